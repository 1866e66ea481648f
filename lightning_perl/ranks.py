"""Several processes on one global batch: each reads its share of the rows, results are put together again.

Every rank is given the same global batch, reads its share of the rows with the trunk, and puts the small results
(log-probabilities, values, scores) together with everybody's. Losses, statistics and decisions are then computed
from all rows on every rank alike, and gradients are summed once before the step. So the number of ranks changes
nothing but rounding. All ranks pass every function here equally often. On one rank nothing is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_perl.functional.sequences import Cut, Sequences, cuts

AT_ONCE = 2**24
"""Most numbers of gradients that are copied and summed at a time; one tensor may be larger."""
_alone = 0


def world() -> int:
    """How many ranks there are."""
    together = not _alone and dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if together else 1


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this rank reads whole batches, and the others are not waited for."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


class Share(NamedTuple):
    """The rows of a global batch that one rank reads.

    Attributes:
        rows: Their numbers, or a slice where they stand together. At least one unit, so that every rank runs the
            trunk equally often.
        counted: How many of them count: all, or none where a rank has no rows of its own.
        total: Rows of the global batch.
    """

    rows: slice | Tensor
    counted: int
    total: int

    def gathered(self, part: Tensor) -> Tensor:
        """This share's results and those of the others. Shape: ``(rows of the share, ...)`` to ``(B, ...)``.

        Gradients flow back to the own rows. Every rank must compute the same loss from what it gets.
        """
        if world() == 1:
            return part
        number = part if part.is_floating_point() else part.long()
        places = torch.arange(self.total, device=part.device)[self.rows][: self.counted]
        parts = number.new_zeros(self.total, *part.shape[1:])
        parts = parts.index_copy(0, places, number[: self.counted])
        whole: Tensor = _Sum.apply(parts)  # type: ignore[no-untyped-call]
        return whole.to(part.dtype)

    def places(self, places: Tensor, tokens: int) -> Tensor:
        """Those of the places ``row * tokens + column`` that lie in this share, counted in its own rows."""
        if world() == 1:
            return places
        numbers = torch.full((self.total,), -1, device=places.device)
        own = torch.arange(self.total, device=places.device)[self.rows]
        numbers[own] = torch.arange(len(own), device=places.device)
        row, column = numbers[places // tokens], places % tokens
        return (row * tokens + column)[row >= 0]


def share(units: int, samples: int = 1) -> Share:
    """This rank's share of so many units of ``samples`` rows each; the first ranks have one unit more."""
    ranks = world()
    rank = dist.get_rank() if ranks > 1 else 0
    least, more = divmod(units, ranks)
    start, count = rank * least + min(rank, more), least + (rank < more)
    first, end = (start, start + count) if count else (0, 1)
    return Share(slice(first * samples, end * samples), count * samples, units * samples)


def share_of_lines(line: Tensor | None, rows: int) -> Share:
    """This rank's share of rows of which some lie on one line, see `Packing`."""
    if line is None or world() == 1:
        return share(rows)
    lines = share(int(line.max()) + 1)
    own = torch.arange(int(line.max()) + 1, device=line.device)[lines.rows]
    numbers = torch.isin(line, own).nonzero().squeeze(-1)
    return Share(numbers, len(numbers) if lines.counted else 0, rows)


