from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_perl.data.loaders import (
    FixedLoader,
    ResumableLoader,
    StreamingLoader,
    mixture,
)
from lightning_perl.data.rows import PromptExample, collate_prompts

LENGTHS = [1 + (37 * number) % 50 for number in range(103)]


def loader(
    batch_size: int = 4, seed: int = 0, num_workers: int = 0, bucket: bool = True
) -> ResumableLoader:
    examples = [PromptExample([1] * length, row) for row, length in enumerate(LENGTHS)]
    return ResumableLoader(examples, batch_size, collate_prompts, num_workers, seed, bucket)


def read(epoch: int, start: int) -> Iterator[tuple[int, PromptExample]]:
    """Every ninth row cannot be used."""
    for row, length in enumerate(LENGTHS):
        if row >= start and row % 9:
            yield row, PromptExample([1] * length, row)


USED = [row for row in range(len(LENGTHS)) if row % 9]


def streamed(
    ahead: int = 0, seed: int = 0, bucket: bool = True, block: int = 30
) -> StreamingLoader:
    return StreamingLoader(read, 4, collate_prompts, seed, block, bucket, ahead)


def rows(batches: ResumableLoader | StreamingLoader) -> list[list[int]]:
    return [batch.row.tolist() for batch in batches]


@pytest.mark.parametrize("bucket", [True, False])
def test_every_row_exactly_once_in_an_order_of_seed_and_epoch(bucket: bool) -> None:
    sampler = loader(seed=3, bucket=bucket)
    for epoch in range(3):
        batches = sampler.batches(epoch)
        assert sorted(row for batch in batches for row in batch) == list(range(len(LENGTHS)))
        assert sorted(map(len, batches)) == [3, *[4] * 25]
        assert batches == loader(seed=3, bucket=bucket).batches(epoch)
        assert batches != sampler.batches(epoch + 1)
        assert batches != loader(seed=4, bucket=bucket).batches(epoch)


def test_buckets_pad_less_and_do_not_sort_the_epoch() -> None:
    bucketed, shuffled = (loader(bucket=b).batches(0) for b in (True, False))
    widths = [[max(LENGTHS[row] for row in batch) for batch in b] for b in (bucketed, shuffled)]
    paid = [
        sum(w * len(batch) for w, batch in zip(*pair, strict=True)) - sum(LENGTHS)
        for pair in zip(widths, (bucketed, shuffled), strict=True)
    ]
    assert paid[0] < 0.3 * paid[1]
    assert widths[0] != sorted(widths[0])


@pytest.mark.parametrize("stop", [1, 7, 25, 26])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loaded_position_continues_at_the_next_batch(stop: int, num_workers: int) -> None:
    order = loader()
    straight = order.batches(0) + order.batches(1)
    first = loader(num_workers=num_workers)
    seen = [batch.row.tolist() for _, batch in zip(range(stop), first, strict=False)]
    second = loader()
    second.load_state_dict(first.state_dict())
    while len(seen) < len(straight):
        seen += rows(second)
    assert seen == straight


def test_a_pass_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    rows(loader())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (loader(batch_size=8), r"batch_size = 4, this run's has 8"),
        (loader(seed=1), r"seed = 0, this run's has 1"),
        (streamed(block=100), r"block = 32, this run's has 100"),
    ],
)
def test_a_position_of_other_data_is_refused(
    other: ResumableLoader | StreamingLoader, words: str
) -> None:
    mine = streamed() if isinstance(other, StreamingLoader) else loader()
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(mine.state_dict())


def test_a_position_of_the_old_order_of_streams_is_refused() -> None:
    old = {key: value for key, value in streamed().state_dict().items() if key != "order"}
    with pytest.raises(ValueError, match=r"order = None, this run's has 2"):
        streamed().load_state_dict(old)


def test_fixed_rows_keep_their_order() -> None:
    fixed = FixedLoader([PromptExample([1], row) for row in range(5)], 2, collate_prompts)
    for _ in range(2):
        assert [batch.row.tolist() for batch in fixed] == [[0, 1], [2, 3], [4]]
    assert len(fixed) == 3


def test_a_stream_has_every_row_once_in_every_epoch() -> None:
    stream = streamed()
    for _ in range(3):
        batches = rows(stream)
        assert sorted(row for batch in batches for row in batch) == USED
        # 91 rows in blocks of 32: only the last block has a batch that is not full.
        assert sorted(map(len, batches)) == [3, *[4] * 22]
        for block in range(3):
            inside = USED[32 * block : 32 * block + 32]
            assert {row for batch in batches[8 * block : 8 * block + 8] for row in batch} == set(
                inside
            )
    with pytest.raises(TypeError, match="has no len"):
        len(stream)  # type: ignore[arg-type]


