"""Hydra-RLHF's own headline: seconds per episode of all six layouts, at equal micro-batch and in equal memory.

    python benchmarks/layouts.py --rounds 3 --report benchmarks/reports/layouts.md
    python benchmarks/layouts.py --rounds 3 --budget_mb 3000 --layouts lora hydra joint_hydra -- --bf16 1

Every figure is `benchmarks/ppo.py` in a process of its own, layouts in turn, medians over rounds. What stands
behind ``--`` goes to it. The first table gives all layouts the same batch and micro-batch. The second gives each
the largest micro-batch that fits the budget, and a batch of at least that size, as the paper's nearly equal memory
column suggests. Memory is what the process really took: allocated on CUDA, else resident; the budget is LoRA-PPO's
in the first table unless one is named.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from record import machine, run_json, shown, table, write_section

LAYOUTS = ("full", "lora", "dynamic_lora", "perl", "hydra", "joint_hydra")
BASELINE = "lora"
PAPER = {
    "lora": "18.75 s (1.00)",
    "hydra": "6.47 s (0.35, -65.5%)",
    "joint_hydra": "5.01 s (0.27, -73.3%)",
}
"""2309.00754, Table 1: Llama 7B, latency per sample, at 68.0, 71.1 and 67.9 GB."""
MOST_ROWS = 1024
NO_MEMORY = ("OutOfMemoryError", "can't allocate memory", "status -9")
"""What a child leaves that had too little: CUDA's error, the CPU allocator's, or the kernel's kill."""
Run = Callable[[Sequence[str]], dict[str, Any]]


class Cost(NamedTuple):
    """Of one layout at one batch.

    Attributes:
        batch: Episodes per iteration.
        micro: Episodes per forward and backward.
        seconds: Per episode, median over rounds.
        memory_mb: Peak, largest of the rounds.
    """

    batch: int
    micro: int
    seconds: float
    memory_mb: float


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=3, help="timed ones, per round")
    parser.add_argument("--budget_mb", type=float, help="by default LoRA-PPO's of the first table")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--title", default="Layouts")
    parser.add_argument("more", nargs="*", help="behind --: flags of benchmarks/ppo.py")
    args = parser.parse_args(argv)
    if BASELINE not in args.layouts:
        parser.error(f"--layouts must have {BASELINE}, which the others are compared with")
    return args


def command(args: argparse.Namespace, layout: str, batch: int, micro: int, timed: int) -> list[str]:
    """One child's."""
    sizes = {"--batch": batch, "--micro": micro, "--iterations": timed}
    flags = [str(word) for pair in sizes.items() for word in pair]
    script = str(Path(__file__).with_name("ppo.py"))
    return ["python", script, "--layout", layout, *flags, *args.more]


def memory_mb(result: dict[str, Any]) -> float:
    """What a child says it took."""
    if "peak_cuda_gib" in result:
        return float(result["peak_cuda_gib"]) * 1024
    return float(result["peak_rss_mb"])


def measured(
    args: argparse.Namespace, sizes: dict[str, tuple[int, int]], run: Run
) -> dict[str, Cost]:
    """Every layout at its batch and micro-batch, in turn, round by round."""
    found: dict[str, list[dict[str, Any]]] = {layout: [] for layout in sizes}
    for number in range(args.rounds):
        for layout, (batch, micro) in sizes.items():
            result = run(command(args, layout, batch, micro, args.iterations))
            found[layout].append(result)
            seconds = result["seconds_per_iteration"] / batch
            print(f"round {number + 1}, {layout} {batch}/{micro}: {seconds:.3f} s", flush=True)
    return {
        layout: Cost(
            *sizes[layout],
            median(one["seconds_per_iteration"] for one in results) / sizes[layout][0],
            max(memory_mb(one) for one in results),
        )
        for layout, results in found.items()
    }