def shared_cuts(sequences: Sequences, size: int, by_length: bool = True) -> list[tuple[Cut, bool]]:
    """This rank's micro-batches, see `cuts`, and whether each counts. Every rank has equally many."""
    if world() == 1:
        return [(cut, True) for cut in cuts(sequences, size, by_length)]
    groups = len(sequences.ids) // sequences.samples
    mine = share(groups, sequences.samples)
    numbers = torch.arange(len(sequences.ids), device=sequences.ids.device)[mine.rows]
    own = list(cuts(sequences.rows(mine.rows), size, by_length))
    counted = len(own) if mine.counted else 0
    # The first rank's share is the largest.
    most = -(-groups // world()) * sequences.samples
    longest = sequences.rows(slice(0, most))
    each = range(sum(1 for _ in cuts(longest, size, by_length=False)))
    shared = ((number < counted, own[number % len(own)]) for number in each)
    return [(cut._replace(rows=numbers[cut.rows]), counts) for counts, cut in shared]


class _Sum(torch.autograd.Function):
    """The sum over the ranks; the gradient comes back as it is, since every rank has all of it."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:  # noqa: ANN401 (torch's)
        return summed(part.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        return gradient


def summed(part: Tensor) -> Tensor:
    """The sum of a tensor over the ranks, in place where it can be."""
    return _reduced(part, dist.ReduceOp.SUM) if world() > 1 else part


def largest(numbers: Iterable[int]) -> list[int]:
    """The largest over the ranks of each of some numbers."""
    own = list(numbers)
    return _reduced(torch.tensor(own), dist.ReduceOp.MAX).tolist() if world() > 1 else own


def _reduced(part: Tensor, how: Any) -> Tensor:  # noqa: ANN401 (torch calls it an attribute of an enum)
    """NCCL reads no memory of the host."""
    moved = part.cuda() if dist.get_backend() == "nccl" else part
    dist.all_reduce(moved, how)
    return moved.to(part.device)


def trained_by(optimizer: Optimizer) -> list[Tensor]:
    """The weights of an optimizer, in the order of its groups: the same on every rank."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def sum_gradients(
    parameters: Iterable[Tensor], stats: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Sum gradients over the ranks, and named statistics, which are returned. None stays None on all ranks."""
    named = dict(stats or {})
    if world() == 1:
        return named
    weights = list(parameters)
    given = torch.tensor([weight.grad is not None for weight in weights]).to(weights[0].device)
    values = [value.to(weights[0].device, torch.float64).reshape(1) for value in named.values()]
    sums = summed(torch.cat([given.double(), *values])).tolist()
    moved = [weight for weight, count in zip(weights, sums, strict=False) if count]
    for bucket in in_pieces(moved, AT_ONCE):
        parts = [torch.zeros_like(w) if w.grad is None else w.grad for w in bucket]
        flat = summed(torch.cat([part.reshape(-1) for part in parts]))
        pieces = torch.split(flat, [part.numel() for part in parts])
        for weight, piece in zip(bucket, pieces, strict=True):
            weight.grad = piece.view_as(weight)
    totals = zip(named.items(), sums[len(weights) :], strict=True)
    return {key: torch.full_like(value, total) for (key, value), total in totals}


def in_pieces(weights: Iterable[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Weights of one dtype in lists of at most so many numbers; one tensor may be larger."""
    piece: list[Tensor] = []
    for weight in weights:
        numbers = weight.numel() + sum(other.numel() for other in piece)
        if piece and (numbers > most or weight.dtype != piece[0].dtype):
            yield piece
            piece = []
        piece.append(weight)
    if piece:
        yield piece


@torch.no_grad()
def take_from_first(weights: Iterable[Tensor]) -> None:
    """Give every rank the first one's weights."""
    if world() > 1:
        for weight in weights:
            dist.broadcast(weight, 0)


def everyones(own: Any) -> list[Any]:  # noqa: ANN401 (anything that can be pickled)
    """What each rank has, in their order."""
    every = [own] * world()
    if world() > 1:
        dist.all_gather_object(every, own)
    return every


def require_same(numbers: Tensor, what: str) -> None:
    """Refuse to go on where ranks hold different numbers.

    Raises:
        RuntimeError: They do.
    """
    if world() == 1:
        return
    places = torch.arange(1, numbers.numel() + 1, device=numbers.device)
    digest = int((numbers.flatten().long() * places).sum())
    if largest([digest, -digest]) != [digest, -digest]:
        raise RuntimeError(
            f"The ranks hold different {what}, but each must be given the same batch: they share out its rows "
            "themselves. Use a datamodule of lightning_perl, or a loader that is seeded alike on all ranks and "
            "has no sampler for each of them."
        )
