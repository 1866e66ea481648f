"""PERL's policy gradient at small scale: reward adapter, then `Reinforce` with full tuning and LoRA 1, 4, 16.

    python benchmarks/perl_rl.py --data_dir ../shared/data             # everything; finished runs are kept
    python benchmarks/perl_rl.py --data_dir ../shared/data --report    # tables and plot from finished runs

Two tasks: the quickstart's made-up coffee orders, where the true quality of an answer is known (three seeds), and
Taskmaster's real coffee prompts (one seed). Within a task all runs learn from the same reward model: an adapter of
rank 4 on the attention projections, which the layout ``full`` gets merged into a trunk of its own. A third table
learns from a verifiable Python reward alone. Learning rates are chosen on what training maximizes, quickstart,
seed 0. Writes ``benchmarks/reports/perl_rl.md`` and ``.png``. Each run is a process of its own, one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from perl_reward import ATTENTION, ROOT, balance, read, spread
from small_trunk import adam, fitted, linear_decay, middle, run_missing, trunks

from lightning_perl.data import PreferenceDataModule, TaskmasterDataModule
from lightning_perl.data.base import ConversationDataModule
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.modules import Reinforce, RewardModel
from lightning_perl.packaged import unpackaged
from lightning_perl.rewards.coffee_orders import CoffeeOrderQuality
from lightning_perl.rewards.verifiable import MatchesPattern
from lightning_perl.rollouts.sampling import SamplingSpec

RL = ROOT / "rl"
REPORT = Path("benchmarks/reports/perl_rl.md")
RANKS = (1, 4, 16)
VARIANTS = ("full", *(f"rank {rank}" for rank in RANKS))
SWEPT = {"full": (3e-5, 1e-4, 3e-4), **{f"rank {rank}": (1e-3, 3e-3, 1e-2) for rank in RANKS}}
SEEDS = (0, 1, 2)
BETA = 0.05
BATCH = 64
EPISODES = {"quickstart": 5120, "coffee": 2048}
SWEEP_EPISODES = 1536
NEW_TOKENS = {"quickstart": 32, "coffee": 64}
PATTERN = r"So .*\."
"""A form of answer that the untrained policy gives now and then."""


# ---- tasks --------------------------------------------------------------------------------------


def trunk_of(task: str) -> str:
    """The supervised trunk that reward and policy stand on."""
    return (
        unpackaged("packaged:quickstart/trunk")
        if task == "quickstart"
        else str(ROOT / "trunk_coffee")
    )


def orders(kind: str, **options: Any) -> PreferenceDataModule:
    """The packaged coffee orders, prompts or rated answers."""
    files = {
        split: f"packaged:quickstart/orders/{kind}_{split}.jsonl.gz"
        for split in ("train", "val", "test")
    }
    return PreferenceDataModule(
        trunk_of("quickstart"), **files, max_tokens=80, max_response_tokens=32, **options
    )


def prompts(task: str, data_dir: Path, seed: int) -> ConversationDataModule:
    """Prompts to train on and to hold out."""
    options: dict[str, Any] = {"rows": "prompts", "batch_size": BATCH, "seed": seed}
    if task == "quickstart":
        return orders("prompts", val_batch_size=128, **options)
    return TaskmasterDataModule(
        trunk_of(task),
        data_dir,
        "coffee",
        demonstrations=False,
        val_batch_size=64,
        max_tokens=320,
        max_response_tokens=64,
        **options,
    )


def rated(task: str, data_dir: Path) -> ConversationDataModule:
    """Thumbs for the reward model."""
    if task == "quickstart":
        return orders("rated", batch_size=16)
    return TaskmasterDataModule(
        trunk_of(task),
        data_dir,
        "coffee",
        demonstrations=False,
        batch_size=8,
        max_tokens=320,
        max_response_tokens=80,
    )


# ---- runs ---------------------------------------------------------------------------------------


def train_reward(task: str, data_dir: Path) -> dict[str, Any]:
    """The reward adapter, and the same merged into a trunk."""
    warnings.filterwarnings("ignore")
    data = rated(task, data_dir)
    data.setup()
    if data.splits is None:
        raise RuntimeError("setup read nothing")
    module = RewardModel(
        trunk_of(task),
        lora=LoraSpec(4, alpha=8.0, targets=ATTENTION),
        positive_weight=balance(data.splits.train),
        optimizer=adam(3e-3),
        scheduler=linear_decay(len(data.train_dataloader())),
    )
    trainer, _ = fitted(module, data)
    folder = RL / task / "reward"
    module.hand_over(folder)
    module.save_trunk(folder / "trunk")
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


class Course(Callback):
    """What every rollout looked like."""

    def __init__(self) -> None:
        self.rollouts: list[dict[str, float]] = []

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Keep the numbers that were logged."""
        keys = ("rollout/score", "rollout/kl", "gold/score", "rollout/response_tokens")
        seen = trainer.callback_metrics
        self.rollouts.append({key: float(seen[key]) for key in keys if key in seen})


