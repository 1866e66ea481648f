"""How time and memory of a Hydra-PPO iteration grow with its sizes: one size at a time, and the exponents.

    python benchmarks/scaling.py --report benchmarks/reports/scaling.md
    python benchmarks/scaling.py --axes layers vocab --bf16 1
    python benchmarks/scaling.py --tiny          # toy sizes, seconds

A random Llama; the module's own collect, score and update, without a trainer. Times are medians of some
repetitions after a warm-up. Memory is the most that tensors held at once during a phase, above weights, optimizer
and whatever was there before, counted allocation by allocation. An exponent is the slope of a straight line
through the logarithms: 1 is linear, 0 does not depend on it; the second number is that of the last two sizes.

The axis ``stop`` asks what a rollout costs when rows end early: a growing share of the vocabulary ends a
response, and the exponent is that of seconds against tokens really generated.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import linear_regression, median
from typing import Any, NamedTuple

import torch
from ppo import random_trunk
from record import machine, shown, table, write_section

from lightning_perl.batches import PromptBatch
from lightning_perl.commands.ledger import Ledger
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.modules import PPO
from lightning_perl.rollouts.rollout import Rollout, Scored
from lightning_perl.rollouts.sampling import SamplingSpec

PHASES = ("rollout", "score", "update")
Sizes = dict[str, float]
BASE: Sizes = {
    "hidden": 256, "layers": 4, "heads": 4, "vocab": 1024, "rank": 16,
    "batch": 16, "micro": 4, "prompt": 64, "response": 64, "stop": 0.0,
}  # fmt: skip
TINY: Sizes = {
    "hidden": 16, "layers": 2, "heads": 2, "vocab": 320, "rank": 2,
    "batch": 4, "micro": 2, "prompt": 4, "response": 4, "stop": 0.0,
}  # fmt: skip


class Axis(NamedTuple):
    """One size that grows.

    Attributes:
        values: Its values.
        tiny: Its values with ``--tiny``.
        others: Sizes that differ from `BASE` meanwhile.
        why: What the others are for.
    """

    values: Sequence[float]
    tiny: Sequence[float]
    others: Sizes | None = None
    why: str = ""


AXES = {
    "layers": Axis((2, 4, 8, 16), (1, 2)),
    "prompt": Axis((64, 128, 256, 512), (4, 8)),
    "response": Axis((32, 64, 128, 256), (4, 8)),
    "batch": Axis((8, 16, 32, 64), (4, 32)),
    "micro": Axis((2, 4, 8, 16), (1, 2)),
    "rank": Axis((4, 16, 64, 256), (2, 4)),
    "vocab": Axis(
        (16384, 32768, 65536, 131072),
        (320, 640),
        {"hidden": 64, "layers": 2, "batch": 8, "micro": 8, "response": 128},
        "8 x 128 positions of 16,384 logits are one chunk: from there on there are more chunks",
    ),
    "stop": Axis(
        # One token always ends a response: of 1024, or of 320.
        (1 / 1024, 1 / 64, 1 / 32, 1 / 16, 1 / 8),
        (1 / 64, 1 / 4),
        {"hidden": 512, "layers": 2, "heads": 8, "batch": 128, "prompt": 8},
        "short prompts, whose reading is part of the rollout, and many rows: few are bound by the weights",
    ),
}


BEHIND = "without prompts and first tokens, s"
"""Fitted against the tokens that are left."""


class Point(NamedTuple):
    """What an iteration cost.

    Attributes:
        seconds: By phase.
        megabytes: By phase, above what was held before.
        tokens: Generated.
        prompts: Seconds of a rollout of one token a row.
        rows: Of the rollout.
    """

    seconds: dict[str, float]
    megabytes: dict[str, float]
    tokens: int
    prompts: float = 0.0
    rows: int = 0


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", type=int, default=0)
    parser.add_argument("--attention", help="transformers' attn_implementation")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--report", type=Path)
    return parser.parse_args(argv)


def built(sizes: Sizes, args: argparse.Namespace) -> PPO:
    """Hydra-PPO on a random trunk, ``stop`` of whose vocabulary ends a response."""
    whole = {name: int(value) for name, value in sizes.items() if name != "stop"}
    with tempfile.TemporaryDirectory() as folder:
        trunk = random_trunk(argparse.Namespace(**whole), Path(folder) / "trunk")
        ends = max(1, round(sizes["stop"] * whole["vocab"]))
        (trunk / "generation_config.json").write_text(
            json.dumps({"eos_token_id": list(range(2, 2 + ends))})
        )
        return PPO(
            str(trunk),
            layout="hydra",
            lora=LoraSpec(rank=whole["rank"], alpha=whole["rank"]),
            sampling=SamplingSpec(max_new_tokens=whole["response"]),
            ppo_epochs=1,
            micro_batch_size=whole["micro"],
            trunk_dtype="bfloat16" if args.bf16 else "float32",
            attention=args.attention,
        )


def timed(act: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What an act gives, and its seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = act()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def measure(sizes: Sizes, args: argparse.Namespace) -> Point:
    """Warm up, time some iterations, and count the memory of one more."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    module = built(sizes, args).to(device)
    batch, prompt = int(sizes["batch"]), int(sizes["prompt"])
    ids = torch.randint(int(sizes["vocab"]), (batch, prompt), device=device)
    rows = torch.arange(batch, device=device)
    prompts = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), rows)
    optimizer = torch.optim.AdamW(module.parameter_groups(), lr=1e-6)

    def learn(rollout: Rollout, scored: Scored) -> None:
        """What `PPO.training_step` does with a scored rollout."""
        scored, value_stats = module.values_of(rollout, scored)
        experience, _ = module.experience(rollout, scored)
        module.update(experience, optimizer, first_value_stats=value_stats)

    def iteration(seconds: dict[str, list[float]]) -> int:
        rollout, taken = timed(lambda: module.collect(prompts, 0), device)
        seconds["rollout"].append(taken)
        _, taken = timed(lambda: module.collect(prompts, 0, sampling=SamplingSpec(1)), device)
        seconds["prompts"].append(taken)
        scored, taken = timed(
            lambda: module.score(rollout, values=not module.values_come_later), device
        )
        seconds["score"].append(taken)
        _, taken = timed(lambda: learn(rollout, scored), device)
        seconds["update"].append(taken)
        return int(rollout.response_mask.sum())

    seconds: dict[str, list[float]] = {part: [] for part in (*PHASES, "prompts")}
    # The first makes the optimizer's moments.
    iteration({part: [] for part in seconds})
    tokens = [iteration(seconds) for _ in range(args.repeats)][-1]
    ledger = Ledger(block=1)
    with ledger, ledger.phase("rollout"):
        rollout = module.collect(prompts, 0)
    with ledger, ledger.phase("score"):
        held = {"score": ledger.total}
        scored = module.score(rollout, values=not module.values_come_later)
    with ledger, ledger.phase("update"):
        held["update"] = ledger.total
        learn(rollout, scored)
    return Point(
        {phase: median(seconds[phase]) for phase in PHASES},
        {phase: (ledger.peaks[phase].total - held.get(phase, 0)) / 2**20 for phase in PHASES},
        tokens,
        median(seconds["prompts"]),
        batch,
    )


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Slope of ``log y`` over ``log x``."""
    return linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def columns(points: Sequence[Point]) -> dict[str, list[float]]:
    """What is fitted: seconds of each phase and of all, megabytes of each phase."""
    found = {f"{phase}, s": [one.seconds[phase] for one in points] for phase in PHASES}
    found["iteration, s"] = [sum(one.seconds.values()) for one in points]
    return found | {f"{phase}, MB": [one.megabytes[phase] for one in points] for phase in PHASES}


def axis_lines(
    name: str, values: Sequence[float], points: Sequence[Point]
) -> tuple[list[str], dict[str, float]]:
    """An axis' table, and its exponents."""
    stop = name == "stop"
    found, xs = columns(points), dict[str, Sequence[float]]()
    if stop:
        behind = [one.seconds["rollout"] - one.prompts for one in points]
        found = {"rollout, s": found["rollout, s"], BEHIND: behind}
        xs = {
            "rollout, s": [one.tokens for one in points],
            BEHIND: [one.tokens - one.rows for one in points],
        }
    exponents = {key: exponent(xs.get(key, values), ys) for key, ys in found.items()}
    last = {key: exponent(xs.get(key, values)[-2:], ys[-2:]) for key, ys in found.items()}
    generated = [[str(one.tokens)] if stop else [] for one in points]
    rows = [
        [f"{value:.4g}", *tokens, *(f"{ys[number]:.4g}" for ys in found.values())]
        for number, (value, tokens) in enumerate(zip(values, generated, strict=True))
    ]
    fits = [f"**{exponents[key]:.2f}** ({last[key]:.2f})" for key in found]
    head = ["share that ends a response", "tokens generated"] if stop else [name]
    return table([*head, *found], [*rows, ["exponent", *([""] if stop else []), *fits]]), exponents


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Every axis."""
    args = arguments(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    base = TINY if args.tiny else BASE
    command = [
        "python",
        "benchmarks/scaling.py",
        "--threads",
        str(args.threads),
        "--bf16",
        str(args.bf16),
    ]
    result = {}
    for name in args.axes:
        axis = AXES[name]
        values = axis.tiny if args.tiny else axis.values
        sizes = base if args.tiny else base | (axis.others or {})
        points = []
        for value in values:
            points.append(measure(sizes | {name: value}, args))
            print(f"{name} {value:.4g}: {points[-1]}", flush=True)
        lines, result[name] = axis_lines(name, values, points)
        others = ", ".join(f"{key} {value:.4g}" for key, value in sizes.items() if key != name)
        about = [
            f"{machine()}; `{shown([*command, '--axes', name])}`; medians of {args.repeats}.",
            "",
            f"Others: {others}." + (f" ({axis.why}.)" if axis.why and not args.tiny else ""),
            "",
        ]
        print("\n".join(lines))
        if args.report is not None:
            write_section(args.report, "How an iteration's cost grows", name, [*about, *lines])
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
