"""Direct preference optimization and its closest relatives."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_perl.arguments import FractionBelowHalf, NonNegative
from lightning_perl.batches import RatedBatch
from lightning_perl.losses.dpo import dpo, ipo
from lightning_perl.modules.base import Stats
from lightning_perl.modules.pairwise import Pairwise


class DPO(Pairwise):
    """Direct preference optimization (2305.18290): Bradley-Terry on the policy's implicit reward.

    Args:
        trunk: Folder or hub name of the SFT trunk.
        label_smoothing: Share of the pairs that are thought to be labelled the wrong way round, below 0.5.
    """

    def __init__(
        self, trunk: str, label_smoothing: FractionBelowHalf = 0.0, **settings: Any
    ) -> None:
        super().__init__(trunk, **settings)
        self.label_smoothing = label_smoothing

    def preference_loss(self, ratios: Tensor, batch: RatedBatch) -> tuple[Tensor, Stats]:
        """``-log sigmoid`` of the margin, a mean over pairs."""
        chosen, rejected = ratios[batch.pairs[:, 0]], ratios[batch.pairs[:, 1]]
        return dpo(chosen, rejected, self.beta, self.label_smoothing), {}


class IPO(Pairwise):
    """Identity preference optimization (2310.12036): a log-ratio margin of ``1 / (2 beta)``, no more.

    Log-probabilities are sums over a response's tokens, as in the paper; TRL takes means, so that its beta is
    another number. Arguments as `Pairwise`; ``beta`` is the paper's tau.
    """

    def preference_loss(self, ratios: Tensor, batch: RatedBatch) -> tuple[Tensor, Stats]:
        """Squared distance from the margin, a mean over pairs."""
        return ipo(ratios[batch.pairs[:, 0]], ratios[batch.pairs[:, 1]], self.beta), {}


class RDPO(Pairwise):
    """Length-regularized DPO (2403.19159): the objective is ``r - alpha |y| - beta KL``.

    A pair that is won by length has ``alpha (|y_w| - |y_l|)`` of its margin already, and teaches less; a short
    winner teaches more.

    Args:
        trunk: Folder or hub name of the SFT trunk.
        alpha: Price of a token of the response, in units of the reward. 0 is DPO.
    """

    def __init__(self, trunk: str, alpha: NonNegative = 0.01, **settings: Any) -> None:
        super().__init__(trunk, **settings)
        self.alpha = alpha

    def preference_loss(self, ratios: Tensor, batch: RatedBatch) -> tuple[Tensor, Stats]:
        """DPO's loss with the length's part of the margin, a mean over pairs."""
        chosen, rejected = batch.pairs[:, 0], batch.pairs[:, 1]
        lengths = batch.response_mask.sum(1)
        offset = self.alpha * (lengths[chosen] - lengths[rejected])
        return dpo(ratios[chosen], ratios[rejected], self.beta, offset=offset), {}
