"""Measures of a reward model, and of answers beside other answers.

Shapes: ``B`` rows, ``K`` pairs, ``N`` rows with a label, or answers, ``J`` judgements, ``S`` bootstrap samples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional import pearson_corrcoef
from torchmetrics.functional.classification import binary_auroc, binary_recall, binary_specificity
from torchmetrics.functional.text import rouge_score
from torchmetrics.utilities import dim_zero_cat

BINS = 10


class Reliability(NamedTuple):
    """Predicted probabilities beside outcomes, in `BINS` bins of the predicted probability.

    Ours, because torchmetrics' calibration error takes outcomes of 0 and 1 only, no votes, and keeps to itself
    the bins that `RewardReport` draws. Shapes: ``(BINS,)``; means of an empty bin are NaN. A pair counts as half a
    judgement in two bins.
    """

    counts: Tensor
    predicted: Tensor
    observed: Tensor

    @property
    def error(self) -> float:
        """Expected calibration error: ``sum_b n_b / n |observed_b - predicted_b|`` (1706.04599, Eq. 3)."""
        gaps = (self.observed - self.predicted).abs() * self.counts / self.counts.sum()
        return float(gaps[self.counts > 0].sum())


class RewardMeasures(NamedTuple):
    """The results of `RewardMetrics`: every measure by its key, and the number of rows it is taken over.

    ``good_scores`` are those of chosen answers and of thumbs up, ``bad_scores`` those of the others.
    """

    values: dict[str, float]
    counts: dict[str, int]
    reliability: Reliability
    good_scores: list[float]
    bad_scores: list[float]
    pairs: int
    thumbs: int


class Judgements(NamedTuple):
    """Logits beside outcomes: a thumb once, a pair in both orders.

    A pair is judged by ``r_w - r_l`` with outcome 1 and by ``r_l - r_w`` with outcome 0, each with half a vote.
    So it does not matter which answer is named first, and calibration is that of "the better-scored answer is
    the preferred one". Shapes: ``(J,)``, float64.
    """

    logits: Tensor
    outcomes: Tensor
    votes: Tensor


class RewardMetrics(Metric):
    """Measures of scores on pairs and thumbs, and of what length alone would give: keys of docs/logged_keys.md.

    Thumbs have ``auroc``, ``balanced_accuracy`` (of ups above 0 and downs at or below 0), ``length_auroc``; pairs,
    a tie counting half, ``accuracy`` of all and by the answers' tokens and the prompt's turns, ``margin``,
    ``longer_wins``, ``length_accuracy``. Both have ``ece``, ``brier`` and ``temperature`` over all `Judgements`,
    without the training margin, and ``length_score_correlation``. What length gives is taken in the direction
    that is better on these very rows, so that baseline is rather too high than too low.

    A rating between 0 and 1 is an outcome as it is, and a thumb up above 0.5 where a class is needed. A key is
    there only if there were rows for it; the ``auroc``s and ``balanced_accuracy`` need both classes.
    """

    full_state_update = False
    thumbs: list[Tensor]
    pairs: list[Tensor]

    def __init__(self) -> None:
        # Every rank has all rows.
        super().__init__(sync_on_compute=False)
        # The rows themselves, four numbers each: an AUROC cannot be added up.
        self.add_state("thumbs", [], dist_reduce_fx="cat")
        self.add_state("pairs", [], dist_reduce_fx="cat")

    def update(
        self,
        scores: Tensor,
        label: Tensor,
        labelled: Tensor,
        pairs: Tensor,
        lengths: Tensor,
        turns: Tensor,
    ) -> None:
        """Add a batch: fields of a `RatedBatch`, and each answer's tokens. Shapes: ``(B,)``, pairs ``(K, 2)``."""
        rows = torch.stack([part.to(scores.dtype) for part in (scores, label, lengths, turns)], -1)
        self.thumbs.append(rows[labelled])
        self.pairs.append(rows[pairs])

    def compute(self) -> RewardMeasures:
        """Measures of all rows since the last reset, in float64."""
        thumbs, pairs = _gathered(self.thumbs, (0, 4)), _gathered(self.pairs, (0, 2, 4))
        scores, labels, lengths, _ = thumbs.unbind(-1)
        chosen, _, chosen_length, turns = pairs[:, 0].unbind(-1)
        rejected, _, rejected_length, _ = pairs[:, 1].unbind(-1)
        judgements = judgements_of(scores, labels, chosen - rejected)
        all_scores = torch.cat([scores, chosen, rejected])
        all_lengths = torch.cat([lengths, chosen_length, rejected_length])
        measures = {
            **thumb_measures(scores, labels, lengths),
            **pair_measures(chosen - rejected, chosen_length - rejected_length, turns),
            **calibration_measures(judgements, len(scores) + len(chosen)),
            **length_measures(all_scores, all_lengths),
        }
        return RewardMeasures(
            {key: value for key, (value, _) in measures.items()},
            {key: count for key, (_, count) in measures.items()},
            reliability_of(judgements),
            [*chosen.tolist(), *scores[labels > 0.5].tolist()],
            [*rejected.tolist(), *scores[labels < 0.5].tolist()],
            len(chosen),
            len(scores),
        )


