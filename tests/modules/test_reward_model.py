"""The reward model: where it reads, what it learns, what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lightning_perl.batches import RatedBatch
from lightning_perl.functional.sequences import pad_right
from lightning_perl.models.adapters import OFF, LoraSpec
from lightning_perl.models.heads import load_head
from lightning_perl.models.trunk import load_trunk
from lightning_perl.modules import RewardModel
from tests.modules import tiny


def separable(seed: int, pairs: bool) -> RatedBatch:
    """Sixteen rows; good ones end in ``w5``, bad ones in ``w6``."""
    batch = tiny.rated(16, seed, pairs=8 if pairs else 0)
    ids = batch.ids.clone()
    last = batch.attention_mask.sum(1) - 1
    ids[torch.arange(16), last] = torch.where(batch.label > 0.5, 5, 6)
    return batch._replace(ids=ids)


@pytest.mark.parametrize("lora", [None, tiny.LORA], ids=["full", "lora"])
@pytest.mark.parametrize("pairs", [False, True], ids=["thumbs", "pairs"])
def test_learns_a_separable_problem(
    pairs: bool, lora: LoraSpec | None, plain_trunk: Path, tmp_path: Path
) -> None:
    module = RewardModel(
        str(plain_trunk), lora, optimizer=lambda params: torch.optim.AdamW(params, lr=0.01)
    )
    trainer, _ = tiny.quiet_trainer(tmp_path)
    rows = [separable(seed, pairs) for seed in range(30)]
    trainer.fit(module, tiny.Batches(rows))
    held_out = tiny.Batches([separable(100 + seed, pairs) for seed in range(4)])
    (logged,) = trainer.validate(module, held_out, verbose=False)
    if pairs:
        assert logged["val/accuracy"] > 0.95
        assert logged["val/margin"] > 0
    else:
        assert logged["val/auroc"] > 0.95
        assert logged["val/balanced_accuracy"] > 0.95


def test_score_is_read_at_the_last_response_token(plain_trunk: Path) -> None:
    module = RewardModel(str(plain_trunk), trunk_dtype="float64")
    batch = tiny.rated(5)
    scores = module.scores(batch)
    for row in range(5):
        tokens = int(batch.attention_mask[row].sum())
        with torch.no_grad(), module.trunk.switch.use(module.adapter):
            hidden = module.trunk(batch.ids[row : row + 1, :tokens], torch.ones(1, tokens).bool())
        assert_close(scores[row], module._head(hidden[0, -1]))
    # A response that ends before its row does (the user goes on) is read where it ends.
    mask = batch.response_mask.clone()
    mask[:, 3:] = False
    cut = module.scores(batch._replace(response_mask=mask))
    short = pad_right([row[:3] for row in batch.ids.tolist()], 0)
    alone = batch._replace(
        ids=short[0], attention_mask=short[1], response_mask=mask[:, :3] & short[1]
    )
    assert_close(cut, module.scores(alone))


def test_padding_and_row_mates_change_no_score(plain_trunk: Path) -> None:
    module = RewardModel(str(plain_trunk), trunk_dtype="float64")
    tiny.train_adapters(module)
    batch = tiny.rated(6)
    extra = torch.zeros(6, 4, dtype=torch.int64)
    padded = batch._replace(
        ids=torch.cat([batch.ids, extra + 9], 1),
        attention_mask=torch.cat([batch.attention_mask, extra.bool()], 1),
        response_mask=torch.cat([batch.response_mask, extra.bool()], 1),
    )
    assert_close(module.scores(padded), module.scores(batch), rtol=1e-5, atol=1e-6)
    assert_close(module.objective(padded)[0], module.objective(batch)[0], rtol=1e-5, atol=1e-6)


def test_adapter_and_head_are_handed_over(plain_trunk: Path, tmp_path: Path) -> None:
    module = RewardModel(str(plain_trunk), tiny.LORA, head_learning_rate=0.1)
    trunk = tiny.weights(module.trunk)  # type: ignore[arg-type]
    trainer, folder = tiny.quiet_trainer(tmp_path)
    trainer.fit(module, tiny.Batches([separable(seed, True) for seed in range(3)]))
    changed = {f"trunk.{name}" for name in tiny.changed(trunk, module.trunk)}  # type: ignore[arg-type]
    assert changed | {"reward_head.weight"} <= module.trainable_names()
    assert all(".lora_" in name for name in changed)
    stored = load_trunk(str(plain_trunk))
    stored.adapters.load("reward", folder / "adapters" / "reward")
    head = load_head(folder / "adapters" / "reward", "reward")
    batch = tiny.rated(4, seed=5)
    last = batch.attention_mask.sum(1) - 1
    with torch.no_grad(), stored.switch.use("reward"):
        scores = head(stored(batch.ids, batch.attention_mask)[torch.arange(4), last])
    assert_close(scores, module.scores(batch), rtol=0, atol=0)
    assert not (folder / "trunk").exists()


def test_full_tuning_leaves_the_lm_head_alone(plain_trunk: Path, tmp_path: Path) -> None:
    module = RewardModel(str(plain_trunk), None)
    before = tiny.weights(module)
    trainer, folder = tiny.quiet_trainer(tmp_path)
    trainer.fit(module, tiny.Batches([tiny.rated(6, seed) for seed in range(2)]))
    changed = tiny.changed(before, module)
    assert changed == module.trainable_names()
    assert not any("lm_head" in name for name in changed)
    assert {"trunk.model.model.embed_tokens.weight", "reward_head.bias"} <= changed
    stored, head = load_trunk(str(folder / "trunk")), load_head(folder / "trunk", "reward")
    batch = tiny.rated(4, seed=5)
    last = batch.attention_mask.sum(1) - 1
    with torch.no_grad(), stored.switch.use(OFF):
        scores = head(stored(batch.ids, batch.attention_mask)[torch.arange(4), last])
    assert_close(scores, module.scores(batch))


def test_predict_names_the_rows(plain_trunk: Path) -> None:
    module, batch = RewardModel(str(plain_trunk)), tiny.rated(4, seed=2)
    predicted = module.predict_step(batch, 0)
    assert predicted["row"].tolist() == [200, 201, 202, 203]
    assert_close(predicted["score"], module.scores(batch))
