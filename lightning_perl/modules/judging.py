"""The skeleton of supervised modules that give answers a score, which held-out judgements are measured by."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

from lightning_perl.batches import RatedBatch
from lightning_perl.callbacks.reward_report import RewardReport
from lightning_perl.metrics import RewardMeasures, RewardMetrics
from lightning_perl.modules.supervised import Supervised

WATCHED = ("auroc", "balanced_accuracy", "accuracy", "margin", "ece", "brier")
"""Measures that validation logs; a test logs all of them."""


class Judging(Supervised):
    """Measures its scores on pairs and thumbs. Leaves fill `scores`, and call `measure` in validation.

    After a test ``measures`` holds the results, for the report. Arguments as `Supervised`.
    """

    def __init__(self, trunk: str, **settings: Any) -> None:
        super().__init__(trunk, **settings)
        self.metrics = RewardMetrics()
        self.measures: RewardMeasures | None = None

    @abstractmethod
    def scores(self, batch: RatedBatch) -> Tensor:
        """Scores of the responses; higher is better. Shape: ``(B,)``."""

    def configure_callbacks(self) -> list[Callback]:
        """A test ends with a report."""
        return [*super().configure_callbacks(), RewardReport()]

    def measure(self, scores: Tensor, batch: RatedBatch) -> None:
        """Add the scores of a batch to what is measured."""
        lengths = batch.response_mask.sum(1)
        self.metrics.update(scores, batch.label, batch.labelled, batch.pairs, lengths, batch.turns)

    def on_validation_epoch_end(self) -> None:
        """Log the measures of all rows: a few in validation, all in a test."""
        if self.metrics.update_called:
            self.measures = self.metrics.compute()
            for key, value in self.measures.values.items():
                if key in WATCHED or self.trainer.testing:
                    self.log(f"{self.held_out}/{key}", value, prog_bar=key in ("auroc", "accuracy"))
        self.metrics.reset()

    def on_test_epoch_end(self) -> None:
        """As after a validation."""
        self.on_validation_epoch_end()

    def predict_step(self, batch: RatedBatch, batch_idx: int) -> dict[str, Any]:
        """Row numbers, which answer of a pair it is, and scores."""
        answers: list[str | None] = [None] * len(batch.row)
        for chosen, rejected in batch.pairs.tolist():
            answers[chosen], answers[rejected] = "chosen", "rejected"
        return {"row": batch.row, "answer": answers, "score": self.scores(batch)}
