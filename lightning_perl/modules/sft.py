"""Supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from lightning_perl.batches import RatedBatch
from lightning_perl.losses.language_modeling import cross_entropy
from lightning_perl.modules.base import Stats
from lightning_perl.modules.supervised import Supervised, sequences_of


def imitation_loss(module: Supervised, hidden: Tensor, batch: RatedBatch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the responses to imitate, in nats per token, and how many tokens there were."""
    mask = sequences_of(batch).response_mask & batch.imitate.unsqueeze(-1)
    return cross_entropy(module.token_logprobs(hidden, batch), mask), mask.sum()


class SFT(Supervised):
    """Supervised fine-tuning: ``L = xent(y)`` over the responses to imitate.

    Rows that are only judged (thumbs down, rejected answers) do not count, so that `SFT` and `HydraSFT` can be
    compared on the very same rows. Arguments as `Supervised`; an adapter is merged into the trunk at the end.
    """

    def objective(self, batch: RatedBatch) -> tuple[Tensor, Stats]:
        """Mean cross-entropy per token."""
        loss, tokens = imitation_loss(self, self.hidden(batch), batch)
        return loss, {"lm_loss": loss.detach(), "lm_tokens": tokens.float()}

    def validation_step(self, batch: RatedBatch, batch_idx: int) -> None:
        """Loss per token, weighted by tokens."""
        loss, tokens = imitation_loss(self, self.hidden(batch), batch)
        if tokens > 0:
            options = {"batch_size": int(tokens), "on_epoch": True}
            self.log(f"{self.held_out}/lm_loss", loss, **options)  # type: ignore[arg-type]
            self.log(f"{self.held_out}/loss", loss, prog_bar=True, **options)  # type: ignore[arg-type]

    test_step = validation_step
