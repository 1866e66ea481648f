"""``--ckpt_path last``: the file that it means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_perl.whole import damage, of_a_run


def newest_checkpoint(trainer: Mapping[str, Any], resumed: bool) -> Path:
    """The newest whole checkpoint of the newest run of this name.

    Args:
        trainer: The trainer's settings: its first logger and its `ModelCheckpoint` say where runs lie.
        resumed: Whether training goes on, for which weights alone are not enough.

    Raises:
        FileNotFoundError: There is none.
    """
    places = list(_places(trainer))
    found = {path for folder, pattern in places for path in folder.glob(pattern)}
    ours = [path for path in found if path.absolute().parents[1].name != "latest"]
    passed_over: list[str] = []
    for path in sorted(ours, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True):
        problem = _unusable(path, resumed)
        if problem is None:
            for other in passed_over:
                rank_zero_warn(f"--ckpt_path last is {path}: {other}.")
            return path
        passed_over.append(problem)
    looked = " or ".join(str(folder / pattern) for folder, pattern in places)
    raise FileNotFoundError(
        f"no checkpoint to go on from in {looked}. Leave --ckpt_path out to begin, or give a file. "
        + "; ".join(passed_over)
    )


def _unusable(path: Path, resumed: bool) -> str | None:
    try:
        whole = "optimizer_states" in read(path)
    except ValueError as error:
        return str(error)
    return None if whole or not resumed else f"{path} holds weights alone (save_weights_only)"


def _places(trainer: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    root = Path(trainer.get("default_root_dir") or ".")
    loggers = trainer.get("logger")
    first = loggers[0] if isinstance(loggers, list) and loggers else loggers
    if isinstance(first, Mapping):
        given = first.get("init_args", {})
        name = given.get("project") or given.get("name") or ""
        version = given.get("version")
        if version is None:
            version = given.get("id") or "*"
        folder = Path(given.get("save_dir") or root, name)
        run = f"version_{version}" if isinstance(version, int) else version
        yield folder, f"{run}/checkpoints/*.ckpt"
    else:
        yield root, "version_*/checkpoints/*.ckpt"
        yield root / "lightning_logs", "version_*/checkpoints/*.ckpt"
    callbacks = trainer.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        folder = callback.get("init_args", {}).get("dirpath")
        if folder:
            yield Path(folder), "*.ckpt"


def read(path: Path) -> dict[str, Any]:
    """A checkpoint without its tensors in memory.

    Raises:
        ValueError: It was cut short or changed, or would run code.
    """
    if problem := damage(path):
        raise ValueError(f"{path} is no whole checkpoint: {problem}")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than weights and settings; it is not loaded"
        ) from error
    return of_a_run(stored, path)
