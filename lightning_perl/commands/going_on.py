"""``--ckpt_path``: the file that ``last`` means, and which settings a run may change when it goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from lightning_perl.whole import damage

FIXED = ("class", "layout", "lora", "seed", "samples")
"""What a run may not change on its way: shapes, and what its random numbers depend on."""
SHAPES = ("class", "layout", "lora")
"""What has to agree where a checkpoint is only measured."""


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
    ours = [path for path in found if path.parents[1].name != "latest"]
    passed_over = []
    for path in sorted(ours, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True):
        problem = damage(path)
        if not problem and resumed and "optimizer_states" not in read(path):
            problem = "holds weights alone (save_weights_only)"
        if not problem:
            return path
        passed_over.append(f"{path}: {problem}")
    looked = " or ".join(str(folder / pattern) for folder, pattern in places)
    raise FileNotFoundError(
        f"--ckpt_path last: no checkpoint to go on from in {looked}. Leave --ckpt_path out to "
        "begin, or give a file. " + "; ".join(passed_over)
    )


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
        ValueError: It would run code.
    """
    try:
        stored: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than weights and settings; it is not loaded"
        ) from error
    return stored


def changes(model: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ: key, the checkpoint's value, the one given now. Unknown keys are passed over.

    Args:
        model: ``class_path`` and ``init_args`` of the module.
        stored: Hyper-parameters of the checkpoint.
    """
    before = {"class": stored.get("_class_path"), **stored}
    now = {"class": model.get("class_path"), **model.get("init_args", {})}
    flat_before, flat_now = dict(_flat(before)), dict(_flat(now))
    shared = flat_before.keys() & flat_now.keys()
    pairs = {key: (flat_before[key], flat_now[key]) for key in sorted(shared)}
    if pairs.get("class", (None,))[0] is None:  # not saved from a command line
        pairs.pop("class", None)
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        if isinstance(plain, Mapping):
            yield from _flat(plain, f"{prefix}{key}.")
        else:
            # A reward or another object of a class is compared by its arguments.
            yield (
                f"{prefix}{key}".replace("init_args.", ""),
                list(plain) if isinstance(plain, tuple) else plain,
            )
