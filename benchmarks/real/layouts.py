"""Hydra-RLHF's Table 3 on a model that can speak: PPO on five layouts after one Hydra-SFT.

    python benchmarks/real/layouts.py --trunk runs/real/trunk --data_dir ../shared/data
    python benchmarks/real/layouts.py --trunk runs/real/trunk --data_dir ../shared/data --report

Hydra-SFT, SFT, and a reward model as an adapter of the untrained trunk learn in one pass from the same two
eighths of the short pairs of HH harmless (192 tokens, of which an answer has 48): LoRA of rank 16, AdamW at 5e-4
with linear decay, batches of 8, gamma 1. PPO then stands on the Hydra-SFT trunk: one epoch in two minibatches,
LoRA of rank 16, learning rate 1e-3, KL coefficient 0.05, temperature 0.7. Two rollouts of 8 episodes say what each
layout costs, and that `lora` and `dynamic_lora` are `hydra` with more trunks; the others learn for 64 episodes in
batches of 16, `perl` from an adapter trained on that trunk. The judge is a reward model on the untrained trunk
that learned from four others; wins are over the Hydra-SFT model's answers to 32 prompts of the eighth that nobody
learned from. Nothing was swept. A JSON per run, finished runs are kept, one thread each. Writes
``benchmarks/reports/real/layouts.md``.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from judges import (
    JUDGED,
    LEARNED,
    adapter_of,
    held_out,
    judged_by,
    learner,
    pairs,
    prompts,
    reward_model,
    supervised,
)
from perl_reward import read
from perl_rl import Course
from record import study_parser, table, write_study
from small_trunk import adam, fitted, resident_mb, run_missing

from lightning_perl.modules import PPO, SFT, HydraSFT

REPORT = Path("benchmarks/reports/real/layouts.md")
LAYOUTS = ("lora", "dynamic_lora", "perl", "hydra", "joint_hydra")
LEARNING = ("hydra", "joint_hydra", "perl")
"""Layouts that learn; `lora` and `dynamic_lora` are `hydra` with more trunks, as two rollouts show."""
SEEDS, COSTED = (0,), 8
EPISODES, BATCH, RATE = 64, 16, 1e-3
RECIPE = {"ppo_epochs": 1, "kl_coef": 0.05, "value_coef": 0.5}
FIRST = {
    "Hydra-SFT": "hydra",
    "SFT": "sft",
    "reward model": "reward_base",
    "reward model on Hydra-SFT": "reward",
    "judge": "judge",
}
"""What is trained before PPO, and its folder and file."""


def imitated(name: str, trunk: Path, data_dir: Path, root: Path) -> dict[str, Any]:
    """Hydra-SFT, or SFT of the same answers."""
    data = pairs(trunk, data_dir, LEARNED)
    if name == "sft":
        return supervised(SFT, trunk, data, root / name)
    joint = {"reward_weight": 1.0, "normalize_scores": True}
    return supervised(HydraSFT, trunk, data, root / name, **joint)


def fit(
    layout: str,
    seed: int,
    batch: int,
    rollouts: int,
    data_dir: Path,
    root: Path,
    reward: str | None = None,
) -> tuple[Any, Any, dict[str, Any]]:
    """A policy on the Hydra-SFT trunk, its prompts, and what it took."""
    warnings.filterwarnings("ignore")
    start, course, before = root / "hydra/trunk", Course(), resident_mb("VmRSS")
    settings: dict[str, Any] = {"layout": layout, "reward": reward, "seed": seed}
    settings |= RECIPE | {"minibatch_size": batch // 2, "max_episodes": batch * rollouts}
    module = learner(start, PPO, optimizer=adam(RATE), **settings)
    loaded, cpu = resident_mb("VmRSS") - before, time.process_time()
    data = prompts(start, data_dir, batch, seed)
    fitted(module, data, 10, [course], limit_val_batches=0, default_root_dir=root)
    seconds = time.process_time() - cpu
    return (
        module,
        data,
        {
            **{"layout": layout, "seed": seed, "rollouts": course.rollouts},
            **{"cpu_minutes": seconds / 60, "seconds_per_episode": seconds / module.episodes},
            **{"loaded_mb": loaded, "fit_peak_mb": resident_mb("VmHWM") - before},
        },
    )


def cost(layout: str, data_dir: Path, root: Path) -> dict[str, Any]:
    """Two rollouts; in `perl` the trunk's head scores, through an adapter that changes nothing."""
    return fit(layout, 0, COSTED, 2, data_dir, root)[2]


