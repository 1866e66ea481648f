"""Keys and values in one place from the start.

transformers' dynamic cache makes every layer anew, one token longer, for each token that is sampled: a
copy of the whole cache per token, and twice a layer's memory while it is made.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


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
        """Write the new tokens behind the others; views of all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self.tokens:
            raise ValueError(f"The cache has room for {self.tokens} tokens, got {self.length}.")
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start : self.length, :] = states
        return self._look()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, moved together in the same buffers; called as rows end."""
        if not self.is_initialized:
            return
        self._buffers = [self._moved(buffer, indices) for buffer in self._buffers]
        self._look()

    def reset(self) -> None:
        """Nothing held any more; room is made anew."""
        super().reset()
        self.length = 0

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
        PreallocatedLayer(tokens) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
