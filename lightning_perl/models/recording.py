"""A decoding step that is recorded as a CUDA graph and replayed for every token.

Python takes longer to launch a step's thousand small kernels than a GPU to run them; a CUDA graph launches all at
once. It replays the same kernels on the same memory, so a step may depend only on tensors that stay in place.
`GrowingRows` is written so; whether a family's own code depends on more is tried before the first rollout.

Shapes: ``B`` rows, ``T`` tokens of the longest row there will be, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers.cache_utils import Cache

from lightning_perl.functional.sequences import position_ids
from lightning_perl.models.adapters import OFF
from lightning_perl.models.lean_layers import all_preallocated
from lightning_perl.models.trunk import REFUSALS, Trunk, nearly_equal

Step = Callable[[], None]
Recorder = Callable[[Step], Step]
"""Records a decoding step; call the result to replay it."""
PROMPT, STEPS = 6, 6
"""Tokens of the trial's prompts, and of what is read after them."""
POISON = 100.0
"""What the trial writes into unused cache columns: a step that reads them gives other logits."""


class CudaGraphs:
    """Records steps on a GPU in one pool of memory. A step must have run once before.

    Unlike ``torch.cuda.graph`` it does not return the allocator's free memory to the driver, from which the
    work after the rollout would have to allocate it again.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _side_stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        # A pool is freed with the last graph that uses it.
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def __call__(self, step: Step) -> Step:
        """Record a step; one that a graph cannot record is refused."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.stream(self._stream):
                # cuBLAS allocates its workspace outside the graph.
                torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]
                # Other threads may allocate memory meanwhile (a loader that pins batches).
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                try:
                    step()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            raise RuntimeError(
                "A decoding step could not be recorded as a CUDA graph. Set shortcuts: {recorded_decoding: "
                f"false}} and run again; this process is not to be trusted any more. {error}"
            ) from error
        self._graphs.append(graph)
        return graph.replay


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One stream for all recorders: libraries keep a workspace per stream.
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def recorder_of(trunk: Trunk, tokens: int) -> Recorder | None:
    """A recorder on a GPU, for rows of up to ``tokens`` tokens; None, with a warning, where none works.

    The trunk must take a 4-D mask (no ALiBi, no window that is shorter than the rows) and keep keys and values
    only. A recorded step must give what the step itself gives, which is tried once; a step that waits for the
    GPU (say, routing to experts in a loop) fails there.
    """
    if not trunk.shortcuts.recorded_decoding:
        return None
    record, fault = CudaGraphs(trunk.model.device), None
    if not trunk.packs(tokens):
        fault = "it takes no 4-D attention mask, or has a window that is shorter than the rows"
    elif trunk.recordable is None:
        counts = trunk.passes, trunk.flops
        fault = _fault(trunk, record)
        trunk.passes, trunk.flops = counts
        trunk.recordable = fault is None
    if fault is not None:
        rank_zero_warn(
            f"{trunk.named}: decoding steps are not recorded as a CUDA graph, so rollouts take longer than they "
            f"might: {fault}."
        )
    return record if fault is None and trunk.recordable else None


class GrowingRows:
    """Rows that grow by one token per step. All that changes between steps is in tensors that stay in place.

    Args:
        trunk: Inside a role.
        cache: Preallocated, holds the tokens before ``place``.
        mask: True on real tokens, those to come included. Shape: ``(B, T)``, bool.
        tokens: The tokens that are read next. Shape: ``(B,)``, int64.
        place: Their column. As an attribute a tensor, shape ``(1,)``, which `grow` advances.
        shown: Columns that a step attends to; ``place`` must stay below.
        filler: See `PreallocatedLayer.hold`.
    """

    def __init__(
        self,
        trunk: Trunk,
        cache: Cache,
        mask: Tensor,
        tokens: Tensor,
        place: int,
        shown: int,
        filler: float = 0.0,
    ) -> None:
        self.trunk = trunk
        self.cache = cache
        self.place = torch.full((1,), place, device=mask.device)
        self._ids = tokens.unsqueeze(-1).clone()
        self._real = mask[:, :shown]
        self._columns = torch.arange(shown, device=mask.device)
        # Added to a column it gives the row's position.
        self._offset = position_ids(mask[:, : place + 1])[:, -1:] - place
        if not all_preallocated(cache.layers):
            raise TypeError("Only preallocated keys and values can be held.")
        self._layers = cache.layers
        for layer in self._layers:
            layer.hold(self.place, shown, filler)

    @property
    def tokens(self) -> Tensor:
        """The tokens that are read next. Shape: ``(B,)``."""
        return self._ids.squeeze(-1)

    def logits(self) -> Tensor:
        """Logits of each row's next token. Shape: ``(B, V)``."""
        unseen = ~(self._real & (self._columns <= self.place))
        bias = torch.zeros_like(unseen, dtype=self.trunk.dtype)
        bias.masked_fill_(unseen, torch.finfo(self.trunk.dtype).min)
        positions = self._offset + self.place
        return self.trunk.step(self._ids, bias[:, None, None], positions, self.cache)

    def grow(self, tokens: Tensor) -> None:
        """Read these tokens next. Shape: ``(B,)``."""
        self._ids.copy_(tokens.unsqueeze(-1))
        self.place.add_(1)

    def end(self, length: int) -> None:
        """Let the cache grow again, with ``length`` tokens in it."""
        for layer in self._layers:
            layer.let_go(length)


