"""What a run has left: its adapter or trunk and the trunk beneath, its checkpoints, and what it logged."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_perl.models.adapters import CONFIG_FILE, OFF, LoraSpec, trunk_of
from lightning_perl.models.heads import ScalarHead, has_head, save_heads
from lightning_perl.models.loading import TrunkDtype, load_trunk
from lightning_perl.models.manifest import (
    agree_on_template,
    require_trunk_of,
    write_adapter_manifest,
)
from lightning_perl.models.trunk import Trunk
from lightning_perl.packaged import unpackaged
from lightning_perl.whole import damage, manifest_of, of_a_run

Series = Mapping[str, Sequence[tuple[float, float]]]
"""Values of a measure with their steps."""
Part = Literal["policy", "reward"]
NAME = "trained"
"""The adapter's name on a trunk that :func:`load` has loaded."""
# Below a run's folder, the first that exists. An SFT's adapter is in its trunk when the run ends.
PLACES: dict[Part, tuple[str, ...]] = {
    "policy": ("adapters/actor", "policy", "trunk"),
    "reward": ("adapters/reward", "trunk"),
}
ADAPTERS: dict[Part, tuple[str, ...]] = {"policy": ("actor", "sft"), "reward": ("reward",)}


@dataclass(frozen=True)
class Trained:
    """What a run handed over.

    Attributes:
        folder: An adapter's folder, or that of a whole trunk.
        trunk: Folder or hub name of the trunk that the adapter was trained on, or the trunk's own folder.
    """

    folder: Path
    trunk: str

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter, and not a whole trunk."""
        return (self.folder / CONFIG_FILE).is_file()

    @property
    def run(self) -> Path:
        """The run's folder, where it was handed over in one; else its own."""
        if self.folder.parent.name == "adapters":
            return self.folder.parent.parent
        return self.folder.parent if self.folder.name in ("policy", "trunk") else self.folder


def trained(run: Path, part: Part, trunk: str | None = None) -> Trained:
    """Find what a run's folder, an adapter's or a trunk's holds.

    Args:
        run: One of these folders; of a folder of runs the latest one is meant.
        part: What to look for in a run's folder.
        trunk: The trunk, where it no longer lies where it was. None: as the adapter says.

    Raises:
        FileNotFoundError: There is nothing of this kind.
        ValueError: A reward model is there in place of a policy, or an adapter that names no trunk.
    """
    run = Path(unpackaged(str(run))).expanduser()
    if (run / "latest").is_dir():
        run = run / "latest"
    places = [run, *(run / place for place in PLACES[part])]
    kinds = (CONFIG_FILE, "config.json")
    found = next((p for p in places if any((p / kind).is_file() for kind in kinds)), None)
    if found is None:
        raise FileNotFoundError(_nothing_in(run, part))
    if not (found / CONFIG_FILE).is_file():
        return Trained(found, str(found.resolve()))
    if part == "policy" and has_head(found, "reward"):
        raise ValueError(f"{found} is a reward model, which answers nothing.")
    base = trunk or trunk_of(found)
    if not base:
        raise ValueError(
            f"{found} does not name the trunk that it was trained on. Give it as --trunk."
        )
    return Trained(found, unpackaged(trunk) if trunk else _lies_at(base, found))


def _lies_at(trunk: str, trained_on_it: Path) -> str:
    """The folder of a trunk, named from here or from a folder above what was trained on it; or a hub name.

    Raises:
        FileNotFoundError: It is neither.
    """
    named = Path(unpackaged(trunk)).expanduser()
    for place in (Path(), *trained_on_it.resolve().parents):
        if (place / named / "config.json").is_file():
            return str((place / named).resolve())
    if named.is_absolute() or trunk.startswith(".") or trunk.count("/") > 1:
        raise FileNotFoundError(
            f"{trained_on_it} was trained on the trunk {trunk}, which is not there (looked from {Path.cwd()}, and "
            "from the folders above what was trained). Give it as --trunk."
        )
    return trunk


def _nothing_in(run: Path, part: Part) -> str:
    if not run.exists():
        return f"There is no {run} (looked from {Path.cwd()}). Give a run's folder, such as runs/NAME/latest."
    checkpoints = sorted(
        (run / "checkpoints").glob("*.ckpt"), key=lambda file: file.stat().st_mtime
    )
    if checkpoints:
        return (
            f"{run} has handed over no {part}; it may not have ended. Its newest checkpoint can be exported: "
            f"{checkpoints[-1]}."
        )
    return (
        f"{run} holds no {part}: none of {', '.join(PLACES[part])}. Give a run's folder, the folder of an adapter "
        "or a trunk, or a checkpoint."
    )


