"""What a trunk's passes cost in FLOPs: a closed form over its weights, counted pass by pass.

*Model* FLOPs, as model FLOP utilization (MFU) wants them (PaLM, 2204.02311, App. B): what the passes need,
however it is computed. What activation checkpointing or a chunked LM head computes again is not counted, and
a causal mask does not halve attention. A multiplication and an addition are two FLOPs.

    forward    2 N W + 4 B Q K A
    backward   2 N (W + W_trained) + 8 B Q K A        of passes that are learned from
    LM head    2 C V H, once more for each of its operands (states, weight) that gets a gradient

``N = B Q`` tokens of the pass, ``W`` weights of the linear layers that they go through, low-rank ones of the
adapter in use included, ``W_trained`` those of them that are trained; ``K`` tokens that each may look at, those
in the cache included; ``A`` widths of all heads of all layers; ``C`` positions projected onto the vocabulary.

A frozen trunk's backward thus costs as much as its forward (gradients of its inputs only), a trained one's
twice as much. Padding is run, so it counts. Left out: embeddings, norms, scalar heads, rotary angles; and a
backward is charged for the very first layers too, whose input needs no gradient under adapters.
Experts, convolutions and recurrences are not linear layers, and are missing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_perl.models.adapters import OFF, Adapters


class FlopCount:
    """Counts the model FLOPs of a trunk's passes, each backward together with its forward.

    Args:
        model: The decoder before any adapter.
        adapters: Its adapters, those still to come included.

    Attributes:
        total: Counted so far.
    """

    def __init__(self, model: PreTrainedModel, adapters: Adapters) -> None:
        self.total = 0
        body: nn.Module = model.base_model
        self._layers = [one for one in body.modules() if isinstance(one, nn.Linear | Conv1D)]
        self._weights = sum(_size(layer) for layer in self._layers)
        self._attention_width = _attention_width(model)
        self._adapters = adapters
        self._adapter_weights: dict[str, int] = {OFF: 0}

    def read(self, tokens: int, keys: int, adapter: str) -> None:
        """Count a pass of the decoder's blocks.

        Args:
            tokens: That are read, ``N``.
            keys: Tokens that each may look at, ``K``.
            adapter: Name of the adapter in use, or `OFF`.
        """
        pairs = tokens * keys
        weights = self._weights + self._weights_of(adapter)
        self.total += 2 * tokens * weights + 4 * pairs * self._attention_width
        if torch.is_grad_enabled() and (trained := self._trained(adapter)):
            self.total += 2 * tokens * (weights + trained) + 8 * pairs * self._attention_width

    def project(self, hidden: Tensor, weight: Tensor) -> None:
        """Count a pass of the LM head; not one that backward makes again.

        Args:
            hidden: States. Shape: ``(..., H)``.
            weight: Shape: ``(V, H)``.
        """
        # What torch's own checkpointing asks to find out whether it runs inside a backward.
        if torch._C._current_graph_task_id() != -1:
            return
        gradients = (hidden.requires_grad + weight.requires_grad) * torch.is_grad_enabled()
        self.total += 2 * hidden.numel() * weight.shape[0] * (1 + gradients)

    def step(self, rows: int, keys: int, adapter: str, weight: Tensor) -> None:
        """Count a token more of some rows, read and projected: a step of decoding.

        Args:
            rows: ``B``.
            keys: Tokens that each may look at, ``K``.
            adapter: Name of the adapter in use, or `OFF`.
            weight: Of the LM head. Shape: ``(V, H)``.
        """
        self.read(rows, keys, adapter)
        self.total += 2 * rows * weight.numel()

    def _weights_of(self, adapter: str) -> int:
        # Decoding asks once per token; an adapter keeps its shape.
        if adapter not in self._adapter_weights:
            sizes = (weight.numel() for weight in self._adapters.parameters(adapter))
            self._adapter_weights[adapter] = sum(sizes)
        return self._adapter_weights[adapter]

    def _trained(self, adapter: str) -> int:
        own = sum(_size(layer) for layer in self._layers if layer.weight.requires_grad)
        low_rank = [] if adapter == OFF else self._adapters.parameters(adapter)
        return own + sum(weight.numel() for weight in low_rank if weight.requires_grad)


def _size(layer: nn.Linear | Conv1D) -> int:
    """Weights of a layer; a quantized one packs several into an element."""
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features
    return int(layer.weight.numel())


def _attention_width(model: PreTrainedModel) -> int:
    """``A``: layers x heads x width of a head; 0 where the configuration knows no heads."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return 0
    width: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers: int = config.num_hidden_layers
    return layers * heads * width
