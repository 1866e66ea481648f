"""Hydra-SFT: language model and reward model in one trunk."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_perl.batches import RatedBatch
from lightning_perl.functional.sequences import at_last_response
from lightning_perl.metrics import RewardMetrics
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.heads import ScalarHead
from lightning_perl.models.trunk import TrunkDtype
from lightning_perl.modules.base import default_optimizer
from lightning_perl.modules.reward_model import rating_loss
from lightning_perl.modules.sft import SFT, imitation_loss
from lightning_perl.modules.supervised import Stats, sequences_of


class HydraSFT(SFT):
    """Hydra-SFT (2309.00754): ``L = xent(y_w) + gamma * L_RM``, one forward for both.

    The language-modelling loss is taken on demonstrations and on thumbs-up (or chosen) answers, the
    reward loss on pairs (Bradley-Terry) or thumbs (binary cross-entropy), whichever the batch has.

    Args:
        trunk: Folder or hub name of a decoder.
        lora: The adapter's shape, merged into the trunk once at the end. None tunes the whole trunk.
        reward_weight: The paper's gamma; 0 is plain SFT.
        margin: Score difference below which a pair still pays in full.
        positive_weight: Weight of a thumbs up against a thumbs down.
        trunk_dtype: Of the trunk's weights and matrix products; adapters and head stay fp32.
        checkpointing: Recompute activations in backward.
        head_learning_rate: Of the reward head; None takes the optimizer's.
        optimizer: Makes the optimizer.
        scheduler: Makes the learning-rate scheduler, stepped once per optimizer step.
        seed: Of the fresh adapter and head.
    """

    def __init__(
        self,
        trunk: str,
        lora: LoraSpec | None = None,
        reward_weight: float = 0.1,
        margin: float = 0.0,
        positive_weight: float = 1.0,
        trunk_dtype: TrunkDtype = "float32",
        checkpointing: bool = False,
        head_learning_rate: float | None = None,
        optimizer: OptimizerCallable = default_optimizer(1e-4),
        scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        if reward_weight < 0:
            raise ValueError(f"reward_weight must be at least 0, got {reward_weight}.")
        super().__init__(trunk, lora, trunk_dtype, checkpointing, optimizer, scheduler, seed)
        self.add_reward_head(head_learning_rate, seed)
        self.reward_weight = reward_weight
        self.margin = margin
        self.positive_weight = positive_weight
        self.metrics = RewardMetrics()
        # By default NaN is left out, and a diverged model would have the best loss of all.
        self.mean_lm = MeanMetric(nan_strategy=float("nan"))
        self.mean_reward = MeanMetric(nan_strategy=float("nan"))

    def heads(self) -> dict[str, ScalarHead]:
        """The reward head, unless nothing ever trained it."""
        return super().heads() if self.reward_weight > 0 else {}

    def losses(self, batch: RatedBatch) -> tuple[Tensor, Tensor, Tensor, Tensor, Stats]:
        """Language-modelling loss, its tokens, reward loss, scores and statistics, from one forward."""
        hidden = self.hidden(batch)
        lm_loss, lm_tokens = imitation_loss(self.trunk, hidden, batch)
        scores = self._head(at_last_response(hidden, sequences_of(batch).response_mask))
        reward_loss, stats = rating_loss(scores, batch, self.margin, self.positive_weight)
        return lm_loss, lm_tokens, reward_loss, scores, stats

    def objective(self, batch: RatedBatch) -> tuple[Tensor, Stats]:
        """``xent + reward_weight * L_RM``."""
        lm_loss, _, reward_loss, _, stats = self.losses(batch)
        return lm_loss + self.reward_weight * reward_loss, {"lm_loss": lm_loss.detach(), **stats}

    def validation_step(self, batch: RatedBatch, batch_idx: int) -> None:
        """Loss per token weighted by tokens, reward loss by rated rows, and the scores' measures."""
        lm_loss, lm_tokens, reward_loss, scores, _ = self.losses(batch)
        rated = int(batch.labelled.sum()) + len(batch.pairs)
        if lm_tokens > 0:
            self.log(
                f"{self.held_out}/lm_loss",
                lm_loss,
                batch_size=int(lm_tokens),
                on_epoch=True,
                prog_bar=True,
            )
            # Summed at the end: a batch without thumbs would otherwise count as one whose thumbs cost 0.
            self.mean_lm.update(lm_loss, int(lm_tokens))
        if rated:
            self.log(f"{self.held_out}/reward_loss", reward_loss, batch_size=rated, on_epoch=True)
            self.mean_reward.update(reward_loss, rated)
        self.metrics.update(scores, batch.label, batch.labelled, batch.pairs)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log AUROC, balanced accuracy, pair accuracy and margin, and the loss of all rows."""
        parts = ((1.0, self.mean_lm), (self.reward_weight, self.mean_reward))
        seen = [weight * mean.compute() for weight, mean in parts if mean.update_called]
        if seen:
            self.log(f"{self.held_out}/loss", torch.stack(seen).sum())
        for _, mean in parts:
            mean.reset()
        for key, value in self.metrics.compute().items():
            self.log(f"{self.held_out}/{key}", value, prog_bar=key in ("auroc", "accuracy"))

    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: RatedBatch, batch_idx: int) -> dict[str, Any]:
        """Row numbers and scores."""
        return {"row": batch.row, "score": self.losses(batch)[3]}
