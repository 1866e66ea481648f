"""Runs every module in two trees of this repository and says whether all numbers are bit-equal.

    python benchmarks/golden.py --before ../before --after .

Each tree runs in a process of its own (PYTHONPATH is the tree; both at once, a thread each) on the same tiny
trunks and rows. Compared, by name: every logged metric at every step (validation and test too), gradients at
each optimizer step, checkpoints (but for hyper-parameters), the folders that are handed over, and predictions.
At last the tree after tests from the checkpoints of the tree before, which must give the same metrics.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

HERE = Path(__file__).parent
VOLATILE = ("hyper_parameters", "hparams_name", "pytorch-lightning_version")
Values = dict[str, object]


def flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Yields (name, tensor or text) of every leaf of nested containers."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in VOLATILE:
                yield from flat(part, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from flat(part, f"{name}/{number}")
    elif isinstance(value, torch.Tensor):
        yield name, value.detach().cpu().clone()
    else:
        yield name, repr(value)


def difference(before: object, after: object) -> str | None:
    """Says how two leaves differ; None where every bit is the same."""
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        if before.dtype != after.dtype or before.shape != after.shape:
            shapes = f"{tuple(before.shape)} {before.dtype}", f"{tuple(after.shape)} {after.dtype}"
            return f"{shapes[0]} before, {shapes[1]} after"
        if torch.equal(*(part.reshape(-1).view(torch.uint8) for part in (before, after))):
            return None  # bits, so that NaN equals NaN
        return f"largest difference {float((before.double() - after.double()).abs().max()):.3g}"
    return None if before == after else f"{before} before, {after} after"


def compare(before: Values, after: Values) -> list[str]:
    """Lines that say what differs between the leaves of two runs."""
    lines = [f"{name}: only before" for name in before if name not in after]
    lines += [f"{name}: only after" for name in after if name not in before]
    for name in before:
        said = difference(before[name], after[name]) if name in after else None
        if said is not None:
            lines.append(f"{name}: {said[:200]}")
    return lines


def start(tree: Path, work: Path, side: str, only: str) -> subprocess.Popen[bytes]:
    """Starts all cases in a process that imports the package from ``tree``."""
    environment = {**os.environ, "PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": "1"}
    environment["PYTHONHASHSEED"] = "0"  # PEFT writes a set's members in their order
    transcript = (work / f"{side}.log").open("wb")
    command = [sys.executable, str(HERE / "golden_child.py"), str(work), side, only]
    return subprocess.Popen(command, env=environment, stdout=transcript, stderr=transcript)


def finish(process: subprocess.Popen[bytes], work: Path, side: str) -> None:
    """Waits for a process of `start`.

    Raises:
        RuntimeError: It failed.
    """
    if process.wait() != 0:
        log = (work / f"{side}.log").read_text(errors="replace").splitlines()
        raise RuntimeError(f"the cases of {side!r} failed:\n" + "\n".join(log[-25:]))


def results(work: Path, side: str) -> dict[str, Values]:
    """What each case of a side gave, in the order of the cases."""
    return torch.load(work / f"{side}.pt", weights_only=True)


def verdict(before: dict[str, Values], after: dict[str, Values], shown: int) -> int:
    """Prints a line per case, and what differs; returns how many leaves differ."""
    count = 0
    for case in before | after:
        old, new = before.get(case, {}), after.get(case, {})
        lines = compare(old, new)
        count += len(lines)
        said = f"{len(lines)} of {len(old | new)} DIFFER" if lines else f"{len(old)} bit-equal"
        print(f"{case}: {said}")
        for line in lines[:shown]:
            print(f"    {line}")
        if len(lines) > shown:
            print(f"    ... and {len(lines) - shown} more (--shown)")
    return count


def main() -> None:
    """Run both trees and compare; exits with 1 where anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, help="the one checkout")
    parser.add_argument("--after", type=Path, default=HERE.parent, help="the other; this one")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--shown", type=int, default=8, help="differences shown per case")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        subprocess.run([sys.executable, str(HERE / "golden_rows.py"), folder], check=True)
        sides = {"before": args.before, "after": args.after}
        running = {side: start(tree, work, side, args.only) for side, tree in sides.items()}
        for side, process in running.items():
            finish(process, work, side)
        count = verdict(results(work, "before"), results(work, "after"), args.shown)
        print("\nCheckpoints of the tree before, tested in the tree after:")
        finish(start(args.after, work, "old", args.only), work, "old")
        expected = {
            case: {name: value for name, value in leaves.items() if name.startswith("/test")}
            for case, leaves in results(work, "before").items()
        }
        count += verdict(expected, results(work, "old"), args.shown)
    print(f"\n{count} differences" if count else "\nall bit-equal")
    sys.exit(1 if count else 0)


if __name__ == "__main__":
    main()
