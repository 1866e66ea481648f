"""Proximal policy optimization (1707.06347): the policy's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_perl.functional.logprobs import k3
from lightning_perl.functional.masked import masked_mean


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_range: float,
    denominator: Tensor | float | None = None,
    clip_range_high: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``-min(ratio A, clip(ratio, 1 - e, 1 + e) A)``, Eq. 7, as a token mean. All tensors: ``(B, R)``.

    Args:
        logprobs: Log-probabilities of the policy being trained.
        old_logprobs: Log-probabilities of the policy that sampled.
        advantages: See `generalized_advantages`.
        response_mask: True on the tokens that count.
        clip_range: The paper's epsilon.
        denominator: Tokens of the whole minibatch (see `masked_mean`).
        clip_range_high: How far above 1, where that differs ("clip-higher", 2503.14476).

    Returns:
        Loss; the share of tokens whose clipped term counts, and the k3 estimate of KL(old || new) per token.
    """
    high = clip_range if clip_range_high is None else clip_range_high
    log_ratio = torch.where(response_mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    ratio = torch.exp(log_ratio)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + high)
    with torch.no_grad():
        share = masked_mean((clipped > plain).to(ratio.dtype), response_mask, denominator)
        kl = masked_mean(k3(old_logprobs, logprobs), response_mask, denominator)
    loss = masked_mean(torch.maximum(plain, clipped), response_mask, denominator)
    return loss, {"clip_fraction": share, "approx_kl": kl}
