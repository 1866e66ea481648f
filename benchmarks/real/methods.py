"""Every method on a model that can speak, at equal episodes, where the true reward is known.

    python benchmarks/real/methods.py --trunk runs/real/trunk --data_dir ../shared/data
    python benchmarks/real/methods.py --trunk runs/real/trunk --data_dir ../shared/data --report

Prompts are the first human turns of Anthropic's harmless-base, with a system turn that asks for one short
sentence (without it 3% of answers have both, too few to learn from). The reward is plain Python,
`ShortAndOnTopic`: half a point for an answer of at most 20 words, half for one that uses a word of the question
of five letters or more.
Gold is the share of held-out answers with both: shortness alone is learned fast, by answers such as "A myth.",
and does not count. On-policy methods learn from 768 episodes, the others in one pass from as many answers of the
untrained model, two to a question, that the same reward put in order. Recipes are those of
``benchmarks/bakeoff.py``, in batches of 32 episodes; the learning rate is one for all, tried with seed 100 on RLOO
only. A JSON per run, finished runs are kept, one thread each. Writes ``benchmarks/reports/real/methods.md`` and
``.png``.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from matplotlib.figure import Figure
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from bakeoff import METHODS, slug
from perl_reward import read, spread
from perl_rl import Course
from record import study_parser, table, write_study
from small_trunk import adam, fitted, resident_mb, run_missing

from lightning_perl.data import HarmlessnessDataModule, PreferenceDataModule
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.modules import RLOO
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.rewards.function import EachAlone
from lightning_perl.rollouts.sampling import SamplingSpec

REPORT = Path("benchmarks/reports/real/methods.md")
EPISODES, BATCH, PAIRS = 768, 32, 16
RATE, TRIED, SEEDS = 1e-3, 100, (0, 1, 2)
LORA = LoraSpec(16, alpha=16.0)
SAMPLING = SamplingSpec(max_new_tokens=48, temperature=0.7)
SIZES: dict[str, Any] = {"max_tokens": 192, "max_response_tokens": 48, "on_bad_row": "reject"}
HELD_OUT = 64
ASKED = "Answer in one short sentence."
WORD = re.compile(r"[a-z']+")


class ShortAndOnTopic(EachAlone):
    """Half a point for at most 20 words, half for a word of the question of five letters or more."""

    def score(self, prompt: str, response: str, row: int) -> float:
        """0, 0.5 or 1."""
        words = WORD.findall(response.lower())
        question = prompt.rpartition("User: ")[2].removesuffix("\nAgent:")
        named = {word for word in WORD.findall(question.lower()) if len(word) >= 5} & {*words}
        return 0.5 * (0 < len(words) <= 20) + 0.5 * bool(named)


class HasBoth(ShortAndOnTopic):
    """1 for an answer that earns both halves."""

    def score(self, prompt: str, response: str, row: int) -> float:
        """0 or 1."""
        return float(super().score(prompt, response, row) == 1.0)


def questions(trunk: Path, data_dir: Path) -> list[dict[str, str]]:
    """First human turns of harmless-base, each once, of at most 60 words."""
    data = HarmlessnessDataModule(str(trunk), data_dir, on_bad_row="reject")
    firsts = [item.context[0].text for part in data.read() for item in part]
    short = {text: None for text in firsts if len(WORD.findall(text.lower())) <= 60}
    return [{"prompt": text, "system": ASKED} for text in short]


def asked(trunk: Path, data_dir: Path, **options: Any) -> PreferenceDataModule:
    """The questions, the first of them held out."""
    rows = questions(trunk, data_dir)
    test, val, train = rows[:HELD_OUT], rows[HELD_OUT : 2 * HELD_OUT], rows[2 * HELD_OUT :]
    sizes: dict[str, Any] = {"rows": "prompts", "val_batch_size": HELD_OUT, **SIZES}
    return PreferenceDataModule(str(trunk), train, val, test, **sizes, **options)


def policy(trunk: Path, make: Any = RLOO, **settings: Any) -> Any:  # noqa: ANN401 (any on-policy class)
    """An on-policy module on the trunk, its reward in Python alone."""
    fixed: dict[str, Any] = {
        "trunk_dtype": "bfloat16",
        "lora": LORA,
        "sampling": SAMPLING,
        "learned_reward_weight": 0.0,
        "reward_function": ShortAndOnTopic(),
        "gold": HasBoth(),
        "score_batch_size": 8,
    }
    return make(str(trunk), **fixed | settings | {"micro_batch_size": 8})


def make_pairs(trunk: Path, data_dir: Path) -> dict[str, Any]:
    """Two answers of the reference to each of 256 questions, the better one first."""
    module, data = policy(trunk), asked(trunk, data_dir, batch_size=16, seed=TRIED)
    data.setup()
    rows, pairs, drawn = questions(trunk, data_dir)[2 * HELD_OUT :], [], 0
    for batch in data.train_dataloader():
        rollout = module.collect(batch, 0, "reference", samples=2)
        scores = module.scores(rollout).view(-1, 2).tolist()
        _, answers = module.texts(rollout)
        for number, row in enumerate(batch.row.tolist()):
            better = scores[number].index(max(scores[number]))
            two = answers[2 * number : 2 * number + 2]
            if scores[number][0] != scores[number][1] and all(map(str.strip, two)):
                pairs.append(rows[row] | {"chosen": two[better], "rejected": two[1 - better]})
        drawn += len(rollout.row)
        if drawn >= EPISODES:
            break
    return {"pairs": pairs}


def data_for(name: str, seed: int, trunk: Path, data_dir: Path, root: Path) -> PreferenceDataModule:
    """What a method learns from."""
    method = METHODS[name]
    if method.rows == "prompts":
        return asked(trunk, data_dir, batch_size=BATCH // method.samples, seed=seed)
    pairs = json.loads((root / "pairs.json").read_text())["pairs"]
    options: dict[str, Any] = {"val_fraction": 0.0, "batch_size": PAIRS, "seed": seed, **SIZES}
    return PreferenceDataModule(str(trunk), pairs, **options)


def train(
    name: str, rate: float, seed: int, trunk: Path, data_dir: Path, root: Path
) -> dict[str, Any]:
    """One policy, its answers to the held-out questions, and what it took."""
    warnings.filterwarnings("ignore")
    method, course = METHODS[name], Course()
    options = method.settings | {"seed": seed, "optimizer": adam(rate)}
    before = resident_mb("VmRSS")
    if issubclass(method.make, OnPolicy):
        if "minibatch_size" in options:
            options["minibatch_size"] = BATCH // 2
        module = policy(trunk, method.make, max_episodes=EPISODES, **options)
        callbacks: list[Any] = [course]
    else:
        module = method.make(str(trunk), lora=LORA, trunk_dtype="bfloat16", **options)
        callbacks = []
    cpu, wall = time.process_time(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        data = data_for(name, seed, trunk, data_dir, root)
        fitted(module, data, 1, callbacks, limit_val_batches=0, default_root_dir=folder)
        module.hand_over(Path(folder))
        took = {
            "cpu_minutes": (time.process_time() - cpu) / 60,
            "wall_minutes": (time.perf_counter() - wall) / 60,
            "threads": torch.get_num_threads(),
            "fit_peak_mb": resident_mb("VmHWM") - before,
            "updates": module.trainer.global_step,
            "rollouts": course.rollouts,
        }
        found = judged(Path(folder) / "adapters/actor", trunk, data_dir, seed)
    return {"method": name, "learning_rate": rate, "seed": seed, **took, **found}


def judged(adapter: Path, trunk: Path, data_dir: Path, seed: int) -> dict[str, Any]:
    """Answers of a handed-over policy to questions: held-out ones, or with the tried seed validation's."""
    judge = policy(trunk)
    weights = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name, weight in judge.policy_trunk.adapters.tensors("actor").items():
            weight.copy_(weights[f"base_model.model.{name}"])
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }
    trainer, data = Trainer(accelerator="cpu", **quiet), asked(trunk, data_dir)
    answer = trainer.validate if seed == TRIED else trainer.test
    (found,) = answer(judge, datamodule=data, verbose=False)
    return {key.partition("/")[2]: value for key, value in found.items()}


