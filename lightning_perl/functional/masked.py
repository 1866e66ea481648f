"""Reductions that see only what a mask lets them see. Masked-out positions may hold anything finite.

Shapes: any, as long as the mask has the shape of the values. True means *this token counts*.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_row_sums(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the values that count in each row. Shape: ``(B, R)`` to ``(B,)``."""
    return torch.where(mask, values, torch.zeros_like(values)).sum(1)


def masked_mean(values: Tensor, mask: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """Mean of the values that count, 0 where none does. Shape: ``()``.

    ``denominator`` divides the sum instead of the number of values that count: a micro-batch passes the count of
    its whole minibatch, so that its micro-batches' losses add up to the token mean.
    """
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    return torch.where(mask, values, torch.zeros_like(values)).sum() / denominator


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Values shifted to mean 0 and scaled to (biased, 2403.17031) variance 1 over what counts; 0 elsewhere."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    return torch.where(mask, (values - mean) * (variance + 1e-8).rsqrt(), torch.zeros_like(values))
