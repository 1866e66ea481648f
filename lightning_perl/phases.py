"""The phases of a train batch: what modules say of them, and what callbacks share that measure them."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

WHOLE_BATCH = "step"
"""The phase that a train batch counts as when its module names none."""


def cuda_device(trainer: Trainer) -> torch.device | None:
    """Returns the CUDA device that this process trains on, or None where it trains elsewhere."""
    device = trainer.strategy.root_device
    return device if device.type == "cuda" else None


def ran_out_of_memory(exception: BaseException | None) -> bool:
    """Whether an exception is, or was caused by, an out-of-memory error; a CPU's has no type of its own."""
    while exception is not None:
        if isinstance(exception, torch.OutOfMemoryError) or "can't allocate memory" in str(
            exception
        ):
            return True
        exception = exception.__cause__ or exception.__context__
    return False


def only_sent(outputs: object) -> bool:
    """Whether a train batch only sent prompts to servers, so that what was logged last is of an earlier one."""
    return isinstance(outputs, Mapping) and outputs.get("episodes") == 0


class PhaseCallback(Callback):
    """A callback that is told when a module enters and leaves a named phase.

    On-policy modules name ``rollout`` (with servers ``push`` and ``wait`` inside it), ``score``, ``actor``,
    ``critic`` and ``optimizer``. A phase may begin several times in one train batch (once per minibatch), and may
    lie inside another.
    """

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Called before the first statement of a phase."""

    def on_phase_end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Called after the last statement of a phase."""


class Phased(LightningModule):
    """A module that names its phases."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Tell every `PhaseCallback` of the trainer, if there is one, that a phase begins and ends."""
        callbacks = [] if self._trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
        listeners = [callback for callback in callbacks if isinstance(callback, PhaseCallback)]
        for listener in listeners:
            listener.on_phase_start(self.trainer, self, name)
        try:
            yield
        finally:
            for listener in listeners:
                listener.on_phase_end(self.trainer, self, name)


class PhaseTracker(PhaseCallback):
    """Knows which phases are running, or were when memory ran out; the innermost last."""

    def __init__(self) -> None:
        self.running: list[str] = []

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        """Begin anew."""
        self.running = []

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Remember the phase."""
        self.running.append(phase)

    def on_phase_end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Forget the phase, unless memory ran out in it: phases end before the trainer hears of the error."""
        if self.running and not ran_out_of_memory(sys.exc_info()[1]):
            self.running.pop()


class PhaseMeter(PhaseTracker, ABC):
    """Measures every phase of a train batch, itself the phase ``step`` around the others, and logs the results.

    Results stand in the row of the module's own train keys; with several ranks they are rank zero's.
    ``measured`` is what is known of each phase of the train batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device: torch.device | None = None
        self.measured: defaultdict[str, defaultdict[str, float]]

    @abstractmethod
    def read(self, begins: bool = False) -> None:
        """Charge the running phases with what happened since the last reading; the innermost may just begin."""

    @abstractmethod
    def results(self, outputs: object) -> dict[str, float]:
        """What to log of the train batch, given what ``training_step`` returned."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the device."""
        self.device = cuda_device(trainer)
        self.running = []

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        """Begins the train batch."""
        self.running = []
        self.measured = defaultdict(lambda: defaultdict(float))
        self._enter(WHOLE_BATCH)

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Begins a phase."""
        if self.running:
            self._enter(phase)

    def on_phase_end(self, *_: object) -> None:
        """Ends a phase."""
        if self.running:
            self.read()
            self.running.pop()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, *_: object
    ) -> None:
        """Logs the train batch."""
        self.read()
        self.running = []
        pl_module.log_dict(self.results(outputs), on_step=True, on_epoch=False)

    def _enter(self, phase: str) -> None:
        self.read()
        self.running.append(phase)
        self.read(begins=True)
