"""``fit --dry-run``: everything is built, one batch is learned from, a plan is printed, and nothing is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lightning_perl.callbacks.console import show
from lightning_perl.callbacks.cuda_memory import GIB, resident_bytes
from lightning_perl.models.adapters import OFF
from lightning_perl.models.trunk import Trunk
from lightning_perl.modules.base import AdapterModule
from lightning_perl.modules.on_policy import OnPolicy

FLAG = "--dry-run"
AS_FIT = [
    "--trainer.fast_dev_run=true",
    '--trainer.callbacks+={"class_path": "MemoryPreflight", "init_args": {"run": "always"}}',
    f"--trainer.callbacks+={__name__}.DryRun",
]
"""What a dry run sets beside the arguments of ``fit``: the longest rows first, then one batch of the data."""


class DryRun(Callback):
    """Prints, when a ``fit`` of one batch ends, what the whole run will be."""

    def __init__(self) -> None:
        self._began = self._seconds = 0.0

    def on_train_batch_start(self, *_: object) -> None:
        """Begin the clock, behind the preflight."""
        self._began = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        """Stop it."""
        self._seconds = time.perf_counter() - self._began

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the plan."""
        if isinstance(pl_module, AdapterModule):
            lines = list(plan(pl_module, trainer, self._seconds))
            width = max(len(key) for key, _ in lines)
            show("\n".join(f"{key:<{width}}  {value}" for key, value in lines))
        show("dry run: one batch was learned from, and nothing is kept")


def plan(module: AdapterModule, trainer: Trainer, seconds: float) -> Iterator[tuple[str, str]]:
    """What the run will be, a line each.

    Args:
        module: The module after one batch.
        trainer: Its trainer.
        seconds: What the batch took.
    """
    for trunk in (part for part in module.modules() if isinstance(part, Trunk)):
        count = sum(weight.numel() for weight in trunk.bare)
        dtype = str(trunk.dtype).removeprefix("torch.")
        held = f", {trunk.quantization}" if trunk.quantization else ""
        yield "trunk", f"{trunk.source}: {count / 1e6:,.1f}M parameters, {dtype}{held}"
    if isinstance(module, OnPolicy):
        seats = module.roles.seats.items()
        said = [f"{role} {'off' if seat.adapter == OFF else seat.adapter}" for role, seat in seats]
        yield "roles", f"{', '.join(said)} (layout {module.roles.layout})"
    for group in trainer.optimizers[0].param_groups:
        count = sum(weight.numel() for weight in group["params"])
        yield f"trained: {group['name']}", f"{count:,} parameters, learning rate {group['lr']:g}"
    device = trainer.strategy.root_device
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / GIB
        yield "memory", f"{peak:.2f} GiB at most, the longest rows included"
    else:
        resident = resident_bytes() / GIB
        yield "memory", f"{resident:.2f} GiB resident, the longest rows included"
    yield from _length(module, seconds)


def _length(module: AdapterModule, seconds: float) -> Iterator[tuple[str, str]]:
    """How long the run will be, as far as its settings say."""
    yield "one batch", f"{seconds:.1f} s"
    episodes: Any = getattr(module, "episodes", 0)
    most: Any = getattr(module, "max_episodes", None)
    if episodes and most:
        minutes = seconds / episodes * most / 60
        yield "the run", f"{most:,} episodes, {episodes} a batch: about {minutes:,.1f} minutes"
        return
    with suppress(TypeError):  # a stream has no length
        batches = len(module.trainer.train_dataloader)  # type: ignore[arg-type]
        yield "one epoch", f"{batches:,} batches: about {batches * seconds / 60:,.1f} minutes"
