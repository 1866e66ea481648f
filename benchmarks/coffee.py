"""The coffee chain on Taskmaster's real rows: Hydra-SFT, its reward beside other judges, Hydra-PPO.

    python benchmarks/coffee.py --data_dir ../shared/data            # everything, finished runs are kept
    python benchmarks/coffee.py --data_dir ../shared/data --folds 0  # one fold's trainings only
    python benchmarks/coffee.py --data_dir ../shared/data --report   # tables from finished runs

Every training is ``python -m lightning_perl fit --config configs/taskmaster/...``; this file names folds and
run folders, scores held-out rows, and writes ``benchmarks/reports/coffee.md``. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from lightning_perl.batches import PromptBatch, RatedBatch
from lightning_perl.data.rows import BadRow, RatedExample, RatedRow, Row, collate_rated
from lightning_perl.data.taskmaster import TaskmasterDataModule
from lightning_perl.data.tokenization import TurnEncoder
from lightning_perl.functional.logprobs import chunked_logprobs
from lightning_perl.functional.sequences import Sequences, at_last_response, pad_left, predicting
from lightning_perl.models.adapters import OFF
from lightning_perl.models.heads import ScalarHead, load_head
from lightning_perl.models.loading import load_trunk
from lightning_perl.models.trunk import Trunk
from lightning_perl.rollouts.sampling import SamplingSpec, row_uniforms, sample

ROOT = Path("runs/coffee")
CONFIGS = Path("configs/taskmaster")
REPORT = Path("benchmarks/reports/coffee.md")
FOLDS = 5
MAX_TOKENS, MAX_RESPONSE_TOKENS = 320, 80
BOOTSTRAPS = 2000
# Hydra-PPO's reward and its judge never saw the same dialog, and neither saw the prompts' dialogs.
PPO_FOLD, PPO_TRAIN_FOLDS, JUDGE_FOLDS = 0, [1, 2], [3, 4]
SAMPLES_PER_PROMPT = 2


# ---- training -----------------------------------------------------------------------------------


def fit(config: str, name: str, done: str, *overrides: str) -> None:
    """Run one config into ``runs/coffee/NAME/version_0``, unless what it hands over is there."""
    folder = ROOT / name / "version_0"
    if (folder / done).exists():
        print(f"kept {folder / done}")
        return
    if folder.exists():
        print(f"starting {folder} again, it was not finished")
        shutil.rmtree(folder)
    command = [
        *(sys.executable, "-m", "lightning_perl", "fit", "--config", str(CONFIGS / config)),
        *("--trainer.logger.init_args.name", name, "--trainer.enable_progress_bar", "false"),
        *overrides,
    ]
    print(" ".join(command[1:]), flush=True)
    started = time.monotonic()
    subprocess.run(command, check=True)
    (folder / "minutes.json").write_text(json.dumps((time.monotonic() - started) / 60))


def decay_over(steps: int) -> list[str]:
    """The learning rate falls over this many steps: two folds' rows instead of four."""
    return ["--model.init_args.scheduler.init_args.total_iters", str(steps)]


def train_fold(
    fold: int, data_dir: str, train_folds: list[int] | None = None, tag: str = ""
) -> None:
    """Hydra-SFT, plain SFT (the same with reward_weight 0) and a separate reward model."""
    where = ["--data.data_dir", data_dir, "--data.init_args.fold", str(fold)]
    if train_folds is not None:
        where += decay_over(160)
        where += ["--data.init_args.train_folds", json.dumps(train_folds)]
    monitor = "--trainer.callbacks.init_args.monitor"
    fit("hydra_sft.yaml", f"hydra_sft/fold{fold}{tag}", "trunk", *where)
    if train_folds is None:
        plain = ["--model.init_args.reward_weight", "0", monitor, "val/lm_loss"]
        fit("hydra_sft.yaml", f"sft_plain/fold{fold}", "trunk", *where, *plain)
        fit("reward_model.yaml", f"reward_model/fold{fold}", "trunk", *where)


