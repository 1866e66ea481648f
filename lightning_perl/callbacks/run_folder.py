"""The folder of a run's files."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

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
