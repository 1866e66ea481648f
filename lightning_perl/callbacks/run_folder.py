"""The folder of a run's files, and handing the result over into it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info

_FOLDERS: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()


def run_folder(trainer: Trainer) -> Path:
    """Returns the folder of this trainer's run; two runs never share one.

    The first logger decides, as it does for Lightning's checkpoints: ``log_dir`` of a `CSVLogger` or
    `TensorBoardLogger`; ``save_dir/name/version`` of any other, which for a `WandbLogger` is its project and run
    id. Without a logger that saves it is the next free ``default_root_dir/version_N``, created here. Rank zero
    chooses and broadcasts at the first call, which has to be made on every rank (in ``setup``, say).
    """
    if trainer not in _FOLDERS:
        folder = _choose(trainer) if trainer.is_global_zero else None
        chosen = trainer.strategy.broadcast(folder)
        if chosen is None:
            raise RuntimeError(
                f"rank zero told rank {trainer.global_rank} no run folder; call run_folder "
                "first in a hook that runs on every rank, such as `setup`"
            )
        _FOLDERS[trainer] = chosen
    return _FOLDERS[trainer]


def _choose(trainer: Trainer) -> Path:
    logger: Logger | None = trainer.loggers[0] if trainer.loggers else None
    if isinstance(logger, CSVLogger | TensorBoardLogger):
        return Path(logger.log_dir)
    if isinstance(logger, WandbLogger):
        _ = logger.experiment  # The id that tells two runs apart exists once the run does.
    elif logger is None or logger.save_dir is None:
        return _next_version(Path(trainer.default_root_dir))
    folder = Path(logger.save_dir or trainer.default_root_dir) / str(logger.name)
    version = logger.version
    if version is None:
        return _next_version(folder)
    return folder / (version if isinstance(version, str) else f"version_{version}")


def _next_version(folder: Path) -> Path:
    """Creates the first ``version_N`` that does not exist; creating it keeps other runs away."""
    number = 0
    while True:
        version = folder / f"version_{number}"
        try:
            version.mkdir(parents=True)
            return version
        except FileExistsError:
            number += 1


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
