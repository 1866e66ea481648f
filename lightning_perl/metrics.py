"""Measures of a reward model, as torchmetrics, so that they add up over batches and ranks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAUROC, BinaryRecall, BinarySpecificity


class RewardMetrics(nn.Module):
    """Thumbs: AUROC and balanced accuracy. Pairs: accuracy and margin.

    Keys appear only for what was seen: AUROC and balanced accuracy need both classes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.auroc = BinaryAUROC()
        self.recall = BinaryRecall()
        self.specificity = BinarySpecificity()
        self.positive = MeanMetric()
        self.accuracy = MeanMetric()
        self.margin = MeanMetric()

    def update(self, scores: Tensor, label: Tensor, labelled: Tensor, pairs: Tensor) -> None:
        """Add a batch.

        Args:
            scores: Shape: ``(B,)``.
            label: 1 or 0. Shape: ``(B,)``.
            labelled: Shape: ``(B,)``, bool.
            pairs: Rows (chosen, rejected). Shape: ``(K, 2)``.
        """
        if bool(labelled.any()):
            # Into (0, 1): torchmetrics would squash some batches' logits and not others'. Not by a
            # sigmoid, which is 1 in fp32 from 17 on and makes ties of scores that differ.
            seen, target = (1 + F.softsign(scores[labelled])) / 2, label[labelled].long()
            for metric in (self.auroc, self.recall, self.specificity):
                metric.update(seen, target)
            self.positive.update(target.float())
        if len(pairs):
            difference = scores[pairs[:, 0]] - scores[pairs[:, 1]]
            self.accuracy.update((difference > 0).float() + 0.5 * (difference == 0).float())
            self.margin.update(difference)

    def compute(self) -> dict[str, Tensor]:
        """Values of what was seen since the last reset, which this is."""
        values = {}
        if self.positive.update_called and 0 < float(self.positive.compute()) < 1:
            values["auroc"] = self.auroc.compute()
            values["balanced_accuracy"] = (self.recall.compute() + self.specificity.compute()) / 2
        if self.accuracy.update_called:
            values["accuracy"] = self.accuracy.compute()
            values["margin"] = self.margin.compute()
        for metric in self.children():
            metric.reset()  # type: ignore[operator]
        return values
