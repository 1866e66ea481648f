"""Keys and values in one place from the start.

transformers' dynamic cache makes every layer anew, one token longer, for each token that is sampled: a
copy of the whole cache per token, and twice a layer's memory while it is made.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeGuard, cast

from torch import LongTensor, Tensor, nn
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

CACHE_ARGUMENTS = ("cache", "cache_params")
"""Names of the cache in a decoder's forward: since transformers 5.24, and of Mamba's families before."""


class PreallocatedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer's keys and values in two buffers as long as they will ever be.

    Args:
        tokens: How long that is.

    Raises:
        ValueError: More tokens come.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tokens = tokens
        self.length = 0
        self._place: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room, once the shapes are known."""
        super().lazy_initialization(key_states, value_states)
        self._buffers = [self._room(key_states), self._room(value_states)]

    def _room(self, states: Tensor) -> Tensor:
        return states.new_empty(*states.shape[:-2], self.tokens, states.shape[-1])

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens behind the others, or where `hold` said; views of all of them."""
        if self._place is not None:
            for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(-2, self._place, states)
            return self._look()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self.tokens:
            raise ValueError(f"The cache has room for {self.tokens} tokens, got {self.length}.")
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start : self.length, :] = states
        return self._look()

    def hold(self, place: Tensor, shown: int, filler: float = 0.0) -> None:
        """From now on a token is written at ``place``, and the same views are given back every time.

        So a step is the same work on the same memory, wherever ``place`` has come to: it can be recorded.

        Args:
            place: Column of the next token, moved on by whoever steps. Shape: ``(1,)``, int64.
            shown: Columns of the views; those that nothing was written to must be masked.
            filler: What stands in them: a finite number, since weight 0 times NaN is NaN.
        """
        for buffer in self._buffers:
            buffer[..., self.length : shown, :] = filler
        self._place, self.length = place, shown

    def let_go(self, length: int) -> None:
        """Grow again, as `update` does.

        Args:
            length: Tokens that were written.
        """
        self._place, self.length = None, length
        self._look()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, moved together in the same buffers; only where they become more, in larger ones."""
        if not self.is_initialized:
            return
        self._buffers = [self._moved(buffer, indices) for buffer in self._buffers]
        self._look()

    def reset(self) -> None:
        """Nothing held any more; room is made anew."""
        super().reset()
        self._place, self.length = None, 0

    def crop(self, *_: object) -> None:
        """Not offered: sampling never takes a token back."""
        raise NotImplementedError(
            "A preallocated cache only grows. Use transformers' DynamicCache."
        )

    def reorder_cache(self, *_: object) -> None:
        """Not offered."""
        self.crop()

    def batch_repeat_interleave(self, *_: object) -> None:
        """Not offered."""
        self.crop()

    def _moved(self, buffer: Tensor, indices: Tensor) -> Tensor:
        kept = buffer[: len(indices)]
        if len(indices) > len(buffer):
            kept = buffer.new_empty(len(indices), *buffer.shape[1:])
        kept[..., : self.length, :] = buffer[indices, ..., : self.length, :]
        return kept

    def _look(self) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[..., : self.length, :] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values


def preallocate(cache: Cache, tokens: int) -> None:
    """Give every layer that only grows its room at once; other kinds of layers stay as they are.

    Args:
        cache: With nothing in it yet.
        tokens: Of the longest row there will be.
    """
    cache.layers = [
        PreallocatedLayer(tokens) if _only_grows(layer, tokens) else layer for layer in cache.layers
    ]


def keep_rows(cache: Cache, rows: Tensor) -> None:
    """Keep these rows, in this order; one that is named twice is there twice.

    transformers' own ``batch_select_indices`` knows no recurrent or convolutional states.

    Args:
        cache: Of any layers, with something in it.
        rows: Their numbers. Shape: ``(b,)``, int64.
    """
    for layer in cache.layers:
        if isinstance(layer, PreallocatedLayer):
            layer.batch_select_indices(rows)
        else:
            layer.reorder_cache(cast(LongTensor, rows))


def _only_grows(layer: object, tokens: int) -> bool:
    """A window that no row is longer than never slides."""
    if type(layer) is DynamicSlidingWindowLayer:
        return bool(layer.sliding_window >= tokens)
    return type(layer) is DynamicLayer


def all_preallocated(layers: list[Any]) -> TypeGuard[list[PreallocatedLayer]]:
    """Whether there is nothing but keys and values with their room."""
    return all(isinstance(layer, PreallocatedLayer) for layer in layers)


def cache_argument(body: nn.Module) -> str:
    """What a decoder's forward calls its cache; transformers renamed it in 5.24."""
    accepted = inspect.signature(body.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in accepted), "past_key_values")


def only_states(cache: Cache) -> bool:
    """Whether a family keeps recurrent and convolutional states and no keys and values (Mamba)."""
    return not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
