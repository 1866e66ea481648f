"""The reward model's measures against hand counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_perl.metrics import RewardMetrics

NO_PAIRS = torch.zeros(0, 2, dtype=torch.int64)


def slow_auroc(scores: Tensor, label: Tensor) -> float:
    """Share of (up, down) couples in the right order; a tie is half."""
    ups, downs = scores[label > 0.5].tolist(), scores[label < 0.5].tolist()
    right = [1.0 if up > down else 0.5 * (up == down) for up in ups for down in downs]
    return float(sum(right) / len(right))


def everything_labelled(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.bool)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("share", [0.156, 0.86])
def test_thumbs_over_batches(share: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    label = (torch.rand(90, generator=generator) < share).float()
    # Scores far from 0: as probabilities in fp32 the larger ones would all be 1.
    scores = scale * (torch.randn(90, generator=generator) + label + 1)
    metrics = RewardMetrics()
    for start in range(0, 90, 20):
        rows = slice(start, start + 20)
        metrics.update(scores[rows], label[rows], everything_labelled(90)[rows], NO_PAIRS)
    values = metrics.compute()
    assert set(values) == {"auroc", "balanced_accuracy"}
    assert values["auroc"].item() == pytest.approx(slow_auroc(scores, label), abs=1e-6)
    recall = (scores[label > 0.5] > 0).float().mean()
    specificity = (scores[label < 0.5] <= 0).float().mean()
    assert values["balanced_accuracy"].item() == pytest.approx(((recall + specificity) / 2).item())


def test_ties_count_half() -> None:
    metrics = RewardMetrics()
    label = torch.tensor([1.0, 0.0, 1.0, 0.0])
    metrics.update(torch.tensor([2.0, 2.0, 3.0, 1.0]), label, everything_labelled(4), NO_PAIRS)
    assert metrics.compute()["auroc"] == pytest.approx(3.5 / 4)


def test_pairs_over_batches() -> None:
    metrics = RewardMetrics()
    unlabelled = torch.zeros(4, dtype=torch.bool)
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0])
    metrics.update(scores, torch.zeros(4), unlabelled, torch.tensor([[0, 1], [2, 3]]))
    metrics.update(scores, torch.zeros(4), unlabelled, torch.tensor([[1, 0]]))
    values = metrics.compute()
    assert set(values) == {"accuracy", "margin"}
    assert values["accuracy"] == pytest.approx((1 + 0.5 + 0) / 3)  # a tie is half right
    assert values["margin"] == pytest.approx((2 + 0 - 2) / 3)


def test_unlabelled_rows_are_not_judged() -> None:
    metrics = RewardMetrics()
    scores, label = torch.tensor([1.0, -1.0, 9.0, 9.0]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    metrics.update(scores, label, torch.tensor([True, True, False, False]), NO_PAIRS)
    assert metrics.compute()["auroc"] == 1


def test_keys_only_for_what_was_seen() -> None:
    metrics = RewardMetrics()
    assert metrics.compute() == {}
    metrics.update(torch.ones(3), torch.ones(3), everything_labelled(3), NO_PAIRS)
    assert metrics.compute() == {}  # one class only
    metrics.update(torch.ones(3), torch.zeros(3), everything_labelled(3), NO_PAIRS)
    assert metrics.compute() == {}  # the epoch before is forgotten
    metrics.update(torch.tensor([2.0, 1.0]), torch.zeros(2), ~everything_labelled(2), NO_PAIRS)
    assert metrics.compute() == {}


def test_nothing_of_it_is_stored() -> None:
    metrics = RewardMetrics()
    metrics.update(torch.ones(2), torch.tensor([0.0, 1.0]), everything_labelled(2), NO_PAIRS)
    assert metrics.state_dict() == {}
    assert list(metrics.parameters()) == []
