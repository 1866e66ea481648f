"""Everything that needs CUDA, in one go of at most 25 minutes: speed, memory, `estimate`, decoding, callbacks.

    python benchmarks/gpu.py --report benchmarks/reports/gpu.md
    python benchmarks/gpu.py --parts speed decoding --shape 8b --layouts hydra joint_hydra
    python benchmarks/gpu.py --tiny          # every part at toy size, on a CPU too

Random Llamas in bfloat16 (layout ``full``, which is tuned whole, in fp32), LoRA on all linear layers. Parts:

- ``speed``: PPO iterations of all layouts by the trainer: seconds per episode, tokens per second and TFLOP per
  second of each phase, the share of the measured matrix-multiply peak, and the peak memory of each phase.
- ``decoding``: tokens per second against the bytes that a token has to read, and the measured bandwidth of a copy.
- ``estimate``: what the command of that name predicts against ``torch.cuda.max_memory_allocated``, for SFT, reward
  and PPO in three layouts, rank 16 and 128, with and without checkpointing.
- ``callbacks``: the memory callbacks in a fit, and after an out-of-memory that is brought about.

What fails, or would begin after ``--minutes``, is named in the report; the status is 1 where that is a whole part.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from record import machine, shown, table, write_section
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_perl.batches import PromptBatch, RatedBatch
from lightning_perl.callbacks import CudaMemoryMonitor, CudaMemorySnapshot, SpeedMonitor
from lightning_perl.callbacks.speed import matmul_tflops
from lightning_perl.commands.estimate import LlamaSizes
from lightning_perl.commands.ledger import CUDA_BLOCK, Ledger, PhaseLedger
from lightning_perl.commands.new_trunk import train_tokenizer
from lightning_perl.commands.rehearsal import Load, SupervisedRehearsal, rated_of, rehearsal_of
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.heads import ScalarHead, save_heads
from lightning_perl.models.trunk import Trunk
from lightning_perl.models.weightless import weightless
from lightning_perl.modules import PPO, SFT, RewardModel
from lightning_perl.modules.base import AdapterModule
from lightning_perl.modules.supervised import Supervised
from lightning_perl.optim import HostAdamW
from lightning_perl.rollouts.sampling import SamplingSpec

GIB = 2**30
LAYOUTS = ("full", "lora", "dynamic_lora", "perl", "hydra", "joint_hydra")
ESTIMATED = ("SFT", "RewardModel", "PPO lora", "PPO hydra", "PPO joint_hydra")
CHECKPOINTING = (False, True)
HOSTED = "PPO hydra, moments on the host"
"""Estimated on CUDA only: a CPU's memory is the host's."""
SHAPES = {
    "small": LlamaSizes(512, 8, 8, 1408, 32000),
    "1b": LlamaSizes(2048, 16, 32, 8192, 128256, kv_heads=8),
    "8b": LlamaSizes(4096, 32, 32, 14336, 128256, kv_heads=8),
    "tiny": LlamaSizes(32, 2, 2, 64, 512),
}


class Size(NamedTuple):
    """How much a part runs.

    Attributes:
        batch: Episodes of a rollout, rows of a supervised batch.
        micro: Rows per forward and backward.
        prompt: Tokens.
        response: Tokens.
        iterations: Timed ones, behind one that warms up.
        ranks: Of the adapters.
        decoded: Rows decoded at once.
        new_tokens: Tokens of a decoded row.
        copied: Bytes of the copy.
    """

    batch: int = 16
    micro: int = 4
    prompt: int = 256
    response: int = 256
    iterations: int = 2
    ranks: Sequence[int] = (16, 128)
    decoded: Sequence[int] = (1, 8, 32, 64)
    new_tokens: int = 128
    copied: int = 2 * GIB


TINY = Size(4, 2, 6, 4, 1, (2,), (1, 2), 4, 2**20)


class Bench(NamedTuple):
    """What every part is given.

    Attributes:
        device: Where it runs.
        size: How much.
        sizes: Of the trunk.
        folder: Where trunks are written.
        layouts: Of ``speed``.
        deadline: When nothing more is begun, as `time.monotonic` counts.
    """

    device: torch.device
    size: Size
    sizes: LlamaSizes
    folder: Path
    layouts: Sequence[str]
    deadline: float = math.inf

    def over(self) -> bool:
        """Whether the time is."""
        return time.monotonic() > self.deadline


Part = Callable[[Bench], list[str]]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--shape", choices=[name for name in SHAPES if name != "tiny"], default="1b"
    )
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--tiny", action="store_true", help="toy size; runs on a CPU too")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        parser.error(
            "this machine has no CUDA device, which is what is measured here; --tiny runs every part at "
            "toy size on a CPU"
        )
    return args


# ---- trunks and modules -------------------------------------------------------------------------


def trunk_folder(bench: Bench) -> str:
    """A random Llama in bfloat16 with a reward head, written once."""
    folder = bench.folder / "trunk"
    if not folder.exists():
        config = bench.sizes.config()
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            # On the device: drawing billions of numbers takes minutes on a CPU.
            with bench.device:
                model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(default)
        model.save_pretrained(folder)
        train_tokenizer(["a tokenizer that this benchmark never uses"], 300).save_pretrained(folder)
        save_heads(folder, {"reward": ScalarHead(bench.sizes.hidden_size)})
    return str(folder)


def made(bench: Bench, name: str, trunk: str, rank: int = 16, checkpointing: bool = False) -> Any:  # noqa: ANN401 (a module)
    """``SFT``, ``RewardModel``, ``PPO LAYOUT`` or `HOSTED`."""
    kind, _, layout = name.partition(",")[0].partition(" ")
    common: dict[str, Any] = {
        "lora": LoraSpec(rank=rank, alpha=rank),
        "trunk_dtype": "float32" if layout == "full" else "bfloat16",
        "checkpointing": checkpointing,
    }
    if name == HOSTED:
        common["optimizer"] = partial(HostAdamW, lr=1e-4)
    if kind == "PPO":
        sampling = SamplingSpec(max_new_tokens=bench.size.response)
        sizes = {"ppo_epochs": 1, "micro_batch_size": bench.size.micro}
        return PPO(trunk, layout=layout, sampling=sampling, **sizes, **common)  # type: ignore[arg-type]
    return (SFT if kind == "SFT" else RewardModel)(trunk, **common)


def random_prompts(bench: Bench, rows: int) -> PromptBatch:
    """As long as can be, every second one by a token less: without padding there is no mask to be held."""
    ids = torch.randint(10, bench.sizes.vocabulary_size, (rows, bench.size.prompt))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1::2, 0] = False
    return PromptBatch(ids, mask, torch.arange(rows))


class Logged(Callback):
    """What every train batch logged."""

    def __init__(self) -> None:
        self.batches: list[dict[str, float]] = []

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Keep it."""
        self.batches.append({key: float(value) for key, value in trainer.logged_metrics.items()})


