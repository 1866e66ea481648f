"""Key-value caches that allocate their memory once; transformers' own is copied whole for each sampled token."""

from __future__ import annotations

import inspect
import math
from typing import Any, TypeGuard, cast

from torch import LongTensor, Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)


class PreallocatedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer's keys and values in two buffers of their final length of ``tokens`` tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tokens = tokens
        self.length = 0
        self._place: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers, once the shapes are known."""
        super().lazy_initialization(key_states, value_states)
        self._buffers = [
            states.new_empty(*states.shape[:-2], self.tokens, states.shape[-1])
            for states in (key_states, value_states)
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens behind the others (or where `hold` said). Returns views of all tokens."""
        if self._place is not None:
            for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(-2, self._place, states)
            return self._views()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self.tokens:
            raise ValueError(f"The cache has room for {self.tokens} tokens, got {self.length}.")
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start : self.length, :] = states
        return self._views()

    def hold(self, place: Tensor, shown: int, filler: float = 0.0) -> None:
        """From now on write each token at ``place`` and return the same views every time.

        Every step then does the same work on the same memory, whatever ``place`` is: it can be recorded.

        Args:
            place: Column of the next token, advanced by the caller. Shape: ``(1,)``, int64.
            shown: Columns of the views. Those not written yet must be masked.
            filler: Their content: a finite number, since weight 0 times NaN is NaN.
        """
        for buffer in self._buffers:
            buffer[..., self.length : shown, :] = filler
        self._place, self.length = place, shown

    def let_go(self, length: int) -> None:
        """Grow again behind the first ``length`` tokens, which were written."""
        self._place, self.length = None, length
        self._views()

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Keep these rows in the same buffers; in larger ones only where there are more of them."""
        self._buffers = [self._moved(buffer, beam_idx) for buffer in self._buffers]
        self._views()

    def _moved(self, buffer: Tensor, indices: Tensor) -> Tensor:
        kept = buffer[: len(indices)]
        if len(indices) > len(buffer):
            kept = buffer.new_empty(len(indices), *buffer.shape[1:])
        kept[..., : self.length, :] = buffer[indices, ..., : self.length, :]
        return kept

    def _views(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[..., : self.length, :] for buffer in self._buffers)
        return self.keys, self.values


def preallocate(cache: Cache, tokens: int) -> None:
    """Let every layer of an empty cache that only grows allocate room for ``tokens`` tokens at once."""
    cache.layers = [
        PreallocatedLayer(tokens) if _only_grows(layer, tokens) else layer for layer in cache.layers
    ]


def keep_rows(cache: Cache, rows: Tensor) -> None:
    """Keep the rows with these numbers, in this order; a row may be named twice. Shape: ``(b,)``, int64.

    transformers' own ``batch_select_indices`` ignores recurrent and convolutional states.
    """
    for layer in cache.layers:
        layer.reorder_cache(cast(LongTensor, rows))


def _only_grows(layer: object, tokens: int) -> bool:
    # A window that no row is longer than never slides.
    if type(layer) is DynamicSlidingWindowLayer:
        return bool(layer.sliding_window >= tokens)
    return type(layer) is DynamicLayer


def all_preallocated(layers: list[Any]) -> TypeGuard[list[PreallocatedLayer]]:
    """Whether a cache has preallocated keys and values only."""
    return all(isinstance(layer, PreallocatedLayer) for layer in layers)


def reach_of_layers(config: PreTrainedConfig) -> float:
    """Tokens that every layer of a decoder sees: its shortest window, or 0 where a layer keeps states.

    Layers without keys and values of their own (`DummyLayer`) read those of others.
    """
    layers = [
        layer
        for layer in DynamicCache(config=config).layers
        if type(layer).__name__ != "DummyLayer"
    ]
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return 0
    return min((getattr(layer, "sliding_window", math.inf) for layer in layers), default=math.inf)


def cache_argument(body: nn.Module) -> str:
    """What a decoder's forward calls its cache: ``cache`` since transformers 5.24, and another name before."""
    accepted, names = inspect.signature(body.forward).parameters, ("cache", "cache_params")
    return next((name for name in names if name in accepted), "past_key_values")


def only_states(cache: Cache) -> bool:
    """Whether a cache has recurrent and convolutional states and no keys and values (Mamba)."""
    return not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
