"""How long each phase of a train batch takes, what that makes per token and per episode, and of the peak."""

from __future__ import annotations

import math
from collections.abc import Mapping
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_perl.phases import WHOLE_BATCH, PhaseCallback, cuda_device

# What each count of tokens in `training_step`'s result was spent on.
_PHASES = {
    "rollout": ("rollout",),
    "score": ("score",),
    "update": ("actor", "critic", "optimizer"),
    WHOLE_BATCH: (WHOLE_BATCH,),
}
_PRODUCTS = 4
TERA = 1e12


@runtime_checkable
class CountsFlops(Protocol):
    """A module that knows what its matrix products cost."""

    @property
    def flops(self) -> int:
        """Model FLOPs so far, recomputation not among them; each backward counted with its forward."""

    @property
    def product_dtype(self) -> torch.dtype:
        """What the products are in."""


def matmul_tflops(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Measures how fast this machine multiplies square matrices, in TFLOP per second.

    The best of several products, under the process's own threads and precision flags. Sizes are doubled as
    far as time allows, up to 2048 (8192 on CUDA). Nothing is drawn from torch's own generators.

    Args:
        device: Where.
        dtype: Of the matrices.
        seconds: What it may take. A larger size is left out where it would take longer.
    """
    largest = 8192 if device.type == "cuda" else 2048
    size, best = 256, 0.0
    # The first product of a process loads libraries.
    _seconds_of_product(_matrix(size, device, dtype), _matrix(size, device, dtype))
    ends = perf_counter() + seconds
    while True:
        left, right = _matrix(size, device, dtype), _matrix(size, device, dtype)
        # The first product of a size warms up.
        took = min(_seconds_of_product(left, right) for _ in range(_PRODUCTS))
        best = max(best, 2 * size**3 / took / TERA)
        # Twice the size takes eight times as long.
        if size == largest or perf_counter() + 8 * _PRODUCTS * took > ends:
            break
        size *= 2
    if device.type == "cuda":
        del left, right
        torch.cuda.empty_cache()
    return best


def _matrix(size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(size)
    return torch.randn(size, size, generator=generator, device=device, dtype=dtype)


def _seconds_of_product(left: torch.Tensor, right: torch.Tensor) -> float:
    _wait(left.device)
    started = perf_counter()
    torch.mm(left, right)
    _wait(left.device)
    return perf_counter() - started


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


class SpeedMonitor(PhaseCallback):
    """Logs how fast each phase runs, once per train batch.

    Keys:

    - ``speed/{phase}_seconds``: wall time of the phase, all its runs in the train batch together;
      lower is better. Time inside a nested phase counts for the nested one alone. A train batch
      whose module names no phase is one phase, ``step``.
    - ``speed/{rollout,score,update}_tokens_per_second``: the module's own count over the seconds of
      that phase, for ``update`` over ``actor``, ``critic`` and ``optimizer`` together; higher is
      better. For a module without phases ``speed/step_tokens_per_second``.
    - ``speed/seconds_per_episode``: wall time of the whole train batch over its episodes; lower is
      better. Other callbacks' work at the train batch's start and end is inside it as far as they
      stand before this one at its end and after it at its start.

    - ``speed/tflops``: model FLOPs of the train batch, in 10^12, over its wall time; higher is better.
      ``speed/{phase}_tflops``: a phase's own.
    - ``speed/mfu``: ``speed/tflops`` over the measured peak of this machine, from 0 to 1; higher is
      better. Padding is run, so it counts as work here, not in tokens per second. What activation
      checkpointing computes again does not count.

    Tokens and episodes need a ``training_step`` that returns ``{"episodes": int, "tokens": {"rollout":
    int, "score": int, "update": int}}``, as on-policy modules do, or ``{"loss": ..., "tokens": {"step":
    int}}``. FLOPs need a module that counts them, `CountsFlops`, as all of this library do. On CUDA the device is
    synchronized at every phase's start and end, so that a phase's kernels are timed in it. Numbers
    are this process's: with several ranks, rank zero's in the log. They go through
    ``pl_module.log_dict`` into the same row and on the same step axis as the module's own train
    keys.

    Args:
        peak_tflops: What ``speed/mfu`` is a fraction of. None measures it when the fit starts, in about a
            second: square matrix products in the trunk's dtype (see `matmul_tflops`).
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and not 0 < peak_tflops < math.inf:
            raise ValueError(
                f"SpeedMonitor(peak_tflops={peak_tflops}): give a number above 0, in 10^12 FLOP per "
                "second, or None to measure it"
            )
        self.peak_tflops = peak_tflops
        self._peak = peak_tflops
        self._device: torch.device | None = None
        self._counts: CountsFlops | None = None
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._flops: dict[str, int] = {}
        self._started = 0.0
        self._marked = 0.0
        self._counted = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the device whose clock counts, and how fast it could be."""
        self._device = cuda_device(trainer)
        self._counts = pl_module if isinstance(pl_module, CountsFlops) else None
        self._open = []
        if self._counts is None or self.peak_tflops is not None:
            return
        device, dtype = trainer.strategy.root_device, self._counts.product_dtype
        self._peak = matmul_tflops(device, dtype)
        name = str(dtype).removeprefix("torch.")
        rank_zero_info(f"speed: {device} multiplies matrices at {self._peak:.3g} TFLOP/s ({name})")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Starts the clock."""
        self._open = []
        self._mark()
        self._started = self._marked
        self._open = [WHOLE_BATCH]
        self._seconds = {WHOLE_BATCH: 0.0}
        self._flops = {WHOLE_BATCH: 0}

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Charges the time so far to what ran, and this phase from here."""
        if self._open:
            self._mark()
            self._open.append(phase)
            self._seconds.setdefault(phase, 0.0)
            self._flops.setdefault(phase, 0)

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
        work = self._work()
        if len(self._seconds) > 1:
            self._seconds.pop(WHOLE_BATCH)
        metrics = {f"speed/{phase}_seconds": value for phase, value in self._seconds.items()}
        if isinstance(outputs, Mapping):
            metrics |= self._rates(outputs)
        pl_module.log_dict(metrics | work, on_step=True, on_epoch=False)

    def _work(self) -> dict[str, float]:
        """TFLOP per second of the phases that are not nothing, and of the whole train batch."""
        seconds, flops = self._marked - self._started, sum(self._flops.values())
        if self._counts is None or not flops or seconds <= 0:
            return {}
        rates = {
            f"speed/{phase}_tflops": count / self._seconds[phase] / TERA
            for phase, count in self._flops.items()
            if count and self._seconds[phase] > 0 and phase != WHOLE_BATCH
        }
        rates["speed/tflops"] = flops / seconds / TERA
        if self._peak is not None:
            rates["speed/mfu"] = rates["speed/tflops"] / self._peak
        return rates

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
        _wait(self._device)
        now, counted = perf_counter(), 0 if self._counts is None else self._counts.flops
        if self._open:
            self._seconds[self._open[-1]] += now - self._marked
            self._flops[self._open[-1]] += counted - self._counted
        self._marked, self._counted = now, counted