def train(
    task: str,
    variant: str,
    learning_rate: float,
    seed: int,
    episodes: int,
    data_dir: Path,
    verifiable: bool = False,
) -> dict[str, Any]:
    """One policy, and its answers to held-out prompts."""
    warnings.filterwarnings("ignore")
    reward = RL / task / "reward"
    full = variant == "full"
    options: dict[str, Any] = {"reward": str(reward / ("trunk" if full else "adapters/reward"))}
    if verifiable:
        options = {
            "reward": None,
            "reward_function": MatchesPattern(PATTERN),
            "learned_reward_weight": 0.0,
        }
    rank = 1 if full else int(variant.split()[1])
    module = Reinforce(
        trunk_of(task),
        layout="full" if full else "perl",
        lora=LoraSpec(rank, alpha=2.0 * rank, targets=ATTENTION),
        sampling=SamplingSpec(max_new_tokens=NEW_TOKENS[task]),
        micro_batch_size=32,
        score_batch_size=64,
        beta=BETA,
        max_episodes=episodes,
        optimizer=adam(learning_rate),
        gold=CoffeeOrderQuality() if task == "quickstart" else None,
        seed=seed,
        **options,
    )
    data = prompts(task, data_dir, seed)
    course = Course()
    _, clock = fitted(module, data, epochs=20, callbacks=[course], limit_val_batches=0)
    judge = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    (held_out,) = judge.validate(module, datamodule=data, verbose=False)
    return {
        "task": task,
        "variant": variant,
        "learning_rate": learning_rate,
        "seed": seed,
        "episodes": module.episodes,
        "trained": sum(p.numel() for p in module.roles.actor_parameters()),
        "seconds_per_episode": middle(clock.seconds) / BATCH,
        "rollouts": course.rollouts,
        "held_out": held_out,
    }


# ---- which runs ---------------------------------------------------------------------------------


