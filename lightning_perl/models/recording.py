"""A decoding step that is recorded once, and played again for every token.

A step of a large model is some thousand small kernels, and Python takes longer to ask for them than a GPU to run
them. A CUDA graph asks for all of them at once. It plays the same kernels on the same memory with the same
numbers, so a step may depend on nothing but tensors that stay where they are; `GrowingRows` is written so.
Whether a family's own code depends on more is tried out before the first rollout.

Shapes: ``B`` rows, ``T`` tokens of the longest row there will be, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers.cache_utils import Cache

from lightning_perl.functional.sequences import position_ids
from lightning_perl.models.adapters import OFF
from lightning_perl.models.cache import all_preallocated
from lightning_perl.models.trunk import REFUSALS, Trunk, same_logits

Step = Callable[[], None]
Recorder = Callable[[Step], Step]
"""Notes what a step does, without doing it; the result does it."""
PROMPT, STEPS = 6, 6
"""Tokens of the trial's prompts, and how many are read after them."""
POISON = 100.0
"""What the trial leaves where nothing was written: whoever looks there finds other logits."""


class CudaGraphs:
    """Records steps on a GPU, one after the other, in one pool of memory. A step must have been run once.

    Unlike ``torch.cuda.graph`` it does not give the allocator's free memory back to the driver: what comes
    after the rollout would have to ask for it again.

    Args:
        device: Where.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _side_stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        # A pool is given up with the last graph that knows it.
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def __call__(self, step: Step) -> Step:
        """Record a step.

        Raises:
            RuntimeError: It does what a graph cannot hold.
        """
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.stream(self._stream):
                # Its workspace is not the graph's.
                torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]
                # Other threads may ask for memory meanwhile (a loader that pins batches).
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
        replay: Step = graph.replay
        return replay


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all: libraries keep a workspace for every stream they have seen.
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def recorder_on(device: torch.device) -> Recorder | None:
    """A fresh recorder for a rollout there; None where Python is not what one waits for."""
    return CudaGraphs(device) if device.type == "cuda" else None


def recorder_of(trunk: Trunk, tokens: int) -> Recorder | None:
    """How a rollout's decoding steps are recorded; None where they are not, which is said.

    The trunk must take a mask of ours (no ALiBi, no window that is shorter than the rows) and keep
    nothing but keys and values, and a recorded step must give what the step gives, which is tried out
    once. A step that waits for the GPU (routing to experts in a loop, say) fails there.

    Args:
        trunk: Inside a role.
        tokens: Of the longest row there will be.

    Raises:
        RuntimeError: See `CudaGraphs`.
    """
    wanted = trunk.shortcuts.recorded_decoding
    record = recorder_on(trunk.model.device) if wanted else None
    if record is None:
        return None
    fault = None
    if not trunk.takes_masks(tokens):
        fault = "it reads no mask of ours, or has a window that is shorter than the rows"
    elif trunk.recordable is None:
        fault = _fault(trunk, record)
        trunk.recordable = fault is None
    if fault is not None:
        rank_zero_warn(
            f"{trunk.source or 'The trunk'} ({type(trunk.model).__name__}): decoding steps are not recorded "
            f"as a CUDA graph, so rollouts take longer than they might: {fault}."
        )
    return record if fault is None and trunk.recordable else None


class GrowingRows:
    """Rows that grow by a token a step. All that changes between steps is in tensors that stay in place.

    Args:
        trunk: Inside a role.
        cache: Preallocated, holds the tokens before ``place``.
        mask: True on real tokens, those to come included. Shape: ``(B, T)``, bool.
        tokens: Read next. Shape: ``(B,)``, int64.
        place: Their column.
        shown: Columns that a step looks at; ``place`` must stay below.
        filler: See `PreallocatedLayer.hold`.

    Attributes:
        place: Column of the token that is read next. Shape: ``(1,)``, int64.
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
        # From a row's column to its position.
        self._moved = position_ids(mask[:, : place + 1])[:, -1:] - place
        if not all_preallocated(cache.layers):
            raise TypeError("Only preallocated keys and values can be held.")
        self._layers = cache.layers
        for layer in self._layers:
            layer.hold(self.place, shown, filler)

    @property
    def tokens(self) -> Tensor:
        """Read next. Shape: ``(B,)``."""
        return self._ids.squeeze(-1)

    def logits(self) -> Tensor:
        """Of each row's next token. Shape: ``(B, V)``."""
        unseen = ~(self._real & (self._columns <= self.place))
        bias = torch.zeros_like(unseen, dtype=self.trunk.dtype)
        bias.masked_fill_(unseen, torch.finfo(self.trunk.dtype).min)
        positions = self._moved + self.place
        return self.trunk.step(self._ids, bias[:, None, None], positions, self.cache)

    def grow(self, tokens: Tensor) -> None:
        """Read these next. Shape: ``(B,)``."""
        self._ids.copy_(tokens.unsqueeze(-1))
        self.place.add_(1)

    def end(self, length: int) -> None:
        """Give the cache back, with so many tokens in it."""
        for layer in self._layers:
            layer.let_go(length)


def _fault(trunk: Trunk, record: Recorder) -> str | None:
    """Why steps cannot be recorded: two rows, one of them padded, read in three ways."""
    tokens = PROMPT + STEPS
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(trunk.vocabulary_size, (2, tokens), generator=drawn).to(trunk.model.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :2] = False
    with torch.no_grad(), trunk.switch.use(OFF), trunk.uncounted():
        if not all_preallocated(trunk.empty_cache(tokens).layers):
            return "it keeps more than keys and values"
        try:
            whole = trunk.project(trunk(ids, mask))[:, PROMPT:]
            stepped = _read(trunk, ids, mask, partial(_not_waiting, ids.device))
        except REFUSALS as error:
            return str(error).splitlines()[0]
        # Other kernels here, the same ones there: rounding, and less of it.
        if not same_logits(stepped, whole, trunk.rounding, 0.5):
            return "steps over a held cache have other logits"
        played = _read(trunk, ids, mask, record)
    return (
        None
        if same_logits(played, stepped, trunk.rounding, 0.75)
        else "a recorded step has other logits"
    )


def _not_waiting(device: torch.device, step: Step) -> Step:
    """The step as it is, but what waits for the GPU raises: it would break a recording."""

    def checked() -> None:
        with refusing_to_wait(device):
            step()

    return checked


@contextmanager
def refusing_to_wait(device: torch.device) -> Iterator[None]:
    """Waiting for the GPU raises inside the block."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _read(trunk: Trunk, ids: Tensor, mask: Tensor, record: Recorder) -> Tensor:
    """Logits at the last `STEPS` tokens, read one by one. Shape: ``(B, STEPS, V)``."""
    cache = trunk.empty_cache(ids.shape[1])
    trunk(ids[:, :PROMPT], mask[:, :PROMPT], cache)
    rows = GrowingRows(trunk, cache, mask, ids[:, PROMPT], PROMPT, ids.shape[1], POISON)
    found = ids.new_zeros(len(ids), trunk.vocabulary_size, dtype=trunk.dtype)
    # One column more, which is never read.
    given = torch.nn.functional.pad(ids, (0, 1))

    def step() -> None:
        found.copy_(rows.logits())
        rows.grow(given.index_select(1, rows.place + 1).squeeze(1))

    step()
    seen, play = [found.clone()], record(step)
    for _ in range(STEPS - 1):
        play()
        seen.append(found.clone())
    return torch.stack(seen, 1)
