"""Reward models on thumbs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_perl.functional.masked import masked_mean


def thumbs(
    scores: Tensor, labels: Tensor, labelled: Tensor, positive_weight: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Binary cross-entropy of the score as a logit: PERL's pointwise loss. All tensors: ``(B,)``.

    ``-w y log sigmoid(r) - (1 - y) log sigmoid(-r)`` with the weight ``w`` of a thumbs up. Differs from
    PERL's print, whose second term reads ``log sigmoid(1 - r)``.

    Args:
        scores: Of the rows.
        labels: 1 for thumbs up, 0 for down; a rating between them is that much of a thumbs up and the
            rest of a thumbs down.
        labelled: True where there is a thumb.
        positive_weight: Weight of a thumbs up against a thumbs down, for skewed classes.

    Returns:
        Mean loss over the labelled rows (0 without any); the share of them whose score is on the right side of 0,
        and their mean score.
    """
    targets = labels.to(scores.dtype)
    weight = scores.new_tensor(positive_weight)
    losses = F.binary_cross_entropy_with_logits(
        scores, targets, reduction="none", pos_weight=weight
    )
    with torch.no_grad():
        right = ((scores > 0) == (targets > 0.5)).to(scores.dtype)
        stats = {"accuracy": masked_mean(right, labelled), "score": masked_mean(scores, labelled)}
    return masked_mean(losses, labelled), stats
