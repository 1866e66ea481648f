"""Memory of all layouts and ways of fine-tuning, for Llama-7B and Llama-3-8B, without a GPU and without weights.

    python benchmarks/estimate.py
    python benchmarks/estimate.py --parts fits reality --models llama-7b

Everything is `python -m lightning_perl estimate` from Python: bf16 trunk, fp32 adapters on all linear layers,
AdamW, micro-batch 4 of 256 + 256 tokens, sdpa attention, rollouts of 4 prompts. Full fine-tuning and full PPO are
float32. Some runs are shown a second time with `HostAdamW`, whose moments rest on the host. Three parts, each of
them a section of the report:

- ``peaks``: the peak of every run at ranks 16 and 128, with and without activation checkpointing.
- ``fits``: the most rows of a micro-batch and of a rollout in 16, 24, 40 and 80 GiB, at rank 16.
- ``reality``: a small model, estimated and really run on the CPU under PyTorch's profiler.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from reality import real_peak
from record import machine, table, write_section
from torch import Tensor

from lightning_perl.batches import RatedBatch
from lightning_perl.commands.estimate import (
    GIB,
    LORA_SFT,
    Estimate,
    LlamaSizes,
    comparisons,
    estimate,
    highest,
    parse_bytes,
)
from lightning_perl.commands.ledger import KINDS
from lightning_perl.commands.rehearsal import (
    Load,
    OnPolicyRehearsal,
    SupervisedRehearsal,
    rehearsal_of,
)
from lightning_perl.functional.sequences import position_ids
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.loading import TrunkDtype
from lightning_perl.models.roles import Layout
from lightning_perl.models.shortcuts import Shortcuts
from lightning_perl.models.weightless import weightless
from lightning_perl.modules import PPO, SFT, RewardModel
from lightning_perl.modules.base import AdapterModule, default_optimizer
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.modules.supervised import Supervised
from lightning_perl.optim import HostAdamW
from lightning_perl.rollouts.sampling import SamplingSpec

MODELS = {
    "llama-7b": LlamaSizes(4096, 32, 32, 11008, 32000),
    "llama-3-8b": LlamaSizes(4096, 32, 32, 14336, 128256, kv_heads=8),
}
SMALL: dict[TrunkDtype, LlamaSizes] = {
    "float32": LlamaSizes(128, 4, 4, 352, 1000),
    "bfloat16": LlamaSizes(128, 4, 4, 352, 1000, kv_heads=2),
}
RANKS = (16, 128)
LOAD = Load(256, 256, 4)
PLAIN = "LoRA-SFT"
"""transformers' own loss and blocks, our LoRA layers: what the others are measured by."""
LORA_PPO = "PPO lora"
# 2309.00754, Table 1, Llama 7b; its batch sizes are not known.
PAPER = {
    "PPO full": "220 (estimated)",
    LORA_PPO: "68.0",
    "PPO joint_hydra": "67.9",
    "PPO hydra": "71.1",
}
HOSTED = ", moments on the host"
"""What `HostAdamW` leaves on the device; the others have AdamW."""
FITTED = (
    PLAIN,
    LORA_SFT,
    LORA_PPO,
    "PPO dynamic_lora",
    "PPO hydra",
    "PPO hydra" + HOSTED,
    "PPO joint_hydra",
)


class Setting(NamedTuple):
    """A column of the first part."""

    rank: int
    checkpointing: bool

    def __str__(self) -> str:
        return f"rank {self.rank}" + (", checkpointing" if self.checkpointing else "")


class PlainLoss(SupervisedRehearsal):
    """Fine-tuning with transformers' own loss, on the logits of all positions."""

    def loss(self, batch: RatedBatch) -> Tensor:
        """Cross-entropy as transformers computes it from labels."""
        trunk = self.module.trunk
        labels = batch.ids.masked_fill(~batch.response_mask, -100)
        with trunk.training_pass(), trunk.switch.use(self.module.adapter):
            output = trunk.model(
                input_ids=batch.ids,
                attention_mask=batch.attention_mask.long(),
                position_ids=position_ids(batch.attention_mask),
                labels=labels,
                use_cache=False,
            )
        loss: Tensor = output.loss
        return loss


