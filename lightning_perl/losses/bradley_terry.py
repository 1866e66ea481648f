"""Reward models on pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(
    chosen_scores: Tensor, rejected_scores: Tensor, margin: float | Tensor = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """``-log sigmoid(r_w - r_l - margin)``: Hydra-SFT's L_RM and PERL's pairwise loss (App. A.1.2).

    PERL's text writes the preference as r_w / (r_w + r_l), which is this with exponentiated scores.

    Args:
        chosen_scores: Shape: ``(K,)``.
        rejected_scores: Shape: ``(K,)``.
        margin: Score difference below which a pair still pays in full (Llama 2, Eq. 2); may be one for each pair,
            shape ``(K,)``.

    Returns:
        Mean loss (0 without pairs); the share of pairs whose chosen answer scores higher (a tie counts half), and
        the mean ``r_w - r_l``.
    """
    difference = chosen_scores - rejected_scores
    count = max(difference.shape[0], 1)
    with torch.no_grad():
        right = (difference > 0).to(difference.dtype) + 0.5 * (difference == 0)
        stats = {"accuracy": right.sum() / count, "margin": difference.sum() / count}
    return -F.logsigmoid(difference - margin).sum() / count, stats


def centering(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """``(r_w + r_l)^2``, a mean over the pairs: keeps scores around 0, which Bradley-Terry leaves anywhere.

    The regularizer of Eisenstein et al. (2312.09244), to be added with a small coefficient; TRL's
    ``center_rewards_coefficient``, for which it recommends 0.01. Scores: ``(K,)``.
    """
    return ((chosen_scores + rejected_scores) ** 2).sum() / max(chosen_scores.shape[0], 1)
