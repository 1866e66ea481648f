"""Writes a run's result into its folder, for the next stage to load."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lightning_perl.callbacks.run_folder import run_folder


@runtime_checkable
class HandsOver(Protocol):
    """A module that can write what the next stage loads."""

    def hand_over(self, folder: Path) -> None:
        """Write below ``folder``."""


def best_checkpoint(trainer: Trainer) -> str | None:
    """Path of the best checkpoint, if a `ModelCheckpoint` of the trainer watches a measure."""
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.monitor is None:
            continue
        # A resumed run may remember a best file of its first part that was cleared away since.
        if Path(callback.best_model_path).is_file():
            return callback.best_model_path
    return None


class Handover(Callback):
    """At the end of ``fit``, writes the module's result into the run's folder and logs the path.

    Where a `ModelCheckpoint` watches a measure (``monitor``), the best checkpoint is handed over, else
    the last weights.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write on the first process; a dry run (``fast_dev_run``) writes nothing."""
        if not isinstance(pl_module, HandsOver) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = run_folder(trainer)
        best = best_checkpoint(trainer)
        if best is not None:
            stored = torch.load(best, map_location=pl_module.device, weights_only=True)
            pl_module.load_state_dict(stored["state_dict"], strict=False)
            rank_zero_info(f"handing over the best of the run: {best}")
        if trainer.is_global_zero:
            pl_module.hand_over(folder)
        rank_zero_info(f"handed over in {folder}")
