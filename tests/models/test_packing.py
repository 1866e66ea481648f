"""Pairs on one line give what rows of their own give, in every family that can."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from lightning_perl.functional.packing import Packing, plan
from lightning_perl.functional.sequences import pad_right
from lightning_perl.models.adapters import OFF
from lightning_perl.models.trunk import Trunk, load_trunk
from tests.conftest import TinyTrunk
from tests.models.families import FAMILIES
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


def gap(trunk: Trunk, adapter: str) -> float:
    ids, mask, packing = pairs()
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
        assert gap(trunk, adapter) <= allowed
    assert trunk.packs(8) == (family not in SLIDING)


@pytest.mark.parametrize("family", sorted(SLIDING))
def test_a_wider_sliding_window_is_found_by_trying(tiny_trunk: TinyTrunk, family: str) -> None:
    # The mask of a packed line replaces the window: exact up to it, wrong past it.
    trunk = load_trunk(str(tiny_trunk(family, sliding_window=40)))
    assert trunk.packs(5)
    assert trunk.packs(32)
    assert not trunk.packs(33)
    assert not trunk.packs(90)


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_window_missed_by_less_than_bf16_rounds_is_found(
    tiny_trunk: TinyTrunk, family: str
) -> None:
    # The last tokens of such rows, which scores are read at, would be wrong by 5 to 20%.
    folder = tiny_trunk(family, sliding_window=60, max_position_embeddings=96)
    trunk = load_trunk(str(folder), dtype="bfloat16", attention="eager")
    assert trunk.packs(32)
    assert not trunk.packs(61)
    assert not trunk.packs(64)


def test_layers_that_run_on_across_rows_are_not_packed(tiny_trunk: TinyTrunk) -> None:
    # A fresh convolution is too small to be found by trying.
    trunk = load_trunk(
        str(
            tiny_trunk(
                "llama",
                model_type="lfm2",
                layer_types=["conv", "full_attention"],
            )
        )
    )
    assert not trunk.packs(8)


def test_gradients_through_a_packed_line_are_those_of_separate_rows(tiny_trunk: TinyTrunk) -> None:
    ids, mask, packing = pairs()
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


def test_trying_out_counts_no_pass_and_draws_no_random_number(tiny_trunk: TinyTrunk) -> None:
    trunk = load_trunk(str(tiny_trunk("llama")))
    before = torch.get_rng_state()
    assert trunk.packs(40)
    assert trunk.passes == 0
    assert torch.equal(torch.get_rng_state(), before)
