"""Counting what tensors hold, at every moment of a program, whether they are real or fake."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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
"""Stands for the host's memory where fake tensors of the CPU stand for the GPU's."""
CUDA_BLOCK = 512
"""What CUDA's caching allocator rounds every tensor up to, in bytes."""

_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Peak(NamedTuple):
    """The most that was held at one moment.

    Attributes:
        total: Bytes.
        kinds: Bytes of each kind at that moment; they add up to the total.
    """

    total: int
    kinds: Mapping[Kind, int]


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows the bytes of all tensors that were made inside it and are still alive.

    It weighs storages, so views and results written in place cost nothing, and sees what reaches PyTorch's
    dispatcher: tensors of the program, of autograd and of optimizers. What a kernel needs for itself
    during a call is not seen. One such workspace is known and large and is added where ``block`` is
    `CUDA_BLOCK`: flash and memory-efficient attention on CUDA sum the queries' gradient in fp32. CUDA's
    context and the libraries' own buffers (some hundred MiB) are not counted.

    Tensors are activations until `mark` or their shape says otherwise: whose last dimension is the
    vocabulary holds logits. What is on `HOST` is not counted.

    Args:
        vocabulary_size: Of the trunk; None where nothing is a logit.
        block: Each storage is rounded up to a multiple of so many bytes; 1 not at all, as on a CPU.
    """

    def __init__(self, vocabulary_size: int | None = None, block: int = CUDA_BLOCK) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary_size = vocabulary_size
        self.block = block
        self.live: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self.peaks: dict[str, Peak] = {}
        self._total = 0
        self._phases: list[str] = []
        # By id: a storage's entry goes when it dies.
        self._kinds: dict[int, Kind] = {}
        self._deaths: dict[int, weakref.finalize[Any, Any]] = {}

    @property
    def total(self) -> int:
        """Bytes held now."""
        return self._total

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 (whatever the operation gives)
        """Do the operation and write down what came out."""
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.note(value)
        if func is _ATTENTION_BACKWARD and self.block == CUDA_BLOCK:
            self._rise(workspace=4 * args[1].numel())
        return result

    def note(self, tensor: Tensor) -> None:
        """Count a tensor, unless it is counted already."""
        if tensor.device == HOST:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._kinds:
            return
        kind: Kind = "activations"
        if self.vocabulary_size is not None and tensor.shape[-1:] == (self.vocabulary_size,):
            kind = "logits"
        size = -(-storage.nbytes() // self.block) * self.block
        self._kinds[key] = kind
        self._deaths[key] = weakref.finalize(storage, self._forget, key, size)
        self._deaths[key].atexit = False
        self.live[kind] += size
        self._total += size
        self._rise()

    def _forget(self, key: int, size: int) -> None:
        self.live[self._kinds.pop(key)] -= size
        self._total -= size
        del self._deaths[key]

    def mark(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Say what tensors are; those that were not seen yet are counted."""
        for tensor in tensors:
            if tensor.device == HOST:
                continue
            self.note(tensor)
            storage = tensor.untyped_storage()
            size = -(-storage.nbytes() // self.block) * self.block
            self.live[self._kinds[storage._cdata]] -= size
            self.live[kind] += size
            self._kinds[storage._cdata] = kind

    def _rise(self, workspace: int = 0) -> None:
        total = self._total + workspace
        for phase in self._phases:
            if total > self.peaks[phase].total:
                self.peaks[phase] = Peak(total, {**self.live, "workspace": workspace})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Keep the peak of the block; a phase that comes again keeps the larger one."""
        self.peaks.setdefault(name, Peak(0, {}))
        self._phases.append(name)
        self._rise()
        try:
            yield
        finally:
            self._phases.remove(name)

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Count what lives, and keep no peak."""
        phases, self._phases = self._phases, []
        try:
            yield
        finally:
            self._phases = phases


class PhaseLedger(PhaseCallback):
    """Tells a ledger of a module's phases.

    Args:
        ledger: Who listens.
        before: Called with a phase's name before it is counted.
    """

    def __init__(self, ledger: Ledger, before: Callable[[str], None] = lambda phase: None) -> None:
        self.ledger = ledger
        self.before = before
        self._open: list[Any] = []

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Opens the phase."""
        self.before(phase)
        self._open.append(self.ledger.phase(phase))
        self._open[-1].__enter__()

    def on_phase_end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Closes it."""
        self._open.pop().__exit__(None, None, None)
