"""Sampling whole responses, against a slow loop without cache, batch or padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.testing import assert_close
from transformers import masking_utils
from transformers.cache_utils import DynamicSlidingWindowLayer

from lightning_perl.batches import PromptBatch
from lightning_perl.functional.sequences import pad_left
from lightning_perl.models.lean_layers import NoRoleError
from lightning_perl.models.roles import Role, Roles
from lightning_perl.models.shortcuts import Shortcuts
from lightning_perl.models.trunk import Trunk
from lightning_perl.rollouts.rollout import Rollout
from lightning_perl.rollouts.sampling import (
    Responses,
    SamplingSpec,
    distinct_rows,
    ends_of,
    row_uniforms,
    sample,
)
from tests.conftest import TinyTrunk
from tests.models.families import FAMILIES, RECURRENT, STOP_IDS, WINDOW
from tests.models.rows import build
from tests.refusing import Refusing

# ---- whole responses -----------------------------------------------------------------------------

PROMPTS = [[101, 55, 180, 77, 201, 90, 66, 240, 130, 59, 222], [88, 120], [199, 60, 73, 155, 91]]
ROWS = (40, 7, 12)


def answered(
    roles: Roles,
    spec: SamplingSpec,
    rows: Sequence[int] = (0, 1, 2),
    early_exit: bool = True,
    role: Role = "policy",
    extra_padding: int = 0,
) -> Rollout:
    """Sample for some of `PROMPTS`, in the order of ``rows``."""
    ids, mask = pad_left([PROMPTS[row] for row in rows], 0)
    ids = torch.nn.functional.pad(ids, (extra_padding, 0), value=5)
    mask = torch.nn.functional.pad(mask, (extra_padding, 0))
    numbers = torch.tensor([ROWS[row] for row in rows])
    uniforms = row_uniforms(2, 3, numbers, spec.max_new_tokens)
    with roles(role) as trunk:
        return sample(trunk, PromptBatch(ids, mask, numbers), spec, uniforms, early_exit)


def responses(rollout: Rollout) -> list[list[int]]:
    return [
        ids[mask].tolist()
        for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)
    ]


@torch.no_grad()
def slow_response(trunk: Trunk, prompt: list[int], row: int, spec: SamplingSpec) -> list[int]:
    """One row alone, the whole text read again for every token."""
    uniforms = row_uniforms(2, 3, torch.tensor([row]), spec.max_new_tokens)[0]
    text = list(prompt)
    for column in range(spec.max_new_tokens):
        ids = torch.tensor([text])
        logits = trunk.project(trunk(ids, torch.ones_like(ids, dtype=torch.bool)))[0, -1].double()
        if spec.temperature == 0:
            token = int(logits.argmax())
        else:
            cumulative = (logits / spec.temperature).softmax(-1).cumsum(-1)
            token = int((cumulative <= float(uniforms[column])).sum())
        text.append(token)
        if token in trunk.stop_ids:
            break
    return text[len(prompt) :]


LENGTHS = {"llama": 3, "gpt2": 3, "gemma3": 2, "phi3": 2}
"""Families whose rows leave the batch one after the other, two of them past their window."""


# float64, so that no rounding turns a draw; Gemma 2 is refused there.
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 1.4])
def test_cached_sampling_equals_a_slow_loop(
    tiny_trunk: TinyTrunk, family: str, temperature: float
) -> None:
    dtype = "float32" if family == "gemma2" else "float64"
    roles = build(tiny_trunk(family), dtype=dtype)
    spec = SamplingSpec(max_new_tokens=18, temperature=temperature)
    rollout = answered(roles, spec)
    with roles("policy") as trunk:
        expected = [
            slow_response(trunk, prompt, row, spec)
            for prompt, row in zip(PROMPTS, ROWS, strict=True)
        ]
    assert responses(rollout) == expected
    # The long row starts beyond the window, and something is sampled well past it.
    assert max(map(len, expected)) > 1
    assert len(PROMPTS[0]) > WINDOW
    assert temperature == 0 or len(set(map(len, expected))) >= LENGTHS.get(family, 1)
    # The adapter answered, not the trunk alone; and no setting of the model's own was read.
    assert responses(answered(roles, spec, role="reference")) != expected
    generation = trunk.model.generation_config
    assert generation is not None
    assert (generation.temperature, generation.top_k, generation.top_p) == (0.1, 2, 0.3)


def test_the_cache_of_a_sliding_layer_keeps_its_window_only(roles: Roles) -> None:
    ids, mask = pad_left(PROMPTS, 0)
    with torch.no_grad(), roles("policy") as trunk:
        cache = trunk.empty_cache(ids.shape[1])
        trunk(ids, mask, cache)
    assert ids.shape[1] > WINDOW
    widths = [
        layer.keys.shape[-2]
        for layer in cache.layers
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.keys is not None
    ]
    assert widths == [WINDOW - 1] * 2


@pytest.fixture(scope="module")
def roles(tiny_trunk: TinyTrunk) -> Roles:
    """Trained Mistral roles in float64, read only."""
    return build(tiny_trunk("mistral"), dtype="float64")


SPEC = SamplingSpec(max_new_tokens=24, temperature=1.2)


def test_a_row_s_text_depends_on_no_batch_mate(roles: Roles) -> None:
    together = responses(answered(roles, SPEC))
    assert len({len(response) for response in together}) > 1
    for order in ((0,), (1,), (2,), (2, 0, 1), (1, 0), (2, 1, 0)):
        assert responses(answered(roles, SPEC, order)) == [together[row] for row in order]
    assert responses(answered(roles, SPEC, extra_padding=7)) == together


def test_a_response_ends_with_its_first_stop_token(roles: Roles) -> None:
    whole = responses(answered(roles, SPEC))
    for limit in (2, 5, 24):
        rollout = answered(roles, SamplingSpec(limit, 1.2))
        assert responses(rollout) == [response[:limit] for response in whole]
        for row, response in enumerate(responses(rollout)):
            stopped = bool(rollout.stopped[row])
            assert stopped == (response[-1] in STOP_IDS)
            assert not set(response[:-1]) & set(STOP_IDS)
            assert stopped or len(response) == limit
            after = rollout.response_ids[row, len(response) :]
            assert not after.any(), "padding is pad_id"
    # Both ends were seen.
    assert bool(answered(roles, SPEC).stopped.any())
    assert not bool(answered(roles, SamplingSpec(2, 1.2)).stopped.all())


def test_early_exit_spares_finished_rows_and_changes_no_text(roles: Roles) -> None:
    fed: list[int] = []
    handle = roles.trunk("policy").model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with_exit = answered(roles, SPEC)
    read, fed[:] = list(fed), []
    without = answered(roles, SPEC, early_exit=False)
    handle.remove()
    lengths = with_exit.response_tokens()
    assert (sum(read), len(read)) == (int(lengths.sum()), int(lengths.max()))
    assert fed == [3] * 24
    assert responses(with_exit) == responses(without)
    assert torch.equal(with_exit.stopped, without.stopped)
    assert with_exit.response_ids.shape[1] == int(lengths.max())
    assert without.response_ids.shape[1] == 24
    assert torch.equal(with_exit.row, torch.tensor(ROWS))


@pytest.mark.parametrize("early_exit", [True, False])
def test_every_token_stops_or_none_does(
    tiny_trunk: TinyTrunk, monkeypatch: pytest.MonkeyPatch, early_exit: bool
) -> None:
    own = build(tiny_trunk(), dtype="float64")
    trunk = own.trunk("policy")
    for stop_ids, length in ((tuple(range(trunk.vocabulary_size)), 1), ((), 6)):
        monkeypatch.setattr(Trunk, "stop_ids", stop_ids)
        rollout = answered(own, SamplingSpec(6), early_exit=early_exit)
        assert rollout.response_tokens().tolist() == [length] * 3
        assert rollout.stopped.tolist() == [length == 1] * 3


# ---- prompts that are there several times --------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, *RECURRENT])
def test_a_prompt_is_read_once_and_answered_as_often(tiny_trunk: TinyTrunk, family: str) -> None:
    exact = family in FAMILIES and family != "gemma2"
    asked = (2, 0, 2, 1, 2, 0)
    found, read = [], []
    for way in (Shortcuts(), Shortcuts(shared_prompts=False)):
        dtype = "float64" if exact else "float32"
        roles = build(tiny_trunk(family), dtype=dtype, shortcuts=way)
        ids, mask = pad_left([PROMPTS[row] for row in asked], 0)
        prompts = PromptBatch(ids, mask, torch.arange(6))
        seen: list[int] = []
        roles.trunk("policy").model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(len(kwargs["input_ids"])),
            with_kwargs=True,
        )
        with roles("policy") as trunk:
            found.append(sample(trunk, prompts, SPEC, row_uniforms(2, 3, prompts.row, 24)))
        read.append(seen[:2])
    assert [one[0] for one in read] == [3, 6]
    # Nearly all of the six go on.
    assert read[0][1] > 3
    first = responses(found[0])
    assert len(set(map(tuple, first))) == 6, "each with its own noise"
    if exact:
        assert first == responses(found[1])
    logprobs = [one.logprobs[:, 0] for one in found if one.logprobs is not None]
    assert_close(logprobs[0], logprobs[1], rtol=0, atol=1e-3)


def test_padding_is_no_token(roles: Roles) -> None:
    # The padding's id, once as padding and once as a token.
    rows = [[0, 55, 90], [55, 90]]
    prompts = PromptBatch(*pad_left(rows, 0), torch.tensor([3, 3]))
    assert torch.equal(prompts.ids[0], prompts.ids[1])
    with roles("policy") as trunk:
        rollout = sample(trunk, prompts, SPEC, row_uniforms(0, 0, prompts.row, 24))
    assert rollout.logprobs is not None
    assert float(rollout.logprobs[0, 0]) != float(rollout.logprobs[1, 0])


def test_distinct_rows() -> None:
    rows = torch.tensor([[3, 1], [0, 2], [3, 1], [3, 0], [0, 2]])
    first, which = distinct_rows(rows)
    assert torch.equal(rows[first][which], rows)
    assert sorted(first.tolist()) == [0, 1, 3]


# ---- stop strings --------------------------------------------------------------------------------


def test_a_stop_string_ends_a_row_with_the_token_that_completes_it(roles: Roles) -> None:
    tokenizer = roles.trunk("policy").tokenizer
    free = responses(answered(roles, SPEC))
    row = max(range(3), key=lambda row: len(free[row]))
    text = str(tokenizer.decode(free[row][:4], skip_special_tokens=True))
    stop = text[-2:]
    rollout = answered(roles, SamplingSpec(24, 1.2, stop=("never there", stop)))
    for number, (response, whole) in enumerate(zip(responses(rollout), free, strict=True)):
        texts = [
            tokenizer.decode(whole[: end + 1], skip_special_tokens=True)
            for end in range(len(whole))
        ]
        ends = [end + 1 for end, text in enumerate(texts) if stop in text]
        length = ends[0] if ends else len(whole)
        assert response == whole[:length]
        assert bool(rollout.stopped[number]) == (bool(ends) or whole[-1] in STOP_IDS)
    assert len(responses(rollout)[row]) <= 4 < len(free[row])


def test_a_stop_string_may_be_a_special_token(roles: Roles) -> None:
    spec = SamplingSpec(2, stop=("<bos>",))
    drawn = Responses(roles.trunk("policy"), torch.zeros(3, 2), spec)
    drawn.ids = torch.tensor([[101, 1], [1, 101], [101, 101]])
    ended = ends_of(roles.trunk("policy"), drawn, spec.stop)
    assert ended(torch.arange(3), 2, drawn.ids[:, 1]).tolist() == [True, True, False]


def test_stop_strings_need_early_exit(roles: Roles) -> None:
    with pytest.raises(ValueError, match=r"stop strings .* needs early_exit=True"):
        answered(roles, SamplingSpec(4, stop=("x",)), early_exit=False)


# ---- what training rests on --------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_scored_distribution_is_the_sampled_one(tiny_trunk: TinyTrunk, family: str) -> None:
    # Log-probabilities as the sampler saw them, token by token with its cache, equal those of the
    # one pass that scores, also in train mode with every dropout the configuration asks for.
    dtype = "float32" if family == "gemma2" else "float64"
    own = build(tiny_trunk(family), dtype=dtype)
    trunk, spec, seen = own.trunk("policy"), SamplingSpec(18, 0.8), []
    project = trunk.project

    def spied(hidden: Tensor) -> Tensor:
        logits = project(hidden)
        seen.append(logits)
        return logits

    trunk.project = spied  # type: ignore[method-assign]
    rollout = answered(own, spec, early_exit=False)
    trunk.project = project  # type: ignore[method-assign]
    logits = torch.stack(seen, 1).double() / spec.temperature
    sampled = logits.log_softmax(-1).gather(-1, rollout.response_ids.unsqueeze(-1)).squeeze(-1)
    with trunk.training_pass():
        scored = own.answer(rollout.sequences(), ("policy",), spec.temperature).policy
    assert scored is not None
    mask = rollout.response_mask
    assert_close(scored[mask].double(), sampled[mask], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        quiet = own.answer(rollout.sequences(), ("policy",), spec.temperature).policy
    assert quiet is not None
    assert torch.equal(scored, quiet), "ratio 1"


def test_sampling_outside_a_role_raises(roles: Roles) -> None:
    prompts = PromptBatch(*pad_left(PROMPTS, 0), torch.tensor(ROWS))
    with pytest.raises(NoRoleError):
        sample(roles.trunk("policy"), prompts, SPEC, row_uniforms(0, 0, prompts.row, 24))


def no_peeking(func: OpOverload[Any, Any], args: tuple[Any, ...]) -> None:
    """Raises where Python reads a tensor's value."""
    if func.overloadpacket in (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.nonzero,
        torch.ops.aten.equal,
    ):
        raise RuntimeError(f"{func} reads a value")


def test_without_early_exit_the_loop_reads_no_value(
    roles: Roles, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers looks into the mask to spare itself a causal one, unless it is being traced.
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)
    mode = Refusing(no_peeking)
    with mode:
        answered(roles, SamplingSpec(4), early_exit=False)
    with pytest.raises(RuntimeError, match="reads a value"), mode:
        answered(roles, SamplingSpec(4))
