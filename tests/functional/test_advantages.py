"""Rewards, advantages and returns, against slow loops over Python floats.

::

    response    the  cat  .  EOS  pad  pad        3 = last_true(response_mask)
    reward       -b   -b -b  -b+s   0    0        b: kl_coef * (log pi - log ref), s: the score
    value        V0   V1 V2   V3    ?    ?        V_t is before token t; nothing follows EOS

The checks of single functions run in `tests/losses/test_mutations.py`, on the functions and on their mutants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.testing import assert_close

from tests.functional.test_masked import check_hidden, random_values

LENGTHS = ((1, 6, 3, 0), (6, 6, 6, 6), (1, 1, 1, 1), (2, 5, 4, 6))


def prefix_mask(lengths: Sequence[int], columns: int = 6) -> Tensor:
    return torch.arange(columns) < torch.tensor(lengths).unsqueeze(-1)


def double_sum(
    rewards: Sequence[float], values: Sequence[float], discount: float, gae_lambda: float
) -> list[float]:
    """``A_t = sum_l (gamma lambda)^l delta_{t+l}`` over one response's own tokens."""
    following = [*values[1:], 0.0][: len(values)]
    errors = [
        reward + discount * after - before
        for reward, after, before in zip(rewards, following, values, strict=True)
    ]
    return [
        sum((discount * gae_lambda) ** steps * error for steps, error in enumerate(errors[start:]))
        for start in range(len(errors))
    ]


def check_generalized_advantages(fn: Callable[..., tuple[Tensor, Tensor]]) -> None:
    settings = [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 1.0), (0.97, 0.0), (0.0, 0.9)]
    for seed, lengths in enumerate(LENGTHS):
        rewards, values = random_values(seed, 4, 6), random_values(seed + 50, 4, 6)
        mask = prefix_mask(lengths)
        for discount, gae_lambda in settings:
            advantages, returns = fn(rewards, values, mask, discount, gae_lambda)
            for row, length in enumerate(lengths):
                expected = double_sum(
                    rewards[row, :length].tolist(),
                    values[row, :length].tolist(),
                    discount,
                    gae_lambda,
                )
                slow = torch.tensor(expected, dtype=torch.float64)
                assert_close(advantages[row, :length], slow, rtol=1e-12, atol=1e-12)
                assert_close(returns[row, :length] - values[row, :length], slow)
            assert not advantages[~mask].any()
        check_hidden(lambda r, v, mask=mask: fn(r, v, mask, 0.9, 0.8), [rewards, values], mask)


def check_token_rewards(fn: Callable[..., Tensor]) -> None:
    for seed, lengths in enumerate(LENGTHS):
        mask, scores = prefix_mask(lengths), random_values(seed, 4)
        logprobs, reference = random_values(seed + 1, 4, 6), random_values(seed + 2, 4, 6)
        expected = [[0.0] * 6 for _ in lengths]
        for row, length in enumerate(lengths):
            for column in range(length):
                kl = logprobs[row, column].item() - reference[row, column].item()
                score = scores[row].item() if column == length - 1 else 0.0
                expected[row][column] = score - 0.3 * kl
        rewards = fn(scores, logprobs, reference, mask, 0.3)
        assert_close(rewards, torch.tensor(expected).double(), rtol=1e-6, atol=1e-6)
        squared = fn(torch.zeros(4), logprobs, reference, mask, 0.3, lambda p, q: (p - q) ** 2)
        assert_close(squared, torch.where(mask, -0.3 * (logprobs - reference) ** 2, 0.0))
        check_hidden(
            lambda p, q, mask=mask, scores=scores: (fn(scores, p, q, mask, 0.3),),
            [logprobs, reference],
            mask,
        )
