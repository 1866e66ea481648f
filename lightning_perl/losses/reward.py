"""Reward models: pairs (Bradley-Terry) and thumbs (binary cross-entropy).

Shapes: ``K`` pairs, ``B`` rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_perl.functional.masked import masked_mean


class PairStats(NamedTuple):
    """Share of pairs whose chosen answer scores higher (a tie counts half), and mean ``chosen - rejected``."""

    accuracy: Tensor
    margin: Tensor


class ThumbStats(NamedTuple):
    """Share of labelled rows whose score is on the right side of 0, and their mean score."""

    accuracy: Tensor
    score: Tensor


def bradley_terry(
    chosen_scores: Tensor, rejected_scores: Tensor, margin: float | Tensor = 0.0
) -> tuple[Tensor, PairStats]:
    """``-log sigmoid(r_w - r_l - margin)``: Hydra-SFT's L_RM and PERL's pairwise loss (App. A.1.2).

    PERL's text writes the preference as r_w / (r_w + r_l), which is this with exponentiated scores.

    Args:
        chosen_scores: Shape: ``(K,)``.
        rejected_scores: Shape: ``(K,)``.
        margin: Score difference below which a pair still pays in full (Llama 2, Eq. 2); may be one for each pair,
            shape ``(K,)``.

    Returns:
        Mean loss, shape ``()`` (0 without pairs), and statistics.
    """
    difference = chosen_scores - rejected_scores
    count = max(difference.shape[0], 1)
    with torch.no_grad():
        right = (difference > 0).to(difference.dtype) + 0.5 * (difference == 0)
        stats = PairStats(right.sum() / count, difference.sum() / count)
    return -F.logsigmoid(difference - margin).sum() / count, stats


def centering(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """``(r_w + r_l)^2``: keeps a pair's scores around 0, which Bradley-Terry leaves anywhere.

    The regularizer of Eisenstein et al. (2312.09244), to be added with a small coefficient; TRL, where it
    is ``center_rewards_coefficient``, recommends 0.01. Scores have the shape ``(K,)``; the mean over the pairs is
    0 without pairs.
    """
    return ((chosen_scores + rejected_scores) ** 2).sum() / max(chosen_scores.shape[0], 1)


def thumbs(
    scores: Tensor, labels: Tensor, labelled: Tensor, positive_weight: float = 1.0
) -> tuple[Tensor, ThumbStats]:
    """Binary cross-entropy of the score as a logit: PERL's pointwise loss.

    ``-w y log sigmoid(r) - (1 - y) log sigmoid(-r)`` with the weight ``w`` of a thumbs up. Differs from
    PERL's print, whose second term reads ``log sigmoid(1 - r)``.

    Args:
        scores: Shape: ``(B,)``.
        labels: 1 for thumbs up, 0 for down; a rating between them is that much of a thumbs up and the
            rest of a thumbs down. Shape: ``(B,)``.
        labelled: True where there is a thumb. Shape: ``(B,)``, bool.
        positive_weight: Weight of a thumbs up against a thumbs down, for skewed classes.

    Returns:
        Mean loss over the labelled rows, shape ``()`` (0 without any), and statistics.
    """
    targets = labels.to(scores.dtype)
    weight = scores.new_tensor(positive_weight)
    losses = F.binary_cross_entropy_with_logits(
        scores, targets, reduction="none", pos_weight=weight
    )
    with torch.no_grad():
        right = ((scores > 0) == (targets > 0.5)).to(scores.dtype)
        stats = ThumbStats(masked_mean(right, labelled), masked_mean(scores, labelled))
    return masked_mean(losses, labelled), stats
