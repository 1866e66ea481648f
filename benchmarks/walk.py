"""How far one PPO batch walks through the package: files, functions, and moves between files.

    python benchmarks/walk.py --tree ../before

A `HydraPPO` is fitted on one rollout batch of a tiny Llama under ``sys.setprofile``, from ``trainer.fit`` to the
written adapters: 8 prompts in a JSONL file, a batch of 4, one micro-batch, one epoch, at most 4 tokens. Only
functions of the package count, comprehensions and lambdas belong to the function around them, and the constructors
of module and datamodule come before. A *move* is a call that lies in another file than the package's call before
it: a loop that goes to and fro between two files moves each time. The last tree of version 0.1 has 37 files, 253
functions and 491 moves.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from golden_cases import named
from golden_rows import write_trunks
from lightning.pytorch import Trainer

LIMITS = {"files": 25, "moves": 300}


class Walk:
    """Notes the calls of a package's functions; given to ``sys.setprofile``."""

    def __init__(self, package: Path) -> None:
        self.root = f"{package}/"
        self.calls: list[tuple[str, str]] = []

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """One event of the interpreter's."""
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(self.root):
            return
        if not code.co_name.startswith("<"):
            file = code.co_filename.removeprefix(self.root)
            self.calls.append((file, f"{code.co_name} {code.co_firstlineno}"))

    def moves(self) -> Counter[tuple[str, str]]:
        """How often one file followed another, by (file before, file)."""
        pairs = pairwise(file for file, _ in self.calls)
        return Counter(pair for pair in pairs if pair[0] != pair[1])

    def table(self) -> list[str]:
        """A line per file, the most visited last, and the most frequent moves."""
        functions = Counter(file for file, _ in set(self.calls))
        calls = Counter(file for file, _ in self.calls)
        arrivals = Counter(there for _, there in self.moves().elements())
        lines = ["functions  calls  moves to  lines  file"]
        for file in sorted(functions, key=lambda name: (functions[name], calls[name])):
            length = len(Path(self.root, file).read_text(encoding="utf-8").splitlines())
            numbers = f"{functions[file]:9} {calls[file]:6} {arrivals[file]:9} {length:6}"
            lines.append(f"{numbers}  {file}")
        most = self.moves().most_common(20)
        return [*lines, "", *(f"{count:4} moves {a} -> {b}" for (a, b), count in most)]

    def totals(self) -> dict[str, int]:
        """The three figures."""
        files = {file for file, _ in self.calls}
        moves = self.moves().total()
        return {"files": len(files), "functions": len(set(self.calls)), "moves": moves}


def fitted(folder: Path, walk: Walk) -> None:
    """Fits a HydraPPO on one batch in ``folder``, watched."""
    write_trunks(folder)
    rows = (folder / "demos.jsonl").read_text().splitlines(keepends=True)
    (folder / "prompts.jsonl").write_text("".join(rows[:8]))
    data: Any = named("PreferenceDataModule")(
        tokenizer=str(folder / "llama"),
        train=str(folder / "prompts.jsonl"),
        rows="prompts",
        batch_size=4,
        max_tokens=64,
        max_response_tokens=24,
    )
    module: Any = named("HydraPPO")(
        trunk=str(folder / "llama"),
        lora=named("LoraSpec")(rank=2),
        sampling=named("SamplingSpec")(max_new_tokens=4),
        micro_batch_size=4,
        ppo_epochs=1,
    )
    trainer = Trainer(
        default_root_dir=folder, max_epochs=1, limit_train_batches=1, limit_val_batches=0, accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    sys.setprofile(walk)
    try:
        trainer.fit(module, data)
    finally:
        sys.setprofile(None)


def main() -> None:
    """Walk once and print the files; with ``--limits`` exits with 1 where it is too far."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="a checkout")
    parser.add_argument("--limits", action="store_true", help=f"refuse more than {LIMITS}")
    args = parser.parse_args()
    tree = args.tree.resolve()
    sys.path.insert(0, str(tree))
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    walk = Walk(tree / "lightning_perl")
    with tempfile.TemporaryDirectory() as folder:
        fitted(Path(folder), walk)
    totals = walk.totals()
    print("\n".join([*walk.table(), "", ", ".join(f"{n} {name}" for name, n in totals.items())]))
    too_far = [
        f"{name} {totals[name]} > {most}" for name, most in LIMITS.items() if totals[name] > most
    ]
    if args.limits and too_far:
        sys.exit("too far: " + ", ".join(too_far))


if __name__ == "__main__":
    main()
