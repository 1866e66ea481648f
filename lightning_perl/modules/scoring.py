"""What modules share that score answers: reward losses and an LM loss from one forward, and the measures."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_perl.batches import RatedBatch
from lightning_perl.callbacks.reward_report import RewardReport
from lightning_perl.functional.sequences import at_last_response
from lightning_perl.losses.reward import bradley_terry, centering, thumbs
from lightning_perl.metrics import RewardMeasures, RewardMetrics
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.loading import TrunkDtype
from lightning_perl.models.quantization import Quantization
from lightning_perl.models.shortcuts import Shortcuts
from lightning_perl.modules.sft import imitation_loss
from lightning_perl.modules.supervised import Stats, Supervised, sequences_of

# Logged in validation; a test logs every measure.
WATCHED = ("auroc", "balanced_accuracy", "accuracy", "margin", "ece", "brier")


def rating_loss(
    scores: Tensor, batch: RatedBatch, margin: float, positive_weight: float, center_coef: float
) -> tuple[Tensor, Stats]:
    """Bradley-Terry on the batch's pairs and binary cross-entropy on its thumbs, a mean over both.

    A pair weighs as much as a thumb, however a batch mixes them. Rows that stand in a pair carry no
    thumb, so nothing is counted twice. Centering holds for pairs alone: thumbs say themselves where 0
    is.
    """
    chosen, rejected = scores[batch.pairs[:, 0]], scores[batch.pairs[:, 1]]
    pair_loss, pair = bradley_terry(chosen, rejected, margin)
    if center_coef:
        pair_loss = pair_loss + center_coef * centering(chosen, rejected)
    thumb_loss, thumb = thumbs(scores, batch.label, batch.labelled, positive_weight)
    pairs, ratings = len(batch.pairs), batch.labelled.sum()
    loss = (pairs * pair_loss + ratings * thumb_loss) / (pairs + ratings).clamp(min=1)
    stats = {
        "reward_loss": loss.detach(),
        "accuracy": pair.accuracy if pairs else thumb.accuracy,
        "margin": pair.margin,
    }
    return loss, stats


class Scoring(Supervised):
    """``L = lm_weight * xent(y_w) + reward_weight * L_RM``, both from one forward.

    The two weights are what `RewardModel` and `HydraSFT` differ in; see `weights`. After a test,
    ``measures`` holds what was found, for the report.

    Args:
        trunk: Folder or hub name.
        adapter: Name of the adapter; used only with ``lora``.
        lora: The adapter's shape. None: the whole trunk is tuned.
        margin: Score difference below which a pair still pays in full.
        positive_weight: Weight of a thumbs up against a thumbs down. None: see `balance`.
        center_coef: Weight of the pairs' centering term.
        share_prompts: Read a pair's prompt once.
        trunk_dtype: Of the trunk's weights and matrix products.
        checkpointing: Recompute activations in backward.
        attention: transformers' ``attn_implementation``, such as sdpa, eager or flash_attention_2; None
            leaves it to transformers.
        quantization: Keep the frozen trunk's linear layers in 4 bits (nf4) or 8 bits (int8).
        shortcuts: Which work is saved where the result is the same.
        head_learning_rate: Of the reward head; None takes the optimizer's.
        optimizer: Makes the optimizer.
        scheduler: Makes the scheduler.
        seed: Of the fresh adapter and head.

    Raises:
        ValueError: A weight below 0.
    """

    def __init__(
        self,
        trunk: str,
        adapter: str,
        lora: LoraSpec | None,
        margin: float,
        positive_weight: float | None,
        center_coef: float,
        share_prompts: bool,
        trunk_dtype: TrunkDtype,
        checkpointing: bool,
        attention: str | None,
        quantization: Quantization | None,
        shortcuts: Shortcuts,
        head_learning_rate: float | None,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        seed: int,
    ) -> None:
        for name, weight in (("positive_weight", positive_weight), ("center_coef", center_coef)):
            if weight is not None and weight < 0:
                raise ValueError(f"{name} must be at least 0, got {weight}.")
        super().__init__(
            trunk,
            adapter,
            lora,
            trunk_dtype,
            checkpointing,
            attention,
            quantization,
            shortcuts,
            optimizer,
            scheduler,
            seed,
        )
        self.add_reward_head(head_learning_rate, seed)
        self.margin = margin
        self.positive_weight = positive_weight
        self.center_coef = center_coef
        self.share_prompts = share_prompts
        self.metrics = RewardMetrics()
        self.measures: RewardMeasures | None = None
        # By default NaN is left out, and a diverged model would have the best loss of all.
        self.mean_lm = MeanMetric(nan_strategy=float("nan"))
        self.mean_reward = MeanMetric(nan_strategy=float("nan"))

    @property
    @abstractmethod
    def weights(self) -> tuple[float, float]:
        """Of the language-modelling loss and of the reward loss. An LM weight of 0 costs nothing."""

    def configure_callbacks(self) -> list[Callback]:
        """A test ends with a report."""
        return [*super().configure_callbacks(), RewardReport()]

    def setup(self, stage: str) -> None:
        """Weigh the thumbs by the training data's, where that was asked for.

        Raises:
            ValueError: ``positive_weight`` is None and the data does not say how many there are.
        """
        super().setup(stage)
        if self.positive_weight is not None or stage == "predict":
            return
        up, down = thumbs_counted(self.trainer.datamodule)  # type: ignore[attr-defined]
        if not up or not down:
            raise ValueError(
                f"positive_weight: null weighs thumbs up by the training data's thumbs down per thumb up, "
                f"but the data counted {up} up and {down} down (a stream, or loaders without a "
                "datamodule, count none). Give the number, 1.0 for no weight, or call "
                "`module.balance(up, down)` first."
            )
        self.balance(up, down)
        rank_zero_info(f"thumbs up weigh {self.positive_weight:.4g}: {up} up, {down} down")

    def balance(self, up: int, down: int) -> None:
        """Give both classes of thumbs the same weight in all: ``positive_weight = down / up``."""
        self.positive_weight = down / up

    def score_of(self, hidden: Tensor, batch: RatedBatch) -> Tensor:
        """Scores of rows whose last hidden states are known. Shape: ``(B,)``."""
        return self._head(at_last_response(hidden, sequences_of(batch).response_mask))

    def scores(self, batch: RatedBatch) -> Tensor:
        """Shape: ``(B,)``."""
        return self.score_of(self.hidden(batch), batch)

    def losses(self, batch: RatedBatch) -> tuple[Tensor, Tensor, Tensor, Tensor, Stats]:
        """Language-modelling loss, its tokens, reward loss, scores and statistics, from one forward."""
        if self.positive_weight is None:
            raise RuntimeError(
                f"{type(self).__name__}.positive_weight is None and no trainer has set it from its data: "
                "call `module.balance(up, down)`."
            )
        hidden = self.hidden(batch)
        scores = self.score_of(hidden, batch)
        reward_loss, stats = rating_loss(
            scores, batch, self.margin, self.positive_weight, self.center_coef
        )
        if self.weights[0] == 0:
            nothing = torch.zeros_like(reward_loss)
            return nothing, nothing.long(), reward_loss, scores, stats
        lm_loss, lm_tokens = imitation_loss(self.trunk, hidden, batch)
        return lm_loss, lm_tokens, reward_loss, scores, {"lm_loss": lm_loss.detach(), **stats}

    def objective(self, batch: RatedBatch) -> tuple[Tensor, Stats]:
        """``lm_weight * xent + reward_weight * L_RM``."""
        lm_loss, _, reward_loss, _, stats = self.losses(batch)
        lm_weight, reward_weight = self.weights
        return lm_weight * lm_loss + reward_weight * reward_loss, stats

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
        lengths = batch.response_mask.sum(1)
        self.metrics.update(scores, batch.label, batch.labelled, batch.pairs, lengths, batch.turns)

    test_step = validation_step

    def on_test_start(self) -> None:
        """Say so where nothing was trained and nothing loaded."""
        if self.rated == 0:
            rank_zero_warn(
                f"{type(self).__name__} is tested with a random reward head: it was neither trained in this "
                "process nor loaded from a checkpoint (`--ckpt_path last` finds none in a new run). Give "
                "--ckpt_path RUN/checkpoints/NAME.ckpt."
            )

    def on_validation_epoch_end(self) -> None:
        """Log the loss of all rows and the measures: a few in validation, all in a test."""
        means = (self.mean_lm, self.mean_reward)
        parts = zip(self.weights, means, strict=True)
        seen = [weight * mean.compute() for weight, mean in parts if mean.update_called]
        if seen:
            self.log(f"{self.held_out}/loss", torch.stack(seen).sum(), prog_bar=True)
        if self.metrics.update_called:
            self.measures = self.metrics.compute()
            for key, value in self.measures.values.items():
                if key in WATCHED or self.trainer.testing:
                    self.log(f"{self.held_out}/{key}", value, prog_bar=key in ("auroc", "accuracy"))
        for metric in (*means, self.metrics):
            metric.reset()

    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: RatedBatch, batch_idx: int) -> dict[str, Any]:
        """Row numbers and scores."""
        return {"row": batch.row, "score": self.scores(batch)}


def thumbs_counted(data: object) -> tuple[int, int]:
    """Thumbs up and down among a datamodule's training rows, by its report; 0 where it has none."""
    train = getattr(getattr(data, "report", None), "splits", {}).get("train")
    return getattr(train, "up", 0), getattr(train, "down", 0)
