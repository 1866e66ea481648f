"""Loaders whose position can be saved, so that a resumed run continues at the right batch.

They are plain iterables, not ``torch.utils.data.DataLoader``: Lightning rebuilds a ``DataLoader``
(losing its state) when it inserts a sampler. Every rank gets the same batches; modules share out their rows, so
that a position means the same for any number of ranks.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.utils.data import DataLoader

Collate: TypeAlias = Callable[[list[Any]], Any]
"""Makes a batch of a list of examples."""

MEGA_BATCHES = 16


def shuffled(
    rows: list[int], lengths: Sequence[int] | None, batch_size: int, order: random.Random
) -> list[list[int]]:
    """Returns the rows in shuffled batches, rows of similar length together.

    The rows are shuffled, sorted by length inside mega-batches of 16 batches (unless ``lengths``, those of the
    whole corpus, are None) and cut into batches, which are shuffled.
    """
    order.shuffle(rows)
    if lengths is not None:
        mega = batch_size * MEGA_BATCHES
        rows = [
            row
            for start in range(0, len(rows), mega)
            for row in sorted(rows[start : start + mega], key=lengths.__getitem__)
        ]
    batches = _cut(rows, batch_size)
    order.shuffle(batches)
    return batches


def _cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def mixture(sources: Sequence[int], weights: Sequence[float]) -> list[tuple[list[int], int]]:
    """Returns the rows of each source, and how many of them an epoch draws, in proportion to the weights.

    An epoch ends when every row was drawn: the source that has the most rows for its weight is
    drawn once through, the others begin again. ``sources`` has the number of each row's source.
    """
    rows: list[list[int]] = [[] for _ in weights]
    for row, source in enumerate(sources):
        rows[source].append(row)
    if not all(rows):
        empty = [number for number, members in enumerate(rows, start=1) if not members]
        raise ValueError(
            f"data.train: sources {empty} (in their order) have a weight but no training row left. Remove them, "
            "or look at the report for what was rejected."
        )
    epoch = max(len(members) / weight for members, weight in zip(rows, weights, strict=True))
    return [
        (members, max(len(members), round(epoch * weight)))
        for members, weight in zip(rows, weights, strict=True)
    ]


class Place(NamedTuple):
    """A place in a stream: epoch, rows before the block that is read, batches of it before it."""

    epoch: int = 0
    rows: int = 0
    batch: int = 0


class Positioned:
    """A loader whose position can be saved, with what its order ``depends`` on.

    ``ahead`` batches are asked for before they are used, which a saved position must not count.
    """

    def _begin(self, ahead: int = 0, **depends: int) -> None:
        self._depends = depends
        self._places = deque([Place()], maxlen=1 + ahead)

    @property
    def sampler(self) -> Positioned:
        """Itself: Lightning looks for ``sampler.set_epoch`` under this name."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of a later epoch; an epoch that has begun is left where it is.

        Lightning calls this before every epoch, which ends a pass that ``limit_train_batches``
        stopped early in a resumed run exactly as in an uninterrupted one.
        """
        if epoch > self._places[-1].epoch:
            self._go_to(Place(epoch))

    def _go_to(self, place: Place) -> None:
        self._places.clear()
        self._places.append(place)

    def state_dict(self) -> dict[str, int]:
        """Returns the position of the batch after the one in use, and what its order depends on."""
        return self._places[0]._asdict() | self._depends

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes to a saved position; refuses one whose order depends on something else."""
        for key, own in self._depends.items():
            if state.get(key) != own:
                raise ValueError(
                    f"The checkpoint's data has {key} = {state.get(key)}, this run's has {own}, so the position "
                    "in the epoch means nothing. Resume with the same data arguments, or start a new run from the "
                    "exported weights."
                )
        self._go_to(Place(*(state[key] for key in Place._fields)))


