"""Reward hacking on a model that can speak: a weak reward, then a guard, an ensemble and a weight average.

    python benchmarks/real/hacking.py --trunk runs/real/trunk --data_dir ../shared/data
    python benchmarks/real/hacking.py --trunk runs/real/trunk --data_dir ../shared/data --report

The weak reward is an adapter of rank 16 that learned from those of 128 pairs of HH harmless that are short (192
tokens, of which an answer has 48); two more of other seeds learned from the same pairs. The judge, which nobody
learns from, read four eighths of the corpus, other dialogs than theirs. RLOO, four answers to a prompt, layout
`perl`, learns for 320 episodes in batches of 16 at 1e-3 without a KL penalty, from: the weak reward; the same with
``PolicyGuard``, whose ceiling is 4 nats an answer; the lowest score of the three; the score of their averaged
weights. Every reward scores demonstrations of its training pairs 0 with deviation 1. In the end 32 prompts of an
eighth that nobody learned from. Nothing was swept. A JSON per run, finished runs are kept, one thread each. Writes
``benchmarks/reports/real/hacking.md`` and ``.png``.
"""

from __future__ import annotations

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
    prompts,
    reward_model,
)
from learning import draw
from perl_reward import read
from perl_rl import Course
from record import study_parser, table, write_study
from small_trunk import adam, fitted, run_missing

from lightning_perl.callbacks import PolicyGuard
from lightning_perl.modules import RLOO

REPORT = Path("benchmarks/reports/real/hacking.md")
PAIRS, MEMBERS, CEILING = 128, 3, 4.0
EPISODES, BATCH, SAMPLES, RATE = 320, 16, 4, 1e-3
VARIANTS: dict[str, dict[str, Any]] = {
    "no guard": {},
    f"ceiling of {CEILING:g} nats": {"max_kl": CEILING},
    "ensemble, lowest": {"reward_ensemble": "minimum"},
    "weight average": {"reward_ensemble": "weight_average"},
}
SEEDS = (0,)


def train(name: str, seed: int, trunk: Path, data_dir: Path, root: Path) -> dict[str, Any]:
    """One policy, what its rollouts looked like, and its answers to the held-out prompts."""
    warnings.filterwarnings("ignore")
    settings = dict(VARIANTS[name])
    guard, course = PolicyGuard(max_kl=settings.pop("max_kl", None), window=None), Course()
    members = range(MEMBERS if settings else 1)
    rewards = [str(adapter_of(root / f"weak_{member}")) for member in members]
    settings |= {"samples": SAMPLES, "kl_coef": 0.0, "max_episodes": EPISODES, "seed": seed}
    rates = {"optimizer": adam(RATE), "layout": "perl", "reward": rewards}
    module = learner(trunk, RLOO, **rates, **settings)
    heard = judged_by(module, trunk, adapter_of(root / "judge"))
    data, cpu = prompts(trunk, data_dir, BATCH // SAMPLES, seed), time.process_time()
    fitted(module, data, 10, [guard, course], limit_val_batches=0, default_root_dir=root)
    took = {"cpu_minutes": (time.process_time() - cpu) / 60, "rollouts": course.rollouts}
    took |= {"rollbacks": guard.rollbacks, "stopped": guard.stopped_by}
    return {"name": name, "seed": seed, **took, **held_out(module, data, heard)}


def rewards_table(root: Path) -> list[str]:
    """The rewards' accuracy on held-out pairs."""
    rows = [
        [run["name"], run["train"], run["test"], f"{run['accuracy']:.3f}"]
        for run in read(root / "first")
    ]
    return table(["reward", "pairs learned", "pairs tested", "accuracy"], rows)


def policies_table(runs: list[dict[str, Any]]) -> list[str]:
    """A row per policy: before and after, in the learned score and in the judge's."""
    rows = [
        [
            *(run["name"], run["seed"]),
            *(f"{run[f'reference_{key}']:.2f} to {run[key]:.2f}" for key in ("score", "gold")),
            f"{run['judge_wins']:.3f} ± {run['judge_wins_error']:.3f}",
            *(f"{run['kl']:.1f}", f"{run['response_tokens']:.1f}"),
            f"{run['rollbacks']}" + (", stopped" if run["stopped"] else ""),
            f"{run['cpu_minutes']:.1f}",
        ]
        for name in VARIANTS
        for run in runs
        if run["name"] == name
    ]
    head = ["", "seed", "learned score", "judge's score", "judge's wins", "KL, nats", "tokens"]
    return table([*head, "rollbacks", "CPU minutes"], rows)


def write_report(root: Path) -> None:
    """Both tables of what is finished, and the plot."""
    runs, picture = read(root / "runs"), REPORT.with_suffix(".png")
    lines = [*rewards_table(root), "", *policies_table(runs), ""]
    lines.append(f"![scores over KL, a point per rollout]({picture.name})")
    write_study(REPORT, "Reward hacking on a model that can speak", __doc__, lines)
    draw(runs, "rollout/kl", ("rollout/score", "gold/score"), picture)


def main() -> None:
    """Run what is missing, then write the report."""
    parser = study_parser(__doc__, "runs/real/hacking", SEEDS)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    root, given = args.root, (args.trunk, args.data_dir)

    def reward(name: str, parts: range, seed: int = 0, count: int | None = None) -> dict[str, Any]:
        return {"name": name} | reward_model(*given, parts, root / name, seed, count)

    if not args.report:
        first = {f"weak_{seed}": (LEARNED, seed, PAIRS) for seed in range(MEMBERS)}
        first["judge"] = (JUDGED, 0, None)
        work = {
            root / f"first/{name}.json": partial(reward, name, *how) for name, how in first.items()
        }
        run_missing(work, args.workers)
        runs = {
            root / f"runs/{name.replace(' ', '_').replace(',', '')}_{seed}.json": partial(
                train, name, seed, *given, root
            )
            for seed in args.seeds
            for name in args.variants
        }
        run_missing(runs, args.workers)
    write_report(root)


if __name__ == "__main__":
    main()
