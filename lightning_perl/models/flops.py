"""Model FLOPs of a trunk's passes (PaLM, 2204.02311, App. B), each backward counted with its forward.

Recomputation is not counted, and a causal mask does not halve attention.

    forward    2 N W + 4 N K A                         backward   2 N (W + W_trained) + 8 N K A
    LM head    2 C V H, once more for each of its operands (states, weight) that gets a gradient

``N`` tokens read, padding included; ``W`` weights of the linear layers, the adapter's included; ``K`` tokens that
each attends to; ``A`` widths of all heads of all layers; ``C`` positions projected. Embeddings, norms, scalar
heads, experts, convolutions and recurrences are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_perl.models.adapters import OFF, Adapters


class FlopCount:
    """Counts the model FLOPs of the passes of ``model`` and of its adapters, also later ones, in ``total``."""

    def __init__(self, model: PreTrainedModel, adapters: Adapters) -> None:
        self.total = 0
        self._linear = [m for m in model.base_model.modules() if isinstance(m, nn.Linear | Conv1D)]
        # A quantized layer packs several weights into an element: its sizes say how many there are.
        self._weights = sum(
            m.in_features * m.out_features if isinstance(m, nn.Linear) else m.weight.numel()
            for m in self._linear
        )
        config = model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_attention_heads", None)
        heads = heads if isinstance(heads, int) else 0
        width = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
        self._attention = config.num_hidden_layers * heads * width
        self._adapters = adapters
        self._adapter_weights = {OFF: 0}

    def read(self, tokens: int, keys: int, adapter: str, backward: bool) -> None:
        """Count a pass of ``tokens`` tokens through the blocks, each attending to ``keys``."""
        if adapter not in self._adapter_weights:
            self._adapter_weights[adapter] = sum(
                w.numel() for w in self._adapters.parameters(adapter)
            )
        low_rank = self._adapter_weights[adapter]
        weights, attention = self._weights + low_rank, tokens * keys * self._attention
        self.total += 2 * tokens * weights + 4 * attention
        if backward:
            trained = self._weights if self._linear[0].weight.requires_grad else low_rank
            self.total += 2 * tokens * (weights + trained) + 8 * attention

    def project(self, positions: int, states: Tensor, weight: Tensor) -> None:
        """Count ``positions`` states through an LM head whose weight has the shape ``(V, H)``."""
        gradients = (states.requires_grad + weight.requires_grad) * torch.is_grad_enabled()
        self.total += 2 * positions * weight.numel() * (1 + gradients)
