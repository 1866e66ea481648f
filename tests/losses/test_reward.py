"""Reward losses, against loops over Python floats."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.functional.test_masked import check_hidden, random_mask, random_values


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def check_bradley_terry(fn: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> None:
    chosen = (2 * random_values(0, 9)).requires_grad_()
    rejected = (2 * random_values(1, 9)).requires_grad_()
    with torch.no_grad():
        chosen[4] = rejected[4]  # a tie
    pairs = list(zip(chosen.tolist(), rejected.tolist(), strict=True))
    for arguments, margin in (((), 0.0), ((0.75,), 0.75), ((-1.5,), -1.5)):
        loss, stats = fn(chosen, rejected, *arguments)
        expected = sum(-math.log(sigmoid(won - lost - margin)) for won, lost in pairs) / 9
        accuracy = (
            sum(1.0 if won > lost else 0.5 if won == lost else 0.0 for won, lost in pairs) / 9
        )
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        assert stats["accuracy"].item() == pytest.approx(accuracy, rel=1e-12)
        assert stats["margin"].item() == pytest.approx(sum(won - lost for won, lost in pairs) / 9)
        assert not any(one.requires_grad for one in stats.values())
        slopes = [-sigmoid(margin - (won - lost)) / 9 for won, lost in pairs]
        gradients = torch.autograd.grad(loss, [chosen, rejected])
        assert_close(gradients[0], torch.tensor(slopes, dtype=torch.float64))
        assert_close(gradients[1], -gradients[0])
    nothing, stats = fn(torch.zeros(0), torch.zeros(0))
    assert [nothing.item(), *(one.item() for one in stats.values())] == [0, 0, 0]
    hopeless, _ = fn(torch.tensor([-500.0]), torch.tensor([500.0]))
    assert hopeless.item() == 1000  # its distance, where exp would overflow


def check_centering(fn: Callable[..., Tensor]) -> None:
    chosen, rejected = random_values(0, 9).requires_grad_(), random_values(1, 9).requires_grad_()
    loss = fn(chosen, rejected)
    sums = [won + lost for won, lost in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert loss.item() == pytest.approx(sum(one**2 for one in sums) / 9, rel=1e-12)
    for gradient in torch.autograd.grad(loss, [chosen, rejected]):
        assert_close(gradient, torch.tensor([2 * one / 9 for one in sums], dtype=torch.float64))
    assert fn(torch.zeros(0), torch.zeros(0)).item() == 0


def check_thumbs(fn: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> None:
    scores, labelled = 2 * random_values(0, 40), random_mask(3, 40)
    labels = random_mask(4, 40).long()
    counted = [
        (score, up)
        for score, up, counts in zip(
            scores.tolist(), labels.tolist(), labelled.tolist(), strict=True
        )
        if counts
    ]
    assert {up for _, up in counted} == {0, 1}
    for arguments, weight in (((), 1.0), ((3.0,), 3.0), ((0.2,), 0.2)):
        leaf = scores.clone().requires_grad_()
        loss, stats = fn(leaf, labels, labelled, *arguments)
        total = right = 0.0
        slopes = []
        for score, up in counted:
            total -= weight * math.log(sigmoid(score)) if up else math.log(1 - sigmoid(score))
            right += (score > 0) == (up == 1)
            slopes.append(weight * (sigmoid(score) - 1) if up else sigmoid(score))
        assert loss.item() == pytest.approx(total / len(counted), rel=1e-12)
        assert stats["accuracy"].item() == pytest.approx(right / len(counted), rel=1e-12)
        mean_score = sum(score for score, _ in counted) / len(counted)
        assert stats["score"].item() == pytest.approx(mean_score, rel=1e-12)
        assert not any(one.requires_grad for one in stats.values())
        (gradient,) = torch.autograd.grad(loss, leaf)
        expected = torch.tensor(slopes, dtype=torch.float64) / len(counted)
        assert_close(gradient[labelled], expected)

    def flat(tensor: Tensor) -> tuple[Tensor, ...]:
        found, statistics = fn(tensor, labels, labelled, 3.0)
        return found, *statistics.values()

    check_hidden(flat, [scores], labelled)
    # A rating is that much of a thumbs up and the rest of a thumbs down.
    everyone, rating = torch.ones(40, dtype=torch.bool), random_values(5, 40).sigmoid()
    ups = fn(scores, torch.ones(40), everyone, 3.0)[0] * 40
    mixed, stats = fn(scores, rating, everyone, 3.0)
    parts = [
        -3.0 * y * math.log(sigmoid(score)) - (1 - y) * math.log(sigmoid(-score))
        for score, y in zip(scores.tolist(), rating.tolist(), strict=True)
    ]
    assert mixed.item() == pytest.approx(sum(parts) / 40, rel=1e-12)
    assert ups.item() == pytest.approx(-3.0 * sum(math.log(sigmoid(s)) for s in scores.tolist()))
    sides = [(s > 0) == (y > 0.5) for s, y in zip(scores.tolist(), rating.tolist(), strict=True)]
    assert stats["accuracy"].item() == pytest.approx(sum(sides) / 40)
    for filler in (-1, -100, 7):  # whatever an unlabelled row's label holds
        other, _ = fn(scores, torch.where(labelled, labels, filler), labelled, 3.0)
        assert_close(other, flat(scores)[0], rtol=0, atol=0)
    hopeless, _ = fn(torch.tensor([-1000.0, 1000.0]), torch.tensor([1, 0]), everyone[:2])
    assert hopeless.item() == 1000
    leaf = scores.clone().requires_grad_()
    loss, stats = fn(leaf, labels, ~everyone)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert [loss.item(), stats["accuracy"].item(), stats["score"].item()] == [0, 0, 0]
    assert not gradient.any()
