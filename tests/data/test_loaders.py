from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_perl.data.collate import PromptExample, collate_prompts
from lightning_perl.data.loaders import BucketBatches, FixedLoader, ResumableLoader, shard

LENGTHS = [1 + (37 * number) % 50 for number in range(103)]


def loader(batch_size: int = 4, seed: int = 0, num_workers: int = 0) -> ResumableLoader:
    examples = [PromptExample([1] * length, row) for row, length in enumerate(LENGTHS)]
    sampler = BucketBatches(LENGTHS, batch_size, seed)
    return ResumableLoader(examples, sampler, collate_prompts, num_workers)


def rows(batches: ResumableLoader) -> list[list[int]]:
    return [batch.row.tolist() for batch in batches]


@pytest.mark.parametrize("bucket", [True, False])
def test_every_row_exactly_once_in_every_epoch(bucket: bool) -> None:
    sampler = BucketBatches(LENGTHS, 4, bucket=bucket)
    for epoch in range(3):
        batches = sampler.batches(epoch)
        assert sorted(row for batch in batches for row in batch) == list(range(len(LENGTHS)))
        assert sorted(map(len, batches)) == [3, *[4] * 25]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    sampler = BucketBatches(LENGTHS, 4, seed=3)
    assert sampler.batches(1) == BucketBatches(LENGTHS, 4, seed=3).batches(1)
    assert sampler.batches(1) != sampler.batches(2)
    assert sampler.batches(1) != BucketBatches(LENGTHS, 4, seed=4).batches(1)


def test_buckets_pad_less_and_do_not_sort_the_epoch() -> None:
    def padding(batches: list[list[int]]) -> int:
        return sum(
            max(LENGTHS[row] for row in batch) - LENGTHS[row] for batch in batches for row in batch
        )

    bucketed = BucketBatches(LENGTHS, 4).batches(0)
    shuffled = BucketBatches(LENGTHS, 4, bucket=False).batches(0)
    assert padding(bucketed) < 0.3 * padding(shuffled)
    widths = [max(LENGTHS[row] for row in batch) for batch in bucketed]
    assert widths != sorted(widths)


def test_iteration_goes_on_epoch_after_epoch() -> None:
    batches = loader()
    expected = BucketBatches(LENGTHS, 4)
    assert rows(batches) == expected.batches(0)
    assert rows(batches) == expected.batches(1)


@pytest.mark.parametrize("stop", [1, 7, 25, 26])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loaded_position_continues_at_the_next_batch(stop: int, num_workers: int) -> None:
    order = BucketBatches(LENGTHS, 4)
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
    ],
)
def test_a_position_of_other_data_is_refused(other: ResumableLoader, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(loader().state_dict())


def test_the_fixed_loader_keeps_the_order() -> None:
    examples = [PromptExample([1], row) for row in range(5)]
    fixed = FixedLoader(examples, 2, collate_prompts)
    for _ in range(2):
        assert [batch.row.tolist() for batch in fixed] == [[0, 1], [2, 3], [4]]
    assert len(fixed) == 3


def test_ranks_share_the_batches_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [[n] for n in range(5)]
    assert shard(batches) == batches
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares.append(shard(batches))
    assert shares == [[[0], [3]], [[1], [4]], [[2], [0]]]


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


def fit(folder: Path, steps: int, ckpt: Path | None = None, limit: int | None = None) -> Recorder:
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
    trainer.fit(module, train_dataloaders=loader(), ckpt_path=None if ckpt is None else str(ckpt))
    return module


@pytest.mark.parametrize(
    ("limit", "stop"), [(None, 3), (None, 25), (None, 26), (None, 30), (5, 3), (5, 5), (5, 7)]
)
def test_lightning_resumes_at_the_right_batch(tmp_path: Path, limit: int | None, stop: int) -> None:
    straight = fit(tmp_path / "straight", 35, limit=limit)
    fit(tmp_path / "killed", stop, limit=limit)
    (ckpt,) = (tmp_path / "killed").glob(f"*step={stop}.ckpt")
    resumed = fit(tmp_path / "resumed", 35, ckpt, limit)
    assert len(straight.seen) == 35
    assert resumed.seen == straight.seen[stop:]
