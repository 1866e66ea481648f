"""Kahneman-Tversky optimization."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_perl.arguments import NonNegative
from lightning_perl.batches import RatedBatch
from lightning_perl.functional.sequences import Sequences, mismatched
from lightning_perl.losses.kto import kl_anchor, kto
from lightning_perl.modules.base import Stats
from lightning_perl.modules.pairwise import Pairwise


class KTO(Pairwise):
    """Learns a policy from thumbs (2402.01306): PERL's Taskmaster has no pairs. A pair counts as one up, one down.

    The anchor, an estimate of KL(policy || reference), comes from every prompt with the response to another one,
    and costs a forward pass of each; a mean over the batch at hand, it needs batches of several prompts.
    A rating is up above 0.5.

    Args:
        trunk: Folder or hub name of the SFT trunk.
        desirable_weight: Weight of thumbs up, the paper's lambda_D. The paper keeps weight times number of both
            kinds within 1 to 4/3 of each other.
        undesirable_weight: Weight of thumbs down, the paper's lambda_U.
    """

    needs_pairs: ClassVar[bool] = False
    rating_columns: ClassVar[str] = "`label`, or with `chosen` and `rejected`"

    def __init__(
        self,
        trunk: str,
        desirable_weight: NonNegative = 1.0,
        undesirable_weight: NonNegative = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(trunk, **settings)
        self.desirable_weight = desirable_weight
        self.undesirable_weight = undesirable_weight

    def preference_loss(self, ratios: Tensor, batch: RatedBatch) -> tuple[Tensor, Stats]:
        """The value of gains and losses against the anchor, a mean over judged rows."""
        anchor, up = self.anchor(batch), batch.label > 0.5
        desirable, undesirable = batch.labelled & up, batch.labelled & ~up
        desirable[batch.pairs[:, 0]], undesirable[batch.pairs[:, 1]] = True, True
        weights = (self.desirable_weight, self.undesirable_weight)
        loss = kto(ratios, desirable, undesirable, anchor, self.beta, *weights)
        return loss, {"anchor": anchor}

    @torch.no_grad()
    def anchor(self, batch: RatedBatch) -> Tensor:
        """The KL estimate of a batch. Shape: ``()``."""
        rows = mismatched(Sequences(batch.ids, batch.attention_mask, batch.response_mask))
        other = batch._replace(
            ids=rows.ids,
            attention_mask=rows.attention_mask,
            response_mask=rows.response_mask,
            packing=None,
            response_places=None,
        )
        return kl_anchor(self.response_logprobs(other) - self.reference_logprobs(other))
