"""Our command and a peer's in turn, each a process that prints one JSON line last: medians and ratios.

    python benchmarks/side_by_side.py --key episodes_per_second --rounds 3 \
        --ours "python benchmarks/ppo.py --bf16 1" \
        --peer ".venv-trl112/bin/python ../shared/peers/ppo.py --bf16 2" \
        --title "PPO, bf16" --report benchmarks/reports/ppo_side_by_side.md

Machines are noisy: who goes first changes from round to round, and figures are medians. A section of the same
title in the report is replaced, so several comparisons live in one file. The last line printed is JSON itself.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from record import machine, run_json, shown, table, write_section

MEMORY = "peak_rss_mb"
Run = Callable[[Sequence[str]], dict[str, Any]]
Sides = dict[str, list[dict[str, Any]]]
"""What each side printed, round by round."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ours", type=shlex.split, required=True)
    parser.add_argument("--peer", type=shlex.split, required=True)
    parser.add_argument("--key", required=True, help="what is compared; both print it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--report", type=Path, help="Markdown file the section goes into")
    parser.add_argument("--title", help="of the section; the two commands' key by default")
    args = parser.parse_args(argv)
    if args.rounds < 3:
        parser.error(f"--rounds {args.rounds}: a median needs at least 3")
    return args


def alternate(commands: dict[str, Sequence[str]], rounds: int, run: Run) -> Sides:
    """Run every side once a round; the order turns round by round."""
    found: Sides = {side: [] for side in commands}
    for number in range(rounds):
        for side in list(commands)[:: -1 if number % 2 else 1]:
            found[side].append(run(commands[side]))
            print(f"round {number + 1}, {side}: {json.dumps(found[side][-1])}", flush=True)
    return found


def values(results: list[dict[str, Any]], key: str, side: str) -> list[float]:
    """A key of every round.

    Raises:
        KeyError: The side does not print it.
    """
    if any(key not in result for result in results):
        raise KeyError(f"{side} prints no {key!r}; it prints {sorted(results[0])}")
    return [float(result[key]) for result in results]


def dtypes(result: dict[str, Any]) -> str:
    """What a side says of its numbers: dtypes, and the flag bf16."""
    said = [f"{key} {value}" for key, value in result.items() if "dtype" in key or key == "bf16"]
    return ", ".join(said).replace("torch.", "") or "not said"


def compared(sides: Sides, key: str) -> dict[str, Any]:
    """Medians, ratios of medians and ranges; memory where both sides print it."""
    keys = [key] + [MEMORY] * all(MEMORY in one for side in sides.values() for one in side)
    found: dict[str, Any] = {"key": key, "rounds": len(sides["ours"])}
    for name in keys:
        ours, peer = (values(sides[side], name, side) for side in ("ours", "peer"))
        found[name] = {
            "ours": median(ours),
            "peer": median(peer),
            "ratio": median(ours) / median(peer),
            "ours_range": [min(ours), max(ours)],
            "peer_range": [min(peer), max(peer)],
            "ratios": [one / other for one, other in zip(ours, peer, strict=True)],
        }
    return found | {f"{side}_dtypes": dtypes(results[0]) for side, results in sides.items()}


def section(found: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """The report's lines."""
    rows = []
    for name in [name for name in (args.key, MEMORY) if name in found]:
        one = found[name]
        low, high = min(one["ratios"]), max(one["ratios"])
        rows.append(
            [
                name,
                *(
                    f"{one[side]:.4g} ({one[f'{side}_range'][0]:.4g} to {one[f'{side}_range'][1]:.4g})"
                    for side in ("ours", "peer")
                ),
                f"**{one['ratio']:.2f}** (rounds {low:.2f} to {high:.2f})",
            ]
        )
    return [
        f"{machine()}; {args.rounds} rounds, medians (smallest to largest).",
        "",
        f"- ours: `{shown(args.ours)}`: {found['ours_dtypes']}",
        f"- peer: `{shown(args.peer)}`: {found['peer_dtypes']}",
        "",
        *table(["", "ours", "peer", "ours / peer"], rows),
    ]


def main(argv: Sequence[str] | None = None, run: Run = run_json) -> dict[str, Any]:
    """Alternate, compare, report."""
    args = arguments(argv)
    sides = alternate({"ours": args.ours, "peer": args.peer}, args.rounds, run)
    found = compared(sides, args.key)
    lines = section(found, args)
    print("\n".join(lines))
    if args.report is not None:
        title = args.title or args.key
        write_section(args.report, "Side by side", title, lines)
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
