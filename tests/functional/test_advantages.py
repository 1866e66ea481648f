"""Rewards, advantages and returns, against slow loops over Python floats.

::

    response    the  cat  .  EOS  pad  pad        3 = last_true(response_mask)
    reward       -b   -b -b  -b+s   0    0        b: kl_coef * (log pi - log ref), s: the score
    value        V0   V1 V2   V3    ?    ?        V_t is before token t; nothing follows EOS
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_perl.functional.advantages import generalized_advantages, token_rewards
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
        check_hidden(
            lambda p, q, mask=mask, scores=scores: (fn(scores, p, q, mask, 0.3),),
            [logprobs, reference],
            mask,
        )


def test_token_rewards() -> None:
    check_token_rewards(token_rewards)


def test_generalized_advantages_are_the_double_sum() -> None:
    check_generalized_advantages(generalized_advantages)


def test_token_rewards_by_hand() -> None:
    # kl 0.5 per token, kl_coef 0.2: -0.1 each; the score 7 is paid on the last token, not after
    logprobs, reference = torch.full((1, 4), -1.0), torch.full((1, 4), -1.5)
    mask = torch.tensor([[True, True, False, False]])
    rewards = token_rewards(torch.tensor([7.0]), logprobs, reference, mask, 0.2)
    assert_close(rewards, torch.tensor([[-0.1, 6.9, 0.0, 0.0]]))


def test_rewards_of_a_response_sum_to_score_minus_penalty() -> None:
    mask, scores = prefix_mask((4, 1, 6)), random_values(0, 3)
    logprobs, reference = random_values(1, 3, 6), random_values(2, 3, 6)
    rewards = token_rewards(scores, logprobs, reference, mask, 0.05)
    penalty = 0.05 * ((logprobs - reference) * mask).sum(-1)
    assert_close(rewards.sum(-1), scores - penalty)


def test_an_empty_response_is_paid_nothing() -> None:
    zeros, nothing = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert not token_rewards(torch.tensor([5.0, -5.0]), zeros, zeros + 1, nothing, 0.1).any()


@pytest.mark.parametrize("discount", [1.0, 0.9, 0.0])
def test_lambda_one_is_monte_carlo_return_minus_value(discount: float) -> None:
    lengths = (1, 6, 3)
    rewards, values, mask = random_values(0, 3, 6), random_values(1, 3, 6), prefix_mask(lengths)
    advantages, returns = generalized_advantages(rewards, values, mask, discount, 1.0)
    for row, length in enumerate(lengths):
        for start in range(length):
            monte_carlo = sum(
                discount ** (column - start) * rewards[row, column].item()
                for column in range(start, length)
            )
            value = values[row, start].item()
            assert advantages[row, start].item() == pytest.approx(monte_carlo - value, abs=1e-12)
            assert returns[row, start].item() == pytest.approx(monte_carlo, abs=1e-12)


@pytest.mark.parametrize("discount", [1.0, 0.9, 0.0])
def test_lambda_zero_is_the_one_step_error(discount: float) -> None:
    lengths = (1, 6, 3)
    rewards, values, mask = random_values(0, 3, 6), random_values(1, 3, 6), prefix_mask(lengths)
    advantages, _ = generalized_advantages(rewards, values, mask, discount, 0.0)
    for row, length in enumerate(lengths):
        for column in range(length):
            after = values[row, column + 1].item() if column + 1 < length else 0.0
            error = rewards[row, column].item() + discount * after - values[row, column].item()
            assert advantages[row, column].item() == pytest.approx(error, abs=1e-12)


def test_advantages_of_one_token_by_hand() -> None:
    # the only token ends the episode: reward 2 minus value 0.5, whatever discount and lambda
    rewards, values = torch.tensor([[2.0, 8.0]]), torch.tensor([[0.5, 9.0]])
    mask = torch.tensor([[True, False]])
    advantages, returns = generalized_advantages(rewards, values, mask, 0.9, 0.7)
    assert advantages.tolist() == [[1.5, 0.0]]
    assert returns[0, 0].item() == 2.0


def test_extra_padding_columns_change_no_advantage() -> None:
    rewards, values, mask = random_values(0, 2, 4), random_values(1, 2, 4), prefix_mask((4, 2), 4)
    wide_rewards, wide_values = (
        torch.cat([tensor, random_values(7, 2, 3)], dim=1) for tensor in (rewards, values)
    )
    wide_mask = torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    narrow, _ = generalized_advantages(rewards, values, mask, 0.9, 0.8)
    wide, _ = generalized_advantages(wide_rewards, wide_values, wide_mask, 0.9, 0.8)
    assert_close(wide[:, :4], narrow)


def test_a_perfect_critic_leaves_no_advantage() -> None:
    # undiscounted, with the reward-to-go as value every one-step error is 0, so every lambda agrees
    rewards, mask = random_values(0, 3, 6), prefix_mask((6, 2, 4))
    counted = rewards * mask
    values = counted.flip(-1).cumsum(-1).flip(-1)
    for gae_lambda in (0.0, 0.5, 1.0):
        advantages, _ = generalized_advantages(rewards, values, mask, 1.0, gae_lambda)
        assert_close(advantages, torch.zeros_like(advantages), rtol=0, atol=1e-12)
