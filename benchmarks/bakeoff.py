"""Every method on the quickstart's task at equal episodes, from one rule for its settings.

    python benchmarks/bakeoff.py                       # everything; finished runs are kept
    python benchmarks/bakeoff.py --workers 1 --runs /tmp/bakeoff
    python benchmarks/bakeoff.py --report              # table and plot from finished runs

The task is the quickstart's: the packaged trunk of 0.9M weights, whose reward head learned from thumbs; the true
quality of an answer (gold) is known and never learned from. On-policy methods learn from 1,024 episodes that the
reward head scores. Offline methods learn in one pass from as many answers: DPO, IPO, RDPO and KTO from pairs, two
of the reference's own answers to a packaged prompt, put in order by the same reward head; KTO also from packaged
thumbs. Each run is a process of its own with one thread and ends on the packaged held-out prompts.

The rule: a method keeps the coefficients of its recipe in ``configs/``, on the quickstart's trunk and adapter, in
batches of 64 episodes or 16 pairs. Its learning rate is the one of three whose run with seed 100 has the highest
learned score on the validation prompts, within a ceiling of the KL to the reference (or is nearest to it). Writes
``benchmarks/reports/bakeoff.md`` and ``.png``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from calibration import calibration
from lightning.pytorch import Trainer
from matplotlib.figure import Figure
from perl_reward import read, spread
from perl_rl import Course
from record import machine, table, write_section
from small_trunk import adam, fitted, resident_mb, run_missing

from lightning_perl.commands.estimate import GIB, LlamaSizes, estimate
from lightning_perl.commands.rehearsal import Load, rehearsal_of
from lightning_perl.data import MixedDataModule, PreferenceDataModule
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.weightless import weightless
from lightning_perl.modules import (
    DPO,
    GRPO,
    INPO,
    IPO,
    KTO,
    PPO,
    RAFT,
    RDPO,
    RLOO,
    Reinforce,
    ReMax,
    SuperHF,
)
from lightning_perl.modules.base import AdapterModule
from lightning_perl.modules.on_policy import KLControl, OnPolicy
from lightning_perl.packaged import unpackaged
from lightning_perl.rewards.coffee_orders import CoffeeOrderQuality
from lightning_perl.rollouts.sampling import SamplingSpec

REPORT = Path("benchmarks/reports/bakeoff.md")
TRUNK = unpackaged("packaged:quickstart/trunk")
ORDERS = "packaged:quickstart/orders"
EPISODES = 1024
BATCH = 64
PAIRS, THUMBS = 16, 32
"""Pairs and thumbs of an optimizer step: as many answers in both."""
TEXTS = 32
"""Texts to imitate beside the episodes of an optimizer step."""
RATES = (1e-3, 3e-3, 1e-2)
GRID_SEED, SEEDS = 100, (0, 1, 2)
CEILING = 10.0
"""Nats of KL to the reference, above which a learning rate is not chosen."""
SEVEN_B = LlamaSizes(4096, 32, 32, 11008, 32000)
PROMPT_TOKENS, ANSWER_TOKENS, AT_ONCE, ESTIMATED_EPISODES = 256, 256, 4, 16
RECIPE = {"layout": "hydra", "micro_batch_size": 64}
PPO_RECIPE = {
    "ppo_epochs": 2,
    "minibatch_size": 32,
    "kl_coef": 0.05,
    "gae_lambda": 0.95,
    "value_coef": 0.5,
}
PPO_MAX = {
    "score_normalization": "standardize",
    "score_clip": 3.0,
    "advantage_clip": 3.0,
    "critic_warmup": 2,
}
LORA_RLHF = {
    "lora": LoraSpec(8, alpha=64.0, targets=("attention",)),
    "kl_control": KLControl("jensen_shannon"),
}
LORA = LoraSpec(16, alpha=16.0)


class Method(NamedTuple):
    """A class, its recipe, and the rows that it learns from."""

    make: type[AdapterModule]
    settings: dict[str, Any]
    rows: str = "prompts"

    @property
    def samples(self) -> int:
        """Responses per prompt."""
        return int(self.settings.get("samples", 1))

    @property
    def lora(self) -> LoraSpec:
        """The adapter's shape: the quickstart's, or the recipe's own."""
        return self.settings.get("lora", LORA)


