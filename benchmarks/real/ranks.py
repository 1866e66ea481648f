"""PERL's Table 3 on a model that can speak: `Reinforce` with LoRA of rank 1, 4, 16 and with full tuning.

    python benchmarks/real/ranks.py --trunk runs/real/trunk --data_dir ../shared/data
    python benchmarks/real/ranks.py --trunk runs/real/trunk --data_dir ../shared/data --report

The task, its sizes and its episodes are those of ``benchmarks/real/methods.py``: half a point for at most 20
words, half for a word of the question; gold is the share of held-out answers with both. LoRA: layout ``perl``, one
bf16 trunk, alpha = rank, AdamW at that study's 1e-3. Full tuning: layout ``full``, a float32 actor, critic and
reference, at 2e-5. Neither rate was swept. A JSON per run, finished runs are kept, one thread each. Writes
``benchmarks/reports/real/ranks.md``.
"""

from __future__ import annotations

import sys
import time
import warnings
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))

from methods import BATCH, COLUMNS, EPISODES, RATE, SEEDS, asked, cells_of, policy
from perl_reward import read
from perl_rl import BETA, VARIANTS, Course
from record import study_parser, table, write_study
from small_trunk import adam, fitted, resident_mb, run_missing

from lightning_perl.models.adapters import LoraSpec
from lightning_perl.modules import Reinforce

REPORT = Path("benchmarks/reports/real/ranks.md")
FULL_RATE = 2e-5


def train(variant: str, seed: int, trunk: Path, data_dir: Path) -> dict[str, Any]:
    """One policy, its answers to the held-out questions, and what it took."""
    warnings.filterwarnings("ignore")
    full, course = variant == "full", Course()
    rank = 1 if full else int(variant.split()[1])
    settings: dict[str, Any] = {"layout": "perl", "lora": LoraSpec(rank, float(rank))}
    if full:
        settings = {"layout": "full", "trunk_dtype": "float32"}
    settings |= {"beta": BETA, "max_episodes": EPISODES, "seed": seed}
    before, cpu = resident_mb("VmRSS"), time.process_time()
    module = policy(trunk, Reinforce, optimizer=adam(FULL_RATE if full else RATE), **settings)
    data = asked(trunk, data_dir, batch_size=BATCH, seed=seed)
    fitted(module, data, 1, [course], limit_val_batches=0)
    took = {
        "cpu_minutes": (time.process_time() - cpu) / 60,
        "fit_peak_mb": resident_mb("VmHWM") - before,
        "updates": module.trainer.global_step,
        "trained": sum(weight.numel() for weight in module.roles.actor_parameters()),
        "rollouts": course.rollouts,
    }
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", enable_checkpointing=False, **quiet)
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    return {
        **{"variant": variant, "seed": seed, **took},
        **{key.partition("/")[2]: value for key, value in found.items()},
    }


def write_report(root: Path) -> None:
    """A row per way of tuning."""
    runs = read(root)
    before = [f"{runs[0][f'reference_{key}']:.3f}" for key in ("gold", "score")]
    rows = [["reference", "", "", "0", *before, "0", *[""] * (len(COLUMNS) - 3)]]
    for variant in VARIANTS:
        mine = [run for run in runs if run["variant"] == variant]
        if mine:
            rows.append([variant, f"{mine[0]['trained']:,}", str(len(mine)), *cells_of(mine)])
    head = ["tuning", "actor's weights", "seeds", "rise of gold, sd", *COLUMNS]
    title = "Policy gradient by rank on a model that can speak (PERL, Table 3)"
    write_study(REPORT, title, __doc__, table(head, rows))


def main() -> None:
    """Run what is missing, then write the report."""
    parser = study_parser(__doc__, "runs/real/ranks", SEEDS)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    if not args.report:
        runs = {
            args.root / f"{variant.replace(' ', '')}_{seed}.json": partial(
                train, variant, seed, args.trunk, args.data_dir
            )
            for seed, variant in product(args.seeds, args.variants)
        }
        run_missing(runs, args.workers)
    write_report(args.root)


if __name__ == "__main__":
    main()
