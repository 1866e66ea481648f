"""The folder of a run's files, which no two runs share."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import TextIO
from weakref import WeakKeyDictionary, finalize

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # Windows
    flock = None  # type: ignore[assignment]

_COUNTING = CSVLogger | TensorBoardLogger
"""Loggers that number their runs."""
_FOLDERS: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()
# Folders that a trainer made, so that no other run lies in them.
_MADE: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()


def run_folder(trainer: Trainer) -> Path:
    """Returns the folder of this trainer's run; two runs never share one.

    The first logger decides, as it does for Lightning's checkpoints: ``log_dir`` of a `CSVLogger` or
    `TensorBoardLogger`; ``save_dir/name/version`` of any other, which for a `WandbLogger` is its project and run
    id. Without a logger that saves it is the next free ``default_root_dir/version_N``, created here; for a dry run
    (``fast_dev_run``) a temporary one. Rank zero chooses and broadcasts at the first call, which has to be made on
    every rank (in ``setup``, say).
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
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        kept_meanwhile = mkdtemp()
        finalize(trainer, shutil.rmtree, kept_meanwhile, ignore_errors=True)
        return Path(kept_meanwhile)
    logger = trainer.logger
    if isinstance(logger, _COUNTING):
        claim(trainer)
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


def claim(trainer: Trainer) -> None:
    """Make the folder of a logger that counts its runs, before the logger does.

    Loggers take the next number without making its folder, so that runs which start together share one; and a
    `CSVLogger` that goes on in a folder deletes the metrics there.
    """
    logger = trainer.logger
    if not isinstance(logger, _COUNTING) or not trainer.is_global_zero:
        return
    if trainer in _MADE or logger._experiment is not None:
        return
    counts = logger._version is None
    while True:
        folder = Path(logger.log_dir)
        try:
            folder.mkdir(parents=True)
            _MADE[trainer] = folder
            return
        except FileExistsError:
            if not counts:
                break
            logger._version = None
    if isinstance(logger, CSVLogger):
        _append_to(folder / "metrics.csv", logger)


def _append_to(metrics: Path, logger: CSVLogger) -> None:
    if not metrics.is_file():
        return
    kept = metrics.rename(metrics.with_name(".metrics.kept"))
    writer = logger.experiment
    kept.rename(metrics)
    with metrics.open(encoding="utf-8", newline="") as file:
        writer.metrics_keys = next(csv.reader(file), [])


def forget_rows(trainer: Trainer, step: int) -> None:
    """Take the rows from a step on out of a ``metrics.csv`` that is gone on with: they will be logged again."""
    for logger in trainer.loggers:
        metrics = Path(logger.log_dir or "", "metrics.csv")
        if not isinstance(logger, CSVLogger) or not metrics.is_file():
            continue
        with metrics.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            kept = [row for row in reader if float(row["step"] or 0) < step]
        beside = metrics.with_name(".metrics.kept")
        with beside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, reader.fieldnames or ())
            writer.writeheader()
            writer.writerows(kept)
        beside.replace(metrics)


def holds_another_run(trainer: Trainer) -> bool:
    """Whether the run's folder was there before, with something in it."""
    folder = run_folder(trainer)
    before = isinstance(trainer.logger, _COUNTING) and trainer not in _MADE
    return before and any((folder / name).exists() for name in ("checkpoints", "adapters", "trunk"))


def locked(folder: Path) -> TextIO | None:
    """Keep other processes from running in a folder until the result is closed or this process ends.

    Returns:
        None where the system has no such locks.

    Raises:
        FileExistsError: Another process runs in it.
    """
    if flock is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("w", encoding="utf-8")
    try:
        flock(lock, LOCK_EX | LOCK_NB)
    except BlockingIOError as error:
        raise FileExistsError(
            f"{folder}: another process runs in it. Wait for its end, or give trainer.logger another version."
        ) from error
    except OSError:  # a file system without locks
        return None
    return lock


def give_back(trainer: Trainer) -> None:
    """Remove the folder of a run that never began, so that it takes no number."""
    folder = _MADE.pop(trainer, None)
    if folder is None:
        return
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            # It would write its last lines into the folder.
            logger._experiment = None
    shutil.rmtree(folder, ignore_errors=True)


def link_latest(folder: Path) -> None:
    """Let ``latest`` beside a run's folder lead to it; where links cannot be made there is none."""
    beside = folder.with_name(f".latest.{folder.name}")
    try:
        beside.unlink(missing_ok=True)
        beside.symlink_to(folder.name, target_is_directory=True)
        beside.replace(folder.with_name("latest"))
    except OSError:
        beside.unlink(missing_ok=True)
