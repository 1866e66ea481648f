"""Recorded steps against the plain loop. On a CPU a tape stands for the CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lightning_perl.batches import PromptBatch
from lightning_perl.functional.sequences import pad_left
from lightning_perl.models import recording
from lightning_perl.models.recording import STEPS, GrowingRows
from lightning_perl.models.roles import Role, Roles
from lightning_perl.models.shortcuts import Shortcuts
from lightning_perl.models.trunk import Trunk
from lightning_perl.models.twin import small_twin
from lightning_perl.rollouts import sampling as decoding
from lightning_perl.rollouts.rollout import Rollout
from lightning_perl.rollouts.sampling import SamplingSpec, row_uniforms, sample
from tests.conftest import TinyTrunk
from tests.models.families import FAMILIES, FLOAT64_THROUGHOUT, WINDOW
from tests.models.rows import build
from tests.models.tape import Step, refuse_waits, tape
from tests.refusing import Refusing

SPEC = SamplingSpec(max_new_tokens=26, temperature=1.3)
SHORT = SamplingSpec(max_new_tokens=8, temperature=1.3)
WAITING = ("falcon", "falcon_new")
"""They split heads by a list of Python's, which is copied to the GPU at every step."""
WIDE = {family: {"sliding_window": 64} for family in ("mistral", "gemma2", "gemma3", "phi3")}
"""A window that no row here is longer than."""


def prompts(count: int = 9) -> PromptBatch:
    drawn = torch.Generator().manual_seed(4)
    rows = [
        torch.randint(50, 260, (1 + 3 * row % 11,), generator=drawn).tolist()
        for row in range(count)
    ]
    return PromptBatch(*pad_left(rows, 0), torch.arange(count) + 7)


def answered(
    roles: Roles, spec: SamplingSpec = SPEC, role: Role = "policy", **options: Any
) -> Rollout:
    asked = prompts()
    with roles(role) as trunk, trunk.switch.at_rest():
        uniforms = row_uniforms(1, 2, asked.row, spec.max_new_tokens)
        return sample(trunk, asked, spec, uniforms, **options)


class Recordings:
    """A recorder that counts."""

    def __init__(self, record: Callable[[Step], Step]) -> None:
        self.record, self.made, self.played = record, 0, 0

    def __call__(self, step: Step) -> Step:
        self.made += 1
        play = self.record(step)

        def counted() -> None:
            self.played += 1
            play()

        return counted


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> Recordings:
    """As on CUDA, and so that the little there is to decode takes several recordings."""
    found = Recordings(tape)
    monkeypatch.setattr(recording, "CudaGraphs", lambda device: found)
    monkeypatch.setattr(decoding, "RECORDING", {"cpu"})
    monkeypatch.setattr(recording, "refusing_to_wait", lambda device: Refusing(refuse_waits))
    monkeypatch.setattr(decoding, "POLL", 3)
    monkeypatch.setattr(decoding, "LEAST_SHOWN", 16)
    monkeypatch.setattr(decoding, "WORTH", 1)
    return found