# ---- report -------------------------------------------------------------------------------------

COLUMNS = {
    "gold": ("gold", 3),
    "score": ("score", 3),
    "KL, nats": ("kl", 1),
    "tokens": ("response_tokens", 1),
    "minutes (CPU)": ("cpu_minutes", 1),
    "peak MB": ("fit_peak_mb", 0),
    "updates": ("updates", 0),
}


def over_seeds(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation; of one seed the value."""
    return spread(values, digits) if len(values) > 1 else f"{values[0]:.{digits}f}"


def cells_of(runs: list[dict[str, Any]]) -> list[str]:
    """The rise of the gold, and the columns."""
    risen_by = over_seeds([risen(run) for run in runs], 2)
    columns = COLUMNS.values()
    return [risen_by, *(over_seeds([run[key] for run in runs], digits) for key, digits in columns)]


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Held-out gold over KL, a point per run."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(run["method"] for run in runs)):
        mine = [run for run in runs if run["method"] == name]
        marker = "osD^v<>*PX"[number % 10]
        axes.scatter(
            [run["kl"] for run in mine], [run["gold"] for run in mine], label=name, marker=marker
        )
    axes.set(
        xlabel="KL to the reference, nats per answer", ylabel="gold: answers that earn both halves"
    )
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)


def risen(run: dict[str, Any]) -> float:
    """How far the gold rose, in standard deviations of the untrained model's answers."""
    before = run["reference_gold"]
    return float((run["gold"] - before) / (before * (1 - before)) ** 0.5)


def write_report(root: Path) -> None:
    """The table and the plot."""
    runs = [run for run in read(root / "runs") if run["seed"] in SEEDS]
    first = runs[0]
    before = [f"{first[f'reference_{key}']:.3f}" for key in ("gold", "score")]
    rows = [["reference", "", "0", *before, "0", *[""] * 4]]
    grouped = {name: [run for run in runs if run["method"] == name] for name in METHODS}
    for name, mine in grouped.items():
        if mine:
            rows.append([name, str(len(mine)), *cells_of(mine)])
    tried = [
        f"{run['method']} {run['learning_rate']:g}: gold {run['gold']:.2f}, KL {run['kl']:.1f}"
        for run in read(root / "tried")
    ]
    lines = [
        f"{EPISODES} episodes or answers, learning rate {RATE:g}, mean and standard deviation over seeds. "
        f"Tried before, on validation questions: {'; '.join(tried)}.",
        "",
        *table(["method", "seeds", "rise of gold, sd", *COLUMNS], rows),
        "",
        f"![gold over KL]({REPORT.with_suffix('.png').name})",
    ]
    write_study(REPORT, "Every method on a model that can speak", __doc__, lines)
    plot(runs, REPORT.with_suffix(".png"))


def main() -> None:
    """Run what is missing, then write the report."""
    parser = study_parser(__doc__, "runs/real/methods", SEEDS)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument(
        "--try", dest="rates", type=float, nargs="*", default=[], help="rates to try, not to report"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    args = parser.parse_args()
    given: dict[str, Any] = {"trunk": args.trunk, "data_dir": args.data_dir, "root": args.root}
    # Without those that need rows of other kinds, or bring an adapter of their own.
    names = [
        name
        for name in args.methods
        if METHODS[name].rows in ("prompts", "pairs") and "lora" not in METHODS[name].settings
    ]
    if not args.report:
        pairs = partial(make_pairs, args.trunk, args.data_dir)
        if any(METHODS[name].rows == "pairs" for name in names):
            run_missing({args.root / "pairs.json": pairs}, args.workers)
        if args.rates:
            runs = {
                args.root / f"tried/{slug(name)}_{rate:g}.json": partial(
                    train, name, rate, TRIED, **given
                )
                for name, rate in product(names, args.rates)
            }
        else:
            runs = {
                args.root / f"runs/{slug(name)}_{seed}.json": partial(
                    train, name, RATE, seed, **given
                )
                for seed, name in product(args.seeds, names)
            }
        run_missing(runs, args.workers, args.threads)
    if not args.rates:
        write_report(args.root)


if __name__ == "__main__":
    main()