METHODS = {
    "PPO, hydra": Method(PPO, RECIPE | PPO_RECIPE),
    "PPO, joint_hydra": Method(PPO, RECIPE | PPO_RECIPE | {"layout": "joint_hydra"}),
    "PPO-max": Method(PPO, RECIPE | PPO_RECIPE | PPO_MAX),
    "PPO-max, texts": Method(PPO, RECIPE | PPO_RECIPE | PPO_MAX | {"lm_weight": 0.02}, "texts"),
    "LoRA-RLHF": Method(PPO, RECIPE | PPO_RECIPE | LORA_RLHF),
    "Reinforce": Method(Reinforce, RECIPE | {"beta": 0.05}),
    "RLOO": Method(RLOO, RECIPE | {"samples": 4, "kl_coef": 0.05}),
    "ReMax": Method(ReMax, RECIPE | {"kl_coef": 0.05}),
    "GRPO": Method(
        GRPO, RECIPE | {"samples": 8, "epochs": 2, "minibatch_size": 32, "kl_coef": 0.04}
    ),
    "RAFT": Method(RAFT, RECIPE | {"samples": 8, "epochs": 2}),
    "SuperHF": Method(SuperHF, RECIPE | {"samples": 8, "kl_coef": 0.23}),
    "INPO": Method(INPO, RECIPE | {"samples": 8, "epochs": 2, "eta": 0.1}),
    "DPO": Method(DPO, {"beta": 0.1}, "pairs"),
    "IPO": Method(IPO, {"beta": 0.1}, "pairs"),
    "RDPO": Method(RDPO, {"beta": 0.1, "alpha": 0.01}, "pairs"),
    "KTO": Method(KTO, {"beta": 0.1}, "pairs"),
    "KTO, thumbs": Method(KTO, {"beta": 0.1}, "thumbs"),
}


# ---- rows ---------------------------------------------------------------------------------------