def train_policy(data_dir: str) -> None:
    """Hydra-SFT on two folds, Hydra-PPO on their prompts, and a judge from two other folds."""
    train_fold(PPO_FOLD, data_dir, PPO_TRAIN_FOLDS, "_policy")
    where = ["--data.data_dir", data_dir, "--data.init_args.fold", str(PPO_FOLD)]
    fit(
        *("reward_model.yaml", "judge", "trunk", *where, *decay_over(130)),
        *("--data.init_args.train_folds", json.dumps(JUDGE_FOLDS)),
    )
    trunk = str(ROOT / f"hydra_sft/fold{PPO_FOLD}_policy/version_0/trunk")
    fit(
        *(
            "hydra_ppo.yaml",
            "hydra_ppo",
            "adapters/actor",
            *where,
            "--model.init_args.trunk",
            trunk,
        ),
        *("--data.init_args.train_folds", json.dumps(PPO_TRAIN_FOLDS)),
    )


# ---- reading what was trained -------------------------------------------------------------------


def held_out(fold: int, data_dir: str, split: str, demonstrations: bool) -> list[Row]:
    """Rows of a split of the fold, as every training of that fold divided them."""
    module = TaskmasterDataModule(
        tokenizer=str(ROOT / "sft/version_0/trunk"),
        data_dir=data_dir,
        fold=fold,
        demonstrations=demonstrations,
        thumbs=not demonstrations,
        max_tokens=MAX_TOKENS,
        max_response_tokens=MAX_RESPONSE_TOKENS,
    )
    encoder = TurnEncoder(module.tokenizer)
    kept = []
    for item in getattr(module.read(), split):
        try:
            encoder.encode(item, MAX_TOKENS, MAX_RESPONSE_TOKENS)
        except BadRow:
            # Too long for the window: the trainings rejected and counted it, so no judge is asked.
            continue
        kept.append(item)
    return kept


def batches(
    rows: list[Row], trunk: Trunk, size: int = 32
) -> Iterator[tuple[list[int], RatedBatch]]:
    """Row numbers and batches, like lengths together."""
    encoder = TurnEncoder(trunk.tokenizer)
    encoded = [encoder.encode(row, MAX_TOKENS, MAX_RESPONSE_TOKENS) for row in rows]
    order = sorted(range(len(rows)), key=lambda number: len(encoded[number].ids))
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        yield (
            numbers,
            collate_rated(
                [
                    RatedExample(
                        (
                            RatedRow(
                                encoded[n].ids, encoded[n].response_mask, True, rows[n].label, n
                            ),
                        )
                    )
                    for n in numbers
                ]
            ),
        )


@torch.no_grad()
def scores_of(trunk: Trunk, adapter: str, head: ScalarHead, rows: list[Row]) -> np.ndarray:
    """Score of every row."""
    found = np.zeros(len(rows))
    for numbers, batch in batches(rows, trunk):
        with trunk.switch.use(adapter):
            hidden = trunk(batch.ids, batch.attention_mask)
        mask = batch.response_mask[:, batch.prompt_tokens :]
        found[numbers] = head(at_last_response(hidden, mask)).numpy()
    return found


