"""How a token is drawn, against plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_perl.rollouts import sampling
from lightning_perl.rollouts.sampling import SamplingSpec, draw, row_uniforms

# ---- noise -------------------------------------------------------------------------------------

_MASK = 2**64 - 1


def split_mix(state: int) -> int:
    """Java's SplittableRandom, as published (Steele, Lea, Flood 2014)."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def noise(seed: int, rollout: int, rows: Sequence[int], count: int) -> Tensor:
    return row_uniforms(seed, rollout, torch.tensor(rows), count)


def test_uniforms_are_split_mix_over_seed_rollout_row_and_column() -> None:
    for seed, rollout, row in ((0, 0, 0), (1, 2, 3), (-5, -1, 2**40), (2**62, 7, 1)):
        state = split_mix(split_mix(split_mix(seed & _MASK) + rollout & _MASK) + row & _MASK)
        bits = [split_mix(state + column & _MASK) & 0x7FFFFF for column in range(5)]
        expected = [(bit + 0.5) / 2**23 for bit in bits]
        assert noise(seed, rollout, [row], 5)[0].tolist() == expected


def test_a_row_s_uniforms_depend_on_nothing_else() -> None:
    whole = noise(3, 4, range(50), 20)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(row_uniforms(3, 4, order, 20), whole[order])
    assert torch.equal(noise(3, 4, [17], 6)[0], whole[17, :6])
    torch.manual_seed(9)
    assert torch.equal(noise(3, 4, range(50), 20), whole)


def test_neighbours_share_no_noise() -> None:
    # Seeds and rollouts stand for each other nowhere: (3, 9) is not (9, 3), nor (10, 2).
    streams = torch.cat(
        [noise(seed, rollout, range(12), 3) for seed in range(12) for rollout in range(-1, 12)]
    )
    assert len({tuple(stream) for stream in streams.tolist()}) == len(streams) == 12 * 13 * 12
    assert len(set(streams.flatten().tolist())) > 0.999 * streams.numel()


@pytest.mark.parametrize("bits", [0, -1, 0x7FFFFF, 0xFFFFFF, 0x400000])
def test_a_uniform_is_never_0_or_1(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_mix", lambda state: torch.full_like(state, bits))
    number = float(noise(0, 0, [0], 1))
    assert 0 < number < 1
    assert number == ((bits & 0x7FFFFF) + 0.5) / 2**23


# ---- one draw ----------------------------------------------------------------------------------


def kept_probabilities(logits: Sequence[float], spec: SamplingSpec) -> list[float]:
    """Temperature, then top-k, then top-p, in plain Python."""
    weights = [math.exp(logit / spec.temperature) for logit in logits]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    order = order[: spec.top_k] if spec.top_k else order
    total, before, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        if before / total < spec.top_p:
            kept.append(token)
        before += weights[token]
    left = sum(weights[token] for token in kept)
    return [weights[token] / left if token in kept else 0.0 for token in range(len(weights))]


LOGITS = (0.3, -1.2, 2.0, 0.9, -3.0, 1.1, 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.4},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 99},
        {"top_p": 0.7},
        {"top_p": 1e-6},
        {"top_k": 4, "top_p": 0.8, "temperature": 1.7},
    ],
)
def test_draws_have_the_softmax_s_frequencies(settings: dict[str, Any], dtype: torch.dtype) -> None:
    spec, count = SamplingSpec(**settings), 20_000
    expected = torch.tensor(kept_probabilities(LOGITS, spec), dtype=torch.float64)
    logits = torch.tensor(LOGITS, dtype=dtype).expand(count, -1)
    # An even grid: inverse CDF then hits every probability to one grid step on either side.
    grid = (torch.arange(count) + 0.5) / count
    frequency = draw(logits, grid, spec)[0].bincount(minlength=len(LOGITS)) / count
    assert (frequency - expected).abs().max() <= 1.001 / count
    assert bool((frequency[expected == 0] == 0).all())
    # And the noise that training uses.
    drawn, _ = draw(logits, noise(1, 2, range(count), 1)[:, 0], spec)
    seen = drawn.bincount(minlength=len(LOGITS))
    wanted = expected[expected > 0] * count
    chi_square = float(((seen[expected > 0] - wanted) ** 2 / wanted).sum())
    assert chi_square < 40
    assert int(seen[expected == 0].sum()) == 0


@pytest.mark.parametrize("number", [0.5 / 2**23, 1 - 2**-24])
def test_the_ends_of_the_cdf_draw_tokens_that_can_be_drawn(number: float) -> None:
    impossible = -torch.inf
    logits = torch.tensor(
        [
            [impossible, 1.0, 2.0, impossible],
            [impossible, impossible, 0.0, impossible],
            [0.0, impossible, impossible, 5.0],
        ]
    )
    drawn = draw(logits, torch.full((3,), number), SamplingSpec())[0].tolist()
    assert drawn == ([1, 2, 0] if number < 0.5 else [2, 2, 3])
    # A vocabulary's worth of rounding: the last sums stay below or above 1 by some 1e-6.
    wide = torch.randn(8, 50_000, generator=torch.Generator().manual_seed(0))
    wide[:, 40_000:] = impossible
    assert draw(wide, torch.full((8,), number), SamplingSpec())[0].max() < 40_000
    kept, _ = draw(wide, torch.full((8,), number), SamplingSpec(top_k=2))
    assert all(int(token) in wide[row].topk(2).indices for row, token in enumerate(kept))


def test_a_token_owns_the_left_end_of_its_interval() -> None:
    # A quarter each, but for a token in the middle that cannot be drawn.
    logits = torch.tensor([0.0, 0.0, -torch.inf, 0.0, 0.0]).expand(5, -1)
    edges = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.999])
    assert draw(logits, edges, SamplingSpec())[0].tolist() == [0, 1, 3, 4, 4]


def test_bf16_logits_are_drawn_in_fp32() -> None:
    # 0.1% steps are below bf16's resolution near 1; a CDF kept in bf16 would lose most tokens.
    logits = torch.zeros(1000, 1000, dtype=torch.bfloat16)
    grid = (torch.arange(1000) + 0.5) / 1000
    assert draw(logits, grid, SamplingSpec())[0].tolist() == list(range(1000))


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"top_p": 0.9}, {"top_k": 5}])
def test_training_refuses_to_sample_what_it_does_not_score(settings: dict[str, Any]) -> None:
    SamplingSpec(temperature=0.7).refuse_unscored()
    with pytest.raises(ValueError, match=r"must be the distribution that is scored.*top_p 1"):
        SamplingSpec(**settings).refuse_unscored()