def train(layout: str, seed: int, trunk: Path, data_dir: Path, root: Path) -> dict[str, Any]:
    """One policy, its answers to the held-out prompts, and what it took."""
    reward = str(adapter_of(root / "reward")) if layout == "perl" else None
    module, data, took = fit(layout, seed, BATCH, EPISODES // BATCH, data_dir, root, reward)
    heard = judged_by(module, trunk, adapter_of(root / "judge"))
    return took | held_out(module, data, heard)


def first_table(root: Path) -> list[str]:
    """What the supervised models say of the test pairs."""
    rows = []
    for name, folder in FIRST.items():
        for run in read(root / "first"):
            if run["name"] == folder:
                accuracy, loss = (
                    f"{run[key]:.3f}" if key in run else "" for key in ("accuracy", "lm_loss")
                )
                rows.append(
                    [
                        *(name, run["train"], run["test"], accuracy, loss),
                        *(f"{run['fit_peak_mb']:.0f}", f"{run['cpu_minutes']:.1f}"),
                    ]
                )
    head = ["", "pairs learned", "pairs tested", "accuracy", "nats per token of chosen answers"]
    return table([*head, "peak MB", "CPU minutes"], rows)


def cost_table(runs: list[dict[str, Any]]) -> list[str]:
    """A row per layout: what two rollouts took, and what the second one looked like."""
    base = next((run["seconds_per_episode"] for run in runs if run["layout"] == "lora"), None)
    rows = []
    for run in sorted(runs, key=lambda run: LAYOUTS.index(run["layout"])):
        seconds, second = run["seconds_per_episode"], run["rollouts"][1]
        rows.append(
            [
                f"`{run['layout']}`",
                f"{seconds:.2f}" + (f" ({seconds / base:.2f})" if base else ""),
                *(f"{run[key]:.0f}" for key in ("loaded_mb", "fit_peak_mb")),
                f"{second['rollout/score']:.5f} at {second['rollout/kl']:.5f} nats",
            ]
        )
    head = ["layout", "CPU s per episode (of `lora`)", "MB of weights", "peak MB"]
    return table([*head, "second rollout's score"], rows)


def learned_table(runs: list[dict[str, Any]]) -> list[str]:
    """A row per layout and seed: what the held-out prompts say."""
    rows = [
        [
            *(f"`{layout}`", run["seed"]),
            f"{run['reference_score']:.2f} to {run['score']:.2f}",
            f"{run['judge_wins']:.3f} ± {run['judge_wins_error']:.3f}",
            f"{run['gold'] - run['reference_gold']:+.2f}",
            *(f"{run['kl']:.2f}", f"{run['response_tokens']:.1f}", f"{run['cpu_minutes']:.1f}"),
        ]
        for layout in LEARNING
        for run in runs
        if run["layout"] == layout
    ]
    head = ["layout", "seed", "learned score", "judge's wins", "judge's score", "KL, nats"]
    return table([*head, "tokens", "CPU minutes"], rows)


def write_report(root: Path) -> None:
    """The tables of what is finished."""
    lines = [*first_table(root), ""]
    for folder, rows_of in (("costs", cost_table), ("runs", learned_table)):
        if runs := read(root / folder):
            lines += [*rows_of(runs), ""]
    write_study(REPORT, "Layouts on a model that can speak (Hydra-RLHF, Table 3)", __doc__, lines)


def run_all(args: argparse.Namespace) -> None:
    """What is missing: the judge and Hydra-SFT, what stands on it, then PPO."""
    root, trunk, data_dir = args.root, args.trunk, args.data_dir
    rewards = {
        "judge": (trunk, JUDGED),
        "reward": (root / "hydra/trunk", LEARNED),
        "reward_base": (trunk, LEARNED),
    }

    def work(name: str) -> dict[str, Any]:
        if name not in rewards:
            return {"name": name} | imitated(name, trunk, data_dir, root)
        start, parts = rewards[name]
        return {"name": name} | reward_model(start, data_dir, parts, root / name)

    def first(*names: str) -> None:
        run_missing({root / f"first/{name}.json": partial(work, name) for name in names}, 1)

    def policies(*layouts: str) -> None:
        runs = {
            root / f"runs/{layout}_{seed}.json": partial(train, layout, seed, trunk, data_dir, root)
            for seed in args.seeds
            for layout in layouts
        }
        run_missing(runs, args.workers)

    first("judge", "hydra")
    run_missing(
        {
            root / f"costs/{layout}.json": partial(cost, layout, data_dir, root)
            for layout in LAYOUTS
        },
        1,
    )
    policies(*LEARNING[:2])
    first("reward", "reward_base", "sft")
    policies(*LEARNING[2:])


def main() -> None:
    """Run what is missing, then write the report."""
    parser = study_parser(__doc__, "runs/real/layouts", SEEDS)
    args = parser.parse_args()
    if not args.report:
        run_all(args)
    write_report(args.root)


if __name__ == "__main__":
    main()
