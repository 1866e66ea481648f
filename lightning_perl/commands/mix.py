"""``mix``: one policy of several adapters of a trunk, or one that is closer to the reference."""

from __future__ import annotations

import argparse
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lightning_perl.callbacks.console import show
from lightning_perl.models.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    mixed_spec,
    mixture,
    stored_spec,
)
from lightning_perl.models.heads import has_head
from lightning_perl.packaged import unpackaged
from lightning_perl.whole import (
    MANIFEST_FILE,
    manifest_of,
    read_json,
    require_new,
    require_whole,
    written_whole,
)

OF_THE_TRUNK = ("trunk_fingerprint", "stop_ids", "template", "quantization")
"""Entries of a manifest that must be the same for adapters that are mixed."""


def mix(out: Path, adapters: Mapping[str, float]) -> None:
    """Write the exact weighted sum of adapters of one trunk as a plain PEFT adapter; no trunk is loaded.

    What each adapter adds to the trunk's weights is added, times its weight; the ranks add up. One adapter with a
    weight below 1 lies between the reference (0) and itself, as in WARP's last step (2406.16768); several whose
    weights add up to 1 are averaged, as WARM does with reward models (2401.12187).

    Args:
        out: Folder to write; it must not exist yet.
        adapters: A weight for each adapter folder, such as ``{"RUN/adapters/actor": 0.5}``.
    """
    require_new(out)
    folders = [Path(unpackaged(folder)).expanduser() for folder in adapters]
    weights = [*adapters.values()]
    if not folders or not all(map(math.isfinite, weights)):
        raise ValueError(f"mix needs adapter folders with a finite weight each, got {adapters}.")
    spec = mixed_spec([stored_spec(folder) for folder in folders])
    about = _of_one_trunk(folders)
    config = read_json(folders[0] / CONFIG_FILE)
    # What `stored_spec` reads; the rest it refuses, or it is not about what an adapter computes.
    config |= {"r": spec.rank, "lora_alpha": spec.alpha, "target_modules": list(spec.targets)}
    config |= {"use_rslora": spec.rslora, "lora_dropout": spec.dropout}
    config |= dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules"))
    tensors = mixture(folders, weights)
    with written_whole(out.parent, {}) as beside:
        folder = beside / out.name
        folder.mkdir()
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        manifest = {"kind": "adapter", **about, "mixture": dict(adapters)}
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")


def _of_one_trunk(folders: Sequence[Path]) -> dict[str, Any]:
    """What the manifests have in common; adapters of different trunks and reward adapters are refused."""
    for folder in folders:
        require_whole(folder)
        if has_head(folder, "reward"):
            raise ValueError(
                f"{folder} is a reward adapter. With their heads they are averaged by reward_ensemble: "
                "weight_average."
            )
    manifests = [manifest_of(folder) for folder in folders]
    configs = [read_json(folder / CONFIG_FILE) for folder in folders]
    # Adapters of other libraries have no manifest: the name of their base must do.
    keys = OF_THE_TRUNK if all(manifests) else ("base_model_name_or_path",)
    trunks = [
        {key: about.get(key) for key in keys}
        for about in (manifests if all(manifests) else configs)
    ]
    for folder, trunk in zip(folders, trunks, strict=True):
        for key, value in trunk.items():
            if value != trunks[0][key]:
                raise ValueError(
                    f"{folder} and {folders[0]} are not of one trunk: their {key} is {value} and "
                    f"{trunks[0][key]}. Only adapters of one trunk can be mixed."
                )
    if not all(manifests):
        return {}
    common = {key: value for key, value in trunks[0].items() if value is not None}
    if all("rewarded_by" in about for about in manifests):
        common["rewarded_by"] = sorted({name for m in manifests for name in m["rewarded_by"]})
    return {"trunk": manifests[0].get("trunk"), **common}


def run(args: Sequence[str], program: str) -> None:
    """The command line of `mix`."""
    parser = argparse.ArgumentParser(
        program, description=str(inspect.getdoc(mix)).partition("Args:")[0]
    )
    parser.add_argument("out", type=Path, help="Folder to write; it must not exist yet.")
    parser.add_argument(
        "--adapter",
        action="append",
        required=True,
        type=_weighted,
        metavar="FOLDER=WEIGHT",
        help="An adapter and its weight, such as RUN/adapters/actor=0.5. Give it once for each adapter.",
    )
    given = parser.parse_args(args)
    adapters = dict(given.adapter)
    if len(adapters) < len(given.adapter):
        parser.error("--adapter: a folder is named twice; add its weights up.")
    mix(given.out, adapters)
    show(
        f"wrote {given.out}: {' + '.join(f'{weight:g} x {name}' for name, weight in adapters.items())}"
    )


def _weighted(text: str) -> tuple[str, float]:
    folder, _, weight = text.rpartition("=")
    try:
        return folder, float(weight)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be FOLDER=WEIGHT, got {text!r}") from error
