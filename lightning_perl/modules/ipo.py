"""Identity preference optimization."""

from __future__ import annotations

from torch import Tensor

from lightning_perl.batches import RatedBatch
from lightning_perl.losses.dpo import ipo
from lightning_perl.modules.base import Stats
from lightning_perl.modules.pairwise import Pairwise


class IPO(Pairwise):
    """Identity preference optimization (2310.12036): a log-ratio margin of ``1 / (2 beta)``, no more.

    Log-probabilities are sums over a response's tokens, as in the paper; TRL takes means, so that its beta is
    another number. Arguments as `Pairwise`; ``beta`` is the paper's tau.
    """

    def preference_loss(self, ratios: Tensor, batch: RatedBatch) -> tuple[Tensor, Stats]:
        """Squared distance from the margin, a mean over pairs."""
        return ipo(ratios[batch.pairs[:, 0]], ratios[batch.pairs[:, 1]], self.beta), {}
