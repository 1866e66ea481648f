"""Memory: the peak of each phase of a train batch, every allocation on record, and advice where it runs out."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_perl.arguments import Checked, Count, CountOrZero
from lightning_perl.callbacks.console import show
from lightning_perl.callbacks.run_folder import run_folder
from lightning_perl.phases import (
    WHOLE_BATCH,
    PhaseMeter,
    PhaseTracker,
    cuda_device,
    ran_out_of_memory,
)

GIB = 1024**3
"""Bytes of one GiB, the unit of every ``memory/`` key."""
ADVICE = {
    "rollout": "lower sampling.batch_size (responses drawn at once), sampling.max_new_tokens or data.batch_size",
    "score": "lower model.score_batch_size",
    "actor": "lower model.micro_batch_size, or set model.checkpointing: true",
    "critic": "lower model.micro_batch_size, or set model.checkpointing: true",
    "optimizer": "lower lora.rank, or keep the moments on the host (model.optimizer: HostAdamW)",
    WHOLE_BATCH: "lower data.batch_size (trainer.accumulate_grad_batches makes up for it), or set "
    "model.checkpointing: true",
    "validation": "lower data.val_batch_size",
}
"""What to change where memory ran out, by phase."""


def resident_bytes() -> int:
    """Returns the physical memory that this process holds now, in bytes."""
    return int(psutil.Process().memory_info().rss)


class CudaMemoryMonitor(PhaseMeter):
    """Logs the peak memory of every phase, once per train batch, and prints it when the fit ends.

    On CUDA it is the most that tensors held at once (``memory/{phase}_peak_allocated_gib``), and the most that
    PyTorch's allocator held of the device (``_peak_reserved_gib``). Elsewhere it is the physical memory of this
    process (``_resident_gib``), the larger of its readings at the phase's start and end: a buffer that lived only
    inside the phase may be missed, and memory that the system has not taken back is counted.

    A phase that ran several times in the train batch has its largest value; a phase inside another counts for
    both. A train batch whose module names no phase is one phase, ``step``. The peaks of
    ``torch.cuda.max_memory_allocated`` are reset at each phase's start.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fit: dict[str, dict[str, float]] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets an earlier fit."""
        super().on_fit_start(trainer, pl_module)
        self._fit = {}

    def read(self, begins: bool = False) -> None:
        """Charges the peaks since the last reset to every running phase; resets them as one begins."""
        if self.device is None:
            peaks = {"resident": resident_bytes()}
        else:
            if begins:
                torch.cuda.reset_peak_memory_stats(self.device)
            peaks = {
                "peak_allocated": torch.cuda.max_memory_allocated(self.device),
                "peak_reserved": torch.cuda.max_memory_reserved(self.device),
            }
        for phase in self.running:
            _keep_largest(self.measured[phase], peaks)

    def results(self, outputs: object) -> dict[str, float]:
        """The peaks of the train batch's phases."""
        if len(self.measured) > 1:
            self.measured.pop(WHOLE_BATCH)
        for phase, peaks in self.measured.items():
            _keep_largest(self._fit.setdefault(phase, {}), peaks)
        return {
            f"memory/{phase}_{name}_gib": peak / GIB
            for phase, peaks in self.measured.items()
            for name, peak in peaks.items()
        }

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints one line, on rank zero: the largest allocated GiB of each phase, or resident GiB without CUDA."""
        name, title = "resident", "resident GiB"
        if self.device is not None:
            name, title = "peak_allocated", "peak GiB"
        phases = [f"{key} {peaks[name] / GIB:.2f}" for key, peaks in self._fit.items()]
        if trainer.is_global_zero and phases:
            show(f"memory ({title}): {' | '.join(phases)}")


def _keep_largest(largest: dict[str, float], peaks: Mapping[str, float]) -> None:
    for name, peak in peaks.items():
        largest[name] = max(largest.get(name, 0), peak)


class CudaMemorySnapshot(Checked, PhaseTracker):
    """Records every allocation of some train batches, and the moment of an out-of-memory error.

    Files open in PyTorch's memory viewer, https://pytorch.org/memory_viz (drag and drop; nothing is uploaded),
    and each one's path is printed:

    - ``batches_1_to_3_rank0.pickle``: allocations and frees of the recorded train batches.
    - ``out_of_memory_in_actor_rank0.pickle``: written when `torch.OutOfMemoryError` ends the fit, with the
      phase it was raised in (``no_phase`` outside of any): what was allocated then, and how it came to be.

    Without CUDA the callback warns once and does nothing. Recording goes on for the whole fit, since memory may
    run out at any time; it costs about 2 microseconds per allocation.

    Args:
        folder: Folder of the files; created when needed. None: ``memory/`` in the run's folder.
        start_step: Number of train batches before the recorded ones; 1 leaves out the first, which also
            creates the optimizer's moments. At least 0.
        steps: Number of train batches to record. At least 1.
        max_entries: Number of events kept; older ones are dropped. Each takes a few KB in the file: raise it
            if the recording starts in the middle of a train batch.
    """

    def __init__(
        self,
        folder: Path | None = None,
        start_step: CountOrZero = 1,
        steps: Count = 3,
        max_entries: Count = 100_000,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.start_step = start_step
        self.steps = steps
        self.max_entries = max_entries
        self._into: Path | None = None
        self._batches = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts recording, before the module's weights reach the device."""
        if stage != "fit":
            return
        self._into = None
        if cuda_device(trainer) is None:
            rank_zero_warn(
                f"CudaMemorySnapshot records CUDA memory, but this run is on {trainer.strategy.root_device}: "
                "use Trainer(accelerator='cuda') on a machine with a GPU, or remove the callback. Nothing is "
                "recorded."
            )
            return
        # Here and not when a file is due: choosing the run's folder needs all ranks.
        self._into = self.folder or run_folder(trainer) / "memory"
        self._batches = 0
        self._record()

    def on_train_batch_start(self, *_: object) -> None:
        """Drops the events so far where the recorded train batches begin."""
        super().on_train_batch_start()
        if self._into is not None and self._batches == self.start_step:
            self._record()

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Writes the file after the last recorded train batch."""
        self._batches += 1
        if self._batches == self.start_step + self.steps:
            self._dump_batches(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what there is of a fit that ended before or among the recorded train batches."""
        if 0 < self._batches < self.start_step + self.steps:
            self._dump_batches(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Writes a file if memory ran out, and stops recording."""
        if ran_out_of_memory(exception):
            phase = self.running[-1] if self.running else "no_phase"
            self._dump(trainer, f"out_of_memory_in_{phase}")
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stops recording."""
        self._stop()

    def _record(self) -> None:
        torch.cuda.memory._record_memory_history(
            "all", stacks="python", max_entries=self.max_entries, clear_history=True
        )

    def _stop(self) -> None:
        if self._into is not None:
            torch.cuda.memory._record_memory_history(None)
        self._into = None

    def _dump_batches(self, trainer: Trainer) -> None:
        # Events are dropped at the start step alone: a fit that ends before it has them all.
        first = self.start_step if self._batches > self.start_step else 0
        self._dump(trainer, f"batches_{first}_to_{self._batches - 1}")

    def _dump(self, trainer: Trainer, what: str) -> None:
        if self._into is None:
            return
        self._into.mkdir(parents=True, exist_ok=True)
        name = f"{what}_rank{trainer.global_rank}"
        path, numbers = self._into / f"{name}.pickle", itertools.count(2)
        while path.exists():
            path = self._into / f"{name}_{next(numbers)}.pickle"
        torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
        show(f"memory snapshot: {path} (open it at https://pytorch.org/memory_viz)")


class MemoryPreflight(Checked, PhaseTracker):
    """Lets memory run out before the first step, and says what to change whenever it does.

    Before the first batch of a fit it runs one of the largest size: every prompt and response as long as the data
    and ``sampling`` allow, all of a rollout sampled and scored, one micro-batch learned from, room taken for the
    optimizer's moments. Nothing is learned from it, and random generators stay where they are. It costs about a
    rollout of the longest responses.

    Every module has this callback with its default settings, unless the trainer is given one.

    Args:
        run: ``cuda`` where the run is on CUDA, ``always`` or ``never``. Out-of-memory errors are explained in any
            case.
    """

    def __init__(self, run: Literal["cuda", "always", "never"] = "cuda") -> None:
        super().__init__()
        self.run = run
        self._due = False
        self._flying = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Come first: what others measure of the first batch is not this one."""
        trainer.callbacks = [self, *(other for other in trainer.callbacks if other is not self)]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the first batch."""
        on_cuda = cuda_device(trainer) is not None
        self._due = self.run == "always" or (self.run == "cuda" and on_cuda)

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: Any,  # noqa: ANN401 (an AdapterModule, which this room does not import)
        batch: Any,  # noqa: ANN401 (as Lightning says it)
        batch_idx: int,
    ) -> None:
        """Run the largest batch there may be, once."""
        super().on_train_batch_start()
        if not self._due:
            return
        self._due, self._flying = False, True
        device = cuda_device(trainer)
        with torch.random.fork_rng([] if device is None else [device]):
            pl_module.preflight(batch, trainer.optimizers[0])
        pl_module.zero_grad(set_to_none=True)
        self._flying = False
        rank_zero_info("the longest rows there may be fit into memory")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say in which phase memory ran out, and what to change."""
        if not ran_out_of_memory(exception):
            return
        validating = trainer.validating or trainer.sanity_checking
        phase = "validation" if validating else (self.running or [WHOLE_BATCH])[-1]
        rows = "a batch"
        if self._flying:
            rows = "the longest rows there may be, before the first step (MemoryPreflight)"
        exception.args = (
            f"Out of memory in the phase {phase} of {rows}: {ADVICE.get(phase, ADVICE[WHOLE_BATCH])}. "
            f"`estimate` tells what fits. ({str(exception).splitlines()[0]})",
        )
