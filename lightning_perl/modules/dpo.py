"""Direct preference optimization."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_perl.arguments import FractionBelowHalf
from lightning_perl.batches import RatedBatch
from lightning_perl.losses.dpo import dpo
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
