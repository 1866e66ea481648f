"""Prompts with texts beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_perl.batches import MixedBatch, PairBatch, PromptBatch, RatedBatch
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


def test_pairs_are_laid_out_as_sampled_answers(tokenizer_dir: Path) -> None:
    prompts = [{"prompt": f"w{row} w1 w2"} for row in range(4, 14)]
    pairs = [{"prompt": "w1 w2", "chosen": f"w{row} w3", "rejected": f"w{row}"} for row in (4, 5)]
    options: dict[str, Any] = {"texts_as": "pairs", "batch_size": 3}
    options |= {"max_tokens": 24, "max_response_tokens": 8}
    data = MixedDataModule(str(tokenizer_dir), prompts, pairs, 1, **options)
    data.setup()
    for batch, _, _ in iter(data.train_dataloader()):
        texts = batch.texts
        assert isinstance(texts, PairBatch)
        assert torch.equal(texts.prompt_ids[0], texts.prompt_ids[1])
        assert texts.prompt_mask.all()
        better, worse = (
            data.tokenizer.decode(ids[mask])
            for ids, mask in zip(texts.response_ids, texts.response_mask, strict=True)
        )
        assert " w3" in better
        assert " w3" not in worse


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        ({"response": "w2", "label": 0}, {}, r"data\.texts has no row to imitate"),
        ({"response": "w2"}, {"texts_as": "pairs"}, r"data\.texts has no pair: `chosen` and"),
        (
            {},
            {"texts_as": "pairs", "texts_settings": {"streaming": True}},
            "pairs are not streamed",
        ),
        ({}, {"texts_settings": {"colums": {}}}, r"data\.texts_settings: .*'colums'"),
        ({}, {"texts_settings": {"rows": "prompts"}}, r"data\.texts_settings: .*'rows'"),
    ],
)
def test_texts_that_cannot_be_learned_are_refused(
    texts: dict[str, Any], options: dict[str, Any], words: str, tokenizer_dir: Path
) -> None:
    prompts = [{"prompt": "w1"}, {"prompt": "w2"}]
    with pytest.raises(ValueError, match=words):
        MixedDataModule(str(tokenizer_dir), prompts, [{"prompt": "w1", **texts}], **options).setup()
