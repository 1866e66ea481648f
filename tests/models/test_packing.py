"""Pairs on one line give what rows of their own give, in every family that can."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_perl.functional.packing import Packing, attention_bias, plan, plan_samples
from lightning_perl.functional.sequences import pad_left, pad_right
from lightning_perl.models.adapters import OFF
from lightning_perl.models.loading import load_trunk
from lightning_perl.models.trunk import Trunk
from tests.conftest import TinyTrunk
from tests.models.families import FAMILIES, RECURRENT, TRIED, WINDOW
from tests.models.rows import build

SLIDING = {"mistral", "gemma2", "gemma3", "phi3"}
EXACT = 1e-12


def pairs(prompts: tuple[int, ...] = (3, 2, 1), seed: int = 1) -> tuple[Tensor, Tensor, Packing]:
    """Pairs of rows of at most 7 tokens, which even a window of 8 holds."""
    draw = random.Random(seed)
    groups = []
    for length, chosen, rejected in zip(prompts, (2, 1, 3), (4, 5, 3), strict=True):
        prompt = [draw.randrange(5, 300) for _ in range(length)]
        groups.append(
            [
                [*prompt, *(draw.randrange(5, 300) for _ in range(answer))]
                for answer in (chosen, rejected)
            ]
        )
    return *pad_right([row for group in groups for row in group], 0), plan(groups)


def samples() -> tuple[Tensor, Tensor, Packing]:
    """Three responses to each of two prompts, padded on both sides; rows of at most 7 tokens."""
    draw = random.Random(2)
    prompts = [[draw.randrange(5, 300) for _ in range(length)] for length in (3, 1) for _ in "abc"]
    prompts[1:3], prompts[4:6] = prompts[:1] * 2, prompts[3:4] * 2
    responses = [[draw.randrange(5, 300) for _ in range(length)] for length in (1, 4, 2, 3, 1, 2)]
    left, right = pad_left(prompts, 0), pad_right(responses, 0)
    ids, mask = (torch.cat(sides, 1) for sides in zip(left, right, strict=True))
    return ids, mask, plan_samples(6, 7, 3, 3)


BATCHES: list[Callable[[], tuple[Tensor, Tensor, Packing]]] = [pairs, samples]


def gap(trunk: Trunk, adapter: str, rows: tuple[Tensor, Tensor, Packing]) -> float:
    ids, mask, packing = rows
    with torch.no_grad(), trunk.switch.use(adapter):
        ours, own = trunk._packed(ids, mask, packing), trunk(ids, mask)
    return float((ours - own)[mask].abs().max() / own[mask].abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_states_are_those_of_separate_rows(tiny_trunk: TinyTrunk, family: str) -> None:
    folder = tiny_trunk(family)
    # Gemma 2 is refused in float64.
    dtype, allowed = ("float32", 1e-5) if family == "gemma2" else ("float64", EXACT)
    trunk = build(folder, dtype=dtype).trunk("policy")
    for adapter in (OFF, "actor"):
        for rows in BATCHES:
            assert gap(trunk, adapter, rows()) <= allowed
    assert trunk.packs(WINDOW)
    assert trunk.packs(90) == (family not in SLIDING)


@pytest.mark.parametrize("family", sorted(SLIDING))
def test_rows_past_a_sliding_window_are_not_packed(tiny_trunk: TinyTrunk, family: str) -> None:
    # The mask of a packed line replaces the window: exact up to it, wrong past it.
    trunk = load_trunk(str(tiny_trunk(family, sliding_window=40)))
    assert trunk.packs(40)
    assert not trunk.packs(41)


def test_a_window_that_no_cache_knows_is_found_by_trying(tiny_trunk: TinyTrunk) -> None:
    settings = {"model_type": "gpt_neo", "num_layers": 2, "num_heads": 4, "window_size": 40}
    for kinds, packed in ((["global"], True), (["global", "local"], False)):
        types = [[kinds, 2 // len(kinds)]]
        trunk = load_trunk(str(tiny_trunk("llama", **settings, attention_types=types)))
        assert trunk.packs(8) == packed


def test_kernels_that_cannot_read_a_mask_are_not_tried(
    tiny_trunk: TinyTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a GPU flash attention would not raise: it would end the process.
    trunk = load_trunk(str(tiny_trunk("llama")))
    trunk.model.config._attn_implementation_internal = "flash_attention_2"
    monkeypatch.setattr("lightning_perl.models.trunk.small_twin", None)
    assert not trunk.packs(8)


@pytest.mark.parametrize("family", [f for f in RECURRENT if f not in TRIED])
def test_layers_that_run_on_across_rows_are_not_packed(
    tiny_trunk: TinyTrunk, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_perl.models.trunk.small_twin", None)
    assert not load_trunk(str(tiny_trunk(family)), "bfloat16").packs(8)


def test_a_mask_that_is_wrong_by_less_than_bf16_rounds_is_found(
    tiny_trunk: TinyTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaking(group: Tensor, owner: Tensor, dtype: torch.dtype) -> Tensor:
        return attention_bias(group, owner, dtype).clamp(min=-12)

    trunk = load_trunk(str(tiny_trunk("llama")), "bfloat16")
    monkeypatch.setattr("lightning_perl.models.trunk.attention_bias", leaking)
    assert 0.05 < gap(trunk, OFF, pairs()) < 0.1
    assert not trunk.packs(8)


@pytest.mark.parametrize("rows", BATCHES, ids=["pairs", "samples"])
def test_gradients_through_a_packed_line_are_those_of_separate_rows(
    tiny_trunk: TinyTrunk, rows: Callable[[], tuple[Tensor, Tensor, Packing]]
) -> None:
    ids, mask, packing = rows()
    found = []
    for packed in (True, False):
        # Llama's norms sum gradients in fp32 whatever the weights.
        roles = build(tiny_trunk("gpt2"), dtype="float64")
        trunk = roles.trunk("policy")
        with roles("policy"), trunk.training_pass():
            hidden = trunk.packed(ids, mask, packing) if packed else trunk(ids, mask)
        hidden[mask].pow(2).sum().backward()
        found.append([parameter.grad for parameter in trunk.adapters.parameters("actor")])
        assert trunk.passes == 1
    for ours, own in zip(*found, strict=True):
        assert ours is not None
        assert own is not None
        assert float((ours - own).abs().max()) <= EXACT * float(own.abs().max())
        assert float(own.abs().max()) > 0


def test_a_family_that_refuses_reads_separate_rows(tiny_trunk: TinyTrunk) -> None:
    trunk = load_trunk(str(tiny_trunk("falcon", alibi=True)))
    ids, mask, packing = pairs()
    assert not trunk.packs(ids.shape[1])
    with torch.no_grad(), trunk.switch.use(OFF):
        assert torch.equal(trunk.packed(ids, mask, packing), trunk(ids, mask))


@pytest.mark.parametrize("small", [True, False])
def test_trying_out_counts_no_pass_and_draws_no_random_number(
    tiny_trunk: TinyTrunk, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = build(tiny_trunk("llama"), dtype="bfloat16").trunk("policy")
    if not small:
        monkeypatch.setattr("lightning_perl.models.trunk.small_twin", lambda _: None)
    before = torch.get_rng_state()
    trunk.require_cache()
    assert trunk.packs(40)
    assert trunk.passes == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert trunk.dtype == torch.bfloat16
