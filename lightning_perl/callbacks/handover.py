"""Stages hand over by folder."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_perl.callbacks.run_folder import run_folder


@runtime_checkable
class HandsOver(Protocol):
    """A module that can write what the next stage loads."""

    def hand_over(self, folder: Path) -> None:
        """Write below ``folder``."""


class Handover(Callback):
    """At the end of ``fit``, writes the module's result into the run's folder and says where.

    `SFT` and `HydraSFT` write ``RUN/trunk/``, `RewardModel` ``RUN/adapters/reward/``, PPO
    ``RUN/adapters/{actor,critic}/``.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write on the first process; a dry run (``fast_dev_run``) leaves nothing behind."""
        if not isinstance(pl_module, HandsOver) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            pl_module.hand_over(folder)
        rank_zero_info(f"handed over in {folder}")
