"""ReMax (2310.10505): the greedy response is the baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_perl.functional.advantages import generalized_advantages, token_rewards


def greedy_advantages(
    scores: Tensor,
    greedy_scores: Tensor,
    logprobs: Tensor,
    reference_logprobs: Tensor,
    response_mask: Tensor,
    kl_coef: float,
) -> Tensor:
    """``r(x, y) - r(x, greedy) - kl_coef * sum_(t' >= t) (log pi - log ref)_t'`` for every token.

    The baseline does not depend on the sample, so the gradient stays unbiased. The authors' code takes the KL of
    the current token alone, which leaves out what a token does to the KL of those after it.

    Args:
        scores: Of the sampled responses. Shape: ``(B,)``.
        greedy_scores: Of the greedy responses to the same prompts. Shape: ``(B,)``.
        logprobs: Log-probabilities of the policy that sampled. Shape: ``(B, R)``.
        reference_logprobs: Shape: ``(B, R)``.
        response_mask: Shape: ``(B, R)``, bool.
        kl_coef: Weight of the KL in the reward.

    Returns:
        Shape: ``(B, R)``; 0 where the mask is False.
    """
    above = scores - greedy_scores
    rewards = token_rewards(above, logprobs, reference_logprobs, response_mask, kl_coef)
    return generalized_advantages(rewards, torch.zeros_like(rewards), response_mask, 1.0, 1.0)[0]
