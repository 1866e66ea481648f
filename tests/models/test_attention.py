"""Attention as plain products: the same numbers as torch's kernel, only where it was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_perl.models import attention
from lightning_perl.models.adapters import OFF
from lightning_perl.models.attention import attention_by_products, suits
from lightning_perl.models.loading import load_trunk
from lightning_perl.models.shortcuts import Shortcuts
from lightning_perl.models.trunk import Trunk
from tests.conftest import TinyTrunk
from tests.models.families import FAMILIES, WINDOW
from tests.models.test_lean_blocks import trained_pass

SCALE = 0.3


def states(
    dtype: torch.dtype = torch.float64, queries: int = 5, keys: int = 5, key_heads: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of 4 heads, keys, values, laid out as models do: heads behind tokens."""
    drawn = torch.Generator().manual_seed(queries + keys + key_heads)

    def some(tokens: int, heads: int, width: int) -> Tensor:
        numbers = torch.randn(3, tokens, heads, width, generator=drawn, dtype=torch.float64)
        return numbers.to(dtype).transpose(1, 2).requires_grad_()

    return some(queries, 4, 6), some(keys, key_heads, 6), some(keys, key_heads, 7)


def by_torch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALE)
    return output.transpose(1, 2)


def some_mask(queries: int, keys: int, kind: str) -> Tensor | None:
    if kind == "none":
        return None
    seen = torch.rand(3, 1, queries, keys, generator=torch.Generator().manual_seed(1)) < 0.6
    seen[..., 0] = True
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e9)
    return seen if kind == "bool" else added


@pytest.mark.parametrize("cached", [1, 2**19, 2 * 4 * 5 * 5])
@pytest.mark.parametrize("kind", ["none", "bool", "added"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 5), (1, 5)])
def test_values_and_gradients_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch,
    queries: int,
    keys: int,
    key_heads: int,
    kind: str,
    cached: int,
) -> None:
    monkeypatch.setattr(attention, "CACHED", cached)
    monkeypatch.setattr(attention, "COPIED", cached)
    inputs, mask = states(torch.float64, queries, keys, key_heads), some_mask(queries, keys, kind)
    before = None if mask is None else mask.clone()
    ours = attention_by_products(*inputs, mask, SCALE)
    theirs = by_torch(*inputs, mask)
    assert ours.is_contiguous()
    assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    way = torch.randn_like(ours)
    assert_close(
        torch.autograd.grad(ours, inputs, way),
        torch.autograd.grad(theirs, inputs, way),
        rtol=1e-12,
        atol=1e-12,
    )
    assert mask is None or torch.equal(mask, before)  # type: ignore[arg-type]


def test_a_query_that_sees_nothing_stays_finite() -> None:
    inputs = states(torch.bfloat16)
    mask = torch.ones(3, 1, 5, 5, dtype=torch.bool).tril()
    mask[1, :, :2] = False
    output = attention_by_products(*inputs, mask, SCALE)
    output.sum().backward()  # type: ignore[no-untyped-call]
    assert output.isfinite().all()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in inputs)


@pytest.mark.parametrize("queries", [1, 64])
def test_rounding_in_bfloat16_is_of_the_size_of_torchs(queries: int) -> None:
    query, key, value = (one.detach().bfloat16() for one in states(torch.float64, queries, 64))
    true = by_torch(query.double(), key.double(), value.double(), None)

    def off(output: Tensor) -> float:
        return float((output.double() - true).norm() / true.norm())

    ours = attention_by_products(query, key, value, None, SCALE)
    assert off(ours) < 2 * off(by_torch(query, key, value, None))


def test_short_rows_in_half_precision_on_a_cpu() -> None:
    bf16, full = states(torch.bfloat16), states(torch.float32)
    assert suits(*bf16[:2], None)
    assert not suits(*full[:2], None)
    long = states(torch.bfloat16, 2, attention.SHORT + 1)
    assert not suits(*long[:2], None)
    assert suits(long[0][:, :, :1], long[1], None), "a decoding step, however long the row"
    assert not suits(*bf16[:2], torch.zeros(3, 4, 5, 5)), "a mask for every head (ALiBi)"
    assert not suits(bf16[0].to("meta"), bf16[1].to("meta"), None)