class PeftLayers(PlainLoss):
    """The same with PEFT's own LoRA layers, which cast and keep their inputs in fp32."""

    def loss(self, batch: RatedBatch) -> Tensor:
        """The same loss."""
        for _, layer in self.module.trunk.adapters.layers():
            # Ours hangs on the instance.
            vars(layer).pop("forward", None)
        return super().loss(batch)


class Run(NamedTuple):
    """What makes a module, how much its train batch holds, and how it is run."""

    make: Callable[[], AdapterModule]
    load: Load
    rehearse: Callable[[Any, Load], OnPolicyRehearsal | SupervisedRehearsal] = rehearsal_of


def runs(rank: int, checkpointing: bool) -> dict[str, Run]:
    """Runs of Llamas in bf16; some also with moments that rest on the host."""
    common: dict[str, Any] = {
        "trunk": "trunk",
        "lora": LoraSpec(rank, float(rank)),
        "trunk_dtype": "bfloat16",
        "checkpointing": checkpointing,
    }

    def compared(optimizer: Any) -> dict[str, Run]:  # noqa: ANN401 (makes an optimizer)
        with weightless(SMALL["float32"].config()):
            ppo = PPO(micro_batch_size=LOAD.rows, optimizer=optimizer, **common)
        return {name: Run(*run) for name, run in comparisons(ppo, LOAD).items()}

    own_blocks = partial(SFT, shortcuts=Shortcuts(lean_blocks=False), **common)
    plain = {
        PLAIN: Run(own_blocks, LOAD, PlainLoss),
        "LoRA-SFT, PEFT's layers": Run(own_blocks, LOAD, PeftLayers),
    }
    hosted = compared(partial(HostAdamW, lr=1e-4))
    hosted[PLAIN] = Run(partial(own_blocks, optimizer=partial(HostAdamW, lr=1e-4)), LOAD, PlainLoss)
    kept = (PLAIN, "PPO hydra", "PPO joint_hydra")
    return (
        plain | compared(default_optimizer(1e-4)) | {name + HOSTED: hosted[name] for name in kept}
    )


def rehearsal(sizes: LlamaSizes, run: Run) -> OnPolicyRehearsal | SupervisedRehearsal:
    """A run on that architecture."""
    with weightless(sizes.config()):
        module = run.make()
    return run.rehearse(module, run.load)


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def peaks(model: str) -> list[str]:
    """Every run in every setting."""
    columns = [Setting(*one) for one in product(RANKS, (False, True))]
    found: dict[Setting, dict[str, Estimate]] = {}
    for column in columns:
        found[column] = {}
        for name, run in runs(*column).items():
            begun = time.perf_counter()
            found[column][name] = estimate(rehearsal(MODELS[model], run))
            total = found[column][name].peak.total / GIB
            say(f"{model}, {column}: {name} {total:.2f} GiB, {time.perf_counter() - begun:.0f} s")
    rows = [
        [name, *(_cell(found[column], name) for column in columns), PAPER.get(name, "")]
        for name in found[columns[0]]
    ]
    head = [
        "run",
        *(f"{column}: GiB (x LoRA-SFT, x LoRA-PPO)" for column in columns),
        "Hydra's Table 1, GB",
    ]
    lines = [*table(head, rows), ""]
    for column in columns:
        for name in ("PPO hydra", "PPO hydra" + HOSTED):
            title = f"{name}, {column}, by phase and kind:"
            lines += [title, "", *_phases(found[column][name]), ""]
    return lines


def _cell(found: dict[str, Estimate], name: str) -> str:
    total = found[name].peak.total
    ratios = ", ".join(f"{total / found[other].peak.total:.2f}" for other in (PLAIN, LORA_PPO))
    return f"{total / GIB:.2f} ({ratios})"


def _phases(one: Estimate) -> list[str]:
    shown = [kind for kind in KINDS if any(peak.kinds.get(kind) for peak in one.peaks.values())]
    rows = [
        [phase, f"{peak.total / GIB:.2f}", *(f"{peak.kinds[kind] / GIB:.2f}" for kind in shown)]
        for phase, peak in one.peaks.items()
    ]
    return table(["phase", "peak", *shown], rows)