@torch.no_grad()
def token_losses(trunk: Trunk, rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss in nats and number of tokens of every row."""
    losses, tokens = np.zeros(len(rows)), np.zeros(len(rows))
    for numbers, batch in batches(rows, trunk):
        with trunk.switch.use(OFF):
            hidden = trunk(batch.ids, batch.attention_mask)
        found = Sequences(
            batch.ids, batch.attention_mask, batch.response_mask[:, batch.prompt_tokens :]
        )
        mask = found.response_mask
        logprobs, _ = chunked_logprobs(
            predicting(hidden, mask.shape[1]), found.response_ids, trunk.project
        )
        losses[numbers] = -torch.where(mask, logprobs, 0.0).sum(1).numpy()
        tokens[numbers] = mask.sum(1).numpy()
    return losses, tokens


def reward_model(name: str) -> tuple[Trunk, str, ScalarHead]:
    """A trained reward model: its trunk, tuned whole, and its head."""
    folder = ROOT / name / "version_0/trunk"
    return load_trunk(str(folder)), OFF, load_head(folder, "reward")


# ---- baselines ----------------------------------------------------------------------------------


def texts(rows: list[Row]) -> tuple[list[str], list[str]]:
    """Answers and contexts as text."""
    return (
        [" ".join(turn.text for turn in row.response) for row in rows],
        [" ".join(turn.text for turn in row.context) for row in rows],
    )


def bag_of_words(train: list[Row]) -> Callable[[list[Row]], np.ndarray]:
    """Logistic regression on words (binary, min. 2 rows) of the answer and, apart, of the context."""
    answers, contexts = texts(train)
    answer_words = CountVectorizer(binary=True, min_df=2).fit(answers)
    context_words = CountVectorizer(binary=True, min_df=2).fit(contexts)

    def features(rows: list[Row]) -> csr_matrix:
        answers, contexts = texts(rows)
        return hstack([answer_words.transform(answers), context_words.transform(contexts)]).tocsr()

    model = LogisticRegression(C=0.1, max_iter=2000, class_weight="balanced")
    model.fit(features(train), [row.label for row in train])
    return lambda rows: model.decision_function(features(rows))


def lengths_only(train: list[Row]) -> Callable[[list[Row]], np.ndarray]:
    """Logistic regression on log characters of answer and context, and the number of turns."""

    def features(rows: list[Row]) -> np.ndarray:
        answers, contexts = texts(rows)
        return np.array(
            [
                [np.log1p(len(answer)), np.log1p(len(context)), len(row.context)]
                for answer, context, row in zip(answers, contexts, rows, strict=True)
            ]
        )

    scaler = StandardScaler().fit(features(train))
    model = LogisticRegression(class_weight="balanced")
    model.fit(scaler.transform(features(train)), [row.label for row in train])
    return lambda rows: model.decision_function(scaler.transform(features(rows)))


# ---- measures -----------------------------------------------------------------------------------


@dataclass
class FoldScores:
    """Held-out scores of one fold by judge, and each judge's threshold chosen on validation rows."""

    labels: np.ndarray
    dialogs: np.ndarray
    scores: dict[str, np.ndarray]
    thresholds: dict[str, float]


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """Where balanced accuracy is highest."""
    candidates = np.unique(scores)
    values = [balanced_accuracy_score(labels, scores >= candidate) for candidate in candidates]
    return float(candidates[int(np.argmax(values))])


def score_fold(fold: int, data_dir: str) -> FoldScores:
    """All judges on a fold's test rows."""
    train, val, test = (
        held_out(fold, data_dir, split, demonstrations=False) for split in ("train", "val", "test")
    )
    folder = ROOT / f"hydra_sft/fold{fold}/version_0/trunk"
    hydra, head = load_trunk(str(folder)), load_head(folder, "reward")
    separate = reward_model(f"reward_model/fold{fold}")
    judges: dict[str, Callable[[list[Row]], np.ndarray]] = {
        "Hydra-SFT": lambda rows: scores_of(hydra, OFF, head, rows),
        "RewardModel": lambda rows: scores_of(*separate, rows),
        "bag of words": bag_of_words(train),
        "length only": lengths_only(train),
    }
    scores = {name: judge(test) for name, judge in judges.items()}
    val_labels = np.array([row.label for row in val])
    thresholds = {name: best_threshold(judge(val), val_labels) for name, judge in judges.items()}
    return FoldScores(
        np.array([row.label for row in test]),
        np.array([row.dialog for row in test]),
        scores,
        thresholds,
    )


def auroc(fold: FoldScores, name: str, rows: np.ndarray) -> float:
    """AUROC of a judge on some of the fold's rows."""
    return float(roc_auc_score(fold.labels[rows], fold.scores[name][rows]))


def balanced(fold: FoldScores, name: str, rows: np.ndarray) -> float:
    """Balanced accuracy at the validation part's threshold."""
    decided = fold.scores[name][rows] >= fold.thresholds[name]
    return float(balanced_accuracy_score(fold.labels[rows], decided))


def resampled(dialogs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Rows of as many dialogs as there are, drawn with replacement."""
    names, inverse = np.unique(dialogs, return_inverse=True)
    groups = [np.flatnonzero(inverse == number) for number in range(len(names))]
    drawn = generator.integers(len(groups), size=len(groups))
    return np.concatenate([groups[number] for number in drawn])


def interval(draws: Sequence[float]) -> str:
    """A 95% percentile interval."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"[{low:+.3f}, {high:+.3f}]"


def reward_table(folds: list[FoldScores]) -> list[str]:
    """Mean over folds, and Hydra-SFT's paired difference to each judge with an interval."""
    generator = np.random.default_rng(0)
    measures = {"AUROC": auroc, "balanced accuracy": balanced}
    names = list(folds[0].scores)
    everything = [np.arange(len(fold.labels)) for fold in folds]
    lines = [
        "| judge | AUROC | per fold | balanced accuracy | Hydra-SFT minus it, AUROC | ..., balanced accuracy |",
        "|---|---|---|---|---|---|",
    ]
    draws: dict[tuple[str, str], list[float]] = {}
    for _ in range(BOOTSTRAPS):
        rows = [resampled(fold.dialogs, generator) for fold in folds]
        if any(
            len(np.unique(fold.labels[kept])) < 2 for fold, kept in zip(folds, rows, strict=True)
        ):
            continue
        for measure, function in measures.items():
            means = {
                name: np.mean([function(f, name, r) for f, r in zip(folds, rows, strict=True)])
                for name in names
            }
            for name in names[1:]:
                draws.setdefault((name, measure), []).append(
                    float(means["Hydra-SFT"] - means[name])
                )
    for name in names:
        values = {
            measure: [function(f, name, r) for f, r in zip(folds, everything, strict=True)]
            for measure, function in measures.items()
        }
        cells = []
        for measure, function in measures.items():
            if name == "Hydra-SFT":
                cells.append("")
                continue
            hydra = [function(f, "Hydra-SFT", r) for f, r in zip(folds, everything, strict=True)]
            difference = np.mean(hydra) - np.mean(values[measure])
            cells.append(f"{difference:+.3f} {interval(draws[name, measure])}")
        per_fold = ", ".join(f"{value:.2f}" for value in values["AUROC"])
        lines.append(
            f"| {name} | {np.mean(values['AUROC']):.3f} | {per_fold} | "
            f"{np.mean(values['balanced accuracy']):.3f} | {cells[0]} | {cells[1]} |"
        )
    return lines


def language_table(data_dir: str, folds: list[int]) -> list[str]:
    """Held-out loss of Hydra-SFT beside plain SFT on the same rows, per token."""
    generator = np.random.default_rng(0)
    lines = ["| rows | Hydra-SFT | plain SFT | difference |", "|---|---|---|---|"]
    for title, demonstrations in (("thumbs-up answers", False), ("demonstrated dialogs", True)):
        kept: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        for fold in folds:
            rows = [
                row for row in held_out(fold, data_dir, "test", demonstrations) if row.label != 0.0
            ]
            hydra, tokens = token_losses(
                load_trunk(str(ROOT / f"hydra_sft/fold{fold}/version_0/trunk")), rows
            )
            plain, _ = token_losses(
                load_trunk(str(ROOT / f"sft_plain/fold{fold}/version_0/trunk")), rows
            )
            kept.append((np.array([row.dialog for row in rows]), hydra, plain, tokens))
        draws = []
        for _ in range(BOOTSTRAPS):
            picks = [resampled(dialogs, generator) for dialogs, *_ in kept]
            draws.append(
                np.mean(
                    [
                        (hydra[p].sum() - plain[p].sum()) / tokens[p].sum()
                        for (_, hydra, plain, tokens), p in zip(kept, picks, strict=True)
                    ]
                )
            )
        hydra_loss = np.mean([hydra.sum() / tokens.sum() for _, hydra, _, tokens in kept])
        plain_loss = np.mean([plain.sum() / tokens.sum() for _, _, plain, tokens in kept])
        lines.append(
            f"| {title} | {hydra_loss:.3f} | {plain_loss:.3f} | "
            f"{hydra_loss - plain_loss:+.3f} {interval(draws)} |"
        )
    return lines


# ---- the policy ---------------------------------------------------------------------------------


def test_prompts(data_dir: str, trunk: Trunk) -> tuple[list[list[int]], np.ndarray]:
    """Distinct held-out contexts as ids, and their dialogs."""
    encoder = TurnEncoder(trunk.tokenizer)
    found: dict[tuple[int, ...], str] = {}
    for row in held_out(PPO_FOLD, data_dir, "test", demonstrations=False):
        prompt = encoder.encode_prompt(row.context, MAX_TOKENS - MAX_RESPONSE_TOKENS)
        found.setdefault(tuple(prompt.ids), row.dialog)
    return [list(ids) for ids in found], np.array(list(found.values()))


@torch.no_grad()
def policy_table(data_dir: str) -> list[str]:
    """Held-out score, KL and length before and after, and the win rate under the judge."""
    folder = ROOT / f"hydra_sft/fold{PPO_FOLD}_policy/version_0/trunk"
    trunk, head = load_trunk(str(folder)), load_head(folder, "reward")
    trunk.adapters.load("actor", ROOT / "hydra_ppo/version_0/adapters/actor", trainable=False)
    trunk.eval()
    judge, judge_adapter, judge_head = reward_model("judge")
    prompts, dialogs = test_prompts(data_dir, trunk)
    spec = SamplingSpec(max_new_tokens=48)
    seen: dict[str, dict[str, list[float]]] = {OFF: {}, "actor": {}}
    for repeat in range(SAMPLES_PER_PROMPT):
        for start in range(0, len(prompts), 64):
            chosen = prompts[start : start + 64]
            row = torch.arange(start, start + len(chosen))
            asked = PromptBatch(*pad_left(chosen, trunk.pad_id), row)
            for adapter, values in seen.items():
                noise = row_uniforms(1, repeat, row, spec.max_new_tokens)
                with trunk.switch.use(adapter):
                    rollout = sample(trunk, asked, spec, noise)
                answers = rollout.sequences()
                logprobs = {}
                for role in (OFF, adapter):
                    with trunk.switch.use(role):
                        hidden = trunk(answers.ids, answers.attention_mask)
                    if role == OFF:
                        score = head(at_last_response(hidden, answers.response_mask))
                    width = answers.response_mask.shape[1]
                    logprobs[role], _ = chunked_logprobs(
                        predicting(hidden, width), answers.response_ids, trunk.project
                    )
                with judge.switch.use(judge_adapter):
                    hidden = judge(answers.ids, answers.attention_mask)
                opinion = judge_head(at_last_response(hidden, answers.response_mask))
                gap = torch.where(answers.response_mask, logprobs[adapter] - logprobs[OFF], 0.0)
                found = {
                    "score": score,
                    "judge": opinion,
                    "KL": gap.sum(1),
                    "tokens": rollout.response_tokens(),
                    "finished": rollout.stopped,
                }
                for key, value in found.items():
                    values.setdefault(key, []).extend(value.float().tolist())
    before = {key: np.array(value) for key, value in seen[OFF].items()}
    after = {key: np.array(value) for key, value in seen["actor"].items()}
    wins = (after["judge"] > before["judge"]) + 0.5 * (after["judge"] == before["judge"])
    repeated = np.tile(dialogs, SAMPLES_PER_PROMPT)
    generator = np.random.default_rng(0)
    draws = [wins[resampled(repeated, generator)].mean() for _ in range(BOOTSTRAPS)]
    low, high = np.percentile(draws, [2.5, 97.5])
    lines = ["| | before | after |", "|---|---|---|"]
    for key, title in (
        ("score", "learned score"),
        ("judge", "judge's score (other dialogs)"),
        ("KL", "KL to the reference, nats per response"),
        ("tokens", "tokens per response"),
        ("finished", "share that ends by itself"),
    ):
        lines.append(f"| {title} | {before[key].mean():.3f} | {after[key].mean():.3f} |")
    lines.append(
        f"\nWin rate of the policy against the reference under the judge: **{wins.mean():.3f}**, 95% interval "
        f"[{low:.3f}, {high:.3f}] ({len(prompts)} prompts of {len(set(dialogs))} dialogs, "
        f"{SAMPLES_PER_PROMPT} answers each, ties half)."
    )
    return lines


def judge_quality(data_dir: str) -> str:
    """The judge's own AUROC on the policy's test fold."""
    rows = held_out(PPO_FOLD, data_dir, "test", demonstrations=False)
    value = roc_auc_score([row.label for row in rows], scores_of(*reward_model("judge"), rows))
    return f"The judge's AUROC on that fold's thumbs: {value:.3f}."


def minutes() -> list[str]:
    """Wall-clock minutes of every training."""
    lines = ["| run | minutes |", "|---|---|"]
    for path in sorted(ROOT.glob("**/minutes.json")):
        name = path.parent.parent.relative_to(ROOT)
        lines.append(f"| {name} | {json.loads(path.read_text()):.1f} |")
    return lines


def write_report(data_dir: str) -> None:
    """All tables into the committed report."""
    folds = list(range(FOLDS))
    plain = [fold for fold in folds if (ROOT / f"sft_plain/fold{fold}/version_0/trunk").exists()]
    lines = [
        "# The coffee chain on Taskmaster's rows",
        "",
        f"Made {date.today()} on {platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, by `python benchmarks/coffee.py --data_dir DATA`.",
        "Trunk: 5.3M parameters from scratch. Five folds by dialog; every judge sees the same rows; the "
        "checkpoint and each threshold are chosen on a validation part of the training dialogs. Intervals: "
        f"95%, {BOOTSTRAPS} bootstraps over dialogs within folds.",
        "",
        "## Reward: thumbs of held-out dialogs",
        "",
        *reward_table([score_fold(fold, data_dir) for fold in folds]),
        "",
        "Bag of words: logistic regression (C 0.1, balanced classes) on binary word features of the answer and, "
        "apart, of the context. Length only: log characters of answer and context, and the number of turns.",
        "",
        "## Language: loss in nats per token",
        "",
        *language_table(data_dir, plain),
        "",
        f"Folds {plain}. "
        "Plain SFT is Hydra-SFT with reward_weight 0 on the same rows; its checkpoint is chosen by val/lm_loss, "
        "Hydra-SFT's by val/reward_loss.",
        "",
        "## Hydra-PPO",
        "",
        f"Trunk and prompts: folds {PPO_TRAIN_FOLDS}; judge: folds {JUDGE_FOLDS}; tested on the prompts of fold "
        f"{PPO_FOLD}. {judge_quality(data_dir)}",
        "",
        *policy_table(data_dir),
        "",
        "## Minutes",
        "",
        *minutes(),
    ]
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    """Train what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--folds", type=int, nargs="*", help="only these folds' trainings")
    parser.add_argument("--policy", action="store_true", help="only the policy's trainings")
    parser.add_argument("--report", action="store_true", help="only the report")
    args = parser.parse_args()
    everything = args.folds is None and not args.policy and not args.report
    if everything:
        if not (ROOT / "new_trunk").exists():
            subprocess.run(
                [
                    *(sys.executable, "-m", "lightning_perl", "new-trunk", "--config"),
                    *(str(CONFIGS / "new_trunk.yaml"), "--data.data_dir", args.data_dir),
                ],
                check=True,
            )
        fit("sft.yaml", "sft", "trunk", "--data.data_dir", args.data_dir)
    for fold in args.folds or (range(FOLDS) if everything else []):
        train_fold(fold, args.data_dir)
    if args.policy or everything:
        train_policy(args.data_dir)
    if args.report or everything:
        write_report(args.data_dir)


if __name__ == "__main__":
    main()