def fitted(
    bench: Bench, module: AdapterModule, batches: list[Any], *callbacks: Callback
) -> list[dict[str, float]]:
    """Train quietly; what every batch logged."""
    logged = Logged()
    module.configure_callbacks = list  # type: ignore[method-assign]  # nothing to hand over
    trainer = Trainer(
        max_epochs=1,
        accelerator="cuda" if bench.device.type == "cuda" else "cpu",
        devices=1,
        logger=False,
        log_every_n_steps=1,
        callbacks=[*callbacks, logged],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return logged.batches


@contextmanager
def emptied(bench: Bench) -> Iterator[None]:
    """Give the device's memory back around a run."""
    try:
        yield
    finally:
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def or_out_of_memory(bench: Bench, row: Callable[[], list[str]], columns: int) -> list[str]:
    """A table's row, or that there was no room for it."""
    cells = ["out of memory", *[""] * (columns - 1)]
    # Outside of the handler: the error holds its frames, and with them the memory.
    with emptied(bench), suppress(torch.OutOfMemoryError):
        cells = row()
    return cells


# ---- parts --------------------------------------------------------------------------------------


def speed(bench: Bench) -> list[str]:
    """PPO iterations of all layouts."""
    peaks = [matmul_tflops(bench.device, dtype) for dtype in (torch.bfloat16, torch.float32)]
    head = ["s per episode", "rollout tokens/s", "update tokens/s", "TFLOP/s", "mfu"]
    head += [f"{phase} TFLOP/s" for phase in ("rollout", "score", "actor", "critic")]
    head += [f"{phase} GiB" for phase in ("rollout", "score", "actor", "critic", "optimizer")]
    rows = []
    for layout in bench.layouts:
        cells = or_out_of_memory(bench, lambda layout=layout: speed_row(bench, layout), len(head))
        rows.append([f"`{layout}`", *cells])
        print(rows[-1], flush=True)
    size = bench.size
    return [
        f"{size.batch} episodes, {size.prompt} + {size.response} tokens, micro-batch {size.micro}, one epoch, "
        f"rank 16, medians of {size.iterations}. `mfu` is a fraction of the peak of square matrix products in the "
        f"trunk's dtype: {peaks[0]:.1f} TFLOP/s in bfloat16, {peaks[1]:.1f} in float32. GiB: "
        + ("peak allocated." if bench.device.type == "cuda" else "resident."),
        "",
        *table(["layout", *head], rows),
    ]


def speed_row(bench: Bench, layout: str) -> list[str]:
    """One layout's cells."""
    module = made(bench, f"PPO {layout}", trunk_folder(bench))
    batches = [random_prompts(bench, bench.size.batch) for _ in range(bench.size.iterations + 1)]
    logged = fitted(bench, module, batches, SpeedMonitor(), CudaMemoryMonitor())[1:]

    def middle(key: str) -> str:
        found = [one[key] for one in logged if key in one]
        return f"{median(found):.4g}" if found else ""

    keys = [
        "speed/seconds_per_episode",
        "speed/rollout_tokens_per_second",
        "speed/update_tokens_per_second",
        "speed/tflops",
        "speed/mfu",
        *(f"speed/{phase}_tflops" for phase in ("rollout", "score", "actor", "critic")),
    ]
    kind = "peak_allocated" if bench.device.type == "cuda" else "resident"
    phases = ("rollout", "score", "actor", "critic", "optimizer")
    return [middle(key) for key in (*keys, *(f"memory/{phase}_{kind}_gib" for phase in phases))]


def bandwidth(bench: Bench) -> float:
    """Bytes per second that a copy reads and writes, the best of ten."""
    source = torch.ones(bench.size.copied, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        started = now(bench)
        target.copy_(source)
        best = max(best, 2 * bench.size.copied / (now(bench) - started))
    return best


def now(bench: Bench) -> float:
    """The time once the device is done."""
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bytes_per_step(trunk: Trunk, sizes: LlamaSizes, rows: int, tokens: float) -> float:
    """What one decoded token of every row has to read: all weights once, keys and values of every row."""
    read = [trunk.lm_head.weight]
    read += [
        one
        for name, one in trunk.model.named_parameters()
        if "layers." in name and ("lora_" not in name or ".actor." in name)
    ]
    # Adapters are read in the trunk's dtype too: a rollout rests them so.
    size = trunk.lm_head.weight.element_size()
    weights = size * sum(one.numel() for one in read)
    heads = sizes.kv_heads or sizes.heads
    width = heads * sizes.hidden_size // sizes.heads
    return weights + 2 * sizes.layers * width * rows * tokens * size


def decoding(bench: Bench) -> list[str]:
    """Seconds per decoded token against the memory's bandwidth."""
    size = bench.size
    copy = bandwidth(bench)
    module = made(bench, "PPO hydra", trunk_folder(bench)).to(bench.device)
    trunk, rows = module.policy_trunk, []
    for count, recorded in product(size.decoded, (True, False)):
        trunk.shortcuts = replace(trunk.shortcuts, recorded_decoding=recorded)
        prompts = PromptBatch(*(one.to(bench.device) for one in random_prompts(bench, count)))

        def seconds(new_tokens: int, prompts: PromptBatch = prompts) -> tuple[float, int]:
            spec = SamplingSpec(max_new_tokens=new_tokens)
            started = now(bench)
            rollout = module.collect(prompts, 0, sampling=spec)
            return now(bench) - started, rollout.response_ids.shape[1]

        seconds(2)
        whole, steps = min(seconds(size.new_tokens) for _ in range(2))
        first, _ = min(seconds(1) for _ in range(2))
        step = (whole - first) / max(steps - 1, 1)
        moved = bytes_per_step(trunk, bench.sizes, count, size.prompt + steps / 2)
        rows.append(
            [
                str(count),
                "CUDA graph" if recorded and trunk.recordable else "plain loop",
                f"{1e3 * step:.2f}",
                f"{count / step:.0f}",
                f"{moved / step / 1e9:.1f}",
                f"**{moved / step / copy:.1%}**",
            ]
        )
    head = [
        "rows",
        "steps",
        "ms per token",
        "tokens/s",
        "GB/s it has to read",
        "share of the copy's",
    ]
    return [
        f"Prompts of {size.prompt}, {size.new_tokens} new tokens, actor's adapter (rank 16) on; reading the "
        f"prompt is not counted, recording is. A copy moves {copy / 1e9:.1f} GB/s.",
        "",
        *table(head, rows),
    ]


def predicted(
    bench: Bench, name: str, rank: int, checkpointing: bool
) -> tuple[dict[str, float], RatedBatch | None]:
    """GiB of each phase by fake tensors, and a batch of the rehearsal's shape for supervised modules."""
    size = bench.size
    load = Load(size.prompt, size.response, size.batch, pairs=name == "RewardModel")
    if not name.startswith("PPO"):
        load = load._replace(rows=size.micro)
    with weightless(bench.sizes.config()):
        module = made(bench, name, "any", rank, checkpointing)
    block = CUDA_BLOCK if bench.device.type == "cuda" else 1
    rehearsal = rehearsal_of(module, load, block)
    found = {phase: peak.total / GIB for phase, peak in rehearsal.peaks().items()}
    if not isinstance(rehearsal, SupervisedRehearsal):
        return found, None
    batch = rated_of(load, size.micro)
    ids = torch.randint(10, bench.sizes.vocabulary_size, batch.ids.shape)
    if batch.packing is not None:
        return {"step": max(found.values())}, batch._replace(ids=ids)
    # Padding for the real run, which would else need no mask.
    mask, response_mask = batch.attention_mask.clone(), batch.response_mask.clone()
    mask[1::2, -1] = response_mask[1::2, -1] = False
    padded = batch._replace(ids=ids, attention_mask=mask, response_mask=response_mask)
    return {"step": max(found.values())}, padded


def taken(
    bench: Bench, name: str, rank: int, checkpointing: bool, batch: RatedBatch | None
) -> dict[str, float]:
    """GiB of each phase as the allocator has it; without CUDA, as tensors are counted."""
    module = made(bench, name, trunk_folder(bench), rank, checkpointing)
    batches: list[Any] = [batch] * 2
    if batch is None:
        batches = [random_prompts(bench, bench.size.batch) for _ in range(2)]
    if bench.device.type == "cuda":
        logged = fitted(bench, module, batches, CudaMemoryMonitor())[-1]
        end = "_peak_allocated_gib"
        found = {key: value for key, value in logged.items() if key.endswith(end)}
        return {key.removeprefix("memory/").removesuffix(end): one for key, one in found.items()}
    ledger = Ledger(bench.sizes.vocabulary_size, block=1)
    ledger.mark([*module.parameters(), *module.buffers()], "trunk")
    with ledger, ledger.phase("step"):
        fitted(bench, module, batches, PhaseLedger(ledger))
    phases = ["step"] if isinstance(module, Supervised) else set(ledger.peaks) - {"step"}
    return {phase: ledger.peaks[phase].total / GIB for phase in phases}


def estimate(bench: Bench) -> list[str]:
    """Predicted against taken, phase by phase."""
    rows, worst = [], 0.0
    for name in (*ESTIMATED, HOSTED) if bench.device.type == "cuda" else ESTIMATED:
        for rank in bench.size.ranks:
            for checkpointing in CHECKPOINTING:
                ways = [name, str(rank), "yes" if checkpointing else "no"]
                if bench.over():
                    rows.append([*ways, "", "left out: no time", "", "", ""])
                    continue
                with emptied(bench):
                    before = time.perf_counter()
                    foretold, batch = predicted(bench, name, rank, checkpointing)
                    seconds = time.perf_counter() - before
                    foreseen = f"{max(foretold.values()):.3f}"
                    try:
                        really = taken(bench, name, rank, checkpointing, batch)
                    except torch.OutOfMemoryError:
                        really = {}
                if not really:
                    rows.append([*ways, foreseen, "out of memory", "", "", f"{seconds:.1f}"])
                    print(rows[-1], flush=True)
                    continue
                phase = max(really, key=lambda one: really[one])
                peak = foretold[phase] / really[phase] - 1
                worst = max(worst, abs(peak))
                off = [f"{one} {foretold[one] / really[one] - 1:+.1%}" for one in really]
                rows.append(
                    [
                        *ways,
                        foreseen,
                        f"{max(really.values()):.3f} ({phase})",
                        f"{peak:+.1%}",
                        ", ".join(off),
                        f"{seconds:.1f}",
                    ]
                )
                print(rows[-1], flush=True)
    head = [
        "run", "rank", "checkpointing", "estimate GiB", "taken GiB", "at the peak", "by phase", "s to estimate",
    ]  # fmt: skip
    size = bench.size
    return [
        f"Micro-batch {size.micro} x ({size.prompt} + {size.response}) tokens, rollouts of {size.batch}, AdamW. "
        f"Largest difference at the peak: **{worst:.1%}**.",
        "",
        *table(head, rows),
    ]


def callbacks(bench: Bench) -> list[str]:
    """The memory callbacks in a fit; on CUDA also when memory runs out."""
    into = bench.folder / "snapshots"
    module = made(bench, "PPO hydra", trunk_folder(bench))
    batches = [random_prompts(bench, bench.size.micro) for _ in range(2)]
    watching = [CudaMemoryMonitor(), SpeedMonitor(1.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logged = fitted(bench, module, batches, *watching, CudaMemorySnapshot(into, 1, 1))[-1]
    keys = sorted(key for key in logged if key.startswith(("memory/", "speed/")))
    lines = [f"Logged: {', '.join(f'`{key}` {logged[key]:.3g}' for key in keys)}.", ""]
    if bench.device.type != "cuda":
        return [*lines, "No CUDA: `CudaMemorySnapshot` records nothing, as it says."]
    del module
    lines += [f"`{path.name}`: {path.stat().st_size} bytes." for path in sorted(into.iterdir())]
    return [*lines, "", run_out_of_memory(bench, into)]


def run_out_of_memory(bench: Bench, into: Path) -> str:
    """Let a fit have 64 MiB more than its weights; what it leaves behind.

    Raises:
        RuntimeError: It had enough, or left no snapshot.
    """
    with emptied(bench):
        module = made(bench, "PPO hydra", trunk_folder(bench)).to(bench.device)
    total = torch.cuda.get_device_properties(bench.device).total_memory
    room = torch.cuda.memory_reserved() + 64 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        fitted(bench, module, [random_prompts(bench, 256)], CudaMemorySnapshot(into))
    except torch.OutOfMemoryError as error:
        found = sorted(path.name for path in into.glob("out_of_memory_in_*"))
        if not found:
            raise RuntimeError("out of memory, and no snapshot of it") from error
        return f"Out of memory with 64 MiB more than weights: {', '.join(found)}."
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    raise RuntimeError("64 MiB more than weights was enough for 256 prompts")


PARTS: dict[str, Part] = {
    "speed": speed,
    "decoding": decoding,
    "estimate": estimate,
    "callbacks": callbacks,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Every part; the process's status."""
    args = arguments(argv)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = "tiny" if args.tiny else args.shape
    begun = time.monotonic()
    status: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            device,
            TINY if args.tiny else Size(),
            SHAPES[shape],
            Path(folder),
            args.layouts,
            begun + 60 * args.minutes,
        )
        for name in args.parts:
            started = time.monotonic()
            if bench.over():
                status[name] = f"left out: {args.minutes:g} minutes were over"
                continue
            try:
                with emptied(bench):
                    lines = PARTS[name](bench)
                status[name] = "done"
            except Exception as error:
                # The others are worth having all the same.
                traceback.print_exc()
                status[name] = f"failed: {type(error).__name__}: {error}"
                lines = [status[name]]
            minutes = (time.monotonic() - started) / 60
            command = shown(["python", "benchmarks/gpu.py", "--parts", name, "--shape", shape])
            lines = [f"{machine()}; `{command}`; {minutes:.1f} minutes.", "", *lines]
            print("\n".join([f"## {name}", "", *lines]), flush=True)
            if args.report is not None:
                write_section(args.report, "On a GPU", f"{name}, {shape}", lines)
    print(json.dumps(status))
    return 0 if set(status.values()) == {"done"} else 1


if __name__ == "__main__":
    sys.exit(main())