# ---- in a trunk ----------------------------------------------------------------------------------


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Products for every dtype; the shapes of the queries that took them."""
    shapes: list[tuple[int, ...]] = []
    products = attention.attention_by_products

    def watched(query: Tensor, *rest: Tensor, **named: float) -> Tensor:
        shapes.append(tuple(query.shape))
        return products(query, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "attention_by_products", watched)
    own = attention.suits
    monkeypatch.setattr(
        attention,
        "suits",
        lambda query, key, mask: own(query.bfloat16(), key.bfloat16(), mask),
    )
    return shapes


def trunk_of(tiny_trunk: TinyTrunk, family: str, short: bool, checkpointing: bool = False) -> Trunk:
    return load_trunk(
        str(tiny_trunk(family)),
        "float32" if family == "gemma2" else "float64",
        checkpointing,
        shortcuts=Shortcuts(short_attention=short),
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_numbers(
    tiny_trunk: TinyTrunk, used: list[tuple[int, ...]], family: str, checkpointing: bool
) -> None:
    short, plain = (
        trained_pass(trunk_of(tiny_trunk, family, way, checkpointing), 2 * WINDOW)
        for way in (True, False)
    )
    layers = len(used)
    # Gemma 2's soft cap is eager's alone; ALiBi and Falcon have ways of their own.
    assert (layers == 0) == (family in {"gemma2", "bloom", "falcon", "falcon_new"}), layers
    tolerance = 1e-4 if family == "gemma2" else 1e-11
    assert_close(short[:2], plain[:2], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_one_token_after_the_other(
    tiny_trunk: TinyTrunk, used: list[tuple[int, ...]], family: str
) -> None:
    ids = torch.arange(3, 3 + 4 * 12).view(4, 12)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :3] = False
    found = []
    for way in (True, False):
        trunk = trunk_of(tiny_trunk, family, way)
        if way:
            used.clear()  # the comparison at loading
        cache = trunk.empty_cache(12)
        with torch.no_grad(), trunk.switch.use(OFF):
            parts = [trunk(ids[:, :5], mask[:, :5], cache)]
            parts += [trunk(ids[:, at : at + 1], mask[:, : at + 1], cache) for at in range(5, 12)]
        found.append(torch.cat(parts, 1)[mask])
    assert {shape[2] for shape in used} == {5, 1}
    assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_other_models_keep_what_they_had(
    tiny_trunk: TinyTrunk, used: list[tuple[int, ...]]
) -> None:
    mine, other = (trunk_of(tiny_trunk, "llama", way) for way in (True, False))
    used.clear()
    ids = torch.arange(3, 9).view(1, 6)
    with torch.no_grad():
        other.model(ids)
        assert not used
        mine.model(ids)
        assert used


def test_what_was_registered_before_is_asked_by_the_others(
    tiny_trunk: TinyTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def theirs(module: object, *states: Tensor, **named: Any) -> tuple[Tensor, None]:
        asked.append(module)
        return sdpa_attention_forward(module, *states, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "_before", attention._before)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", theirs)
    trunk = trunk_of(tiny_trunk, "llama", True)
    asked.clear()
    with torch.no_grad():
        trunk.model(torch.arange(3, 9).view(1, 6))
    assert len(asked) == 2, "float64 is left to whoever was there"


def test_a_trunk_in_bfloat16_is_as_near_as_with_torchs_kernel(tiny_trunk: TinyTrunk) -> None:
    folder = str(tiny_trunk("llama"))
    true = trained_pass(load_trunk(folder, "float64"), 16)[0]

    def off(short: bool) -> float:
        way = load_trunk(folder, "bfloat16", shortcuts=Shortcuts(short_attention=short))
        return float((trained_pass(way, 16)[0].double() - true).norm() / true.norm())

    assert off(True) != off(False)
    assert off(True) < 1.2 * off(False)
