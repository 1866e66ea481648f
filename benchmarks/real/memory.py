"""Memory of a model that can speak: what `estimate` says, PyTorch's allocator counts, and the process takes.

    python benchmarks/real/memory.py --trunk runs/real/trunk --data_dir ../shared/data
    python benchmarks/real/memory.py --trunk runs/real/trunk --data_dir ../shared/data --methods RewardModel

Every method with LoRA of rank 16 on a bf16 trunk: those that learn from rows on batches of 8 pairs of HH harmless
(256 + 128 tokens), the others on batches of 32 answers of 48 tokens to prompts of up to 144, 8 at once (`PPO` on
the layout hydra, `RLOO` with 4 answers to a prompt, `GRPO`, `RAFT`, `SuperHF` and `INPO` with 8). Estimated, and
counted by the allocator: a batch whose rows are all as long as they may be. Resident, for four of them: the most
that the process took beyond what it had after its imports, over 12 batches of real pairs, or 3 of 32 answers,
whose shapes differ; and the mean CPU seconds of a batch. Each figure is a process of its own with one thread;
finished ones are kept. ``glibc`` is the C library's allocator as it is, ``mmap`` the same with
MALLOC_MMAP_THRESHOLD_=1048576, so that what has more than 1 MiB goes back to the system when it is freed, ``huge``
with PyTorch's THP_MEM_ALLOC_ENABLE=1 too, so that it comes in huge pages; a path is a library for LD_PRELOAD.
Writes ``benchmarks/reports/real/memory.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from methods import asked, policy
from reality import real_peak
from record import run_json, table, write_study
from reward_models import rows
from small_trunk import adam, fitted, resident_mb

from lightning_perl.commands.estimate import architecture_from, estimate
from lightning_perl.commands.rehearsal import Load, rehearsal_of
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
    SFT,
    HydraSFT,
    Reinforce,
    ReMax,
    RewardModel,
    SuperHF,
)

REPORT = Path("benchmarks/reports/real/memory.md")
SUPERVISED = (SFT, RewardModel, HydraSFT, DPO, IPO, RDPO, KTO)
ON_POLICY: dict[Any, dict[str, Any]] = {
    PPO: {"layout": "hydra", "minibatch_size": 16},
    Reinforce: {},
    RLOO: {"samples": 4},
    ReMax: {},
    GRPO: {"samples": 8},
    RAFT: {"samples": 8},
    SuperHF: {"samples": 8},
    INPO: {"samples": 8},
}
METHODS = {make.__name__: make for make in (*SUPERVISED, *ON_POLICY)}
STEPS = {"RewardModel": 12, "DPO": 12, "RLOO": 3, "PPO": 3}
"""Whose processes are measured, too, and over how many batches."""
PAIRS, ANSWERS = Load(256, 128, 8, pairs=True), Load(144, 48, 32)
MIB = 2**20


def made(method: str, trunk: str) -> Any:  # noqa: ANN401 (any of them)
    """The module."""
    make, shared = METHODS[method], {"optimizer": adam(1e-4)}
    if make in SUPERVISED:
        return make(trunk, lora=LoraSpec(16), trunk_dtype="bfloat16", **shared)
    return policy(Path(trunk), make, **ON_POLICY[make], **shared)


def sizes(method: str, trunk: Path) -> dict[str, Any]:
    """What is estimated, and what the allocator counts, in MiB."""
    load = prompts = PAIRS
    if METHODS[method] in ON_POLICY:
        load, samples = ANSWERS, ON_POLICY[METHODS[method]].get("samples", 1)
        prompts = load._replace(rows=load.rows // samples)
    make, config = partial(made, method, str(trunk)), architecture_from(str(trunk))
    with weightless(config):
        module = make()
    # As a CPU computes it: CUDA takes blocks of 512 bytes, and the logits of a chunk at once.
    found = estimate(rehearsal_of(module, load, block=1))
    counted = real_peak(make, config, prompts)
    return {
        "estimate_mb": found.peak.total / MIB,
        "phase": found.phase,
        "counted_mb": counted / MIB,
    }


def resident(method: str, trunk: Path, data_dir: Path) -> dict[str, Any]:
    """What a process takes for batches of real rows."""
    before = resident_mb("VmRSS")
    module = made(method, str(trunk))
    if METHODS[method] in SUPERVISED:
        data: Any = rows("harmless", 0, 1.0, trunk, data_dir)
    else:
        data = asked(trunk, data_dir, batch_size=8 if method == "RLOO" else 32)
    options: dict[str, Any] = {"limit_train_batches": STEPS[method], "limit_val_batches": 0}
    cpu = time.process_time()
    fitted(module, data, **options)
    return {
        "resident_mb": resident_mb("VmHWM") - before,
        "at_the_end_mb": resident_mb("VmRSS") - before,
        "seconds": (time.process_time() - cpu) / STEPS[method],
    }


def environment(allocator: str) -> list[str]:
    """What stands before a child's command."""
    mmap = [f"MALLOC_MMAP_THRESHOLD_={MIB}"]
    known = {"glibc": [], "mmap": mmap, "huge": [*mmap, "THP_MEM_ALLOC_ENABLE=1"]}
    return ["env", "OMP_NUM_THREADS=1", *known.get(allocator, [f"LD_PRELOAD={allocator}"])]


def measured(root: Path, method: str, kind: str, given: list[str]) -> dict[str, Any]:
    """A child's figures, kept in a file."""
    path = root / f"{method}_{Path(kind).name}.json"
    if not path.exists():
        child = ["python", __file__, "--child", method, kind, *given]
        found = run_json([*environment("glibc" if kind == "sizes" else kind), *child])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
        print(path, found, flush=True)
    found = json.loads(path.read_text())
    return dict(found)


def write_report(found: dict[str, dict[str, dict[str, Any]]], allocators: list[str]) -> None:
    """One row per method."""
    lines = []
    for method, kinds in found.items():
        one = kinds["sizes"]
        off = one["estimate_mb"] / one["counted_mb"] - 1
        cells = [f"{one['estimate_mb']:.0f}", f"{one['counted_mb']:.0f}", f"{off:+.1%}"]
        for name in allocators:
            took = kinds.get(name)
            cells += [f"{took['resident_mb']:.0f}", f"{took['seconds']:.2f}"] if took else ["", ""]
        lines.append([method, one["phase"], *cells])
    head = ["method", "highest phase", "estimate MiB", "allocator's peak MiB", "off by"]
    for name in allocators:
        head += [f"resident MiB, {Path(name).name}", "CPU s per batch"]
    write_study(REPORT, "Memory of a model that can speak", __doc__, table(head, lines))


def main() -> None:
    """Measure what is missing, then report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trunk", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--root", type=Path, default=Path("runs/real/memory"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--allocators", nargs="+", default=["glibc", "mmap", "huge"])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        method, kind = args.child
        act = sizes if kind == "sizes" else partial(resident, data_dir=args.data_dir)
        print(json.dumps(act(method, args.trunk)))
        return
    given = ["--trunk", str(args.trunk), "--data_dir", str(args.data_dir)]
    write_report(
        {
            method: {
                kind: measured(args.root, method, kind, given)
                for kind in ("sizes", *(args.allocators if method in STEPS else ()))
            }
            for method in args.methods
        },
        args.allocators,
    )


if __name__ == "__main__":
    main()
