"""REINFORCE with a learned baseline (PERL, 2403.10704, through RLAIF, 2309.00267, App. F)."""

from __future__ import annotations

from torch import Tensor

from lightning_perl.functional.masked import masked_mean


def policy_gradient(
    logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """``-sum_t log pi(a_t|s_t) * stopgrad(Z_t - V(s_t))``, divided.

    Args:
        logprobs: Log-probabilities of the policy being trained, which is the one that sampled. Shape: ``(B, R)``.
        advantages: ``Z_t - V(s_t)``; no gradient flows into them. Shape: ``(B, R)``.
        response_mask: Shape: ``(B, R)``, bool.
        denominator: The paper's sum over tokens and mean over episodes: episodes of the whole
            minibatch. None: the tokens that count.

    Returns:
        Shape: ``()``.
    """
    return masked_mean(-logprobs * advantages.detach(), response_mask, denominator)


def baseline_loss(
    values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """``sum_t (Z_t - V(s_t))^2``, divided as in `policy_gradient`; not halved and not clipped.

    No gradient flows into the returns ``Z_t``. Shape: ``(B, R)`` each to ``()``.
    """
    return masked_mean((returns.detach() - values) ** 2, response_mask, denominator)