def same(found: Rollout, expected: Rollout, tolerance: float) -> None:
    assert torch.equal(found.response_ids, expected.response_ids)
    assert torch.equal(found.response_mask, expected.response_mask)
    assert torch.equal(found.stopped, expected.stopped)
    assert found.logprobs is not None
    assert expected.logprobs is not None
    assert_close(found.logprobs, expected.logprobs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_samples_what_the_plain_loop_samples(
    tiny_trunk: TinyTrunk, family: str, recordings: Recordings
) -> None:
    dtype = "float32" if family == "gemma2" else "float64"
    # Norms and rotary angles pass through fp32 in most families, whatever the weights.
    tolerance = 1e-11 if family in FLOAT64_THROUGHOUT else 1e-5
    folder = tiny_trunk(family, **WIDE.get(family, {}))
    roles = build(folder, dtype=dtype)
    plain = build(folder, dtype=dtype, shortcuts=Shortcuts(recorded_decoding=False))
    expected = answered(plain)
    assert recordings.made == 0
    assert len(set(expected.response_tokens().tolist())) > 3
    for spec in (SPEC, replace(SPEC, temperature=0.0), replace(SPEC, top_p=0.8, top_k=40)):
        same(answered(roles, spec), answered(plain, spec), tolerance)
    same(answered(roles, role="reference"), answered(plain, role="reference"), tolerance)
    if family in WAITING:
        assert recordings.made == 0
        assert roles.trunk("policy").recordable is False
        return
    # One for the trial; then for all rows, for more columns, for half of the rows.
    assert 4 < recordings.made < recordings.played / 3
    assert roles.trunk("policy").recordable


@pytest.fixture(scope="module")
def folder(tiny_trunk: TinyTrunk) -> Path:
    return tiny_trunk()


def test_what_is_counted_is_what_is_run(
    folder: Path, recordings: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody ends, so that no row stays a few steps longer.
    monkeypatch.setattr(Trunk, "stop_ids", ())
    counts = []
    for recorded in (True, False):
        roles = build(folder, shortcuts=Shortcuts(recorded_decoding=recorded))
        answered(roles)
        trunk = roles.trunk("policy")
        counts.append((trunk.passes, trunk.flops))
    assert counts[0] == counts[1]
    assert counts[0][0] == SPEC.max_new_tokens
    assert recordings.played > SPEC.max_new_tokens / 2


def test_a_recording_holds_until_its_room_is_full(
    folder: Path, recordings: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trunk, "stop_ids", ())
    shown: list[int] = []

    class Noting(GrowingRows):
        def __init__(self, *args: Any) -> None:
            shown.append(args[-1])
            super().__init__(*args)

    monkeypatch.setattr(decoding, "GrowingRows", Noting)
    assert prompts().ids.shape[1] == 11
    answered(build(folder))
    # Twice the columns that are there, and no more than there will be: 11 + 26.
    assert shown == [22, 37]
    # And the trial's. The first step of each room is run as it is.
    assert recordings.made == 3
    assert recordings.played == STEPS - 1 + (26 - 1) - 2


def test_rows_that_end_leave_at_the_next_recording(folder: Path, recordings: Recordings) -> None:
    roles = build(folder)
    read: list[int] = []
    trunk: Any = roles.trunk("policy")
    step = trunk.step

    def noting(ids: Tensor, *more: Any) -> Any:  # noqa: ANN401
        read.append(len(ids))
        return step(ids, *more)

    trunk.step = noting
    rollout = answered(roles)
    # Twice each: run once, then recorded. The trial has two rows.
    rows = [count for count in read if count != 2]
    assert rows == sorted(rows, reverse=True)
    assert len(set(rows)) > 2
    left = [int((rollout.response_tokens() > column).sum()) for column in range(26)]
    assert set(rows) <= set(left)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_so_few_tokens_are_not_worth_it(
    folder: Path, recordings: Recordings, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(decoding, "WORTH", 4)
    spec = replace(SPEC, max_new_tokens=tokens)
    plain = build(folder, shortcuts=Shortcuts(recorded_decoding=False))
    same(answered(build(folder), spec), answered(plain, spec), 1e-5)
    # The trial's.
    assert recordings.made == 1


def test_everybody_ends_at_once(
    folder: Path, recordings: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = build(folder)
    monkeypatch.setattr(Trunk, "stop_ids", tuple(range(roles.trunk("policy").vocabulary_size)))
    rollout = answered(roles)
    assert rollout.response_tokens().tolist() == [1] * 9
    assert bool(rollout.stopped.all())


@pytest.mark.parametrize(
    ("recorded", "options"),
    [(True, {"spec": replace(SPEC, stop=("q",))}), (True, {"early_exit": False}), (False, {})],
    ids=["stop strings", "no early exit", "turned off"],
)
def test_not_where_nothing_is_gained(
    folder: Path, recordings: Recordings, recorded: bool, options: dict[str, Any]
) -> None:
    answered(build(folder, shortcuts=Shortcuts(recorded_decoding=recorded)), **options)
    assert recordings.made == 0


@pytest.mark.parametrize("family", [*WIDE, "lfm2"])
def test_not_past_a_window_nor_with_other_states(
    tiny_trunk: TinyTrunk, family: str, recordings: Recordings
) -> None:
    assert prompts().ids.shape[1] > WINDOW
    roles = build(tiny_trunk(family))
    with pytest.warns(
        UserWarning, match="not recorded as a CUDA graph.* it takes no 4-D attention mask"
    ):
        answered(roles)
    assert recordings.made == 0
    assert roles.trunk("policy").recordable is None


# ---- what a trial must find ----------------------------------------------------------------------


Forward = Callable[..., Any]


def cache_in(kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    return next((value for value in kwargs.values() if isinstance(value, Cache)), None)


def counting(forward: Forward, dtype: torch.dtype) -> Forward:
    """Turns a little by a number that Python keeps: a recording plays the number it had."""
    read = 0
    little = torch.finfo(dtype).eps ** 0.5

    def turned(**kwargs: Any) -> Any:  # noqa: ANN401
        nonlocal read
        output = forward(**kwargs)
        if cache_in(kwargs) is not None and kwargs["input_ids"].shape[1] == 1:
            read += 1
            output.last_hidden_state = output.last_hidden_state * (1 + little * math.sin(2 * read))
        return output

    return turned


def waiting(forward: Forward, dtype: torch.dtype) -> Forward:
    """Looks at a value."""

    def looking(**kwargs: Any) -> Any:  # noqa: ANN401
        output = forward(**kwargs)
        if bool((output.last_hidden_state > 1e9).any()):
            raise AssertionError
        return output

    return looking


def careless(forward: Forward, dtype: torch.dtype) -> Forward:
    """Looks at keys that a 4-D mask hides from a single token."""

    def unmasked(**kwargs: Any) -> Any:  # noqa: ANN401
        mask = kwargs["attention_mask"]
        if mask.dim() == 4 and kwargs["input_ids"].shape[1] == 1:
            kwargs["attention_mask"] = torch.zeros_like(mask)
        return forward(**kwargs)

    return unmasked


def single(kwargs: dict[str, Any]) -> bool:
    return bool(kwargs["attention_mask"].dim() == 4 and kwargs["input_ids"].shape[1] == 1)


def peeking(forward: Forward, dtype: torch.dtype) -> Forward:
    """Looks where nothing was written yet."""

    def looking(**kwargs: Any) -> Any:  # noqa: ANN401
        output = forward(**kwargs)
        if single(kwargs):
            keys = cache_in(kwargs).layers[0].keys
            # No key that was read is so large.
            strange = (keys.abs() > 50).any((1, 2, 3)).to(dtype)
            output.last_hidden_state = output.last_hidden_state * (1 - strange[:, None, None])
        return output

    return looking


def leaning(forward: Forward, dtype: torch.dtype) -> Forward:
    """Is off by more than rounding, and not by much."""
    little = 0.001
    sides = torch.ones(32, dtype=dtype)
    sides[::2] = -1

    def turned(**kwargs: Any) -> Any:  # noqa: ANN401
        output = forward(**kwargs)
        if single(kwargs):
            output.last_hidden_state = output.last_hidden_state * (1 + little * sides)
        return output

    return turned


OTHER = "steps over a preallocated cache have other logits"


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (counting, "a recorded step has other logits"),
        (waiting, "aten.* waits"),
        (careless, OTHER),
        (peeking, OTHER),
        (leaning, OTHER),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_family_that_cannot_be_recorded_is_found_out_once(
    folder: Path,
    recordings: Recordings,
    spoil: Callable[[Forward, torch.dtype], Forward],
    fault: str,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spoiled_twin(model: PreTrainedModel) -> Any:  # noqa: ANN401
        twin: Any = small_twin(model)
        twin.base_model.forward = spoil(twin.base_model.forward, torch.float32)
        return twin

    if fault == OTHER:
        monkeypatch.setattr("lightning_perl.models.trunk.small_twin", spoiled_twin)

    def spoiled(**options: Any) -> Roles:
        roles = build(folder, dtype=dtype, **options)
        body: Any = roles.trunk("policy").model.base_model
        body.forward = spoil(body.forward, body.dtype)
        return roles

    roles = spoiled()
    with pytest.warns(UserWarning, match=rf"not recorded as a CUDA graph.*{fault}"):
        answered(roles, SHORT)
    assert roles.trunk("policy").recordable is False
    made = recordings.made
    found = answered(roles, SHORT)
    assert recordings.made == made
    if spoil in (waiting, careless):
        plain = spoiled(shortcuts=Shortcuts(recorded_decoding=False))
        same(found, answered(plain, SHORT), 0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("family", FAMILIES)
def test_on_cuda(tiny_trunk: TinyTrunk, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "LEAST_SHOWN", 16)
    folder = tiny_trunk(family, **WIDE.get(family, {}))
    rollouts = []
    for recorded in (True, False):
        roles = build(folder, shortcuts=Shortcuts(recorded_decoding=recorded)).to("cuda")
        asked = PromptBatch(*(one.to("cuda") for one in prompts()))
        with roles("policy") as trunk, trunk.switch.at_rest():
            uniforms = row_uniforms(1, 2, asked.row, SPEC.max_new_tokens)
            rollouts.append(sample(trunk, asked, SPEC, uniforms))
        assert trunk.recordable is (family not in WAITING if recorded else None)
    same(rollouts[0], rollouts[1], 1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_capture_that_fails_names_the_switch() -> None:
    record = recording.CudaGraphs(torch.device("cuda"))
    value = torch.ones(3, device="cuda")
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match=r"recorded_decoding: false"):
        record(lambda: print(value.sum().item()))
    assert torch.cuda.current_stream() == stream
