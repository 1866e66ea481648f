"""How long each phase of a train batch takes, and what that makes per token and per episode."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_perl.callbacks.phases import WHOLE_BATCH, PhaseCallback, cuda_device

# What each count of tokens in `training_step`'s result was spent on.
_PHASES = {
    "rollout": ("rollout",),
    "score": ("score",),
    "update": ("actor", "critic", "optimizer"),
}


class SpeedMonitor(PhaseCallback):
    """Logs how fast each phase runs, once per train batch.

    Keys:

    - ``speed/{phase}_seconds``: wall time of the phase, all its runs in the train batch together;
      lower is better. Time inside a nested phase counts for the nested one alone. A train batch
      whose module names no phase is one phase, ``step``.
    - ``speed/{rollout,score,update}_tokens_per_second``: the module's own count over the seconds of
      that phase, for ``update`` over ``actor``, ``critic`` and ``optimizer`` together; higher is
      better.
    - ``speed/seconds_per_episode``: wall time of the whole train batch over its episodes; lower is
      better. Other callbacks' work at the train batch's start and end is inside it as far as they
      stand before this one at its end and after it at its start.

    The last two need a ``training_step`` that returns ``{"episodes": int, "tokens": {"rollout":
    int, "score": int, "update": int}}``, as on-policy modules do. On CUDA the device is
    synchronized at every phase's start and end, so that a phase's kernels are timed in it. Numbers
    are this process's: with several ranks, rank zero's in the log. They go through
    ``pl_module.log_dict`` into the same row and on the same step axis as the module's own train
    keys.
    """

    def __init__(self) -> None:
        self._device: torch.device | None = None
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._started = 0.0
        self._marked = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the device whose clock counts."""
        self._device = cuda_device(trainer)
        self._open = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Starts the clock."""
        self._open = []
        self._mark()
        self._started = self._marked
        self._open = [WHOLE_BATCH]
        self._seconds = {WHOLE_BATCH: 0.0}

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Charges the time so far to what ran, and this phase from here."""
        if self._open:
            self._mark()
            self._open.append(phase)
            self._seconds.setdefault(phase, 0.0)

    def on_phase_end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Charges the time to this phase, and to what lies around it from here."""
        if self._open:
            self._mark()
            self._open.pop()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Logs the train batch."""
        self._mark()
        self._open = []
        if len(self._seconds) > 1:
            self._seconds.pop(WHOLE_BATCH)
        metrics = {f"speed/{phase}_seconds": value for phase, value in self._seconds.items()}
        if isinstance(outputs, Mapping):
            metrics |= self._rates(outputs)
        pl_module.log_dict(metrics, on_step=True, on_epoch=False)

    def _rates(self, outputs: Mapping[str, Any]) -> dict[str, float]:
        rates = {}
        for name, tokens in outputs.get("tokens", {}).items():
            seconds = sum(self._seconds.get(phase, 0.0) for phase in _PHASES.get(name, ()))
            if seconds > 0:
                rates[f"speed/{name}_tokens_per_second"] = float(tokens) / seconds
        if episodes := outputs.get("episodes"):
            rates["speed/seconds_per_episode"] = (self._marked - self._started) / float(episodes)
        return rates

    def _mark(self) -> None:
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        now = perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now - self._marked
        self._marked = now