def test_the_order_of_a_stream_is_a_function_of_seed_epoch_and_place() -> None:
    stream = streamed()
    first, second = rows(stream), rows(stream)
    assert first != second
    assert first == rows(streamed())
    assert first != rows(streamed(seed=1))
    assert first != rows(streamed(bucket=False))
    blocks = [[sorted(LENGTHS[row] for row in batch) for batch in first[n : n + 8]] for n in (0, 8)]
    assert blocks[0] != blocks[1]


@pytest.mark.parametrize("stop", [0, 1, 7, 8, 9, 22, 23, 24, 40])
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_loaded_position_of_a_stream_continues_at_the_next_batch(stop: int, ahead: int) -> None:
    whole = streamed()
    straight = rows(whole) + rows(whole)
    first = streamed(ahead)
    # What is asked for is used `ahead` batches later; an epoch's end uses all.
    seen: list[list[int]] = []
    while len(seen) < stop:
        asked: list[list[int]] = []
        for batch in first:
            asked.append(batch.row.tolist())
            if len(asked) - ahead + len(seen) == stop:
                break
        else:
            seen += asked
            continue
        seen += asked[: len(asked) - ahead]
    second = streamed(ahead)
    second.load_state_dict(first.state_dict())
    while len(seen) < len(straight):
        seen += rows(second)
    assert seen == straight


def test_what_was_asked_for_ahead_and_never_used_comes_again() -> None:
    stream, whole = streamed(ahead=1), rows(streamed())
    for _ in zip(range(3), stream, strict=False):
        pass
    assert stream.state_dict()["batch"] == 2
    again = iter(stream)
    assert next(again).row.tolist() == whole[2]
    assert stream.state_dict()["batch"] == 2


def test_a_stream_reads_past_what_it_has_seen() -> None:
    starts: list[tuple[int, int]] = []

    def watched(epoch: int, start: int) -> Iterator[tuple[int, PromptExample]]:
        starts.append((epoch, start))
        return read(epoch, start)

    first = StreamingLoader(watched, 4, collate_prompts, block=32)
    for _ in zip(range(11), first, strict=False):
        pass
    second = StreamingLoader(watched, 4, collate_prompts, block=32)
    second.load_state_dict(first.state_dict())
    list(second)
    list(second)
    # The second block begins behind the 32nd usable row.
    assert starts == [(0, 0), (0, USED[31] + 1), (1, 0)]


def test_a_mixture_draws_every_row_and_keeps_the_proportions() -> None:
    parts = mixture([0, 1, 1, 1, 0, 1, 1, 1], [1.0, 1.0])
    assert parts == [([0, 4], 6), ([1, 2, 3, 5, 6, 7], 6)]
    # As many rows for their weight: everything once.
    assert [drawn for _, drawn in mixture([0, 1, 1, 1], [0.2, 0.6])] == [1, 3]
    assert [drawn for _, drawn in mixture([0, 1, 1, 1], [4.0, 1.0])] == [12, 3]
    with pytest.raises(ValueError, match=r"sources \[2\]"):
        mixture([0, 0], [1.0, 1.0])


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        self.seen.append(batch[2].tolist())
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    folder: Path, steps: int, limit: int | None, stream: bool, ckpt: Path | None = None
) -> Recorder:
    module = Recorder()
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=limit,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)],
    )
    batches = streamed(ahead=limit is None) if stream else loader()
    trainer.fit(module, train_dataloaders=batches, ckpt_path=None if ckpt is None else str(ckpt))
    return module


@pytest.mark.parametrize(
    ("stream", "stops"), [(False, (3, 25, 26, 30)), (True, (3, 8, 23, 24, 30))]
)
@pytest.mark.parametrize("limit", [None, 5])
def test_lightning_resumes_at_the_right_batch(
    tmp_path: Path, limit: int | None, stops: tuple[int, ...], stream: bool
) -> None:
    straight = fit(tmp_path / "straight", 35, limit, stream).seen
    assert len(straight) == 35
    if stream and limit is None:
        assert sorted(row for batch in straight[:23] for row in batch) == USED
    for stop in (3, 5, 7) if limit else stops:
        fit(tmp_path / f"killed{stop}", stop, limit, stream)
        (ckpt,) = (tmp_path / f"killed{stop}").glob(f"*step={stop}.ckpt")
        assert fit(tmp_path / "resumed", 35, limit, stream, ckpt).seen == straight[stop:]