@dataclass(eq=False, repr=False)
class FixedLoader:
    """Yields the rows in their order, collated by ``num_workers`` processes or by this one."""

    examples: Sequence[Any]
    batch_size: int
    collate: Collate
    num_workers: int = 0

    def _load(self, batches: list[list[int]]) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(
            self.examples,  # type: ignore[arg-type]  # a sequence is all that it needs
            batch_sampler=batches,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            # Its own generator: a DataLoader draws a worker seed from the global one at every pass.
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
        )
        yield from loader

    def batches(self, epoch: int = 0) -> list[list[int]]:
        """Returns the row numbers of every batch of an epoch."""
        return _cut(list(range(len(self.examples))), self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        """Yields the batches, in order."""
        yield from self._load(self.batches())

    def __len__(self) -> int:
        """Returns the number of batches, the same in every epoch."""
        return len(self.batches())


@dataclass(eq=False, repr=False)
class ResumableLoader(FixedLoader, Positioned):
    """Yields shuffled batches from where it stands; its position can be saved and loaded.

    An iteration continues where the last one stopped and ends with the epoch; the one after it begins the next
    epoch. The order is a function of (seed, epoch), so a resumed run sees the batches of an uninterrupted one.
    ``parts`` says what an epoch draws of which rows (see :func:`mixture`); None draws every row once.
    """

    seed: int = 0
    bucket: bool = True
    parts: Sequence[tuple[list[int], int]] | None = None

    def __post_init__(self) -> None:
        """Begins; the number of rows takes the place of those before a block, as all of them are one."""
        parts = self.parts
        drawn = len(self.examples) if parts is None else sum(count for _, count in parts)
        self._begin(seed=self.seed, rows=drawn, batch_size=self.batch_size)
        self.lengths = [example.tokens for example in self.examples] if self.bucket else None

    def batches(self, epoch: int = 0) -> list[list[int]]:
        """Returns the row numbers of every batch of an epoch."""
        order = random.Random(f"{self.seed}/{epoch}")
        drawn = list(range(len(self.examples))) if self.parts is None else []
        for rows, count in self.parts or ():
            times, more = divmod(count, len(rows))
            drawn += rows * times + order.sample(rows, more)
        return shuffled(drawn, self.lengths, self.batch_size, order)

    def __iter__(self) -> Iterator[Any]:
        """Yields the rest of the epoch, or the next epoch where none is left."""
        if self._places[0].batch >= len(self):
            self._go_to(Place(self._places[0].epoch + 1))
        epoch, _, start = self._places[0]
        for number, batch in enumerate(self._load(self.batches(epoch)[start:]), start=start + 1):
            # Before the yield: a checkpoint taken while this batch is in use resumes after it, and
            # Lightning never asks a loader of known length for the end of its pass.
            self._go_to(Place(epoch, batch=number))
            yield batch


@dataclass(eq=False, repr=False)
class StreamingLoader(Positioned):
    """Batches of rows that are read as they come; no more than one block of them is in memory.

    The stream is cut into blocks of about ``block`` rows, and each goes through :func:`shuffled` as
    a whole corpus does in :class:`ResumableLoader`. A stream has no length. To go to a saved position,
    the rows before its block are read past, not encoded, and the block is made again.

    ``read(epoch, row)`` yields from this row on the epoch's rows that can be used, each with its number. ``ahead``
    is 1 where Lightning fits without ``limit_train_batches``, as it then looks whether a batch is the last one.
    """

    read: Callable[[int, int], Iterator[tuple[int, Any]]]
    batch_size: int
    collate: Collate
    seed: int = 0
    block: int = 4096
    bucket: bool = True
    ahead: int = 0

    def __post_init__(self) -> None:
        """Begins with whole batches in a block."""
        self.block = -(-self.block // self.batch_size) * self.batch_size
        # Order 1 was a shuffle of our own; since 2 datasets shuffles.
        depends = {"seed": self.seed, "block": self.block, "batch_size": self.batch_size}
        self._begin(self.ahead, **depends, order=2)

    def __iter__(self) -> Iterator[Any]:
        """Yields the rest of the epoch; the iteration after that begins the next one."""
        # What was asked for ahead and never used is made again.
        self._go_to(self._places[0])
        epoch, rows, batch = self._places[0]
        stream = self.read(epoch, rows)
        while block := list(islice(stream, self.block)):
            examples = [example for _, example in block]
            lengths = [example.tokens for example in examples] if self.bucket else None
            order = random.Random(f"{self.seed}/{epoch}/{rows}")
            batches = shuffled(list(range(len(examples))), lengths, self.batch_size, order)
            for number, members in enumerate(batches[batch:], start=batch + 1):
                self._places.append(Place(epoch, rows, number))
                yield self.collate([examples[member] for member in members])
            rows, batch = block[-1][0] + 1, 0
        # Only now is it known that the last batch was the last: it is in use.
        self._go_to(Place(epoch + 1))
