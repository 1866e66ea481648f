"""Proximal policy optimization (1707.06347) for responses.

Shapes: ``B`` rollouts, ``R`` response tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_perl.functional.logprobs import k3
from lightning_perl.functional.masked import masked_mean


class PolicyStats(NamedTuple):
    """Share of tokens whose clipped term is the one that counts, and k3 estimate of KL(old || new) per token."""

    clip_fraction: Tensor
    approx_kl: Tensor


class ValueStats(NamedTuple):
    """Share of tokens whose clipped term is the one that counts."""

    value_clip_fraction: Tensor


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_range: float,
    denominator: Tensor | float | None = None,
    clip_range_high: float | None = None,
) -> tuple[Tensor, PolicyStats]:
    """``-min(ratio A, clip(ratio, 1 - e, 1 + e) A)``, Eq. 7, as a token mean.

    Args:
        logprobs: Log-probabilities of the policy being trained. Shape: ``(B, R)``.
        old_logprobs: Log-probabilities of the policy that sampled. Shape: ``(B, R)``.
        advantages: Shape: ``(B, R)``.
        response_mask: Shape: ``(B, R)``, bool.
        clip_range: The paper's epsilon.
        denominator: Tokens of the whole minibatch (see `masked_mean`).
        clip_range_high: How far above 1, where that differs ("clip-higher", 2503.14476).

    Returns:
        Loss, shape ``()``, and statistics.
    """
    high = clip_range if clip_range_high is None else clip_range_high
    log_ratio = torch.where(response_mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    ratio = torch.exp(log_ratio)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + high)
    with torch.no_grad():
        stats = PolicyStats(
            masked_mean((clipped > plain).to(ratio.dtype), response_mask, denominator),
            masked_mean(k3(old_logprobs, logprobs), response_mask, denominator),
        )
    return masked_mean(torch.maximum(plain, clipped), response_mask, denominator), stats


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    value_clip_range: float,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, ValueStats]:
    """``0.5 max((V - G)^2, (clip(V, V_old - e, V_old + e) - G)^2)`` as a token mean.

    Args:
        values: Values of the critic being trained. Shape: ``(B, R)``.
        old_values: When the rollout was scored. Shape: ``(B, R)``.
        returns: What they are fitted to. Shape: ``(B, R)``.
        response_mask: Shape: ``(B, R)``, bool.
        value_clip_range: How far a value may move before its gradient stops.
        denominator: Tokens of the whole minibatch (see `masked_mean`).

    Returns:
        Loss, shape ``()``, and statistics.
    """
    # clamped between bounds: old_values + (values - old_values) rounds, and would count as clipped
    near = values.clamp(old_values - value_clip_range, old_values + value_clip_range)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    with torch.no_grad():
        fraction = masked_mean((clipped > plain).to(values.dtype), response_mask, denominator)
    loss = 0.5 * masked_mean(torch.maximum(plain, clipped), response_mask, denominator)
    return loss, ValueStats(fraction)