def packaged_rows(name: str) -> list[dict[str, Any]]:
    """Rows of a packaged file of orders."""
    with gzip.open(unpackaged(f"{ORDERS}/{name}.jsonl.gz"), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def prompts(**options: Any) -> PreferenceDataModule:
    """The packaged prompts; ``train`` are the training rows, if not all of them."""
    files = {split: f"{ORDERS}/prompts_{split}.jsonl.gz" for split in ("train", "val", "test")}
    return orders(**files | options, rows="prompts")


def orders(
    make: type[PreferenceDataModule] = PreferenceDataModule, **options: Any
) -> PreferenceDataModule:
    """Rows about orders."""
    return make(TRUNK, max_tokens=80, max_response_tokens=32, val_batch_size=256, **options)


def policy(make: type[OnPolicy] = RLOO, **settings: Any) -> Any:  # noqa: ANN401 (any on-policy class)
    """An on-policy module on the packaged trunk."""
    shared = {"lora": LORA, "sampling": SamplingSpec(max_new_tokens=32)}
    return make(TRUNK, gold=CoffeeOrderQuality(), **shared | settings)


def make_pairs() -> dict[str, Any]:
    """Two answers of the reference to every prompt, the one that the reward head prefers first."""
    module, pairs = policy(score_batch_size=64, seed=GRID_SEED), []
    rows = packaged_rows("prompts_train")[PAIRS : PAIRS + EPISODES // 2]
    data = prompts(train=rows, batch_size=BATCH, seed=GRID_SEED)
    data.setup()
    for batch in data.train_dataloader():
        rollout = module.collect(batch, 0, "reference", samples=2)
        scores = module.scores(rollout).view(-1, 2)
        _, answers = module.texts(rollout)
        for number, row in enumerate(batch.row.tolist()):
            two = answers[2 * number : 2 * number + 2]
            better = int(scores[number].argmax())
            if scores[number, 0] != scores[number, 1]:
                both = {"chosen": two[better], "rejected": two[1 - better]}
                pairs.append(rows[row] | both)
    return {"pairs": pairs}


# ---- runs ---------------------------------------------------------------------------------------


def data_for(method: Method, seed: int, root: Path) -> PreferenceDataModule:
    """What a method learns from."""
    options = {"batch_size": BATCH // method.samples, "seed": seed}
    if method.rows == "prompts":
        return prompts(**options)
    if method.rows == "texts":
        texts = {"texts": f"{ORDERS}/rated_train.jsonl.gz", "texts_batch_size": TEXTS}
        return prompts(make=MixedDataModule, **options | texts)
    if method.rows == "pairs":
        rows, size = json.loads((root / "pairs.json").read_text())["pairs"], PAIRS
    else:
        rated = [row for row in packaged_rows("rated_train") if "label" in row]
        rows, size = rated[: EPISODES + PAIRS], THUMBS
    return orders(train=rows[PAIRS:], val=rows[:PAIRS], batch_size=size, seed=seed)


def train(name: str, learning_rate: float, seed: int, root: Path) -> dict[str, Any]:
    """One policy, its answers to validation or held-out prompts, and what it took."""
    warnings.filterwarnings("ignore")
    method, course = METHODS[name], Course()
    options = method.settings | {"seed": seed, "optimizer": adam(learning_rate)}
    data = data_for(method, seed, root)
    data.setup()
    before = resident_mb("VmRSS")
    if issubclass(method.make, OnPolicy):
        module = policy(method.make, max_episodes=EPISODES, score_batch_size=64, **options)
        trunk, callbacks = module.policy_trunk, [course]
    else:
        module, callbacks = method.make(TRUNK, **{"lora": LORA} | options), []
        trunk = module.trunk
    wall, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            fitted(module, data, 1, callbacks, limit_val_batches=0, default_root_dir=folder)
            stopped = None
        except RuntimeError as error:  # a guard: what does not learn is shown
            stopped = str(error).splitlines()[0]
    result = {
        "method": name,
        "learning_rate": learning_rate,
        "seed": seed,
        "stopped": stopped,
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "fit_peak_mb": resident_mb("VmHWM") - before,
        "updates": module.trainer.global_step,
        "rollouts": course.rollouts,
    }
    adapter, held_out = trunk.adapters.tensors("actor"), seed != GRID_SEED
    result |= judged(adapter, method.lora, held_out)
    return result | (calibration(TRUNK, adapter, method.lora) if held_out else {})


def judged(adapter: dict[str, torch.Tensor], lora: LoraSpec, held_out: bool) -> dict[str, Any]:
    """Answers of a policy, drawn with the same noise for all."""
    judge = policy(score_batch_size=64, lora=lora)
    with torch.no_grad():
        for name, weight in judge.policy_trunk.adapters.tensors("actor").items():
            weight.copy_(adapter[name])
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    data = prompts(train=packaged_rows("prompts_train")[:1])  # they are not looked at
    answer = trainer.test if held_out else trainer.validate
    (found,) = answer(judge, datamodule=data, verbose=False)
    return {key.partition("/")[2]: value for key, value in found.items()}


def at_seven_b(name: str) -> dict[str, Any]:
    """What `estimate` says of a method on Llama-7B: bf16 trunk, rank 16, rows of 256 + 256 tokens, 4 at once."""
    method = METHODS[name]
    own = {name: value for name, value in method.settings.items() if name != "minibatch_size"}
    settings = {"lora": LoraSpec(16, 16.0), "trunk_dtype": "bfloat16"} | own
    load = Load(PROMPT_TOKENS, ANSWER_TOKENS, AT_ONCE)
    if issubclass(method.make, OnPolicy):
        sampling = SamplingSpec(max_new_tokens=ANSWER_TOKENS)
        settings |= {"micro_batch_size": AT_ONCE, "sampling": sampling}
        load = load._replace(rows=ESTIMATED_EPISODES)
    elif method.rows == "pairs":
        load = load._replace(rows=AT_ONCE // 2, pairs=True)
    with weightless(SEVEN_B.config()):
        module = method.make("trunk", **settings)
    found = estimate(rehearsal_of(module, load))
    return {"method": name, "peak_gib": found.peak.total / GIB, "phase": found.phase}


# ---- which runs ---------------------------------------------------------------------------------


def slug(name: str) -> str:
    """A method's name in file names."""
    return name.replace(", ", "_").lower()


def preference(run: dict[str, Any]) -> tuple[bool, float]:
    """What a learning rate is chosen by; see the head of this file."""
    within = run["kl"] <= CEILING
    value = run["score"] if within else -run["kl"]
    return within, value if math.isfinite(value) else -math.inf


def chosen_rates(root: Path) -> dict[str, float]:
    """The learning rate of each method whose grid is finished."""
    grid: dict[str, list[dict[str, Any]]] = {}
    for run in read(root / "grid"):
        grid.setdefault(run["method"], []).append(run)
    return {
        name: max(runs, key=preference)["learning_rate"]
        for name, runs in grid.items()
        if len(runs) == len(RATES)
    }


def run_all(root: Path, names: Sequence[str], workers: int) -> None:
    """The pairs, the estimates, the grid, and the runs that count."""
    run_missing({root / "pairs.json": make_pairs}, workers)
    run_missing(
        {
            root / f"grid/{slug(name)}_{rate:g}.json": partial(train, name, rate, GRID_SEED, root)
            for name, rate in product(names, RATES)
        },
        workers,
    )
    rates = chosen_rates(root)
    run_missing(
        {
            root / f"runs/{slug(name)}_{seed}.json": partial(train, name, rates[name], seed, root)
            for seed, name in product(SEEDS, names)
            if name in rates
        },
        workers,
    )
    run_missing(
        {root / f"estimates/{slug(name)}.json": partial(at_seven_b, name) for name in names},
        workers,
    )


# ---- report -------------------------------------------------------------------------------------


def by_method(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs by method, in the table's order."""
    found = {name: [run for run in runs if run["method"] == name] for name in METHODS}
    return {name: mine for name, mine in found.items() if mine}


def results(runs: list[dict[str, Any]], at_7b: dict[str, float]) -> list[str]:
    """A row per method; the reference's own numbers first."""
    first = runs[0]
    reference = f"{first['reference_gold']:.3f}", f"{first['reference_score']:.2f}", "0"
    rows: list[list[str]] = [["reference", "", "", *reference, *[""] * 7]]
    for name, mine in by_method(runs).items():

        def cell(key: str, digits: int, mine: list[dict[str, Any]] = mine) -> str:
            return spread([run[key] for run in mine], digits)

        rows.append(
            [
                name,
                f"{mine[0]['learning_rate']:g}",
                str(len(mine)),
                *(cell("gold", 3), cell("score", 2), cell("kl", 2), cell("win_rate", 3)),
                cell("response_tokens", 1),
                str(mine[0]["updates"]),
                *(
                    f"{np.mean([run[key] for run in mine]):.0f}"
                    for key in ("cpu_seconds", "wall_seconds")
                ),
                f"{np.max([run['fit_peak_mb'] for run in mine]):.0f}",
                f"{at_7b[name]:.1f}" if name in at_7b else "",
            ]
        )
    head = ["method", "learning rate", "runs", "gold", "learned reward", "KL", "wins", "tokens"]
    return table([*head, "updates", "CPU s", "wall s", "peak MB", "7B GiB"], rows)


def calibration_table(runs: list[dict[str, Any]]) -> list[str]:
    """Share of right predictions and their calibration error, see ``calibration.py``; the reference's first."""
    keys = [f"{kind}_{measure}" for kind in ("choice", "token") for measure in ("accuracy", "ece")]
    measured = [run for run in runs if keys[0] in run]
    rows = [
        [
            "reference",
            "",
            *(f"{run[f'reference_{key}']:.3f}" for run in measured[:1] for key in keys),
        ]
    ]
    for name, mine in by_method(measured).items():
        values = ([run[key] for run in mine] for key in keys)
        cells = (spread(seeds, 3) if len(seeds) > 1 else f"{seeds[0]:.3f}" for seeds in values)
        rows.append([name, str(len(mine)), *cells])
    return table(
        ["method", "runs", *(key.replace("_ece", " ECE").replace("_", " ") for key in keys)], rows
    )


def grid_table(runs: list[dict[str, Any]], rates: dict[str, float]) -> list[str]:
    """Every run of the grid: learned score / KL (gold, which chooses nothing)."""

    def cell(name: str, rate: float) -> str:
        (run,) = [one for one in runs if (one["method"], one["learning_rate"]) == (name, rate)]
        text = f"{run['score']:.2f} / {run['kl']:.1f} ({run['gold']:.3f})"
        stopped = f", stopped: {run['stopped']}" if run["stopped"] else ""
        return (f"**{text}**" if rates[name] == rate else text) + stopped

    rows = [[name, *(cell(name, rate) for rate in RATES)] for name in METHODS if name in rates]
    return table(["method", *(f"{rate:g}" for rate in RATES)], rows)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Gold and learned reward over the KL to the reference: every run, and the course of seed 0."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    panels = {"gold": "gold/score", "score": "rollout/score"}
    for number, (key, logged) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, 2, number)
        for place, (name, mine) in enumerate(by_method(runs).items()):
            color, marker = f"C{place % 10}", "o" if METHODS[name].rows == "prompts" else "s"
            filled = color if place < 10 else "none"
            kl = [run["kl"] for run in mine]
            axes.plot(
                *(kl, [run[key] for run in mine], marker),
                color=color,
                markerfacecolor=filled,
                label=name,
            )
            course = mine[0]["rollouts"]
            kl = [one["rollout/kl"] for one in course]
            axes.plot(kl, [one[logged] for one in course], color=color, alpha=0.3, linewidth=0.8)
        axes.axhline(runs[0][f"reference_{key}"], color="0.5", linestyle=":")
        axes.set_xlabel("KL to the reference, nats")
        axes.set_ylabel({"gold": "gold reward", "score": "learned reward"}[key])
        axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)


def report(root: Path) -> None:
    """Tables and plot of what is finished; sections that were written by hand stay."""
    runs, rates = read(root / "runs"), chosen_rates(root)
    runs.sort(key=lambda run: run["seed"])
    at_7b = {run["method"]: run["peak_gib"] for run in read(root / "estimates")}
    write = partial(write_section, REPORT, "Bake-off: every method on the quickstart's task")
    about = [
        f"{machine()}; one thread per run. Command: `python benchmarks/bakeoff.py`.",
        "",
        f"{EPISODES:,} episodes a run (offline: {EPISODES // 2 - PAIRS} pairs or {EPISODES:,} thumbs, one pass); "
        f"LoRA of rank 16; seeds {SEEDS}; mean ± standard "
        "deviation over seeds, on the 256 held-out prompts with the same noise for all. Gold: the true quality, "
        "0 to 1. KL: nats of a response. Wins: over the reference under the learned reward, a tie is half. CPU "
        "and wall seconds are of the training alone, on a machine that others used too: compare the first. Peak: "
        "highest resident size of the training above what its process began with. 7B: what `estimate` says of "
        f"Llama-7B in bf16, {PROMPT_TOKENS} + {ANSWER_TOKENS} tokens, {AT_ONCE} responses at once, without "
        "checkpointing.",
    ]
    image = f"![gold and learned reward over KL]({REPORT.with_suffix('.png').name})"
    write("Held-out prompts", [*about, "", *results(runs, at_7b), "", image])
    sure = [
        "Is a policy as sure as it is right (SuperHF's paper asks that)? Expected calibration errors in ten "
        "bins, on held-out orders. Choice: of four answers, three of which get the drink, the size or the number "
        "wrong, the policy picks the likeliest. Token: the likeliest next token of 512 answers as they were "
        "written, good and bad. `benchmarks/calibration.py`.",
    ]
    write("Calibration", [*sure, "", *calibration_table(runs)])
    rule = [
        f"One run per learning rate with seed {GRID_SEED}: learned score / KL (gold) on the validation "
        f"prompts. Bold: chosen, the highest learned score within {CEILING:g} nats, or the run nearest to them. "
        "Gold chooses nothing.",
    ]
    write("The grid", [*rule, "", *grid_table(read(root / "grid"), rates)])
    plot(runs, REPORT.with_suffix(".png"))
    print(REPORT)


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/bakeoff"), help="where runs are kept"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--report", action="store_true", help="only the report, of finished runs")
    args = parser.parse_args()
    if not args.report:
        run_all(args.runs, args.methods, args.workers)
    report(args.runs)


if __name__ == "__main__":
    main()
