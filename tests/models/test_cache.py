"""Preallocated keys and values hold what transformers' own cache holds, without its copies."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MistralConfig, PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from lightning_perl.models.lean_layers import PreallocatedLayer, keep_rows, preallocate

HEADS, SIZE, ROOM = 2, 3, 7
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 6, "num_attention_heads": 2}


def preallocated(config: PreTrainedConfig, tokens: int = ROOM) -> DynamicCache:
    cache = DynamicCache(config=config)
    preallocate(cache, tokens)
    return cache


class Both:
    """A preallocated cache and transformers' own, which are given the same keys and values."""

    def __init__(self, layers: int = 2) -> None:
        config = LlamaConfig(**{**SIZES, "num_hidden_layers": layers})
        self.layers = layers
        self.ours, self.theirs = preallocated(config), DynamicCache(config=config)
        self.drawn = torch.Generator().manual_seed(0)

    def update(self, rows: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Pairs of what both return: keys and values of all layers."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for layer in range(self.layers):
            # Values of another size than keys, as some families have them.
            keys = torch.randn(rows, HEADS, tokens, SIZE, generator=self.drawn)
            values = torch.randn(rows, HEADS, tokens, SIZE + 1, generator=self.drawn)
            ours = self.ours.update(keys, values, layer)
            pairs += zip(ours, self.theirs.update(keys, values, layer), strict=True)
        return pairs

    def keep(self, rows: list[int]) -> None:
        keep_rows(self.ours, torch.tensor(rows))
        self.theirs.batch_select_indices(torch.tensor(rows))


def test_it_holds_what_the_dynamic_cache_holds() -> None:
    both, rows = Both(), 5
    for tokens, stay in (
        (3, [0, 1, 2, 3, 4]),
        (1, [0, 2, 3]),
        (1, [2, 2, 0, 1]),
        (1, [1]),
        (1, [0]),
    ):
        assert all(torch.equal(*pair) for pair in both.update(rows, tokens))
        assert both.ours.get_seq_length() == both.theirs.get_seq_length()
        assert both.ours.get_mask_sizes(1, 0) == both.theirs.get_mask_sizes(1, 0)
        both.keep(stay)
        rows = len(stay)
        for layers in zip(both.ours.layers, both.theirs.layers, strict=True):
            ours, theirs = cast(list[Any], layers)
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)


def test_nothing_is_made_anew() -> None:
    both, places = Both(1), set()
    for rows, tokens in ((3, 4), (3, 1), (2, 1)):
        both.keep([1, 2]) if rows == 2 else None
        keys = both.update(rows, tokens)[0][0]
        places.add(keys.untyped_storage().data_ptr())
    assert len(places) == 1
    assert keys.untyped_storage().nbytes() == 3 * HEADS * ROOM * SIZE * 4


def test_more_tokens_than_room_are_refused() -> None:
    layer = PreallocatedLayer(4)
    states = torch.zeros(1, HEADS, 3, SIZE)
    layer.update(states, states)
    with pytest.raises(ValueError, match="room for 4 tokens, got 6"):
        layer.update(states, states)


@pytest.mark.parametrize(
    ("window", "tokens", "kind"),
    [(8, 8, PreallocatedLayer), (8, 9, DynamicSlidingWindowLayer)],
    ids=["never slides", "slides"],
)
def test_sliding_layers_stay_as_they_are(window: int, tokens: int, kind: type) -> None:
    cache = preallocated(MistralConfig(sliding_window=window, **SIZES), tokens)
    assert [type(layer) for layer in cache.layers] == [kind] * 2


def test_a_held_cache_writes_where_it_is_told_and_grows_on_afterwards() -> None:
    both, place = Both(1), torch.zeros(1, dtype=torch.int64)
    both.update(3, 2)
    layer: Any = both.ours.layers[0]
    layer.hold(place, 5, filler=7.0)
    seen = []
    for column in (2, 3):
        place.fill_(column)
        keys, expected = both.update(3, 1)[0]
        assert torch.equal(keys[..., : column + 1, :], expected)
        assert bool((keys[..., column + 1 :, :] == 7).all())
        seen.append(keys)
    # The same memory every time.
    assert [one.data_ptr() for one in seen] == [seen[0].data_ptr()] * 2
    assert [one.shape[-2] for one in seen] == [5, 5]
    layer.let_go(4)
    both.keep([2, 0])
    assert torch.equal(*both.update(2, 1)[0])
