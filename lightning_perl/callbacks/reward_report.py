"""A reward model's measures at the end of a test: a table and two pictures."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_perl.callbacks.console import show
from lightning_perl.callbacks.run_folder import run_folder
from lightning_perl.callbacks.wandb_summary import wandb_loggers
from lightning_perl.metrics import BINS, RewardMeasures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Key, name in the table, key of what length alone gives.
_LINES = (
    ("auroc", "AUROC", "length_auroc"),
    ("balanced_accuracy", "balanced accuracy", ""),
    ("accuracy", "pair accuracy", "length_accuracy"),
    ("accuracy_chosen_longer", "  chosen is longer", ""),
    ("accuracy_same_length", "  same length", ""),
    ("accuracy_chosen_shorter", "  chosen is shorter", ""),
    ("accuracy_turns_1", "  prompt of 1 turn", ""),
    ("accuracy_turns_2_3", "  of 2 or 3 turns", ""),
    ("accuracy_turns_4_up", "  of 4 turns or more", ""),
    ("margin", "pair margin", ""),
    ("ece", "ECE", ""),
    ("brier", "Brier score", ""),
    ("temperature", "fitted temperature", ""),
    ("length_score_correlation", "length-score correlation", ""),
)
_GOOD, _BAD, _GREY = "#1b6ca8", "#d1603d", "#777777"


class RewardReport(Callback):
    """At the end of ``test``, prints the reward model's measures and draws them.

    The table compares the model with the length of the answers alone: a model that is no better scores length.
    Writes ``reliability.png`` and ``scores.png`` into the run's folder, and to Weights & Biases as
    ``test/reliability`` and ``test/scores``.
    """

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the folder, which needs every rank."""
        run_folder(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and draw on the first process, if anything was rated."""
        measures: RewardMeasures | None = getattr(pl_module, "measures", None)
        if measures is None or not measures.values or not trainer.is_global_zero:
            return
        splits = getattr(getattr(trainer, "datamodule", None), "splits", None)
        same = splits is not None and splits.test is splits.val
        rows = "the validation rows (there are no test rows)" if same else "test rows"
        show("\n".join(reward_table(measures, rows)))
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {"reliability": reliability_figure(measures), "scores": score_figure(measures)}
        for name, figure in pictures.items():
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=150)
            for logger in wandb_loggers(trainer):
                logger.log_image(f"test/{name}", [str(path)])
        rank_zero_info(f"drew {' and '.join(pictures)} in {folder}")


def reward_table(measures: RewardMeasures, rows: str = "test rows") -> list[str]:
    """One line per measure: the model's value, that of length alone, and the number of rows."""
    lines = [
        f"reward model on {rows}: {rated_rows(measures)}",
        f"  {'':26}{'model':>10}{'length':>10}{'rows':>10}",
    ]
    for key, name, baseline in _LINES:
        if key in measures.values:
            alone = f"{measures.values[baseline]:.3f}" if baseline else ""
            value, count = measures.values[key], measures.counts[key]
            lines.append(f"  {name:26}{value:10.3f}{alone:>10}{count:10d}")
    return lines


def rated_rows(measures: RewardMeasures) -> str:
    """How many pairs and thumbs there were."""
    up = len(measures.good_scores) - measures.pairs
    down = len(measures.bad_scores) - measures.pairs
    parts = [f"{measures.pairs} pairs"] if measures.pairs else []
    if measures.thumbs:
        middle = measures.thumbs - up - down
        between = f", {middle} in the middle" if middle else ""
        parts.append(f"{measures.thumbs} thumbs ({up} up, {down} down{between})")
    return ", ".join(parts)


def headline(measures: RewardMeasures) -> str:
    """The model beside length alone, in a few words."""
    return "; ".join(
        f"{name} {measures.values[key]:.3f}, length alone {measures.values[baseline]:.3f}"
        for key, name, baseline in _LINES
        if baseline and key in measures.values
    )


def reliability_figure(measures: RewardMeasures) -> Figure:
    """Predicted against observed shares, above the number of judgements in each bin.

    A pair is predicted in both orders, so pairs alone are shown from 0.5 on: the rest is the mirror image.
    """
    from matplotlib.figure import Figure

    thumbs, values = measures.thumbs > 0, measures.values
    start, bar_label = (0.0, "judgements") if thumbs else (0.5, "pairs")
    counts, predicted, observed = (part[int(start * BINS) :] for part in measures.reliability)
    figure = Figure(figsize=(5.6, 6.4), layout="constrained")
    ratios = {"height_ratios": [3.2, 1], "hspace": 0.03}
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw=ratios)
    figure.suptitle(
        f"Reliability: ECE {values['ece']:.3f}, Brier {values['brier']:.3f}", fontsize=13
    )
    upper.set_title("\n".join(filter(None, (rated_rows(measures), headline(measures)))), fontsize=9)
    upper.plot([start, 1], [start, 1], "--", color=_GREY, linewidth=1, label="calibrated")
    points = [part[counts > 0].tolist() for part in (predicted, observed)]
    upper.plot(*points, "o-", color=_GOOD, label="reward model")
    upper.set_ylabel("share that came true" if thumbs else "share of pairs ranked right")
    upper.set_ylim(-0.03, 1.03)
    upper.legend(loc="upper left", frameon=False)
    centers = [start + (number + 0.5) / BINS for number in range(len(counts))]
    # Half of every pair is in the mirror image.
    heights = (counts if thumbs else 2 * counts).tolist()
    lower.bar(centers, heights, width=0.92 / BINS, color=_GOOD, alpha=0.75)
    lower.set_ylabel(bar_label)
    lower.set_xlim(start, 1)
    pairs_label = "probability of the better-scored answer, sigmoid of the score difference"
    lower.set_xlabel("predicted probability" if thumbs else pairs_label)
    _tidy(upper)
    _tidy(lower)
    return figure


def score_figure(measures: RewardMeasures) -> Figure:
    """Finite scores of preferred and of other answers, each as shares of its own kind."""
    from matplotlib.figure import Figure

    names = ("chosen or up", "rejected or down")
    if not (measures.thumbs and measures.pairs):
        names = ("thumbs up", "thumbs down") if measures.thumbs else ("chosen", "rejected")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    good, bad = (list(filter(isfinite, s)) for s in (measures.good_scores, measures.bad_scores))
    low, high = min([*good, *bad], default=0.0), max([*good, *bad], default=0.0)
    edges = [low + (high - low) * number / 30 for number in range(31)] if high > low else 1
    for name, scores, color in zip(names, (good, bad), (_GOOD, _BAD), strict=True):
        if not scores:
            continue
        mean = sum(scores) / len(scores)
        label = f"{name}: {len(scores)}, mean {mean:+.2f}"
        shares = [1 / len(scores)] * len(scores)
        axes.hist(scores, bins=edges, weights=shares, color=color, alpha=0.5, label=label)
        axes.axvline(mean, ymax=1 / 1.3, color=color, linestyle="--", linewidth=1.2)
    figure.suptitle("Scores", fontsize=13)
    axes.set_title(headline(measures), fontsize=9)
    axes.set_xlabel("score; dashed lines are means")
    axes.set_ylabel("share of the answers of its kind")
    axes.set_ylim(top=1.3 * axes.get_ylim()[1])  # room for the legend
    if good or bad:
        axes.legend(loc="upper right", frameon=False)
    _tidy(axes)
    return figure


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
