"""Keys and values in one place: what transformers' own cache holds, without its copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from lightning_perl.models.cache import PreallocatedLayer, preallocate

HEADS, SIZE, ROOM = 2, 3, 7


def config() -> LlamaConfig:
    return LlamaConfig(num_hidden_layers=2, hidden_size=6, num_attention_heads=2)


def held(cache: DynamicCache, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer."""
    one: Any = cache.layers[layer]
    return one.keys, one.values


def test_it_holds_what_the_dynamic_cache_holds() -> None:
    ours, theirs = DynamicCache(config=config()), DynamicCache(config=config())
    preallocate(ours, ROOM)
    drawn = torch.Generator().manual_seed(0)
    rows = 5
    for tokens, stay in ((3, None), (1, [0, 2, 3]), (1, [2]), (2, None)):
        for layer in range(2):
            # Values of another size than keys, as some families have them.
            keys = torch.randn(rows, HEADS, tokens, SIZE, generator=drawn)
            values = torch.randn(rows, HEADS, tokens, SIZE + 1, generator=drawn)
            for found, expected in zip(
                ours.update(keys, values, layer), theirs.update(keys, values, layer), strict=True
            ):
                assert torch.equal(found, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1, 0) == theirs.get_mask_sizes(1, 0)
        if stay is not None:
            ours.batch_select_indices(torch.tensor(stay))
            theirs.batch_select_indices(torch.tensor(stay))
            rows = len(stay)
            for layer in range(2):
                for found, expected in zip(held(ours, layer), held(theirs, layer), strict=True):
                    assert torch.equal(found, expected)


def test_nothing_is_made_anew() -> None:
    cache = DynamicCache(config=config())
    preallocate(cache, ROOM)
    places = set()
    for tokens in (4, 1, 1):
        states = torch.ones(3, HEADS, tokens, SIZE)
        keys, _ = cache.update(states, states, 0)
        places.add(keys.untyped_storage().data_ptr())
    cache.batch_select_indices(torch.tensor([1, 2]))
    states = torch.ones(2, HEADS, 1, SIZE)
    keys, _ = cache.update(states, states, 0)
    places.add(keys.untyped_storage().data_ptr())
    assert len(places) == 1
    assert keys.untyped_storage().nbytes() == 3 * HEADS * ROOM * SIZE * 4


def test_more_tokens_than_room_are_refused() -> None:
    layer = PreallocatedLayer(4)
    states = torch.zeros(1, HEADS, 3, SIZE)
    layer.update(states, states)
    with pytest.raises(ValueError, match="room for 4 tokens, got 6"):
        layer.update(states, states)


def test_it_starts_anew_and_never_shrinks() -> None:
    layer = PreallocatedLayer(4)
    layer.batch_select_indices(torch.tensor([0]))  # a layer that nothing was written to
    states = torch.zeros(1, HEADS, 3, SIZE)
    layer.update(states, states)
    layer.reset()
    ones = torch.ones(1, HEADS, 2, SIZE)
    assert torch.equal(layer.update(ones, ones)[0], ones)
    with pytest.raises(NotImplementedError, match="only grows"):
        layer.crop(-1)


def test_sliding_layers_stay_as_they_are() -> None:
    cache = DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=4))
    preallocate(cache, ROOM)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer] * 2


def test_a_held_cache_writes_where_it_is_told_and_grows_on_afterwards() -> None:
    plain, held_one = DynamicCache(config=config()), DynamicCache(config=config())
    preallocate(plain, ROOM)
    preallocate(held_one, ROOM)
    drawn = torch.Generator().manual_seed(0)
    place = torch.zeros(1, dtype=torch.int64)

    def both(rows: int, tokens: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        keys, values = torch.randn(2, rows, HEADS, tokens, SIZE, generator=drawn)
        return plain.update(keys, values, 0), held_one.update(keys, values, 0)

    both(3, 2)
    layer: Any = held_one.layers[0]
    layer.hold(place, 5, filler=7.0)
    seen = []
    for column in (2, 3):
        place.fill_(column)
        (expected, _), (keys, _) = both(3, 1)
        assert torch.equal(keys[..., : column + 1, :], expected)
        assert bool((keys[..., column + 1 :, :] == 7).all())
        seen.append(keys)
    # The same memory every time.
    assert [one.data_ptr() for one in seen] == [seen[0].data_ptr()] * 2
    assert [one.shape[-2] for one in seen] == [5, 5]
    layer.let_go(4)
    rows = torch.tensor([2, 0])
    plain.batch_select_indices(rows)
    held_one.batch_select_indices(rows)
    (expected, _), (keys, _) = both(2, 1)
    assert torch.equal(keys, expected)


def test_a_window_that_no_row_reaches_is_no_window() -> None:
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 6, "num_attention_heads": 2}
    for tokens, kind in ((8, PreallocatedLayer), (9, DynamicSlidingWindowLayer)):
        cache = DynamicCache(config=MistralConfig(sliding_window=8, **sizes))
        preallocate(cache, tokens)
        assert type(cache.layers[0]) is kind
