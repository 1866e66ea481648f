"""Trunk folders and the ``manifest.json`` in every folder: what its weights are and were trained on."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from lightning_perl.models.heads import ScalarHead
from lightning_perl.models.trunk import Trunk
from lightning_perl.quiet import no_progress_bars
from lightning_perl.whole import MANIFEST_FILE, manifest_of, require_whole


def save_trunk(trunk: Trunk, folder: Path, adapter: str | None, about: dict[str, Any]) -> None:
    """Write a transformers folder with tokenizer and manifest, an adapter merged into the weights.

    Args:
        trunk: The trunk, which is not changed. A quantized one is written dense (see `Adapters.merged`).
        folder: Made if missing.
        adapter: Name of the adapter; None writes the trunk's own weights.
        about: Further entries of the manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = trunk.adapters.merged(adapter)
    _save_model(_plain_model(trunk), folder, weights)
    trunk.tokenizer.save_pretrained(folder)
    dtypes = {str(value.dtype).removeprefix("torch.") for value in weights.values()}
    own = {
        "kind": "trunk",
        "from": trunk.source,
        "dtype": sorted(dtypes),
        "pad_id": trunk.pad_id,
        "stop_ids": list(trunk.stop_ids),
    }
    _write(folder, own | _trained_on(trunk) | about)


def save_classifier(
    trunk: Trunk, classifier: PreTrainedModel, folder: Path, adapter: str | None, head: ScalarHead
) -> None:
    """Write a reward model as a sequence classifier of transformers with one label, an adapter merged into it.

    Such classifiers have no bias: scores are lower by the head's, which ``config.json`` keeps as ``reward_bias``.
    They read the score at the last token that is not padding.

    Args:
        trunk: The trunk, which is not changed.
        classifier: A classifier of its family; it gets the weights.
        folder: Made if missing.
        adapter: Name of the adapter; None takes the trunk's own weights.
        head: The reward head.

    Raises:
        ValueError: The family's classifiers have more than a matrix for a head.
    """
    weights, own = trunk.adapters.merged(adapter), classifier.state_dict()
    added = [key for key in own if key not in weights]
    if len(added) != 1 or own[added[0]].shape != (1, trunk.hidden_size):
        raise ValueError(
            f"{type(classifier).__name__} adds {added or 'nothing'} to the trunk and not one matrix, so a reward "
            "head cannot be written as its head. Export without merge."
        )
    weights[added[0]] = head.weight.detach().unsqueeze(0)
    classifier.load_state_dict({key: weights[key] for key in own})
    classifier.config.reward_bias = float(head.bias)
    with no_progress_bars():
        classifier.save_pretrained(folder)
    tokenizer, padding = copy.deepcopy(trunk.tokenizer), classifier.config.pad_token_id
    if padding is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)


def require_alike(
    folder: Path,
    ours: Tensor,
    stored: Tensor,
    dtype: torch.dtype = torch.float32,
    scale: float | None = None,
) -> float:
    """Returns the largest difference of two results, which rounding in ``dtype`` must explain.

    Args:
        folder: What was written, for the message.
        ours: The trained model's result.
        stored: What the written model gives.
        dtype: Dtype of the products.
        scale: Size of the terms that add up to a result. None: of the results themselves.

    Raises:
        RuntimeError: It is larger: what was written is not what was trained.
    """
    difference = float((ours.double() - stored.double()).abs().max())
    # A merged adapter is added to the weights instead of to the products: rounding differs.
    allowed = 64 * torch.finfo(dtype).eps * max(1.0, scale or float(ours.abs().max()))
    if not difference <= allowed:
        raise RuntimeError(
            f"{folder} was written but gives logits that differ by {difference:.3g} from the trained "
            f"model's (allowed {allowed:.3g})."
        )
    return difference


def write_adapter_manifest(folder: Path, trunk: Trunk, rewarded_by: Sequence[str] = ()) -> None:
    """Write beside an adapter which trunk and which rewards it was trained on."""
    own = {
        "kind": "adapter",
        "trunk": trunk.source,
        "trunk_fingerprint": trunk.fingerprint(),
        "stop_ids": list(trunk.stop_ids),
        "rewarded_by": list(rewarded_by),
    }
    _write(folder, own | _trained_on(trunk))


def require_trunk_of(folder: Path, trunk: Trunk) -> None:
    """Refuse an adapter that its manifest says was trained on other weights, stop tokens or templates."""
    path = folder / MANIFEST_FILE
    if not path.is_file() or trunk.weightless:
        return
    require_whole(folder)
    about = manifest_of(folder)
    if "trunk_fingerprint" in about and about.get("quantization") != trunk.quantization:
        raise ValueError(
            f"{folder} was trained on a trunk with quantization {about.get('quantization')}, {trunk.source} is "
            f"loaded with {trunk.quantization}: other values under the adapter, other scores. Set quantization "
            f"as it was there, or train it again. To use it all the same, take trunk_fingerprint out of {path}."
        )
    expected = {"trunk_fingerprint": trunk.fingerprint(), "stop_ids": list(trunk.stop_ids)}
    for key, value in expected.items():
        if about.get(key, value) != value:
            raise ValueError(
                f"{folder} was trained on another trunk ({about.get('trunk')}): its {key} is "
                f"{about[key]}, that of {trunk.source} is {value}. Give the trunk that it was trained on, or "
                "train it again on this one."
            )
    note_template(folder, trunk)


def note_template(folder: Path, trunk: Trunk) -> None:
    """Note the chat template that a folder's manifest names, if there is one (see `agree_on_template`)."""
    template = manifest_of(folder).get("template")
    if template is not None:
        agree_on_template(trunk, template, str(folder))


def agree_on_template(trunk: Trunk, template: str, named_by: str) -> None:
    """Note the chat template (such as ``plain-1``) that a folder or ``data`` names; refuse a second one."""
    for other, earlier in trunk.templates.items():
        if earlier != template:
            raise ValueError(
                f"{named_by} has the template {template!r}, {other} has {earlier!r}: the model would "
                "read turns written as it never saw them. Set data.chat_template as it was there "
                "(false for plain-1, true for chat-..., with that tokenizer), or train that stage "
                'again with this one. To change templates on purpose, take "template" out of the '
                f"folder's {MANIFEST_FILE}."
            )
    trunk.templates[named_by] = template


def _write(folder: Path, about: dict[str, Any]) -> None:
    (folder / MANIFEST_FILE).write_text(json.dumps(about, indent=2) + "\n")


def _trained_on(trunk: Trunk) -> dict[str, str]:
    """Template and quantization, where there are any."""
    about = {
        "template": next(iter(trunk.templates.values()), None),
        "quantization": trunk.quantization,
    }
    return {key: value for key, value in about.items() if value is not None}


def _save_model(model: PreTrainedModel, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write a model and its generation settings as they were read, which older transformers may find invalid."""
    generation = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        with no_progress_bars():
            model.save_pretrained(folder, state_dict=weights)
    finally:
        model.generation_config = generation
    if generation is not None:
        generation.to_json_file(folder / "generation_config.json")


def _plain_model(trunk: Trunk) -> PreTrainedModel:
    """The model; where it is quantized, a dense one of the same shapes without any weights."""
    if trunk.quantization is None:
        return trunk.model
    config = copy.deepcopy(trunk.model.config)
    del config.quantization_config
    with torch.device("meta"):
        plain: PreTrainedModel = type(trunk.model)(config).to(trunk.dtype)  # type: ignore[arg-type]
    plain.generation_config = trunk.model.generation_config
    return plain
