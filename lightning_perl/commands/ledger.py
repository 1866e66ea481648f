"""Counts the bytes that tensors hold at every moment of a program, whether they are real or fake."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lightning_perl.phases import PhaseCallback

Kind = Literal[
    "trunk", "adapters", "gradients", "optimizer", "cache", "logits", "activations", "workspace"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
HOST = torch.device("meta")
"""Stands for the host's memory where fake tensors on the CPU stand for the GPU's."""
CUDA_BLOCK = 512
"""CUDA's caching allocator rounds every tensor up to a multiple of this many bytes."""

_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Peak(NamedTuple):
    """The most bytes that were held at one moment, and how many of each kind they were."""

    total: int
    kinds: Mapping[Kind, int]


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that were made inside it and are still alive.

    It counts storages, so views and results written in place cost nothing. It does not see CUDA's context, the
    libraries' own buffers (some hundred MiB), or what a kernel needs for itself during a call. One such workspace
    is known and large and is added where ``block`` is `CUDA_BLOCK`: flash and memory-efficient attention on CUDA
    sum the queries' gradient in fp32.

    A tensor is counted as activations until `mark` names another kind, or as logits if its last dimension is
    the vocabulary. Tensors on `HOST` are not counted. Each storage is rounded up to a multiple of ``block`` bytes,
    1 as on a CPU.
    """

    def __init__(self, vocabulary_size: int | None = None, block: int = CUDA_BLOCK) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary_size = vocabulary_size
        self.block = block
        self.live: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self.peaks: dict[str, Peak] = {}
        self._phases: list[str] = []
        # Kind and bytes of each living storage, by the address of its C++ object.
        self._storages: dict[int, tuple[Kind, int]] = {}

    @property
    def total(self) -> int:
        """Bytes held now."""
        return sum(self.live.values())

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 (whatever the operation gives)
        """Run the operation and count its results."""
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value)
        if func is _ATTENTION_BACKWARD and self.block == CUDA_BLOCK:
            self._update_peaks(workspace=4 * args[1].numel())
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device == HOST or key in self._storages:
            return
        kind: Kind = "logits" if tensor.shape[-1:] == (self.vocabulary_size,) else "activations"
        size = -(-storage.nbytes() // self.block) * self.block
        self._storages[key] = kind, size
        weakref.finalize(storage, self._forget, key).atexit = False
        self.live[kind] += size
        self._update_peaks()

    def _forget(self, key: int) -> None:
        kind, size = self._storages.pop(key)
        self.live[kind] -= size

    def mark(self, tensors: Iterable[Tensor], kind: Kind, parts: float = 1) -> None:
        """Count tensors as a kind from now on, also those that were not made inside the ledger.

        Of each only one of so many ``parts`` is counted, nothing of infinitely many.
        """
        for tensor in tensors:
            self._count(tensor)
            key = tensor.untyped_storage()._cdata
            if key in self._storages:
                before, size = self._storages[key]
                self.live[before] -= size
                size = math.ceil(size / parts)
                self.live[kind] += size
                self._storages[key] = kind, size

    def _update_peaks(self, workspace: int = 0) -> None:
        total = self.total + workspace
        for phase in self._phases:
            if total > self.peaks[phase].total:
                self.peaks[phase] = Peak(total, {**self.live, "workspace": workspace})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the peak inside the block; a phase that comes again keeps the larger peak."""
        self.peaks.setdefault(name, Peak(0, {}))
        self._phases.append(name)
        self._update_peaks()
        try:
            yield
        finally:
            self._phases.remove(name)

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Count tensors inside the block, but record no peak."""
        phases, self._phases = self._phases, []
        try:
            yield
        finally:
            self._phases = phases


class PhaseLedger(PhaseCallback):
    """Records the peaks of a module's phases in a ledger; ``before`` is called as a phase begins."""

    def __init__(self, ledger: Ledger, before: Callable[[str], None] = lambda phase: None) -> None:
        self.ledger = ledger
        self.before = before
        self._open: list[AbstractContextManager[None]] = []

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Begins to record."""
        self.before(phase)
        self._open.append(self.ledger.phase(phase))
        self._open[-1].__enter__()

    def on_phase_end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Ends recording."""
        self._open.pop().__exit__(None, None, None)
