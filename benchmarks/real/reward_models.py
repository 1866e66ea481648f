"""PERL's Table 2 on a model that can speak: reward models of LoRA rank 1 to 64 and full tuning.

    python benchmarks/real/reward_models.py --trunk runs/real/trunk --data_dir ../shared/data
    python benchmarks/real/reward_models.py --trunk runs/real/trunk --data_dir ../shared/data --report

Pairs of HH harmless and helpful (384 tokens, of which an answer has 128), thumbs of ticketing and coffee (windows
that hold nearly all of their rows whole), four folds by dialog, one pass of AdamW at 5e-4 in batches of 8 with
linear decay, alpha = 2 rank, a bf16 trunk (fp32 for full tuning, at 2e-5). Nothing was swept: these are the values
of a first try. Beside each: length alone and bag of words (logistic regressions, the second's strength chosen on
validation rows), and the untrained trunk's own log-probability of the answer, summed and per token. ``--share``
trains on a part of the dialogs, for learning curves. A JSON per run, finished runs are kept, one thread each.
Writes ``benchmarks/reports/real/reward_models.md`` and ``.png``. Needs scikit-learn.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).parents[1]))

from coffee import bag_of_words, lengths_only, resampled, texts
from perl_reward import balance, judged, longer_is_better, measures, read
from record import study_parser, table, write_study
from small_trunk import GivenRows, adam, fitted, linear_decay, middle, run_missing

from lightning_perl.data import (
    HarmlessnessDataModule,
    HelpfulnessDataModule,
    TaskmasterDataModule,
)
from lightning_perl.data.rows import Item, Pair, Splits, assign_folds, held_out
from lightning_perl.models.adapters import OFF, LoraSpec
from lightning_perl.modules import RewardModel

REPORT = Path("benchmarks/reports/real/reward_models.md")
WINDOWS = {
    "harmless": (384, 128),
    "helpful": (384, 128),
    "ticketing": (1024, 256),
    "coffee": (768, 160),
}
RANKS = (1, 4, 16, 64)
BASELINES = ("length", "words", "log-probability", "log-probability per token")
FOLDS, VALIDATION, BATCH = 4, 0.1, 8
RATES = {"full": 2e-5, "LoRA": 5e-4}
STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3)
BOOTSTRAPS = 2000

Scores = dict[str, list[float]]
"""Scores of test rows in their order: ``chosen`` and ``rejected``, or ``score`` and ``label``."""


def everything(corpus: str, data_dir: Path) -> list[Item]:
    """All rows of a corpus."""
    if corpus in ("ticketing", "coffee"):
        data: Any = TaskmasterDataModule("none", data_dir, corpus, demonstrations=False)  # type: ignore[arg-type]
    else:
        make = HarmlessnessDataModule if corpus == "harmless" else HelpfulnessDataModule
        data = make("none", data_dir)
    return [item for part in data.read() for item in part]


def divided(items: Sequence[Item], fold: int, share: float = 1.0) -> Splits:
    """A fold to test on; of the other dialogs a tenth to choose by, and a share to train on."""
    folds = assign_folds((item.dialog for item in items), FOLDS)
    test = [item for item in items if folds[item.dialog] == fold]
    rest = [item for item in items if folds[item.dialog] != fold]
    train, val = held_out(rest, VALIDATION)
    return Splits(held_out(train, share)[1] if share < 1 else train, val, test)


def rows(corpus: str, fold: int, share: float, trunk: Path, data_dir: Path) -> GivenRows:
    """The corpus, divided and encoded."""
    longest, answer = WINDOWS[corpus]
    sizes: dict[str, Any] = {"max_tokens": longest, "max_response_tokens": answer}
    splits = divided(everything(corpus, data_dir), fold, share)
    data = GivenRows(str(trunk), splits, batch_size=BATCH, val_batch_size=BATCH, **sizes)
    data.setup()
    return data


def tested(data: GivenRows) -> list[Item]:
    """The test rows that fit the window, in the order of their scores."""
    assert data.splits is not None
    kept = {data.where(number) for number in range(len(data._places))}
    return [item for item in data.splits.test if item.where in kept]


# ---- runs ---------------------------------------------------------------------------------------


def train(
    corpus: str, variant: str, fold: int, share: float, trunk: Path, data_dir: Path
) -> dict[str, Any]:
    """One reward model; its scores of the test rows and what it cost."""
    warnings.filterwarnings("ignore")
    data = rows(corpus, fold, share, trunk, data_dir)
    assert data.splits is not None
    full = variant == "full"
    rank = 0 if full else int(variant.split()[1])
    module = RewardModel(
        str(trunk),
        lora=None if full else LoraSpec(rank, alpha=2.0 * rank),
        trunk_dtype=None if full else "bfloat16",
        positive_weight=balance(data.splits.train),
        optimizer=adam(RATES["full" if full else "LoRA"]),
        scheduler=linear_decay(len(data.train_dataloader())),
        seed=fold,
    )
    cpu = time.process_time()
    trainer, clock = fitted(module, data)
    minutes = (time.process_time() - cpu) / 60
    seen = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return {
        **about(corpus, variant, fold, share, data),
        "trainable": sum(one.numel() for one in module.parameters() if one.requires_grad),
        "positive_weight": module.positive_weight,
        "validation": {key: value for key, value in seen.items() if key.startswith("val/")},
        "seconds_per_step": middle(clock.seconds),
        "steps": len(clock.seconds),
        "cpu_minutes": minutes,
        "test": {corpus: judged(module.eval(), data)},
    }


def about(corpus: str, variant: str, fold: int, share: float, data: GivenRows) -> dict[str, Any]:
    """What every run says of itself."""
    assert data.splits is not None
    return {
        "corpus": corpus,
        "variant": variant,
        "fold": fold,
        "share": share,
        "train_rows": data.report.splits["train"].kept,
        "longer_wins_in_training": longer_is_better(data.splits.train),
        "dialogs": [item.dialog for item in tested(data)],
    }


def baselines(corpus: str, fold: int, trunk: Path, data_dir: Path) -> dict[str, Any]:
    """What length, words and the untrained trunk say of the test rows."""
    data = rows(corpus, fold, 1.0, trunk, data_dir)
    assert data.splits is not None
    train, val, test = data.splits.train, data.splits.val, tested(data)
    if isinstance(test[0], Pair):
        lengths, words = shorter_or_longer(train), words_of_pairs(train, val)
    else:
        lengths, words = lengths_only(train), bag_of_words(train)  # type: ignore[arg-type]
    found = {"length": sided(test, lengths), "words": sided(test, words)}
    return about(corpus, "baselines", fold, 1.0, data) | {
        "found": found | log_probabilities(trunk, data)
    }


def sided(items: Sequence[Item], judge: Callable[[list[Any]], np.ndarray]) -> Scores:
    """A judge of rows, asked for pairs or for thumbs."""
    if isinstance(items[0], Pair):
        return {
            side: judge([getattr(item, side) for item in items]).tolist()
            for side in ("chosen", "rejected")
        }
    labels = [item.label for item in items if not isinstance(item, Pair)]
    return {"score": judge([*items]).tolist(), "label": labels}  # type: ignore[dict-item]


def shorter_or_longer(train: Sequence[Item]) -> Callable[[list[Any]], np.ndarray]:
    """The length of an answer, or its negative, as training pairs prefer."""
    sign = 1 if longer_is_better(train) else -1
    return lambda asked: sign * np.array([len(answer) for answer in texts(asked)[0]])


def words_of_pairs(train: Sequence[Item], val: Sequence[Item]) -> Callable[[list[Any]], np.ndarray]:
    """Bradley-Terry on the words of the answers, as strong as validation pairs like it."""

    def answers(items: Sequence[Item], side: str) -> list[str]:
        return texts([getattr(item, side) for item in items])[0]

    better, worse = answers(train, "chosen"), answers(train, "rejected")
    counted = CountVectorizer(binary=True, min_df=2, ngram_range=(1, 2)).fit(better + worse)

    def differences(items: Sequence[Item]) -> Any:  # noqa: ANN401 (a sparse matrix)
        return counted.transform(answers(items, "chosen")).astype(float) - counted.transform(
            answers(items, "rejected")
        ).astype(float)

    half = np.arange(len(train)) % 2 == 0
    signs = np.where(half, 1.0, -1.0)
    signed = differences(train).multiply(signs[:, None]).tocsr()
    fits = [
        LogisticRegression(C=strength, fit_intercept=False, max_iter=2000).fit(signed, half)
        for strength in STRENGTHS
    ]
    best = max(fits, key=lambda fit: (fit.decision_function(differences(val)) > 0).mean())
    return lambda asked: best.decision_function(counted.transform(texts(asked)[0]))


@torch.no_grad()
def log_probabilities(trunk: Path, data: GivenRows) -> dict[str, Scores]:
    """What the untrained trunk thinks of the answers."""
    module = RewardModel(str(trunk), trunk_dtype="bfloat16").eval()
    names = BASELINES[2:]
    found: dict[str, Scores] = {name: {} for name in names}
    for batch in data.test_dataloader():
        summed = module.response_logprobs(batch, OFF)
        for name, scores in zip(names, (summed, summed / batch.response_mask.sum(1)), strict=True):
            sides = {"score": scores[batch.labelled], "label": batch.label[batch.labelled]}
            sides |= {"chosen": scores[batch.pairs[:, 0]], "rejected": scores[batch.pairs[:, 1]]}
            for side, values in sides.items():
                found[name].setdefault(side, []).extend(values.tolist())
    return found


# ---- report -------------------------------------------------------------------------------------


def quality(scores: Scores, chosen: np.ndarray) -> float:
    """Pair accuracy, a tie is half; or AUROC of thumbs."""
    if scores.get("chosen"):
        margin = np.array(scores["chosen"])[chosen] - np.array(scores["rejected"])[chosen]
        return float(((margin > 0) + 0.5 * (margin == 0)).mean())
    values, up = np.array(scores["score"])[chosen], np.array(scores["label"])[chosen] == 1
    # Ranks with ties at their middle: the Mann-Whitney statistic.
    below = np.sort(values[~up])
    left, right = (np.searchsorted(below, values[up], side) for side in ("left", "right"))  # type: ignore[call-overload]
    return float((left + right).mean() / 2 / max(1, len(below)))


def with_intervals(
    judges: dict[str, dict[int, Scores]], dialogs: dict[int, list[str]]
) -> dict[str, list[tuple[float, float, float]]]:
    """Of each judge: its mean over its folds and the difference to length and to words, with 95% intervals.

    Dialogs are drawn with replacement within folds, the same ones for all judges.
    """
    generator = np.random.default_rng(0)
    names = {fold: np.array(those) for fold, those in dialogs.items()}
    draws = [
        {fold: resampled(those, generator) for fold, those in names.items()}
        for _ in range(BOOTSTRAPS)
    ]
    whole = {fold: np.arange(len(those)) for fold, those in names.items()}
    tried = {
        (name, fold): np.array([quality(scores, draw[fold]) for draw in (whole, *draws)])
        for name, folds in judges.items()
        for fold, scores in folds.items()
    }
    found = {}
    for name, folds in judges.items():
        own = np.mean([tried[name, fold] for fold in folds], axis=0)
        others = [
            np.mean([tried[other, fold] for fold in folds], axis=0) for other in BASELINES[:2]
        ]
        found[name] = [
            (float(values[0]), *map(float, np.percentile(values[1:], [2.5, 97.5])))
            for values in (own, *(own - other for other in others))
        ]
    return found


def written(values: tuple[float, float, float], signed: bool = False) -> str:
    """A number with its interval; bold where it excludes 0."""
    mark = "+.3f" if signed else ".3f"
    text = f"{values[0]:{mark}} [{values[1]:{mark}}, {values[2]:{mark}}]"
    return f"**{text}**" if signed and values[1] > 0 else text


def corpus_section(
    corpus: str, runs: list[dict[str, Any]]
) -> tuple[list[str], dict[str, tuple[float, float, float]]]:
    """A table of one corpus, the shares of a learning curve too; and what each judge reached."""
    base = {run["fold"]: run for run in runs if run["variant"] == "baselines"}
    judges: dict[str, dict[int, Scores]] = {
        name: {fold: run["found"][name] for fold, run in base.items()} for name in BASELINES
    }
    trained: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if run["variant"] != "baselines":
            part = "" if run["share"] == 1 else f", {run['share']:.0%} of the dialogs"
            trained.setdefault(run["variant"] + part, []).append(run)
    judges |= {
        name: {run["fold"]: run["test"][corpus] for run in mine} for name, mine in trained.items()
    }
    found = with_intervals(judges, {fold: run["dialogs"] for fold, run in base.items()})
    kind = "accuracy" if base[min(base)]["found"]["words"].get("chosen") else "AUROC"
    lines = []
    for name, values in found.items():
        beside = zip(BASELINES[:2], values[1:], strict=True)
        lines.append(
            [
                name,
                ", ".join(map(str, sorted(judges[name]))),
                str(sum(len(base[fold]["dialogs"]) for fold in judges[name])),
                written(values[0]),
                *("" if name == other else written(value, True) for other, value in beside),
                *costs(corpus, trained.get(name, [])),
            ]
        )
    head = ["judge", "folds", "test rows", kind, "minus length", "minus words", "ECE"]
    head += ["training rows", "trained weights", "peak MB", "s per step", "CPU minutes"]
    return table(head, lines), {name: values[0] for name, values in found.items()}


def costs(corpus: str, mine: list[dict[str, Any]]) -> list[str]:
    """Calibration and what the training took."""
    if not mine:
        return [""] * 6
    ece = np.mean([measures(run, corpus)["ECE"] for run in mine])
    return [
        f"{ece:.3f}",
        f"{np.mean([run['train_rows'] for run in mine]):.0f}",
        f"{mine[0]['trainable']:,}",
        f"{max(run['peak_mb'] for run in mine):.0f}",
        f"{np.median([run['seconds_per_step'] for run in mine]):.2f}",
        f"{np.mean([run['cpu_minutes'] for run in mine]):.1f}",
    ]


def plot(found: dict[str, dict[str, tuple[float, float, float]]], path: Path) -> None:
    """A panel per corpus: every judge with its interval."""
    figure = Figure(figsize=(3.4 * len(found), 3.6), layout="constrained")
    for number, (corpus, judges) in enumerate(found.items(), start=1):
        axes = figure.add_subplot(1, len(found), number)
        for place, (name, (mean, low, high)) in enumerate(judges.items()):
            color = "0.5" if name in BASELINES else "C0"
            axes.errorbar(
                place, mean, [[mean - low], [high - mean]], fmt="o", capsize=4, color=color
            )
        axes.set_xticks(range(len(judges)), judges, rotation=60, ha="right", fontsize=7)
        axes.set_title(corpus)
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=110)


def write_report(root: Path) -> None:
    """Tables and plot of what is finished."""
    lines, panels = list[str](), {}
    for corpus in WINDOWS:
        runs = read(root / corpus)
        if any(run["variant"] == "baselines" for run in runs):
            section, panels[corpus] = corpus_section(corpus, runs)
            lines += [f"## {corpus}", "", *section, ""]
    lines.append(f"![by corpus]({REPORT.with_suffix('.png').name})")
    write_study(REPORT, "Reward models on a model that can speak (PERL, Table 2)", __doc__, lines)
    plot(panels, REPORT.with_suffix(".png"))


def main() -> None:
    """Run what is missing, then write the report."""
    parser = study_parser(__doc__, "runs/real/reward")
    variants = [*(f"rank {rank}" for rank in RANKS), "full"]
    parser.add_argument("--corpora", nargs="*", choices=WINDOWS, default=list(WINDOWS))
    parser.add_argument("--variants", nargs="*", choices=variants, default=variants)
    parser.add_argument("--folds", type=int, nargs="*", default=list(range(FOLDS)))
    parser.add_argument("--share", type=float, default=1.0, help="of the training dialogs")
    args = parser.parse_args()
    given = (args.trunk, args.data_dir)
    if not args.report:
        runs: dict[Path, Callable[[], dict[str, Any]]] = {}
        for fold, corpus in product(args.folds, args.corpora):
            folder = args.root / corpus
            runs[folder / f"baselines_{fold}.json"] = partial(baselines, corpus, fold, *given)
            for variant in args.variants:
                name = f"{variant.replace(' ', '')}_{fold}_{args.share:g}.json"
                work = partial(train, corpus, variant, fold, args.share, *given)
                runs[folder / name] = work
        run_missing(runs, args.workers)
    write_report(args.root)


if __name__ == "__main__":
    main()