def _fault(trunk: Trunk, record: Recorder) -> str | None:
    """Why steps cannot be recorded, if so. Reads two rows, one of them padded, in steps and in recorded ones."""
    with torch.no_grad(), trunk.switch.use(OFF):
        if not all_preallocated(trunk.empty_cache(PROMPT + STEPS).layers):
            return "it keeps more than keys and values"
        if not all(trunk.on_twin(_steps_as_at_once)):
            return "steps over a preallocated cache have other logits"
        try:
            rows = trunk.two_rows(PROMPT + STEPS)
            stepped, played = _read(trunk, *rows), _read(trunk, *rows, record)
        except REFUSALS as error:
            return str(error).splitlines()[0]
    return None if _same_logits(played, stepped) else "a recorded step has other logits"


def _steps_as_at_once(twin: Trunk) -> bool:
    """Whether steps over a preallocated cache have the logits of rows that are read at once."""
    ids, mask = twin.two_rows(PROMPT + STEPS)
    return nearly_equal(_read(twin, ids, mask), twin.project(twin(ids, mask))[:, PROMPT:])


def _same_logits(logits: Tensor, expected: Tensor) -> bool:
    """Whether logits are equal but for rounding, TF32's where it is allowed. Shape: ``(..., V)`` each.

    A constant added to all logits of a position changes no distribution, and may be so large that it hides
    what does (GPT-2's are near -100): it is subtracted, and only its own rounding is allowed for.
    """
    tf32 = logits.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    rounding = 2.0**-10 if tf32 else torch.finfo(logits.dtype).eps
    logits, expected = logits.double(), expected.double()
    difference, spread = (x - x.mean(-1, keepdim=True) for x in (logits - expected, expected))
    allowed = rounding**0.75 * spread.norm() + rounding / 2 * expected.norm()
    return bool(difference.norm() <= allowed)


@contextmanager
def refusing_to_wait(device: torch.device) -> Iterator[None]:
    """Waiting for the GPU, which would break a recording, raises inside the block."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _read(trunk: Trunk, ids: Tensor, mask: Tensor, record: Recorder | None = None) -> Tensor:
    """Logits at the last `STEPS` tokens, read one by one, in recorded steps or not. Shape: ``(B, STEPS, V)``."""
    cache = trunk.empty_cache(ids.shape[1])
    trunk(ids[:, :PROMPT], mask[:, :PROMPT], cache)
    rows = GrowingRows(trunk, cache, mask, ids[:, PROMPT], PROMPT, ids.shape[1], POISON)
    logits = ids.new_zeros(len(ids), trunk.vocabulary_size, dtype=trunk.dtype)
    # One column more, which is never read.
    following = torch.nn.functional.pad(ids, (0, 1))

    def step() -> None:
        logits.copy_(rows.logits())
        rows.grow(following.index_select(1, rows.place + 1).squeeze(1))

    step()
    steps, replay = [logits.clone()], step if record is None else record(step)
    for _ in range(STEPS - 1):
        with refusing_to_wait(ids.device):
            replay()
        steps.append(logits.clone())
    return torch.stack(steps, 1)
