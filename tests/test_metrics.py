"""The reward model's measures, and those of answers beside other answers, against hand counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from lightning_perl.metrics import (
    BINS,
    Judgements,
    RewardMeasures,
    RewardMetrics,
    distinct,
    fit_temperature,
    judgements_of,
    length_controlled_win_rate,
    reliability_of,
    resamples,
    rouge_l,
    wins,
    with_interval,
)

NO_PAIRS = torch.zeros(0, 2, dtype=torch.int64)


class Rated(NamedTuple):
    """What `RewardMetrics.update` takes."""

    scores: Tensor
    label: Tensor
    labelled: Tensor
    pairs: Tensor
    lengths: Tensor
    turns: Tensor


def slow_auroc(scores: Tensor, label: Tensor) -> float:
    """Share of (up, down) couples in the right order; a tie is half."""
    ups, downs = scores[label > 0.5].tolist(), scores[label <= 0.5].tolist()
    right = [1.0 if up > down else 0.5 * (up == down) for up in ups for down in downs]
    return float(sum(right) / len(right))


def thumbs(scores: Tensor, label: Tensor, lengths: Tensor | None = None) -> Rated:
    count = len(scores)
    lengths = torch.full((count,), 7) if lengths is None else lengths
    labelled = torch.ones(count, dtype=torch.bool)
    return Rated(scores, label, labelled, NO_PAIRS, lengths, torch.ones(count).long())


def pairs(
    chosen: Tensor, rejected: Tensor, lengths: Tensor | None = None, turns: Tensor | None = None
) -> Rated:
    """Chosen rows, then rejected rows; lengths ``(K, 2)``, turns ``(K,)``."""
    count = len(chosen)
    lengths = torch.full((count, 2), 7) if lengths is None else lengths
    turns = torch.ones(count).long() if turns is None else turns
    return Rated(
        torch.cat([chosen, rejected]),
        torch.full((2 * count,), 9.0),
        torch.zeros(2 * count, dtype=torch.bool),
        torch.stack([torch.arange(count), torch.arange(count) + count], 1),
        lengths.T.reshape(-1),
        turns.repeat(2),
    )


def random_thumbs(count: int, seed: int, share: float = 0.6) -> Rated:
    generator = torch.Generator().manual_seed(seed)
    label = (torch.rand(count, generator=generator) < share).float()
    scores = torch.randn(count, generator=generator) + label
    return thumbs(scores, label, torch.randint(3, 30, (count,), generator=generator))


def random_pairs(count: int, seed: int) -> Rated:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randn(count, generator=generator) + 0.5
    rejected = torch.randn(count, generator=generator)
    rejected[::7] = chosen[::7]  # ties
    lengths = torch.randint(3, 9, (count, 2), generator=generator)
    return pairs(chosen, rejected, lengths, torch.randint(0, 7, (count,), generator=generator))


def measured(*batches: Rated) -> RewardMeasures:
    metrics = RewardMetrics()
    for batch in batches:
        metrics.update(*batch)
    found: RewardMeasures = metrics.compute()
    return found


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("share", [0.156, 0.86])
def test_thumbs_over_batches(share: float, scale: float) -> None:
    rated = random_thumbs(90, 0, share)
    # Scores far from 0: as probabilities in fp32 the larger ones would all be 1.
    scores, label = scale * (rated.scores + 1), rated.label
    batches = zip(torch.split(scores, 20), torch.split(label, 20), strict=True)
    values = measured(*(thumbs(*batch) for batch in batches)).values
    keys = {"auroc", "balanced_accuracy", "length_auroc", "ece", "brier", "temperature"}
    assert set(values) == keys
    assert values["auroc"] == pytest.approx(slow_auroc(scores, label), abs=1e-6)
    recall = (scores[label > 0.5] > 0).float().mean()
    specificity = (scores[label < 0.5] <= 0).float().mean()
    assert values["balanced_accuracy"] == pytest.approx(((recall + specificity) / 2).item())
    assert values["length_auroc"] == 0.5  # all of one length


@pytest.mark.parametrize("lengths", [[5, 4, 2, 4], [2, 4, 5, 4]])
def test_ties_count_half_and_length_takes_the_better_direction(lengths: list[int]) -> None:
    scores, label = torch.tensor([2.0, 3.0, 2.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    values = measured(thumbs(scores, label, torch.tensor(lengths))).values
    assert values["auroc"] == values["length_auroc"] == 3.5 / 4


def test_pairs_over_batches() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0])
    rated = thumbs(scores, torch.zeros(4), torch.tensor([3, 5, 4, 4]))
    rated = rated._replace(labelled=torch.zeros(4, dtype=torch.bool))
    found = measured(
        rated._replace(pairs=torch.tensor([[0, 1], [2, 3]])),
        rated._replace(pairs=torch.tensor([[1, 0]])),
        rated._replace(pairs=torch.tensor([[0, 3]])),
    )
    assert found.values["accuracy"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)  # a tie is half right
    assert found.values["margin"] == pytest.approx((2 + 0 - 2 + 1) / 4)
    assert (found.pairs, found.thumbs) == (4, 0)
    assert (found.good_scores, found.bad_scores) == ([3, 2, 1, 3], [1, 2, 3, 2])
    # Shorter answers win more often: 1 minus it is the baseline.
    assert found.values["longer_wins"] == 1.5 / 4
    assert found.values["length_accuracy"] == 2.5 / 4


def test_slices_by_brute_force() -> None:
    rated = random_pairs(80, 3)
    rows = [
        (0.5 * ((won > lost) + (won >= lost)), int(longer), int(turns))
        for won, lost, longer, turns in zip(
            rated.scores[:80].tolist(),
            rated.scores[80:].tolist(),
            rated.lengths[:80] - rated.lengths[80:],
            rated.turns[:80],
            strict=True,
        )
    ]
    expected: dict[str, Callable[[int, int], bool]] = {
        "accuracy": lambda longer, turns: True,
        "accuracy_chosen_longer": lambda longer, turns: longer > 0,
        "accuracy_same_length": lambda longer, turns: longer == 0,
        "accuracy_chosen_shorter": lambda longer, turns: longer < 0,
        "accuracy_turns_1": lambda longer, turns: turns in (0, 1),
        "accuracy_turns_2_3": lambda longer, turns: turns in (2, 3),
        "accuracy_turns_4_up": lambda longer, turns: turns >= 4,
    }
    found = measured(rated)
    for key, belongs in expected.items():
        right = [vote for vote, longer, turns in rows if belongs(longer, turns)]
        assert right, key
        assert found.values[key] == pytest.approx(sum(right) / len(right)), key
        assert found.counts[key] == len(right), key
    both = torch.stack([rated.scores.double(), rated.lengths.double()])
    correlation = float(torch.corrcoef(both)[0, 1])
    assert found.values["length_score_correlation"] == pytest.approx(correlation, rel=1e-9)
    longer_wins = sum((longer > 0) + 0.5 * (longer == 0) for _, longer, _ in rows) / 80
    assert found.values["longer_wins"] == pytest.approx(longer_wins)
    assert found.values["length_accuracy"] == pytest.approx(max(longer_wins, 1 - longer_wins))


def test_calibration_is_torchmetrics_own() -> None:
    rated = random_thumbs(300, 5)
    probabilities = rated.scores.double().sigmoid()
    expected = binary_calibration_error(probabilities, rated.label.long(), n_bins=BINS)
    found = measured(rated)
    assert found.values["ece"] == pytest.approx(expected.item(), rel=1e-6)
    assert found.values["brier"] == pytest.approx(
        float(((probabilities - rated.label) ** 2).mean())
    )
    mixed = measured(rated, random_pairs(15, 2)).counts
    assert (mixed["ece"], mixed["length_score_correlation"]) == (315, 330)


def test_a_rating_is_an_outcome() -> None:
    ratings = torch.tensor([0.25, 0.75, 0.5])
    found = measured(thumbs(torch.zeros(3), ratings))
    assert found.values["brier"] == pytest.approx((0.0625 + 0.0625) / 3)
    assert found.values["ece"] == 0  # they are 0.5 on average, which is what was said
    assert len(found.good_scores) == 1  # above 0.5 it is a thumb up


def test_calibration_of_pairs_is_that_of_the_better_scored_answer() -> None:
    rated = random_pairs(70, 8)
    differences = (rated.scores[:70] - rated.scores[70:]).double()
    differences = differences[differences != 0]
    untied = pairs(differences, torch.zeros(len(differences)))
    confidence, right = differences.abs().sigmoid(), (differences > 0).long()
    values = measured(untied).values
    expected = binary_calibration_error(confidence, right, n_bins=BINS)
    assert values["ece"] == pytest.approx(expected.item(), rel=1e-6)
    brier = sum((1 - sigmoid(one)) ** 2 for one in differences.tolist()) / len(differences)
    assert values["brier"] == pytest.approx(brier)


def test_a_pair_counts_as_one_judgement() -> None:
    bins = reliability_of(judgements_of(torch.ones(3), torch.ones(3), torch.tensor([0.3, -2.0])))
    assert bins.counts.sum() == 5
    assert bins.counts[[4, 5]].tolist() == [0.5, 0.5]  # 0.43 and 0.57
    assert bins.predicted[bins.counts == 0].isnan().all()


def test_a_bin_holds_its_lower_edge_and_the_last_one_also_one() -> None:
    logits = torch.tensor([-1e9, 0.0, math.log(0.85 / 0.15), math.log(0.95 / 0.05), 1e9]).double()
    bins = reliability_of(Judgements(logits, torch.ones(5), torch.ones(5).double()))
    assert bins.counts.tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 1, 2]


@pytest.mark.parametrize("temperature", [1e-6, 0.2, 1.0, 4.0, 1e6])
def test_temperature_is_found_again(temperature: float) -> None:
    # Outcomes are the very probabilities, so the likelihood is greatest at the temperature itself.
    logits = torch.linspace(-5, 4, 50, dtype=torch.float64)
    judgements = Judgements(temperature * logits, logits.sigmoid(), torch.ones(50))
    assert fit_temperature(judgements) == pytest.approx(temperature, rel=1e-12)


def test_temperature_of_mixed_judgements_votes_once_each() -> None:
    # One pair, wrong, and one thumb, right, equally sure: together a coin, so T is infinite; a pair
    # with two votes would make it worse than a coin, one with none perfect.
    worthless = judgements_of(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([-2.0]))
    assert fit_temperature(worthless) == math.inf
    better = judgements_of(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([-1.9]))
    assert 10 < fit_temperature(better) < 1000


@pytest.mark.parametrize(
    ("logits", "outcomes", "temperature"),
    [
        ([1.0, -2.0], [1.0, 0.0], 0.0),  # never wrong: the surer the better
        ([1.0, -2.0], [0.0, 1.0], math.inf),  # always wrong
        ([0.0, 0.0], [0.0, 1.0], math.inf),  # says nothing
        ([1e-9, 5.0, -1e9], [1.0, 1.0, 0.0], 0.0),
    ],
)
def test_temperature_without_a_best(
    logits: list[float], outcomes: list[float], temperature: float
) -> None:
    scores, truth = torch.tensor([logits, outcomes]).double()
    judgements = Judgements(scores, truth, torch.ones(len(logits)))
    assert fit_temperature(judgements) == temperature


def test_which_answer_is_named_first_is_no_matter() -> None:
    rated = random_pairs(30, 4)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = Rated(*(part[order] for part in rated._replace(pairs=order)))
    shuffled = shuffled._replace(pairs=order.argsort()[rated.pairs].flip(0))
    assert measured(shuffled).values == pytest.approx(measured(rated).values)


def test_keys_only_for_what_was_seen() -> None:
    metrics = RewardMetrics()
    classless = {"ece", "brier", "temperature"}
    nothing, unrated = torch.zeros(0), thumbs(torch.tensor([2.0, 1.0]), torch.zeros(2))
    unrated = unrated._replace(labelled=torch.zeros(2, dtype=torch.bool))
    for batch, keys in (
        (thumbs(nothing, nothing), set()),
        (thumbs(torch.ones(3), torch.ones(3)), classless),  # one class only
        (thumbs(torch.ones(3), torch.zeros(3)), classless),  # the epoch before is forgotten
        (unrated, set()),
    ):
        metrics.update(*batch)
        assert set(metrics.compute().values) == keys
        metrics.reset()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_diverged_model_measures_nothing_good(broken: float) -> None:
    first, second = random_thumbs(9, 1), random_pairs(9, 2)
    first.scores[4] = broken
    second.scores[4] = broken
    values = measured(first, second).values
    assert math.isnan(values["temperature"])
    if math.isnan(broken):
        for key in ("auroc", "margin", "ece", "brier", "length_score_correlation"):
            assert math.isnan(values[key]), key


def test_a_rating_in_the_middle_is_no_thumb() -> None:
    scores, labels = (
        torch.tensor([2.0, -1.0, 5.0, -5.0, 9]),
        torch.tensor([1.0, 0.0, 0.5, 0.5, 0.0]),
    )
    rated = thumbs(scores, labels, torch.tensor([3, 2, 1, 9, 9]))
    # Nor is a row without a label, which the last one is.
    found = measured(rated._replace(labelled=torch.arange(5) < 4))
    assert found.values["auroc"] == found.values["balanced_accuracy"] == 1.0
    assert found.counts["auroc"] == 2
    assert (found.good_scores, found.bad_scores) == ([2.0], [-1.0])
    # Calibration is measured against the rating itself.
    assert found.counts["brier"] == found.thumbs == 4


# ---- answers beside other answers ----------------------------------------------------------------


def at_equal_length(won: Tensor, longer_by: Tensor) -> float:
    return float(length_controlled_win_rate(won, longer_by, torch.ones(1, len(won)).double()))


def test_wins_at_equal_length_are_those_of_the_logistic_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    longer_by = torch.randint(-9, 10, (200,), generator=generator).double()
    chances = (0.4 + 1.5 * (longer_by / longer_by.std(correction=0)).tanh()).sigmoid()
    won = torch.bernoulli(chances, generator=generator)
    won[::7] = 0.5
    inputs = (longer_by / longer_by.std(correction=0)).tanh()
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, tolerance_change=1e-14)

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = weights[0] + weights[1] * inputs
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, won, reduction="sum")
        value = value + 5e-4 * weights.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    assert at_equal_length(won, longer_by) == pytest.approx(float(weights[0].sigmoid()), abs=1e-6)
    # Every sample is fitted by itself: rows drawn twice count twice.
    counts = torch.stack([torch.ones(200), torch.full((200,), 2.0), won]).double()
    plain, twice, won_alone = length_controlled_win_rate(won, longer_by, counts).tolist()
    assert plain == pytest.approx(twice, abs=1e-4)
    assert won_alone > 0.9 > plain + 0.2


@pytest.mark.parametrize(
    ("won", "longer_by", "rate"),
    [
        ([1.0, 0.0, 1.0, 1.0], [5.0, 5.0, 5.0, 5.0], 0.75),  # one length: the plain win rate
        ([1.0, 1.0, 0.0, 0.0], [3.0, 1.0, -1.0, -3.0], 0.5),  # won by length alone
        ([1.0] * 50, [float(n) for n in range(50)], 1.0),  # all won: finite all the same
        ([0.5] * 4, [1.0, -2.0, 3.0, 0.0], 0.5),
    ],
)
def test_wins_at_equal_length_in_closed_form(
    won: list[float], longer_by: list[float], rate: float
) -> None:
    found = at_equal_length(torch.tensor(won), torch.tensor(longer_by))
    assert found == pytest.approx(rate, abs=1e-3)


def test_bootstrap_intervals_are_as_wide_as_the_standard_error_says() -> None:
    won = wins(torch.randn(400, generator=torch.Generator().manual_seed(1)) + 0.3)
    drawn = resamples(400, seed=2)
    assert torch.equal(drawn.sum(1), torch.full((1001,), 400.0, dtype=torch.float64))
    rate, (low, high) = with_interval(drawn @ won / 400)
    assert rate == pytest.approx(float(won.mean()))
    error = 1.96 * math.sqrt(rate * (1 - rate) / 400)
    assert [rate - low, high - rate] == pytest.approx([error, error], rel=0.15)


def test_distinct_and_rouge_by_hand() -> None:
    rows = [[1, 2, 1, 2], [1, 2], [3], []]
    assert [distinct(rows, n) for n in (1, 2, 5)] == [3 / 7, 2 / 4, 1.0]
    # The longest common subsequence of the first is "der hund bellt": 3 of 4 words and 3 of 3.
    texts = ["Der große Hund bellt.", "nothing at all", "Straße"]
    references = [["Nein", "der Hund, bellt"], ["something else"], ["straße!"]]
    assert rouge_l(texts, references) == pytest.approx((6 / 7 + 0 + 1) / 3)
