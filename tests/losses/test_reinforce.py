"""The policy gradient and its baseline's loss, against loops over Python floats."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.testing import assert_close

from tests.functional.test_masked import GARBAGE, check_hidden, random_mask, random_values

Loss = Callable[..., Tensor]


def check_against_terms(fn: Loss, term: Callable[[float, float], tuple[float, float]]) -> None:
    """Sum of the counted terms over the denominator, and the gradient in the first input alone.

    Args:
        fn: The loss.
        term: A token's loss and slope of (first input, second input).
    """
    for seed in range(3):
        trained, other = random_values(seed, 5, 7), random_values(seed + 20, 5, 7)
        mask = random_mask(seed, 5, 7)
        for denominator in (None, 5, torch.tensor(11)):
            leaves = [trained.clone().requires_grad_(), other.clone().requires_grad_()]
            loss = fn(*leaves, mask, denominator)
            count = float(mask.sum() if denominator is None else denominator)
            expected, slopes = 0.0, torch.zeros_like(trained)
            for row, column in mask.nonzero().tolist():
                value, slope = term(float(trained[row, column]), float(other[row, column]))
                expected += value / count
                slopes[row, column] = slope / count
            assert_close(loss.item(), expected, rtol=1e-12, atol=1e-14)
            gradient, nothing = torch.autograd.grad(loss, leaves, allow_unused=True)
            assert_close(gradient, slopes)
            assert nothing is None

        def alone(first: Tensor, other: Tensor = other, mask: Tensor = mask) -> tuple[Tensor, ...]:
            return (fn(first, other, mask),)

        check_hidden(alone, [trained], mask)
        for garbage in GARBAGE:
            spoiled = torch.where(mask, other, garbage)
            assert_close(fn(trained, spoiled, mask), fn(trained, other, mask), rtol=0, atol=0)


def check_policy_gradient(fn: Loss) -> None:
    check_against_terms(fn, lambda logprob, advantage: (-logprob * advantage, -advantage))


def check_baseline_loss(fn: Loss) -> None:
    check_against_terms(fn, lambda value, wanted: ((wanted - value) ** 2, 2 * (value - wanted)))
