"""Pairs on one line give what rows of their own give, in every family that can."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lightning_perl.functional.packing import Packing, plan, plan_samples
from lightning_perl.functional.sequences import pad_left, pad_right
from lightning_perl.models.adapters import OFF
from lightning_perl.models.loading import load_trunk
from lightning_perl.models.trunk import Trunk
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
    assert trunk.packs(8) == (family not in SLIDING)


@pytest.mark.parametrize("family", sorted(SLIDING))
def test_a_wider_sliding_window_is_found_by_trying(tiny_trunk: TinyTrunk, family: str) -> None:
    # The mask of a packed line replaces the window: exact up to it, wrong past it.
    trunk = load_trunk(str(tiny_trunk(family, sliding_window=40)))
    assert trunk.packs(5)
    assert trunk.packs(32)
    assert not trunk.packs(33)
    assert not trunk.packs(90)


def fresh(tokenizer: Path, dtype: torch.dtype, **settings: object) -> Trunk:
    """A trunk with stock initialization, in which a wrong mask hardly shows."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {**sizes, "num_key_value_heads": 2, "vocab_size": 300}
    config = AutoConfig.for_model(str(settings.pop("model_type")), **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]
    return Trunk(model.to(dtype).eval(), AutoTokenizer.from_pretrained(tokenizer))


def test_a_window_missed_by_less_than_bf16_may_round_is_found(tokenizer_dir: Path) -> None:
    # The last tokens of such rows, which scores are read at, would be wrong by 6% (28 tokens: 14%).
    trunk = fresh(tokenizer_dir, torch.bfloat16, model_type="mistral", sliding_window=120)
    assert trunk.packs(64)
    assert not trunk.packs(121)
    assert not trunk.packs(128)


def test_kernels_that_cannot_read_a_mask_are_not_tried(tiny_trunk: TinyTrunk) -> None:
    # On a GPU flash attention would not raise: it would end the process.
    trunk = load_trunk(str(tiny_trunk("llama")))
    trunk.model.config._attn_implementation_internal = "flash_attention_2"
    assert not trunk.packs(8)
    assert trunk._packs == {}


def test_layers_that_run_on_across_rows_are_not_packed(tokenizer_dir: Path) -> None:
    layers = ["conv", "full_attention"]
    trunk = fresh(tokenizer_dir, torch.bfloat16, model_type="lfm2", layer_types=layers)
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


def test_trying_out_counts_no_pass_and_draws_no_random_number(tiny_trunk: TinyTrunk) -> None:
    trunk = load_trunk(str(tiny_trunk("llama")))
    before = torch.get_rng_state()
    assert trunk.packs(40)
    assert trunk.passes == 0
    assert torch.equal(torch.get_rng_state(), before)
