"""Kahneman-Tversky optimization (KTO, 2402.01306): thumbs instead of pairs.

Shapes: ``B`` rows, ``M`` mismatched rows. A log-ratio is ``log pi(y|x) - log ref(y|x)``, summed over tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_perl.functional.masked import masked_mean


def kto(
    ratios: Tensor,
    desirable: Tensor,
    undesirable: Tensor,
    anchor: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """``w_y (1 - sigmoid(+-beta (ratio - z)))``, Eq. 8, a mean over the judged rows.

    Args:
        ratios: Shape: ``(B,)``, as are the two masks.
        desirable: True on thumbs up.
        undesirable: True on thumbs down.
        anchor: The paper's ``z``, see `kl_anchor`. Shape: ``()``.
        beta: How fast a gain or loss saturates.
        desirable_weight: Weight of thumbs up, the paper's lambda_D.
        undesirable_weight: Weight of thumbs down, lambda_U.

    Returns:
        Shape: ``()``; 0 where nothing is judged.
    """
    gains = beta * (ratios - anchor)
    good, bad = torch.sigmoid(-gains), torch.sigmoid(gains)
    losses = torch.where(desirable, desirable_weight * good, undesirable_weight * bad)
    return masked_mean(losses, desirable | undesirable)


def kl_anchor(mismatched_ratios: Tensor) -> Tensor:
    """KL(pi || ref) estimated on prompts with the responses of other prompts, at least 0. ``(M,)`` to ``()``."""
    return mismatched_ratios.detach().mean().clamp(min=0)