def _gathered(state: list[Tensor] | Tensor, empty: tuple[int, ...]) -> Tensor:
    """A state's rows; a list before ranks are gathered, a tensor after. On the CPU, for float64."""
    if isinstance(state, list) and not state:
        return torch.zeros(empty, dtype=torch.float64)
    rows: Tensor = dim_zero_cat(state)
    return rows.cpu().double()


Measures = dict[str, tuple[float, int]]
"""Values by key, each with the number of rows or pairs it is taken over."""


def thumb_measures(scores: Tensor, labels: Tensor, lengths: Tensor) -> Measures:
    """Measures of thumbs; none unless both classes are there. Shapes: ``(N,)``.

    A rating of 0.5 is neither up nor down and does not count here.
    """
    sided = labels != 0.5
    scores, lengths, up = scores[sided], lengths[sided], labels[sided] > 0.5
    if bool(up.all()) or not bool(up.any()):
        return {}
    above = (scores > 0).long()
    recalls = binary_recall(above, up.long()) + binary_specificity(above, up.long())
    by_length = auroc(lengths, up)
    return {
        "auroc": (auroc(scores, up), len(up)),
        "balanced_accuracy": (float(recalls) / 2, len(up)),
        "length_auroc": (max(by_length, 1 - by_length), len(up)),
    }


def auroc(scores: Tensor, up: Tensor) -> float:
    """AUROC of any real scores, NaN where a score is. Shapes: ``(N,)``."""
    if bool(scores.isnan().any()):
        return math.nan
    # torchmetrics takes a sigmoid of logits, which makes ties of large ones; only the order counts, so ranks
    # give the same value.
    ranks = torch.unique(scores, return_inverse=True)[1].double()
    return float(binary_auroc(ranks / ranks.max().clamp(min=1), up.long()))


def pair_measures(margins: Tensor, longer_by: Tensor, turns: Tensor) -> Measures:
    """Measures of pairs by ``r_w - r_l`` and by how much longer the chosen answer is. Shapes: ``(K,)``."""
    if not len(margins):
        return {}
    right = wins(margins)
    longer_wins = float(wins(longer_by).mean())
    measures = {
        "accuracy": (float(right.mean()), len(right)),
        "margin": (float(margins.mean()), len(right)),
        "longer_wins": (longer_wins, len(right)),
        "length_accuracy": (max(longer_wins, 1 - longer_wins), len(right)),
    }
    slices = {
        "accuracy_chosen_longer": longer_by > 0,
        "accuracy_same_length": longer_by == 0,
        "accuracy_chosen_shorter": longer_by < 0,
        "accuracy_turns_1": turns <= 1,
        "accuracy_turns_2_3": (turns > 1) & (turns <= 3),
        "accuracy_turns_4_up": turns > 3,
    }
    for key, rows in slices.items():
        if bool(rows.any()):
            measures[key] = (float(right[rows].mean()), int(rows.sum()))
    return measures


def wins(differences: Tensor) -> Tensor:
    """1, 0, or 0.5 for a tie."""
    return (differences > 0).double() + 0.5 * (differences == 0)


def calibration_measures(judgements: Judgements, count: int) -> Measures:
    """Calibration of the probabilities; none without judgements."""
    if not count:
        return {}
    errors = judgements.votes * (judgements.logits.sigmoid() - judgements.outcomes) ** 2
    return {
        "ece": (reliability_of(judgements).error, count),
        "brier": (float(errors.sum() / judgements.votes.sum()), count),
        "temperature": (fit_temperature(judgements), count),
    }


def length_measures(scores: Tensor, lengths: Tensor) -> Measures:
    """Correlation of scores with lengths; none where either is constant. Shapes: ``(N,)``."""
    if not bool(scores.isfinite().all()):
        return {"length_score_correlation": (math.nan, len(scores))}
    if len(scores) < 2 or bool((scores == scores[0]).all()) or bool((lengths == lengths[0]).all()):
        return {}
    return {"length_score_correlation": (float(pearson_corrcoef(scores, lengths)), len(scores))}


def judgements_of(scores: Tensor, labels: Tensor, margins: Tensor) -> Judgements:
    """Thumbs ``(N,)`` and pairs ``(K,)`` as logits with outcomes."""
    won, lost = torch.ones_like(margins), torch.zeros_like(margins)
    return Judgements(
        torch.cat([scores, margins, -margins]),
        torch.cat([labels, won, lost]),
        torch.cat([torch.ones_like(scores), won / 2, won / 2]),
    )


