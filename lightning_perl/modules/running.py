"""What training itself changes besides weights: the weight of the KL, and the moments of the scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_perl.arguments import Count, Positive, require_allowed
from lightning_perl.functional.logprobs import jensen_shannon, k1, k2, k3


@dataclass(frozen=True)
class KLControl:
    """How the KL to the reference is estimated for the reward, and who sets its weight.

    Args:
        estimator: Of a token's KL: ``k1``, ``k2``, ``k3`` or ``jensen_shannon`` (LoRA-RLHF, 2309.09055).
        target: KL in nats per response that ``kl_coef`` is steered to (1909.08593, Eq. 4). None: it stays fixed.
        horizon: Episodes over which it is steered: a fifth too much KL for so long makes it 1.2 times as large.
    """

    estimator: Literal["k1", "k2", "k3", "jensen_shannon"] = "k1"
    target: Positive | None = None
    horizon: Count = 10_000

    def __post_init__(self) -> None:
        """Refuse what the types rule out."""
        require_allowed(type(self), vars(self))

    @property
    def estimate(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The estimator: from log-probabilities of policy and reference to nats per token."""
        return {"k1": k1, "k2": k2, "k3": k3, "jensen_shannon": jensen_shannon}[self.estimator]

    def steered(self, kl_coef: float, kl: float, episodes: int) -> float:
        """The next weight of the KL, after a rollout of so many episodes with so much KL per response."""
        if self.target is None or not math.isfinite(kl):
            return kl_coef
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return kl_coef * (1 + error * min(episodes / self.horizon, 1.0))


# Checkpoints hold it among the hyper-parameters.
torch.serialization.add_safe_globals([KLControl])


def seen(moments: Mapping[str, float], scores: Tensor) -> dict[str, float]:
    """Count, mean and sum of squared deviations of the finite scores so far (Chan's update of moments)."""
    scores = scores[torch.isfinite(scores)].double()
    count, before = moments.get("count", 0.0), moments.get("mean", 0.0)
    if not len(scores):
        return dict(moments)
    total, gap = count + len(scores), float(scores.mean()) - before
    squares = float(((scores - scores.mean()) ** 2).sum()) + gap**2 * count * len(scores) / total
    mean = before + gap * len(scores) / total
    return {"count": total, "mean": mean, "squares": moments.get("squares", 0.0) + squares}
