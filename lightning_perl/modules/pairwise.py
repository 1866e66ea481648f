"""The skeleton of methods that learn a policy from judged answers, without a reward model.

Shapes: ``B`` rows, ``K`` pairs.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_perl.arguments import Positive
from lightning_perl.batches import RatedBatch
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.modules.base import Stats
from lightning_perl.modules.judging import Judging


class Pairwise(Judging):
    """A policy adapter whose reference is the same trunk without it. Leaves fill `preference_loss`.

    A leaf that learns from thumbs as well as from pairs sets ``needs_pairs`` to False.

    The policy's implicit reward, ``beta * log(pi / ref)`` of a whole response, is its score: accuracy,
    calibration and the other measures of reward models apply to it. The adapter is handed over as
    ``RUN/adapters/actor``, as that of the on-policy methods.

    Args:
        trunk: Folder or hub name of the SFT trunk.
        lora: Shape of the adapter.
        beta: Weight of the KL to the reference that is implied; the smaller, the further the policy may go.
        settings: Arguments of `Supervised` and `AdapterModule`.
    """

    adapter_name: ClassVar[str] = "actor"
    keeps_adapter: ClassVar[bool] = True
    needs_ratings: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = True
    rating_columns: ClassVar[str] = "`chosen` and `rejected`"

    def __init__(
        self, trunk: str, lora: LoraSpec = LoraSpec(), beta: Positive = 0.1, **settings: Any
    ) -> None:
        if lora is None:
            raise ValueError(
                f"{type(self).__name__} has its reference in the trunk without the adapter, so lora cannot be "
                "null. Give its rank and alpha."
            )
        super().__init__(trunk, lora=lora, **settings)
        self.beta = beta

    @abstractmethod
    def preference_loss(self, ratios: Tensor, batch: RatedBatch) -> tuple[Tensor, Stats]:
        """Loss and statistics of a batch.

        Args:
            ratios: ``log pi(y|x) - log ref(y|x)`` of each response, summed over its tokens. Shape: ``(B,)``.
            batch: The rows.
        """

    def ratings(self, batch: RatedBatch) -> int:
        """Number of pairs in the batch, and of thumbs where the leaf learns from them."""
        return len(batch.pairs) if self.needs_pairs else super().ratings(batch)

    def losses(self, batch: RatedBatch) -> tuple[Tensor, Tensor, Stats]:
        """Loss, scores and statistics."""
        logprobs, reference = self.response_logprobs(batch), self.reference_logprobs(batch)
        ratios = logprobs - reference
        loss, stats = self.preference_loss(ratios, batch)
        scores = self.beta * ratios.detach()
        if self.needs_pairs:
            # Both log-probabilities may fall while the margin grows. 0 without pairs.
            pairs = max(len(batch.pairs), 1)
            for name, rows in zip(("chosen", "rejected"), batch.pairs.unbind(1), strict=True):
                stats[f"{name}_logprobs"] = logprobs.detach()[rows].sum() / pairs
                stats[f"{name}_rewards"] = scores[rows].sum() / pairs
        return loss, scores, stats

    def objective(self, batch: RatedBatch) -> tuple[Tensor, Stats]:
        """The leaf's loss."""
        loss, _, stats = self.losses(batch)
        return loss, stats

    @torch.no_grad()
    def scores(self, batch: RatedBatch) -> Tensor:
        """Implicit rewards. Shape: ``(B,)``."""
        return self.beta * (self.response_logprobs(batch) - self.reference_logprobs(batch))

    def validation_step(self, batch: RatedBatch, batch_idx: int) -> None:
        """Loss, weighted by ratings, and the scores' measures."""
        loss, scores, _ = self.losses(batch)
        if rated := self.ratings(batch):
            name, options = f"{self.held_out}/loss", {"batch_size": rated, "on_epoch": True}
            self.log(name, loss, prog_bar=True, **options)  # type: ignore[arg-type]
        self.measure(scores, batch)

    test_step = validation_step