def largest_batch(memory_of: Callable[[int], float], budget: float, start: int) -> int:
    """The most rows whose memory is within the budget; memory grows about linearly with rows.

    Args:
        memory_of: Peak with so many rows.
        budget: In the same unit.
        start: A first guess.

    Returns:
        0 where one row does not fit. What it and one row more take was looked at, or is 3% from it.
    """
    seen: dict[int, float] = {}
    rows = start
    while rows not in seen:
        seen[rows] = memory_of(rows)
        good = max((one for one, taken in seen.items() if taken <= budget), default=0)
        bad = min((one for one, taken in seen.items() if taken > budget), default=MOST_ROWS + 1)
        if bad - good <= max(1, good // 32):
            return good
        # Lines are quick where memory is a line; every other guess halves what is left where it is not.
        halved = good in seen and bad in seen and len(seen) % 2
        guess = (good + bad) // 2 if halved else _guess(seen, budget, rows)
        rows = min(max(guess, good + 1), bad - 1)
    return max((one for one, taken in seen.items() if taken <= budget), default=0)


def _guess(seen: dict[int, float], budget: float, rows: int) -> int:
    """Where the line through the two places nearest to the budget meets it."""
    known = {one: taken for one, taken in seen.items() if math.isfinite(taken)}
    if len(known) < 2:
        return 2 * rows if seen[rows] <= budget else rows // 2
    (near, taken), (far, other) = sorted(known.items(), key=lambda one: abs(one[1] - budget))[:2]
    slope = (taken - other) / (near - far)
    # Noise may make more rows look smaller.
    return 2 * near if slope <= 0 else near + int((budget - taken) // slope)


def fitting(args: argparse.Namespace, budget: float, run: Run) -> dict[str, tuple[int, int]]:
    """Batch and micro-batch of each layout within the budget; layouts that do not fit are left out."""
    sizes = {}
    for layout in args.layouts:
        if layout == BASELINE and args.budget_mb is None:
            # The budget is what it took.
            sizes[layout] = (args.batch, args.micro)
            continue

        def taken(rows: int, layout: str = layout) -> float:
            batch = max(args.batch, rows)
            try:
                found = memory_mb(run(command(args, layout, batch, rows, 1)))
            except RuntimeError as error:
                if not any(words in str(error) for words in NO_MEMORY):
                    raise
                found = math.inf
            print(f"{layout} {batch}/{rows}: {found:.0f} MB", flush=True)
            return found

        rows = largest_batch(taken, budget, args.micro)
        if rows:
            sizes[layout] = (max(args.batch, rows), rows)
        else:
            print(f"{layout}: not one row fits into {budget:.0f} MB", flush=True)
    return sizes


def rows_of(costs: dict[str, Cost]) -> list[list[str]]:
    """A table's rows."""
    baseline = costs[BASELINE].seconds if BASELINE in costs else None
    return [
        [
            f"`{layout}`",
            f"{cost.batch} / {cost.micro}",
            f"{cost.seconds:.3f}",
            ""
            if baseline is None
            else f"{cost.seconds / baseline:.2f} ({cost.seconds / baseline - 1:+.1%})",
            f"{cost.memory_mb:.0f}",
            PAPER.get(layout, ""),
        ]
        for layout, cost in costs.items()
    ]


def report(
    args: argparse.Namespace, equal: dict[str, Cost], within: dict[str, Cost], budget: float
) -> list[str]:
    """The section's lines."""
    head = [
        "layout", "batch / micro-batch", "s per episode", "against `lora`", "peak MB",
        "paper, Llama 7B (Table 1)",
    ]  # fmt: skip
    child = shown(command(args, "LAYOUT", args.batch, args.micro, args.iterations))
    return [
        f"{machine()}; medians of {args.rounds} rounds, layouts in turn. Each figure: `{child}`.",
        "",
        "Equal batch and micro-batch:",
        "",
        *table(head, rows_of(equal)),
        "",
        f"The largest micro-batch that fits {budget:.0f} MB:",
        "",
        *table(head, rows_of(within)),
    ]


def write(args: argparse.Namespace, lines: list[str]) -> None:
    """Into the report, if there is one."""
    if args.report is not None:
        write_section(args.report, "Layouts", args.title, lines)


def main(argv: Sequence[str] | None = None, run: Run = run_json) -> dict[str, Any]:
    """Both tables."""
    args = arguments(argv)
    equal = measured(args, dict.fromkeys(args.layouts, (args.batch, args.micro)), run)
    budget = args.budget_mb or equal[BASELINE].memory_mb
    # The search may be long; what has been found is kept.
    write(args, report(args, equal, {}, budget))
    within = measured(args, fitting(args, budget, run), run)
    lines = report(args, equal, within, budget)
    print("\n".join(lines))
    write(args, lines)
    found = {
        "budget_mb": budget,
        "equal": {layout: cost._asdict() for layout, cost in equal.items()},
        "within": {layout: cost._asdict() for layout, cost in within.items()},
    }
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
