"""Files and folders that appear whole or not at all, and whose damage is found when they are read."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

MANIFEST_FILE = "manifest.json"
NO_RUN = "it is not what a run writes into its checkpoints"


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint file, or None: ``torch.load`` does not look at its checksums."""
    try:
        return _broken_part(checkpoint, checkpoint.stat().st_mtime_ns)
    except (BadZipFile, OSError, EOFError) as error:
        return str(error)


@cache
def _broken_part(checkpoint: Path, _changed_at: int) -> str | None:
    """Read all checksums, once as long as the file stays as it is."""
    with ZipFile(checkpoint) as parts:
        broken = parts.testzip()
        pickled = any(name.endswith("data.pkl") for name in parts.namelist())
    return f"the checksum of {broken} differs" if broken else None if pickled else NO_RUN


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints are written beside their place and renamed, and read without running code in them.

    Lightning writes into the system's temporary folder and copies from there, which a kill can cut short; and it
    unpickles a remote file with the code in it.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        """Write the file; an error names it."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.part")
        try:
            torch.save(checkpoint, beside)
            _reach_disk(beside)
            beside.replace(target)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's own, on a full disk
            beside.unlink(missing_ok=True)
            raise OSError(f"{target} could not be written: {error}") from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read the file.

        Raises:
            ValueError: It was cut short or changed, or is no checkpoint of a run.
        """
        problem = None if "://" in str(path) else damage(Path(path))
        if problem:
            raise ValueError(
                f"{path} is no whole checkpoint ({problem}): cut short or damaged. Give another "
                "file; `--ckpt_path last` takes the newest whole one."
            )
        return of_a_run(super().load_checkpoint(path, map_location, weights_only=True), path)


def of_a_run(stored: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """A checkpoint that was read, if a run has written it.

    Raises:
        ValueError: It holds something else, such as weights alone.
    """
    parts = ("state_dict", "hyper_parameters")
    sound = isinstance(stored, dict) and "pytorch-lightning_version" in stored
    if not sound or not all(isinstance(stored.get(part, {}), dict) for part in parts):
        raise ValueError(f"{path} is no checkpoint: {NO_RUN}. Give a file of RUN/checkpoints.")
    return stored


@contextmanager
def written_whole(folder: Path, about: dict[str, Any]) -> Iterator[Path]:
    """A folder to write into; then each folder in it with a manifest replaces its namesake at once.

    Args:
        folder: Where the folders belong.
        about: Further entries of their manifests.
    """
    beside = folder / ".part"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        _let_others_read(beside)
        for manifest in list(beside.rglob(MANIFEST_FILE)):
            _seal(manifest, about)
            for path in manifest.parent.rglob("*"):
                _reach_disk(path)
            _replace(manifest.parent, folder / manifest.parent.relative_to(beside))
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder}: not written, what was there stays as it was ({error})") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which then takes this name; others may read its files."""
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        _let_others_read(beside)
        beside.rename(folder)
    except OSError as error:
        raise OSError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def require_new(place: Path) -> None:
    """Refuse a place for results that is taken or cannot be written to, before they are computed.

    Raises:
        FileExistsError: Something is there already.
        OSError: No file can be made there.
    """
    if place.exists():
        raise FileExistsError(f"{place} exists already; name another folder or remove it.")
    above = next(folder for folder in place.absolute().parents if folder.exists())
    try:
        TemporaryFile(dir=above).close()
    except OSError as error:
        raise OSError(
            f"{place} cannot be written: {error}. Name a place below another folder."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a folder.

    Raises:
        ValueError: It is missing or damaged, or holds something else.
    """
    with _named(path):
        about = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(about, dict):
            raise TypeError(f"expected an object, got {type(about).__name__}")
    return about


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: It is missing or damaged.
    """
    with _named(path):
        return load_file(path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say which file of a folder cannot be read."""
    try:
        yield
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): missing, cut short or changed. Copy the folder again."
        ) from error


def manifest_of(folder: Path) -> dict[str, Any]:
    """What a folder's manifest says; nothing where it has none."""
    path = folder / MANIFEST_FILE
    return read_json(path) if path.is_file() else {}


def require_whole(folder: Path) -> None:
    """Refuse a folder whose weights or scale are not what `written_whole` wrote; others are taken as they are."""
    manifest, about = folder / MANIFEST_FILE, manifest_of(folder)
    for name, checksum in about.get("checksums", {}).items():
        path = folder / name
        if not path.is_file() or _checksum(path) != checksum:
            raise ValueError(
                f"{path} is missing, cut short or changed: it is not what was handed over. Copy the folder again. "
                f"If it was changed on purpose, take `checksums` out of {manifest}."
            )


def _reach_disk(path: Path) -> None:
    """Wait until a file is stored, so that no power cut leaves the name without the content."""
    if path.is_file():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _let_others_read(folder: Path) -> None:
    """Safetensors writes files that only their owner can read: a server that runs as another user could not."""
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _seal(manifest: Path, about: dict[str, Any]) -> None:
    folder = manifest.parent
    # An adapter's config has its scale, which no tensor has.
    sealed = [*sorted(folder.rglob("*.safetensors")), *folder.glob("adapter_config.json")]
    checksums = {path.relative_to(folder).as_posix(): _checksum(path) for path in sealed}
    whole = json.loads(manifest.read_text()) | about | {"checksums": checksums}
    manifest.write_text(json.dumps(whole, indent=2) + "\n")


def _checksum(path: Path) -> int:
    if path.suffix == ".json":
        # Where the trunk lies may change in an adapter's config, what the adapter computes may not.
        config = read_json(path)
        shape = {key: config.get(key) for key in ("r", "lora_alpha", "use_rslora")}
        return zlib.crc32(json.dumps(shape).encode())
    value = 0
    with path.open("rb") as file:
        while piece := file.read(2**24):
            value = zlib.crc32(piece, value)
    return value


def _replace(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    before = target.with_name(f".{target.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if target.exists():
        target.rename(before)
    source.rename(target)
    shutil.rmtree(before, ignore_errors=True)
