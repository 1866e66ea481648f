"""Prompts with texts beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_perl.batches import MixedBatch, PromptBatch, RatedBatch
from lightning_perl.data import MixedDataModule


def test_texts_stand_beside_every_batch_of_prompts(tokenizer_dir: Path) -> None:
    prompts = [{"prompt": f"w{row} w1 w2"} for row in range(4, 14)]
    texts = [
        {"ask": f"w{row}", "prompt": 1, "response": "w5 w6", "label": row < 3} for row in range(5)
    ]
    data = MixedDataModule(
        str(tokenizer_dir),
        prompts,
        [*texts, {"ask": "w1", "prompt": 1, "response": "", "label": 1}],
        2,
        {"columns": {"prompt": "ask"}},
        batch_size=3,
        max_tokens=24,
        max_response_tokens=8,
        on_bad_row="reject",
    )
    data.setup()
    batches = [batch for batch, _, _ in iter(data.train_dataloader())]
    # Nine prompts are three batches (one is held out); three texts are two, and begin again. Two are not imitated.
    assert [type(batch) for batch in batches] == [MixedBatch] * 3
    assert all(isinstance(batch.prompts, PromptBatch) for batch in batches)
    assert all(isinstance(batch.texts, RatedBatch) for batch in batches)
    assert sorted(torch.cat([batch.prompts.row for batch in batches]).tolist()) == list(range(9))
    assert [len(batch.texts.ids) for batch in batches] == [2, 1, 2]
    ((where, _),) = data.report.messages
    assert where == "data.texts:6"
    assert all(bool(batch.texts.imitate.all()) for batch in batches)
    assert isinstance(next(iter(data.val_dataloader())), PromptBatch)


def test_texts_of_which_none_is_imitated_are_refused(tokenizer_dir: Path) -> None:
    texts = [{"prompt": "w1", "response": "w2", "label": 0}]
    with pytest.raises(ValueError, match=r"data\.texts has no row to imitate"):
        MixedDataModule(str(tokenizer_dir), [{"prompt": "w1"}, {"prompt": "w2"}], texts).setup()