def reliability_of(judgements: Judgements) -> Reliability:
    """Bins of equal width; one that reads from 0.3 to 0.4 holds 0.3 itself, the last one also 1."""
    probabilities = judgements.logits.sigmoid()
    bins = (probabilities * BINS).long().clamp(0, BINS - 1)

    def total(weights: Tensor) -> Tensor:
        return torch.bincount(bins, weights, BINS)

    votes, counts = judgements.votes, total(judgements.votes)
    predicted, observed = total(votes * probabilities), total(votes * judgements.outcomes)
    return Reliability(counts, predicted / counts, observed / counts)


def fit_temperature(judgements: Judgements) -> float:
    """The T at which ``sigmoid(logit / T)`` fits the outcomes best (temperature scaling, 1706.04599).

    The negative log-likelihood is convex in ``w = 1 / T``; its slope is
    ``sum (sigmoid(w z) - y) z``, whose root is bracketed and bisected in float64.

    Above 1 for scores that are too sure, below 1 for too timid ones. 0 where the scores' signs are never wrong,
    infinity where they are no better than a coin, NaN where a score is not finite.
    """
    logits, outcomes, votes = judgements
    if not bool(logits.isfinite().all()):
        return math.nan

    def slope(inverse: float) -> float:
        return float((votes * ((logits * inverse).sigmoid() - outcomes) * logits).sum())

    if slope(0.0) >= 0:
        return math.inf
    if float((votes * ((logits > 0).double() - outcomes) * logits).sum()) <= 0:
        return 0.0
    high = 1 / float(logits.abs().max())
    while slope(high) < 0:
        high *= 2
    low = high / 2
    while slope(low) > 0:
        low /= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)


def resamples(count: int, seed: int, samples: int = 1000) -> Tensor:
    """How often each of ``count`` rows is drawn in each bootstrap sample; the first sample is the rows themselves.

    Shape: ``(S + 1, N)``, float64.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (samples, count), generator=generator)
    counts = torch.zeros(samples, count, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    return torch.cat([torch.ones_like(counts[:1]), counts])


def with_interval(values: Tensor) -> tuple[float, tuple[float, float]]:
    """A statistic of the rows, and its 95% percentile interval, from its values over `resamples`."""
    low, high = values[1:].quantile(torch.tensor([0.025, 0.975]).to(values)).tolist()
    return float(values[0]), (low, high)


def length_controlled_win_rate(won: Tensor, longer_by: Tensor, counts: Tensor) -> Tensor:
    """Win rate at equal length, of each of several samples of the rows.

    The regression of AlpacaEval 2 (2404.04475) without its term for how hard a prompt is: ``sigmoid(a)`` of
    ``P(win) = sigmoid(a + b tanh(d / sd(d)))``, ``d`` being by how many tokens the answer is longer, fitted to the
    wins by maximum likelihood (Newton's method). A ridge of 0.001 keeps ``a`` and ``b`` finite where all is won.

    Args:
        won: 1, 0, or 0.5 for a tie. Shape: ``(N,)``.
        longer_by: Shape: ``(N,)``.
        counts: How often each row is in each sample. Shape: ``(S, N)``.

    Returns:
        Shape: ``(S,)``, float64.
    """
    won, longer_by = won.double(), longer_by.double()
    spread = longer_by.std(correction=0)
    # Where all differ by the same length, its effect cannot be told from the win rate.
    scaled = longer_by / spread if spread > 0 else torch.zeros_like(longer_by)
    inputs = torch.stack([torch.ones_like(won), scaled.tanh()], -1)
    ridge = 1e-3 * torch.eye(2, dtype=torch.float64)
    weights = torch.zeros(len(counts), 2, dtype=torch.float64)
    for _ in range(50):
        expected = (weights @ inputs.T).sigmoid()
        slope = (counts * (won - expected)) @ inputs - weights @ ridge
        curvature = torch.einsum(
            "sn,ni,nj->sij", counts * expected * (1 - expected), inputs, inputs
        )
        # Steps of at most 1: far from the optimum Newton's own may be too long.
        weights = weights + torch.linalg.solve(curvature + ridge, slope).clamp(-1, 1)
    return weights[:, 0].sigmoid()


def distinct(rows: Sequence[Sequence[int]], n: int) -> float:
    """Different runs of ``n`` neighbouring tokens over all of them (distinct-n, 1510.03055); 1 without any."""
    runs = [tuple(row[start : start + n]) for row in rows for start in range(len(row) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean ROUGE-L F1 of words without case and punctuation, each text beside the nearest of its references."""

    def words(text: str) -> str:
        # torchmetrics' own keeps the letters a to z only.
        return re.sub(r"\W+", " ", text.lower())

    beside = [list(several) for several in references]
    found = rouge_score(list(texts), beside, "best", normalizer=words, rouge_keys="rougeL")
    return float(found["rougeL_fmeasure"])
