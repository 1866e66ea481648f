"""Proximal policy optimization (1707.06347): the critic's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_perl.functional.masked import masked_mean


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    value_clip_range: float,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``0.5 max((V - G)^2, (clip(V, V_old - e, V_old + e) - G)^2)`` as a token mean. All tensors: ``(B, R)``.

    Args:
        values: Values of the critic being trained.
        old_values: Its values when the rollout was scored.
        returns: What they are fitted to.
        response_mask: True on the tokens that count.
        value_clip_range: How far a value may move before its gradient stops.
        denominator: Tokens of the whole minibatch (see `masked_mean`).

    Returns:
        Loss, and the share of tokens whose clipped term counts.
    """
    # clamped between bounds: old_values + (values - old_values) rounds, and would count as clipped
    near = values.clamp(old_values - value_clip_range, old_values + value_clip_range)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    with torch.no_grad():
        share = masked_mean((clipped > plain).to(values.dtype), response_mask, denominator)
    loss = 0.5 * masked_mean(torch.maximum(plain, clipped), response_mask, denominator)
    return loss, {"value_clip_fraction": share}
