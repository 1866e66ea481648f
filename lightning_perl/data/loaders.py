"""Loaders whose position can be saved, so that a resumed run continues at the right batch.

They are plain iterables, not ``torch.utils.data.DataLoader``: Lightning rebuilds a ``DataLoader``
(losing its state) when it inserts a distributed sampler. Ranks share the batches here instead.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from torch.utils.data import DataLoader, Dataset

MEGA_BATCHES = 16


class ListDataset(Dataset[object]):
    """A list, in the form that torch's ``DataLoader`` asks for."""

    def __init__(self, examples: Sequence[object]) -> None:
        self.examples = examples

    def __getitem__(self, index: int) -> object:
        """Returns one example."""
        return self.examples[index]

    def __len__(self) -> int:
        """Returns how many examples there are."""
        return len(self.examples)


class BucketBatches:
    """Shuffled batches of rows of like length, a function of (seed, epoch) alone.

    Each epoch the rows are shuffled, sorted by length inside mega-batches of 16 batches, cut into
    batches, and the batches are shuffled. Holds the position, in (epoch, batch), of the next batch.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch; the last batch may hold fewer.
        seed: Seed of the order.
        bucket: False shuffles the rows and sorts nothing.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int = 0, bucket: bool = True
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.bucket = bucket
        self.epoch = 0
        self.batch = 0

    def batches(self, epoch: int) -> list[list[int]]:
        """Returns the row numbers of every batch of an epoch."""
        order = random.Random(f"{self.seed}/{epoch}")
        rows = list(range(len(self.lengths)))
        order.shuffle(rows)
        if self.bucket:
            mega = self.batch_size * MEGA_BATCHES
            rows = [
                row
                for start in range(0, len(rows), mega)
                for row in sorted(rows[start : start + mega], key=self.lengths.__getitem__)
            ]
        batches = [
            rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)
        ]
        order.shuffle(batches)
        return batches

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of a later epoch; an epoch that has begun is left where it is.

        Lightning calls this before every epoch, which ends a pass that ``limit_train_batches``
        stopped early in a resumed run exactly as in an uninterrupted one.
        """
        if epoch > self.epoch:
            self.epoch, self.batch = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Returns the position of the next batch, and what its order depends on."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "seed": self.seed,
            "rows": len(self.lengths),
            "batch_size": self.batch_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a saved position.

        Raises:
            ValueError: The position belongs to other rows, another batch size or another seed.
        """
        mine = self.state_dict()
        for key in ("seed", "rows", "batch_size"):
            if state[key] != mine[key]:
                raise ValueError(
                    f"The checkpoint's data has {key} = {state[key]}, this run's has {mine[key]}, "
                    "so the position in the epoch means nothing. Resume with the same data "
                    "arguments, or start a new run from the exported weights."
                )
        self.epoch, self.batch = state["epoch"], state["batch"]


def shard(batches: list[list[int]]) -> list[list[int]]:
    """Returns this rank's batches; the first ones are repeated so that all ranks have as many."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return batches
    ranks = torch.distributed.get_world_size()
    missing = -len(batches) % ranks
    return [*batches, *(batches * ranks)[:missing]][torch.distributed.get_rank() :: ranks]


class FixedLoader:
    """Yields the rows in their order.

    Args:
        examples: Encoded rows.
        batch_size: Rows of a batch.
        collate: Makes a batch of a list of examples.
        num_workers: Processes that collate; 0 collates in this one.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        batch_size: int,
        collate: Callable[[list[Any]], Any],
        num_workers: int = 0,
    ) -> None:
        self.dataset = ListDataset(examples)
        self.batch_size = batch_size
        self.collate = collate
        self.num_workers = num_workers

    def _load(self, batches: list[list[int]]) -> Iterator[Any]:
        loader = DataLoader(
            self.dataset,
            batch_sampler=batches,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            # Its own generator: a DataLoader draws a worker seed from the global one at every pass.
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
        )
        yield from loader

    def _batches(self) -> list[list[int]]:
        rows = list(range(len(self.dataset)))
        size = self.batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def __iter__(self) -> Iterator[Any]:
        """Yields this rank's batches, in order."""
        yield from self._load(shard(self._batches()))

    def __len__(self) -> int:
        """Returns the batches of this rank."""
        return len(shard(self._batches()))


class ResumableLoader(FixedLoader):
    """Yields shuffled batches from where it stands; its position can be saved and loaded.

    An iteration continues where the last one stopped and ends with the epoch; the one after it
    begins the next epoch. Nothing else decides the order, so a resumed run and an uninterrupted one
    see the same batches.

    Args:
        examples: Encoded rows.
        sampler: Their order and the position in it.
        collate: Makes a batch of a list of examples.
        num_workers: Processes that collate; 0 collates in this one.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        sampler: BucketBatches,
        collate: Callable[[list[Any]], Any],
        num_workers: int = 0,
    ) -> None:
        super().__init__(examples, sampler.batch_size, collate, num_workers)
        # Lightning looks for `sampler.set_epoch` under this name.
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        """Yields the rest of the epoch, or the next epoch where none is left."""
        sampler = self.sampler
        if sampler.batch >= len(self):
            sampler.set_epoch(sampler.epoch + 1)
        epoch = sampler.epoch
        batches = shard(sampler.batches(epoch))
        start = sampler.batch
        for number, batch in enumerate(self._load(batches[start:]), start=start):
            # Before the yield: a checkpoint taken while this batch is in use resumes after it, and
            # Lightning never asks a loader of known length for the end of its pass.
            sampler.epoch, sampler.batch = epoch, number + 1
            yield batch

    def __len__(self) -> int:
        """Returns the batches of this rank in a whole epoch."""
        return len(shard(self.sampler.batches(0)))

    def state_dict(self) -> dict[str, int]:
        """Returns the position; Lightning stores it in the checkpoint."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a saved position."""
        self.sampler.load_state_dict(state)
