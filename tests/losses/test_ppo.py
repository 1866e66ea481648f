"""The clipped surrogate and the clipped value loss, against loops over Python floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_perl.losses.value import clipped_value_loss
from tests.functional.test_masked import check_hidden, random_mask, random_values

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


class Slow(NamedTuple):
    """What a loop over the counted tokens finds."""

    loss: float
    statistics: list[float]
    gradient: list[list[float]]


def slow_surrogate(inputs: Sequence[Tensor], mask: Tensor, clip: float, tokens: float) -> Slow:
    logprobs, old_logprobs, advantages = (tensor.tolist() for tensor in inputs)
    gradient = [[0.0] * mask.shape[1] for _ in range(mask.shape[0])]
    loss = clipped = kl = 0.0
    for row, column in mask.nonzero().tolist():
        log_ratio = logprobs[row][column] - old_logprobs[row][column]
        advantage, ratio = advantages[row][column], math.exp(log_ratio)
        bounded = min(max(ratio, 1 - clip), 1 + clip)
        loss -= min(ratio * advantage, bounded * advantage) / tokens
        # old was the sampler: -log_ratio = log old - log new is Schulman's d
        kl += (math.exp(log_ratio) - 1 - log_ratio) / tokens
        too_good = advantage > 0 and ratio > 1 + clip
        too_bad = advantage < 0 and ratio < 1 - clip
        if too_good or too_bad:
            clipped += 1 / tokens
        else:
            gradient[row][column] = -advantage * ratio / tokens
    return Slow(loss, [clipped, kl], gradient)


def slow_value_loss(inputs: Sequence[Tensor], mask: Tensor, clip: float, tokens: float) -> Slow:
    values, old_values, returns = (tensor.tolist() for tensor in inputs)
    gradient = [[0.0] * mask.shape[1] for _ in range(mask.shape[0])]
    loss = clipped = 0.0
    for row, column in mask.nonzero().tolist():
        value, old, target = values[row][column], old_values[row][column], returns[row][column]
        near = min(max(value, old - clip), old + clip)
        if abs(near - target) > abs(value - target):
            clipped += 1 / tokens
            loss += 0.5 * (near - target) ** 2 / tokens
        else:
            loss += 0.5 * (value - target) ** 2 / tokens
            gradient[row][column] = (value - target) / tokens
    return Slow(loss, [clipped], gradient)


def check_against_slow(
    fn: Loss,
    slow: Callable[[Sequence[Tensor], Tensor, float, float], Slow],
    inputs: Sequence[Tensor],
    mask: Tensor,
    clip: float,
) -> None:
    """Loss, statistics and gradient in the first input; over the mask's count and another."""
    for denominator in (None, 50, torch.tensor(50)):
        trained = inputs[0].clone().requires_grad_()
        loss, stats = fn(trained, *inputs[1:], mask, clip, denominator)
        tokens = mask.sum().item() if denominator is None else 50.0
        expected = slow(inputs, mask, clip, tokens)
        assert_close(loss.item(), expected.loss, rtol=1e-12, atol=1e-14)
        assert_close(
            [one.item() for one in stats.values()], expected.statistics, rtol=1e-9, atol=1e-14
        )
        assert not any(one.requires_grad for one in stats.values())
        (gradient,) = torch.autograd.grad(loss, trained)
        assert_close(gradient, torch.tensor(expected.gradient, dtype=torch.float64))


def surrogate_inputs(seed: int) -> list[Tensor]:
    """Ratios on both sides of every clip, advantages of both signs."""
    old_logprobs = -random_values(seed, 5, 7).abs()
    logprobs = old_logprobs + 0.4 * random_values(seed + 20, 5, 7)
    return [logprobs, old_logprobs, random_values(seed + 40, 5, 7)]


def value_inputs(seed: int) -> list[Tensor]:
    """Multiples of 2^-10, so that differences and sums are exact and a tie is a tie."""
    return [(random_values(seed + offset, 5, 7) * 1024).round() / 1024 for offset in (0, 20, 40)]


def check_clipped_surrogate(fn: Loss) -> None:
    for seed in range(3):
        inputs, mask = surrogate_inputs(seed), random_mask(seed, 5, 7)
        for clip_range in (0.05, 0.2, 0.5):
            check_against_slow(fn, slow_surrogate, inputs, mask, clip_range)

        def flat(*tensors: Tensor, mask: Tensor = mask) -> tuple[Tensor, ...]:
            loss, stats = fn(*tensors, mask, 0.2)
            return loss, *stats.values()

        check_hidden(flat, inputs, mask)
    same = [inputs[0], inputs[0], inputs[2]]  # untouched policy: ratio 1, nothing clipped, KL 0
    loss, stats = fn(*same, mask, 0.0)
    assert_close(loss, -same[2][mask].mean())
    assert [one.item() for one in stats.values()] == [0.0, 0.0]
    # Above 1 another range, where one is given: a ratio of 1.25 is inside it, one of 0.7 is clipped.
    one = torch.ones(1, 2, dtype=torch.bool)
    ratios, advantages = torch.tensor([[1.25, 0.7]]).double(), torch.tensor([[1.0, -1.0]]).double()
    loss, stats = fn(ratios.log(), torch.zeros(1, 2).double(), advantages, one, 0.2, None, 0.3)
    assert abs(loss.item() - (-1.25 + 0.8) / 2) < 1e-12
    assert stats["clip_fraction"].item() == 0.5


def check_clipped_value_loss(fn: Loss) -> None:
    for seed in range(3):
        inputs, mask = value_inputs(seed), random_mask(seed, 5, 7)
        for value_clip_range in (0.13, 0.55, 2.1):
            check_against_slow(fn, slow_value_loss, inputs, mask, value_clip_range)

        def flat(*tensors: Tensor, mask: Tensor = mask) -> tuple[Tensor, ...]:
            loss, stats = fn(*tensors, mask, 0.2)
            return loss, *stats.values()

        check_hidden(flat, inputs, mask)
    still = [inputs[0], inputs[0], inputs[2]]  # a value that has not moved is not clipped
    assert fn(*still, mask, 0.125)[1]["value_clip_fraction"].item() == 0.0


def test_rounding_clips_no_value() -> None:
    # every value is within range of its old one, yet old + (value - old) may miss it by an ulp
    values, old_values, returns = (random_values(seed, 50, 40).float() for seed in range(3))
    mask = torch.ones(50, 40, dtype=torch.bool)
    loss, stats = clipped_value_loss(values, old_values, returns, mask, 100.0)
    assert stats["value_clip_fraction"].item() == 0
    assert_close(loss, 0.5 * ((values - returns) ** 2).mean())
