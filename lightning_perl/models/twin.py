"""A small decoder of a family's structure, in float32 on the CPU: what a family can do is tried on it."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel

WIDTHS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
"""Ends of the names of MLPs' and experts' widths, which no mask, position or cache depends on."""
SMALL = {
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    # Shared by all layers that a twin may lack.
    "num_kv_shared_layers": 0,
    # GPT-Neo's, which no cache knows: shorter than the rows of a trial, it is felt.
    "window_size": 4,
}


def small_twin(model: PreTrainedModel) -> PreTrainedModel | None:
    """A dense model of the first layers, one of each kind and at least two; None where the family allows none.

    Windows, positions and attention are those of ``model``. Weights are drawn from a fixed seed, as the family
    draws them, but large enough for masks and positions to be felt.
    """
    config = copy.deepcopy(model.config)
    if config._attn_implementation != "sdpa":
        # Every family has it, and it needs no GPU.
        config._attn_implementation = "eager"
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        _shrink(config.get_text_config(decoder=True))
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            torch.manual_seed(0)
            twin: PreTrainedModel = type(model)._from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
            twin.train(False)
            mask = torch.tensor([[0, 1, 1, 1]])
            # Padded, and with a cache of its own: a family that counts its layers twice fails here (Dory's loops).
            logits = twin(input_ids=mask * 0, attention_mask=mask).logits
    # Whatever a family's own code raises.
    except Exception:
        return None
    return twin if bool(logits.isfinite().all()) else None


def _shrink(config: PreTrainedConfig) -> None:
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    kept = min(layers, max([2, *(list(kinds).index(kind) + 1 for kind in kinds)]))
    for key, value in list(vars(config).items()):
        per_layer = isinstance(value, list) and len(value) == layers
        if key.endswith(WIDTHS) and value is not None:
            setattr(config, key, [8] * kept if per_layer else 8)
        elif key in SMALL:
            setattr(config, key, SMALL[key])
        elif per_layer:
            setattr(config, key, value[:kept])
        elif key.endswith("token_id") and value is not None:
            setattr(config, key, 0)
    config.num_hidden_layers = kept
    config.initializer_range = config.hidden_size**-0.5
