"""Learning curves on the quickstart's task: gold and learned reward over KL, and a gamed reward that is stopped.

    python benchmarks/learning.py                      # everything; finished runs are kept
    python benchmarks/learning.py --report             # tables and plots from finished runs

Five ways to learn from the packaged trunk's reward head, three seeds each, 2,048 episodes in batches of 64, on the
recipes and learning rate of ``benchmarks/bakeoff.py``. LoRA-PPO holds four trunks, Hydra-PPO one; the mathematics
is the same, so their curves should agree within seeds. The gameable reward is the number of words of an answer,
without a KL penalty: once free, once with ``PolicyGuard``, the ceiling at 8 nats. A JSON per run, one thread each.
Writes ``benchmarks/reports/learning.md``, ``learning.png`` and ``gamed.png``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bakeoff import BATCH, METHODS, PPO_RECIPE, RECIPE, SEEDS, TRUNK, policy, prompts, slug
from matplotlib.figure import Figure
from perl_reward import read, spread
from perl_rl import Course
from record import table, write_study
from small_trunk import adam, fitted, run_missing

from lightning_perl.callbacks import PolicyGuard
from lightning_perl.modules import PPO
from lightning_perl.rewards.function import EachAlone

REPORT = Path("benchmarks/reports/learning.md")
EPISODES, GAMED_EPISODES, RATE = 2048, 1536, 3e-3
CEILING = 8.0
LAST = 4
"""Rollouts that the tables take a mean of."""
VARIANTS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "Hydra-PPO": METHODS["PPO, hydra"][:2],
    "LoRA-PPO": (PPO, RECIPE | PPO_RECIPE | {"layout": "lora", "reward": TRUNK}),
    "J-Hydra-PPO": METHODS["PPO, joint_hydra"][:2],
    "Reinforce (PERL)": METHODS["Reinforce"][:2],
    "PPO-max": METHODS["PPO-max"][:2],
}
GUARDS: dict[str, Callable[[], PolicyGuard]] = {
    "no guard": lambda: PolicyGuard(window=None),
    f"ceiling of {CEILING:g} nats": lambda: PolicyGuard(max_kl=CEILING, window=None),
}


class Words(EachAlone):
    """The number of words: a reward that anybody would game."""

    def score(self, prompt: str, response: str, row: int) -> float:
        """From 0."""
        return float(len(response.split()))


def train(
    make: type[Any], settings: dict[str, Any], guard: PolicyGuard, seed: int, episodes: int
) -> dict[str, Any]:
    """One policy; what every rollout looked like."""
    warnings.filterwarnings("ignore")
    course, cpu = Course(), time.process_time()
    options = settings | {"seed": seed, "optimizer": adam(RATE), "score_batch_size": 64}
    module = policy(make, max_episodes=episodes, **options)
    data = prompts(batch_size=BATCH, seed=seed)
    data.setup()
    with tempfile.TemporaryDirectory() as folder:
        fitted(module, data, 1, [guard, course], limit_val_batches=0, default_root_dir=folder)
    found = {"rollouts": course.rollouts, "rollbacks": guard.rollbacks, "stopped": guard.stopped_by}
    return found | {"seed": seed, "cpu_seconds": time.process_time() - cpu}


def learned(name: str, seed: int) -> dict[str, Any]:
    """A run that learns from the reward head."""
    make, settings = VARIANTS[name]
    return {"name": name} | train(make, settings, PolicyGuard(window=None), seed, EPISODES)


def gamed(name: str) -> dict[str, Any]:
    """A run that learns to be long."""
    reward = {"learned_reward_weight": 0.0, "reward_function": Words(), "kl_coef": 0.0}
    settings = RECIPE | PPO_RECIPE | reward
    return {"name": name} | train(PPO, settings, GUARDS[name](), 0, GAMED_EPISODES)


# ---- report -------------------------------------------------------------------------------------


def end(run: dict[str, Any], key: str) -> float:
    """Mean of a measure over the last rollouts."""
    return float(np.mean([one[key] for one in run["rollouts"][-LAST:]]))


def draw(runs: list[dict[str, Any]], across: str, keys: tuple[str, ...], path: Path) -> None:
    """A panel per measure, a colour per kind of run."""
    figure = Figure(figsize=(4.2 * len(keys), 3.6), layout="constrained")
    names = list(dict.fromkeys(run["name"] for run in runs))
    for number, key in enumerate(keys, start=1):
        axes = figure.add_subplot(1, len(keys), number)
        for run in runs:
            values = [one[key] for one in run["rollouts"]]
            places = (
                [one[across] for one in run["rollouts"]] if across else range(1, len(values) + 1)
            )
            first = run is next(other for other in runs if other["name"] == run["name"])
            label, color = run["name"] if first else None, f"C{names.index(run['name'])}"
            axes.plot(
                places,
                values,
                ".-" if across == "" else ".",
                color=color,
                label=label,
                markersize=3,
            )
        axes.set(
            xlabel=f"{across.partition('/')[2].upper()}, nats" if across else "rollout", ylabel=key
        )
        axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def write_report(root: Path) -> None:
    """Tables and plots of what is finished."""
    runs, hacked = read(root / "runs"), read(root / "gamed")
    rows = []
    for name in VARIANTS:
        mine = [run for run in runs if run["name"] == name]
        ends = [
            [end(run, key) for run in mine] for key in ("rollout/score", "gold/score", "rollout/kl")
        ]
        cpu = np.mean([run["cpu_seconds"] for run in mine]) if mine else 0.0
        rows.append(
            [name, str(len(mine)), *(spread(values) for values in ends if values), f"{cpu:.0f}"]
        )
    gaming = [
        [
            run["name"],
            *(f"{end(run, key):.2f}" for key in ("rollout/score", "gold/score", "rollout/kl")),
            f"{max(one['rollout/kl'] for one in run['rollouts']):.1f}",
            str(run["rollbacks"]),
            run["stopped"] or "",
        ]
        for run in hacked
    ]
    lines = [
        f"Mean of the last {LAST} rollouts, and standard deviation over seeds. Learning rate {RATE:g} for all.",
        "",
        *table(["", "seeds", "learned reward", "gold", "KL, nats", "CPU s"], rows),
        "",
        "![reward over KL](learning.png)",
        "",
        "## A reward that is gamed",
        "",
        *table(["", "words", "gold", "KL, nats", "highest KL", "rollbacks", "stopped by"], gaming),
        "",
        "![a gamed reward](gamed.png)",
    ]
    write_study(REPORT, "Learning curves", __doc__, lines)
    draw(runs, "rollout/kl", ("rollout/score", "gold/score"), REPORT.with_suffix(".png"))
    draw(hacked, "", ("rollout/kl", "rollout/score", "gold/score"), REPORT.with_name("gamed.png"))


def main() -> None:
    """Run what is missing, then write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("runs/learning"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    if not args.report:
        work: dict[Path, Callable[[], dict[str, Any]]] = {
            args.root / f"gamed/{number}.json": partial(gamed, name)
            for number, name in enumerate(GUARDS)
        }
        work |= {
            args.root / f"runs/{slug(name)}_{seed}.json": partial(learned, name, seed)
            for seed in SEEDS
            for name in VARIANTS
        }
        run_missing(work, args.workers)
    write_report(args.root)


if __name__ == "__main__":
    main()