def fits(model: str, budgets: Sequence[str]) -> list[str]:
    """The largest sizes at rank 16."""
    lines: list[str] = []
    for checkpointing in (False, True):
        known, rows = runs(RANKS[0], checkpointing), []
        for name in FITTED:
            cells = _largest(
                rehearsal(MODELS[model], known[name]), [parse_bytes(one) for one in budgets]
            )
            rows.append([name, *cells])
            say(f"{model}, checkpointing {checkpointing}: {' | '.join(rows[-1])}")
        title = f"Rank {RANKS[0]}, {'with' if checkpointing else 'without'} checkpointing:"
        lines += [title, "", *table(["run", *budgets], rows), ""]
    return [*lines, "Rows of 256 + 256 tokens in a micro-batch / in a rollout."]


def _largest(one: OnPolicyRehearsal | SupervisedRehearsal, budgets: Sequence[int]) -> list[str]:
    cells = []
    for budget in budgets:
        found = None if one.ledger.total > budget else estimate(one, budget)
        sizes = (found.micro_batch_size, found.rollout_rows) if found else (0,)
        cells.append(" / ".join(str(size) for size in sizes if size is not None))
    return cells


def small_runs(
    rank: int, checkpointing: bool, dtype: TrunkDtype
) -> Iterator[tuple[str, Callable[[], OnPolicy | Supervised], Load]]:
    """Name, maker and load of what is really run."""
    load = Load(64, 64, 4)
    common: dict[str, Any] = {
        "lora": LoraSpec(rank, float(rank)),
        "trunk_dtype": dtype,
        "checkpointing": checkpointing,
    }
    yield "SFT", lambda: SFT("trunk", **common), load
    yield "RewardModel, thumbs", lambda: RewardModel("trunk", **common), load
    pairs = load._replace(rows=2, pairs=True)
    yield "RewardModel, pairs", lambda: RewardModel("trunk", **common), pairs

    def ppo(layout: Layout) -> Callable[[], PPO]:
        return lambda: PPO(
            "trunk",
            layout=layout,
            sampling=SamplingSpec(64),
            ppo_epochs=1,
            micro_batch_size=2,
            **common,
        )

    layouts: tuple[Layout, ...] = ("hydra", "joint_hydra", "dynamic_lora")
    for layout in layouts:
        yield f"PPO {layout}", ppo(layout), load
    if dtype == "float32":
        yield "PPO full", ppo("full"), load


def reality() -> list[str]:
    """Estimates against the allocator."""
    rows = []
    for (dtype, sizes), rank, checkpointing in product(SMALL.items(), RANKS, (False, True)):
        config = sizes.config()
        for name, make, load in small_runs(rank, checkpointing, dtype):
            with weightless(config):
                module = make()
            estimated = highest(rehearsal_of(module, load, block=1).peaks())
            real = real_peak(make, config, load)
            rows.append(
                [
                    name,
                    dtype,
                    rank,
                    "yes" if checkpointing else "no",
                    f"{estimated / 2**20:.2f}",
                    f"{real / 2**20:.2f}",
                    f"{estimated / real - 1:+.1%}",
                ]
            )
            say(" | ".join(map(str, rows[-1])))
    head = [
        "run",
        "trunk",
        "rank",
        "checkpointing",
        "estimate MiB",
        "allocator's peak MiB",
        "off by",
    ]
    return [
        *table(head, rows),
        "",
        "Llamas of 4 layers, hidden 128; in bfloat16 with grouped keys and torch's own attention.",
    ]


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("peaks", "fits", "reality")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--budgets", nargs="+", default=["16GiB", "24GiB", "40GiB", "80GiB"])
    parser.add_argument(
        "--report", type=Path, default=Path(__file__).parent / "reports" / "estimate.md"
    )
    args = parser.parse_args()
    about = [
        f"{machine()}. Command: `{shlex.join(['python', 'benchmarks/estimate.py', *sys.argv[1:]])}`",
        "",
    ]

    def write(title: str, lines: list[str]) -> None:
        write_section(args.report, "Memory, estimated", title, [*about, *lines])
        print("\n".join(["## " + title, "", *lines]), flush=True)

    for model in args.models:
        if "peaks" in args.parts:
            write(f"{model}: peaks", peaks(model))
        if "fits" in args.parts:
            write(f"{model}: the largest batches", fits(model, args.budgets))
    if "reality" in args.parts:
        write("A small model, estimated and run", reality())


if __name__ == "__main__":
    main()