def load(found: Trained, dtype: TrunkDtype = "float32") -> tuple[Trunk, str]:
    """Load the trunk, quantized as it was in training, and the adapter.

    Returns:
        The trunk, and the name of the adapter on it; `OFF` where the trunk itself was trained.
    """
    about = manifest_of(found.folder) if found.is_adapter else {}
    trunk = load_trunk(found.trunk, dtype, quantization=about.get("quantization"))
    if not found.is_adapter:
        return trunk, OFF
    require_trunk_of(found.folder, trunk)
    trunk.adapters.load(NAME, found.folder, trainable=False)
    return trunk, NAME


def template_of(found: Trained) -> str | None:
    """Name of the chat template that it was trained with; None where nobody noted it."""
    template: str | None = manifest_of(found.folder).get("template")
    return template


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


def unpack(checkpoint: Path, part: Part, folder: Path, trunk: str | None = None) -> Path:
    """Write the adapter in a checkpoint as a PEFT folder, with its reward head if it has one.

    Args:
        checkpoint: A checkpoint of any module that trains an adapter.
        part: Which adapter.
        folder: Where to write.
        trunk: The trunk, where it no longer lies where it was.

    Returns:
        The folder.

    Raises:
        ValueError: It holds no such adapter, or was trained on another trunk.
    """
    stored = read(checkpoint)
    given, state = stored.get("hyper_parameters", {}), stored["state_dict"]
    ends = {name: f".lora_A.{name}.weight" for name in ADAPTERS[part]}
    name = next(
        (name for name, end in ends.items() if any(key.endswith(end) for key in state)), None
    )
    if name is None or not {"trunk", "lora"} <= given.keys():
        raise ValueError(
            f"{checkpoint} holds no {part} adapter. Where a whole trunk is trained, give the folder that the run "
            "handed over (RUN/trunk or RUN/policy)."
        )
    where = unpackaged(trunk) if trunk else _lies_at(given["trunk"], checkpoint)
    found = load_trunk(where, quantization=given.get("quantization"))
    known = stored.get("trained_on", {}).values()
    if known and found.fingerprint() not in known:
        raise ValueError(
            f"{checkpoint} was trained on another trunk than {where} (other fingerprint). Give the one that it "
            "was trained on as --trunk."
        )
    spec = given["lora"]
    found.adapters.add(name, spec if isinstance(spec, LoraSpec) else LoraSpec(**spec), 0)
    _fill(found, name, state, str(checkpoint))
    if stored.get("template") is not None:
        agree_on_template(found, stored["template"], str(checkpoint))
    found.adapters.save(name, folder, found.source)
    write_adapter_manifest(folder, found, stored.get("on_policy", {}).get("rewarded_by", ()))
    if part == "reward":
        head = ScalarHead(found.hidden_size)
        head.load_state_dict({key: state[f"reward_head.{key}"] for key in head.state_dict()})
        save_heads(folder, {"reward": head})
    return folder


@torch.no_grad()
def _fill(trunk: Trunk, name: str, state: dict[str, Any], source: str) -> None:
    """Give an adapter the values that a checkpoint has for it."""
    # A checkpoint's names are a module's: roles.trunks.0.model.LAYER.lora_A.NAME.weight.
    for key, weight in trunk.adapters.tensors(name).items():
        layer, _, which = key.removesuffix(".weight").rpartition(".")
        end = f"model.{layer}.{which}.{name}.weight"
        value = next((v for k, v in state.items() if k == end or k.endswith(f".{end}")), None)
        if value is None or value.shape != weight.shape:
            raise ValueError(
                f"{source} was trained on another trunk than {trunk.source}: it has no weights for {layer}."
            )
        weight.copy_(value)


def settings_of(run: Path) -> dict[str, str]:
    """The sections of a run's ``config.yaml`` (model, data, trainer) as text; nothing where there is none."""
    path = run / "config.yaml"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    sections = re.split(r"^(?=\w+:)", text, flags=re.MULTILINE)
    return {section.partition(":")[0]: section.rstrip() for section in sections if section}


def series_of(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Every measure of a ``metrics.csv`` with its steps; nothing where there is no such file."""
    if not path.is_file():
        return {}
    found: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file, restkey=""))
    for row in rows:
        try:
            numbers = {key: float(value) for key, value in row.items() if key and value}
        except ValueError as error:
            raise ValueError(f"{path} is no table of numbers ({error}). Copy it again.") from error
        for key, value in numbers.items():
            if key not in ("step", "epoch"):
                found.setdefault(key, []).append((numbers.get("step", 0.0), value))
    return found


def held_out(series: Series) -> dict[str, float]:
    """The last value of every ``val/`` and ``test/`` measure."""
    return {k: values[-1][1] for k, values in series.items() if k.startswith(("val/", "test/"))}
