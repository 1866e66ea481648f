"""What a rollout looked like: the numbers that are logged of it.

Shapes: ``B`` rollouts, ``R`` response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_perl.functional.kl import k1
from lightning_perl.functional.masked import masked_mean, masked_row_sums
from lightning_perl.rollouts.experience import Scored
from lightning_perl.rollouts.rollout import Rollout


def describe(rollout: Rollout, scored: Scored) -> dict[str, Tensor]:
    """What a rollout looked like, each a mean over its responses.

    ``score``, ``kl`` (k1 summed over the response, nats), ``response_tokens``, ``truncated_fraction``,
    ``distinct_2`` (different pairs of neighbouring tokens over all pairs, in the whole batch) and
    ``length_score_correlation`` (Pearson; 0 where either does not vary).
    """
    mask = rollout.response_mask
    lengths = rollout.response_tokens().float()
    return {
        "score": scored.scores.mean(),
        "kl": masked_row_sums(k1(scored.logprobs, scored.reference), mask).mean(),
        "response_tokens": lengths.mean(),
        "truncated_fraction": (~rollout.stopped).float().mean(),
        "distinct_2": distinct_pairs(rollout.response_ids, mask),
        "length_score_correlation": correlation(lengths, scored.scores.float()),
    }


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the returns' variance that the values explain; 1 is all. Shape: ``()``.

    Args:
        values: Shape: ``(B, R)``.
        returns: Shape: ``(B, R)``.
        mask: Shape: ``(B, R)``, bool.
    """
    unexplained = masked_mean((returns - values) ** 2, mask)
    spread = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return 1 - unexplained / spread.clamp(min=1e-8)


def distinct_pairs(ids: Tensor, mask: Tensor) -> Tensor:
    """Distinct neighbouring token pairs over all of them; 1 where there is no pair."""
    both = mask[:, :-1] & mask[:, 1:]
    pairs = torch.stack([ids[:, :-1][both], ids[:, 1:][both]], dim=1)
    if len(pairs) == 0:
        return torch.ones(())
    return torch.tensor(len(torch.unique(pairs, dim=0)) / len(pairs))


def correlation(left: Tensor, right: Tensor) -> Tensor:
    """Pearson correlation over rows; 0 where either side does not vary. Shape: ``()``."""
    left, right = left - left.mean(), right - right.mean()
    scale = left.norm() * right.norm()
    return torch.where(
        scale > 0, (left * right).sum() / scale.clamp(min=1e-12), torch.zeros(()).to(scale)
    )
