"""Reward models: pairs and thumbs on one trunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_perl.batches import RatedBatch
from lightning_perl.functional.sequences import at_last_response
from lightning_perl.losses.reward import bradley_terry, thumbs
from lightning_perl.metrics import RewardMetrics
from lightning_perl.models.adapters import OFF, LoraSpec
from lightning_perl.models.heads import save_heads
from lightning_perl.models.trunk import TrunkDtype, write_adapter_manifest
from lightning_perl.modules.base import default_optimizer
from lightning_perl.modules.supervised import Stats, Supervised, sequences_of


def rating_loss(
    scores: Tensor, batch: RatedBatch, margin: float, positive_weight: float
) -> tuple[Tensor, Stats]:
    """Bradley-Terry on the batch's pairs plus binary cross-entropy on its thumbs; either may be absent.

    Rows that stand in a pair carry no thumb, so nothing is counted twice.
    """
    pair_loss, pair = bradley_terry(scores[batch.pairs[:, 0]], scores[batch.pairs[:, 1]], margin)
    thumb_loss, thumb = thumbs(scores, batch.label, batch.labelled, positive_weight)
    stats = {
        "reward_loss": (pair_loss + thumb_loss).detach(),
        "accuracy": pair.accuracy if len(batch.pairs) else thumb.accuracy,
        "margin": pair.margin,
    }
    return pair_loss + thumb_loss, stats


class RewardModel(Supervised):
    """A scalar score for a whole answer, read at its last token (EOS where there is one).

    Pairs are fitted by Bradley-Terry, thumbs by binary cross-entropy (PERL, 2403.10704, App. A.1);
    the batch says which rows are which.

    Args:
        trunk: Folder or hub name of a decoder; best the SFT trunk.
        lora: The adapter's shape, written as ``RUN/adapters/reward``. None tunes the whole trunk and
            writes ``RUN/trunk``.
        margin: Score difference below which a pair still pays in full.
        positive_weight: Weight of a thumbs up against a thumbs down; below 1 where most are up.
        trunk_dtype: Of the trunk's weights and matrix products; adapters and head stay fp32.
        checkpointing: Recompute activations in backward.
        head_learning_rate: Of the reward head; None takes the optimizer's.
        optimizer: Makes the optimizer. PERL's LoRA learning rates are 1e-4 to 2e-4.
        scheduler: Makes the learning-rate scheduler, stepped once per optimizer step.
        seed: Of the fresh adapter and head.
    """

    def __init__(
        self,
        trunk: str,
        lora: LoraSpec | None = LoraSpec(),
        margin: float = 0.0,
        positive_weight: float = 1.0,
        trunk_dtype: TrunkDtype = "float32",
        checkpointing: bool = False,
        head_learning_rate: float | None = None,
        optimizer: OptimizerCallable = default_optimizer(1e-4),
        scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            trunk, "reward", lora, trunk_dtype, checkpointing, optimizer, scheduler, seed
        )
        if lora is None:
            # No score ever reads the LM head; where it is the embedding too, it is trained as that.
            self.trunk.requires_grad_(False)
            self.trunk.model.base_model.requires_grad_(True)
        self.add_reward_head(head_learning_rate, seed)
        self.margin = margin
        self.positive_weight = positive_weight
        self.metrics = RewardMetrics()

    def scores(self, batch: RatedBatch) -> Tensor:
        """Shape: ``(B,)``."""
        return self._head(at_last_response(self.hidden(batch), sequences_of(batch).response_mask))

    def objective(self, batch: RatedBatch) -> tuple[Tensor, Stats]:
        """Mean loss over pairs plus mean loss over thumbs."""
        return rating_loss(self.scores(batch), batch, self.margin, self.positive_weight)

    def validation_step(self, batch: RatedBatch, batch_idx: int) -> None:
        """Collect scores."""
        scores = self.scores(batch)
        loss, _ = rating_loss(scores, batch, self.margin, self.positive_weight)
        rated = int(batch.labelled.sum()) + len(batch.pairs)
        if rated:
            self.log(f"{self.held_out}/loss", loss, batch_size=rated, on_epoch=True, prog_bar=True)
        self.metrics.update(scores, batch.label, batch.labelled, batch.pairs)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log AUROC, balanced accuracy, pair accuracy and margin."""
        for key, value in self.metrics.compute().items():
            self.log(f"{self.held_out}/{key}", value, prog_bar=key in ("auroc", "accuracy"))

    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: RatedBatch, batch_idx: int) -> dict[str, Any]:
        """Row numbers and scores."""
        return {"row": batch.row, "score": self.scores(batch)}

    def hand_over(self, folder: Path) -> None:
        """Write ``RUN/adapters/reward`` (PEFT folder and head), or ``RUN/trunk`` after full tuning."""
        if self.adapter == OFF:
            super().hand_over(folder)
            return
        target = folder / "adapters" / "reward"
        self.trunk.adapters.save(self.adapter, target, self.trunk.source)
        save_heads(target, self.heads())
        write_adapter_manifest(target, self.trunk)
