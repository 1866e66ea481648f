"""What callbacks share that measure the phases of a train batch."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_perl.phases import WHOLE_BATCH, PhaseCallback


def cuda_device(trainer: Trainer) -> torch.device | None:
    """Returns the CUDA device that this process trains on, or None where it trains elsewhere."""
    device = trainer.strategy.root_device
    return device if device.type == "cuda" else None


class PhaseMeter(PhaseCallback, ABC):
    """Measures every phase of a train batch, itself the phase ``step`` around the others, and logs the results.

    Results stand in the row of the module's own train keys; with several ranks they are rank zero's.
    """

    def __init__(self) -> None:
        self.device: torch.device | None = None
        # The phases that are running, the innermost last.
        self.running: list[str] = []

    @abstractmethod
    def reset(self) -> None:
        """Forget the train batch before."""

    @abstractmethod
    def read(self) -> None:
        """Charge the running phases with what happened since the last reading."""

    @abstractmethod
    def begin(self, phase: str) -> None:
        """Start to measure a phase, after the phases around it were charged."""

    @abstractmethod
    def results(self, outputs: object) -> dict[str, float]:
        """What to log of the train batch, given what ``training_step`` returned."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the device."""
        self.device = cuda_device(trainer)
        self.running = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Begins the train batch."""
        self.running = []
        self.reset()
        self._enter(WHOLE_BATCH)

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Begins a phase."""
        if self.running:
            self._enter(phase)

    def on_phase_end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
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
        self.begin(phase)