def earned(run: dict[str, Any]) -> float:
    """The objective on the last quarter of the rollouts."""
    last = run["rollouts"][-len(run["rollouts"]) // 4 :]
    return float(
        np.mean([(1 - BETA) * one["rollout/score"] - BETA * one["rollout/kl"] for one in last])
    )


def sweep(data_dir: Path) -> dict[Path, Callable[[], dict[str, Any]]]:
    """Learning rates, quickstart, seed 0."""
    return {
        RL / f"sweep/{variant.replace(' ', '')}_{rate:g}.json": partial(
            train, "quickstart", variant, rate, 0, SWEEP_EPISODES, data_dir
        )
        for variant, rates in SWEPT.items()
        for rate in rates
    }


def chosen_rates() -> dict[str, float]:
    """The learning rate that earned most, by variant."""
    best: dict[str, dict[str, Any]] = {}
    for run in read(RL / "sweep"):
        if run["variant"] not in best or earned(run) > earned(best[run["variant"]]):
            best[run["variant"]] = run
    return {variant: run["learning_rate"] for variant, run in best.items()}


def runs(data_dir: Path) -> dict[Path, Callable[[], dict[str, Any]]]:
    """All of them."""
    rates = chosen_rates()
    found: dict[Path, Callable[[], dict[str, Any]]] = {}
    for task, seeds in (("quickstart", SEEDS), ("coffee", SEEDS[:1])):
        for seed in seeds:
            for variant in VARIANTS:
                name = f"{variant.replace(' ', '')}_seed{seed}.json"
                found[RL / "runs" / task / name] = partial(
                    train, task, variant, rates[variant], seed, EPISODES[task], data_dir
                )
    for seed in SEEDS:
        found[RL / f"runs/verifiable/rank4_seed{seed}.json"] = partial(
            train, "quickstart", "rank 4", rates["rank 4"], seed, 3072, data_dir, verifiable=True
        )
    return found


# ---- report -------------------------------------------------------------------------------------


def table(finished: list[dict[str, Any]]) -> Iterator[str]:
    """A row per variant; the reference's own numbers first."""
    keys = {"score": "val/score", "gold": "val/gold", "KL": "val/kl"}
    keys |= {"win rate": "val/win_rate", "tokens": "val/response_tokens"}
    keys = {name: key for name, key in keys.items() if key in finished[0]["held_out"]}
    titles = ["tuning", "runs", "actor's weights", *keys, "extra peak MB", "ms per episode"]
    yield "| " + " | ".join(titles) + " |"
    yield "|---" * len(titles) + "|"
    before = {"score": "val/reference_score", "gold": "val/reference_gold"}
    start = {
        name: spread([run["held_out"][before[name]] for run in finished])
        if name in before
        else "0" * (name == "KL")
        for name in keys
    }
    yield "| reference | | | " + " | ".join(start.values()) + " | | |"
    for variant in VARIANTS:
        mine = [run for run in finished if run["variant"] == variant]
        if mine:
            cells = [
                f"{variant} (lr {mine[0]['learning_rate']:g})",
                str(len(mine)),
                f"{mine[0]['trained']:,}",
                *(spread([run["held_out"][key] for run in mine]) for key in keys.values()),
                f"{np.median([run['peak_mb'] for run in mine]):.0f}",
                f"{1000 * np.median([run['seconds_per_episode'] for run in mine]):.0f}",
            ]
            yield "| " + " | ".join(cells) + " |"


def plot(tasks: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Learned and true reward over KL, rollout by rollout."""
    panels = [
        (task, key)
        for task, finished in tasks.items()
        for key in ("rollout/score", "gold/score")
        if key in finished[0]["rollouts"][0]
    ]
    figure = Figure(figsize=(3.6 * len(panels), 3.2), layout="constrained")
    for number, (task, key) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for color, variant in enumerate(VARIANTS):
            for run in tasks[task]:
                if run["variant"] == variant:
                    kl = [one["rollout/kl"] for one in run["rollouts"]]
                    seen = [one[key] for one in run["rollouts"]]
                    label = variant if run["seed"] == 0 else None
                    axes.plot(kl, seen, ".", markersize=3, color=f"C{color}", label=label)
        axes.set_xlabel("KL to the reference, nats")
        axes.set_ylabel(key)
        axes.set_title(task)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)


def report() -> None:
    """Tables and plot of what is finished."""
    rewards = {task: json.loads((RL / f"rewards/{task}.json").read_text()) for task in EPISODES}
    said = "; ".join(
        f"{task}: validation AUROC {found['val/auroc']:.3f}" for task, found in rewards.items()
    )
    lines = [
        "# PERL's policy gradient at small scale",
        "",
        f"{date.today()}, {platform.processor() or platform.machine()}, one thread per run, torch "
        f"{torch.__version__}. Command: `python benchmarks/perl_rl.py --data_dir DATA`.",
        "",
        f"`Reinforce`, beta {BETA}, {BATCH} episodes per update, temperature 1. Layout `perl` (one trunk: "
        "reward, actor and critic adapters) for LoRA, `full` (four models) for full tuning. Reward: LoRA of "
        f"rank 4 on the attention projections, one epoch ({said}). LoRA's alpha is 2 rank. Learning rates: "
        f"those of {SWEPT} that earned most in {SWEEP_EPISODES} episodes of the quickstart (seed 0, the "
        "objective on the last quarter of the training rollouts). Held-out prompts, mean ± standard deviation "
        "over seeds. Memory is the highest resident size of a run's process above its size before the run.",
        "",
    ]
    tasks = {}
    for task in ("quickstart", "coffee", "verifiable"):
        finished = read(RL / "runs" / task)
        if finished:
            lines += [f"## {task}", "", f"{finished[0]['episodes']} episodes.", ""]
            if task == "verifiable":
                lines += [f"Quickstart prompts; score: 1 where the answer matches `{PATTERN}`.", ""]
            lines += [*table(finished), ""]
            tasks[task] = finished
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(
        "\n".join([*lines, f"![reward over KL]({REPORT.with_suffix('.png').name})", ""])
    )
    plot(tasks, REPORT.with_suffix(".png"))
    print(REPORT)


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data_dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    if not args.report:
        run_missing(trunks(ROOT, args.data_dir, "coffee"), args.workers)
        rewards = {
            RL / f"rewards/{task}.json": partial(train_reward, task, args.data_dir)
            for task in EPISODES
        }
        run_missing(rewards, args.workers)
        run_missing(sweep(args.data_dir), args.workers)
        run_missing(runs(args.data_dir), args.workers)
    report()


if __name__ == "__main__":
    main()
