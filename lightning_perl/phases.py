"""The contract between modules and callbacks: which part of a train batch is running."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

WHOLE_BATCH = "step"
"""The phase that a train batch counts as when its module names none."""


class PhaseCallback(Callback):
    """A callback that is told when a module enters and leaves a named phase.

    On-policy modules name ``rollout``, ``score``, ``actor``, ``critic`` and ``optimizer``. A phase
    may begin several times in one train batch (once per minibatch), and may lie inside another.
    """

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Called before the first statement of a phase."""

    def on_phase_end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Called after the last statement of a phase."""
