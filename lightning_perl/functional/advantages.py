"""Rewards per token, advantages and returns.

Shapes: ``B`` rollouts, ``R`` response tokens. The value at column ``t`` is that of the state *before*
token ``t`` is chosen; the reward at column ``t`` is what choosing it paid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_perl.functional.logprobs import k1
from lightning_perl.functional.sequences import last_true


def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    reference_logprobs: Tensor,
    response_mask: Tensor,
    kl_coef: float,
    estimator: Callable[[Tensor, Tensor], Tensor] = k1,
) -> Tensor:
    """``-kl_coef * (log pi - log ref)`` on every token, and the score on the last one (the EOS action).

    Differs from TRL, which pays the score one position later.

    Args:
        scores: Shape: ``(B,)``.
        logprobs: Log-probabilities of the policy that sampled. Shape: ``(B, R)``.
        reference_logprobs: Shape: ``(B, R)``.
        response_mask: Where it is False, rewards are 0. Shape: ``(B, R)``, bool.
        kl_coef: The papers' beta.
        estimator: What stands for the KL of a token, of the two log-probabilities.
    """
    columns = torch.arange(response_mask.shape[1], device=response_mask.device)
    is_last = (columns == last_true(response_mask).unsqueeze(-1)) & response_mask
    penalty = -kl_coef * estimator(logprobs, reference_logprobs)
    rewards = penalty + is_last * scores.unsqueeze(-1)
    return torch.where(response_mask, rewards, torch.zeros_like(rewards))


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    discount: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (1506.02438, Eq. 16) and the returns the critic is fitted to.

    Nothing follows the last response token: its state's successor is worth 0.

    Args:
        rewards: Shape: ``(B, R)``.
        values: Shape: ``(B, R)``.
        response_mask: True on one run of columns from the first. Shape: ``(B, R)``, bool.
        discount: The papers' gamma, in [0, 1].
        gae_lambda: In [0, 1]; 1 is the Monte Carlo return minus the value, 0 the one-step error.

    Returns:
        Advantages, 0 where the mask is False, and returns (advantages + values). Shape: ``(B, R)`` each.
    """
    counted = response_mask.to(values.dtype)
    values_seen = torch.where(response_mask, values, torch.zeros_like(values))
    rewards_seen = torch.where(response_mask, rewards, torch.zeros_like(rewards))
    carried = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    advantages = []
    for column in reversed(range(values.shape[1])):
        error = rewards_seen[:, column] + discount * next_value - values_seen[:, column]
        carried = (error + discount * gae_lambda * carried) * counted[:, column]
        next_value = values_seen[:, column]
        advantages.append(carried)
    stacked = torch.stack(advantages[::-1], dim=1)
    return stacked, stacked + values_seen
