"""DPO that is not paid for length."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_perl.arguments import NonNegative
from lightning_perl.batches import RatedBatch
from lightning_perl.losses.dpo import dpo
from lightning_perl.modules.base import Stats
from lightning_perl.modules.pairwise import Pairwise


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
