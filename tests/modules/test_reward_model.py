"""The reward model: where it reads, what it learns, what it writes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_perl.batches import RatedBatch
from lightning_perl.functional.sequences import pad_right
from lightning_perl.losses.bradley_terry import bradley_terry, centering
from lightning_perl.losses.thumbs import thumbs
from lightning_perl.models.adapters import OFF, LoraSpec
from lightning_perl.models.heads import load_head
from lightning_perl.models.loading import load_trunk
from lightning_perl.modules import SFT, HydraSFT, RewardModel
from lightning_perl.modules.reward_model import Scoring
from tests.modules import tiny


def separable(seed: int, pairs: bool) -> RatedBatch:
    """Sixteen rows; good ones end in ``w5``, bad ones in ``w6``."""
    batch = tiny.rated(16, seed, pairs=8 if pairs else 0)
    ids = batch.ids.clone()
    last = batch.attention_mask.sum(1) - 1
    ids[torch.arange(16), last] = torch.where(batch.label > 0.5, 5, 6)
    return batch._replace(ids=ids)


LORAS = pytest.mark.parametrize("lora", [None, tiny.LORA], ids=["full", "lora"])


def quick(params: Any) -> torch.optim.Optimizer:  # noqa: ANN401 (as LightningCLI has it)
    return torch.optim.AdamW(params, lr=0.01)


@LORAS
@pytest.mark.parametrize("pairs", [False, True], ids=["thumbs", "pairs"])
def test_learns_a_separable_problem(
    pairs: bool, lora: LoraSpec | None, plain_trunk: Path, tmp_path: Path
) -> None:
    module = RewardModel(str(plain_trunk), lora, optimizer=quick)
    trainer, _ = tiny.fit(module, tmp_path, [separable(seed, pairs) for seed in range(30)])
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
        assert_close(scores[row], module.heads()["reward"](hidden[0, -1]))
    # A response that ends before its row does (the user goes on) is read where it ends.
    mask = batch.response_mask.clone()
    mask[:, 3:] = False
    cut = module.scores(batch._replace(response_mask=mask))
    short = pad_right([row[:3] for row in batch.ids.tolist()], 0)
    alone = batch._replace(
        ids=short[0], attention_mask=short[1], response_mask=mask[:, :3] & short[1]
    )
    assert_close(cut, module.scores(alone))


@LORAS
def test_what_is_handed_over_scores_as_the_module_does(
    lora: LoraSpec | None, plain_trunk: Path, tmp_path: Path
) -> None:
    module = RewardModel(str(plain_trunk), lora, head_learning_rate=0.1)
    before = tiny.weights(module)
    batches = [tiny.rated(6, seed, pairs=2 * seed) for seed in range(2)]
    _, folder = tiny.fit(module, tmp_path, batches)
    changed = tiny.changed(before, module)
    assert changed == module.trainable_names()
    assert not any("lm_head" in name for name in changed)
    assert {"reward_head.weight", "reward_head.bias"} <= changed
    if lora is None:
        assert "trunk.model.model.embed_tokens.weight" in changed
        stored, written = load_trunk(str(folder / "trunk")), folder / "trunk"
    else:
        assert all(".lora_" in name for name in changed if name.startswith("trunk."))
        assert not (folder / "trunk").exists()
        stored, written = load_trunk(str(plain_trunk)), folder / "adapters" / "reward"
        stored.adapters.load("reward", written)
    batch = tiny.rated(4, seed=5)
    last = batch.attention_mask.sum(1) - 1
    with torch.no_grad(), stored.switch.use(OFF if lora is None else "reward"):
        hidden = stored(batch.ids, batch.attention_mask)[torch.arange(4), last]
        scores = load_head(written, "reward")(hidden)
    tolerance = 0 if lora else 1e-5
    assert_close(scores, module.scores(batch), rtol=tolerance, atol=tolerance)


def loader(batches: Sequence[RatedBatch]) -> DataLoader[RatedBatch]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class Rows(LightningDataModule):
    """Ready batches, and a report of thumbs as the project's own datamodules give it."""

    def __init__(
        self,
        train: Sequence[RatedBatch],
        val: Sequence[RatedBatch] = (),
        up: int = 0,
        down: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.report = SimpleNamespace(splits={"train": SimpleNamespace(up=up, down=down)})

    def train_dataloader(self) -> tiny.Batches:
        return tiny.Batches(self.train)

    def val_dataloader(self) -> DataLoader[RatedBatch]:
        return loader(self.val)


@pytest.mark.parametrize(
    ("kind", "weights", "lm_weight", "reward_weight"),
    [
        (RewardModel, {"lora": None, "lm_weight": 0.7}, 0.7, 1.0),
        (HydraSFT, {"reward_weight": 0.25}, 1.0, 0.25),
    ],
)
def test_loss_is_a_weighted_sum_of_xent_and_the_mean_reward_loss(
    kind: type[Scoring],
    weights: dict[str, Any],
    lm_weight: float,
    reward_weight: float,
    plain_trunk: Path,
) -> None:
    batch = tiny.rated(7, pairs=2)
    weights |= {"margin": 0.1, "positive_weight": 3.0, "center_coef": 0.2}
    module = kind(str(plain_trunk), trunk_dtype="float64", **weights)
    loss, stats = module.objective(batch)
    lm_loss = SFT(str(plain_trunk), trunk_dtype="float64").objective(batch)[0]
    scores = module.scores(batch)
    chosen, rejected = scores[[0, 2]], scores[[1, 3]]
    pair_loss = bradley_terry(chosen, rejected, 0.1)[0] + 0.2 * centering(chosen, rejected)
    thumb_loss = thumbs(scores[4:], batch.label[4:], torch.ones(3, dtype=torch.bool), 3.0)[0]
    assert min(lm_loss, pair_loss, thumb_loss) > 0
    # Two pairs and three thumbs, each with the same weight.
    reward_loss = (2 * pair_loss + 3 * thumb_loss) / 5
    assert_close(loss, lm_weight * lm_loss + reward_weight * reward_loss)
    assert_close(stats["reward_loss"], reward_loss.detach())
    assert_close(stats["lm_loss"], lm_loss.detach())


def test_without_an_lm_term_nothing_is_projected(
    plain_trunk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, batch = RewardModel(str(plain_trunk)), tiny.rated(4)

    def refuse(*_: object) -> None:
        raise AssertionError("logits were computed")

    monkeypatch.setattr(module.trunk, "project", refuse)
    assert "lm_loss" not in module.objective(batch)[1]


def test_lm_term_trains_the_lm_head(plain_trunk: Path, tmp_path: Path) -> None:
    module = RewardModel(str(plain_trunk), None, lm_weight=1.0)
    before = tiny.weights(module)
    trainer, folder = tiny.quiet_trainer(tmp_path)
    held_out = loader([tiny.rated(6, 9)])
    trainer.fit(module, tiny.Batches([tiny.rated(6, seed) for seed in range(2)]), held_out)
    changed = tiny.changed(before, module)
    assert changed == module.trainable_names()
    assert "trunk.model.lm_head.weight" in changed
    (logged,) = trainer.validate(module, held_out, verbose=False)
    assert logged["val/loss"] == pytest.approx(logged["val/reward_loss"] + logged["val/lm_loss"])
    stored = load_trunk(str(folder / "trunk"))  # compared with the module's logits on writing
    assert_close(stored.lm_head.weight, module.trunk.lm_head.weight.detach())


def test_lm_term_with_an_adapter_leaves_the_trunk_alone(plain_trunk: Path) -> None:
    module = RewardModel(str(plain_trunk), tiny.LORA, lm_weight=1.0)
    names = module.trainable_names()
    assert all(".lora_" in name or name.startswith("reward_head.") for name in names)
    gradients = tiny.gradients_of(module, tiny.rated(6)._replace(labelled=torch.zeros(6).bool()))
    assert any(gradient.any() for name, gradient in gradients.items() if ".lora_B" in name)


def test_balanced_weight_is_the_datas(plain_trunk: Path, tmp_path: Path) -> None:
    module = RewardModel(str(plain_trunk), tiny.LORA, positive_weight=None)
    with pytest.raises(RuntimeError, match=r"positive_weight is None .* call `module.balance"):
        module.objective(tiny.rated(4))
    trainer, _ = tiny.quiet_trainer(tmp_path)
    data = Rows([tiny.rated(6)], [tiny.rated(6, 1)], up=8, down=2)
    trainer.fit(module, datamodule=data)
    assert module.positive_weight == 0.25
    module.balance(up=1, down=3)
    assert module.positive_weight == 3


def test_balanced_weight_without_counts_is_refused(plain_trunk: Path, tmp_path: Path) -> None:
    module = RewardModel(str(plain_trunk), tiny.LORA, positive_weight=None)
    trainer, _ = tiny.quiet_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"counted 5 up and 0 down .* Give the number"):
        trainer.fit(module, datamodule=Rows([tiny.rated(6)], up=5))
    trainer, _ = tiny.quiet_trainer(tmp_path)  # the other keeps its datamodule
    with pytest.raises(ValueError, match=r"counted 0 up and 0 down .* Give the number"):
        trainer.fit(module, tiny.Batches([tiny.rated(6)]))
    module.balance(up=1, down=1)
    trainer.fit(module, tiny.Batches([tiny.rated(6)]))


@pytest.mark.parametrize(
    ("make", "lora", "split"),
    [
        (RewardModel, None, "val"),
        (RewardModel, tiny.LORA, "train"),
        (RewardModel, tiny.LORA, "val loader"),
        (HydraSFT, None, "train"),
        (HydraSFT, tiny.LORA, "val"),
    ],
)
def test_demonstrations_score_zero_on_average_with_deviation_one(
    make: type[Scoring], lora: LoraSpec | None, split: str, plain_trunk: Path, tmp_path: Path
) -> None:
    train = [separable(seed, True) for seed in range(4)]
    val = [tiny.rated(5, 50), tiny.rated(8, 51, pairs=2)]
    plain, module = (
        make(str(plain_trunk), lora=lora, normalize_scores=normalize, optimizer=quick)
        for normalize in (False, True)
    )
    for model in (plain, module):
        trainer, folder = tiny.quiet_trainer(tmp_path)
        if split == "val loader":
            trainer.fit(model, tiny.Batches(train), loader(val))
        else:
            trainer.fit(model, datamodule=Rows(train, val if split == "val" else ()))
    handed_over = folder / ("adapters/reward" if lora and make is RewardModel else "trunk")
    shown = train if split == "train" else val
    with torch.no_grad():
        scores = torch.cat([module.scores(batch)[batch.imitate] for batch in shown])
        before = torch.cat([plain.scores(batch)[batch.imitate] for batch in shown])
    assert_close(scores.mean(), torch.tensor(0.0), rtol=0, atol=1e-5)
    assert_close(scores.std(correction=0), torch.tensor(1.0), rtol=1e-4, atol=0)
    # Only the head differs from a run without it, and only by shift and scale.
    head, was = load_head(handed_over, "reward"), plain.heads()["reward"]
    mean, deviation = before.mean(), before.std(correction=0)
    assert_close(head.weight, was.weight / deviation)
    assert_close(head.bias, (was.bias - mean) / deviation, rtol=1e-4, atol=1e-6)
    differing = tiny.changed(tiny.weights(plain), module)
    assert differing == {"reward_head.weight", "reward_head.bias"}
    manifest = json.loads((handed_over / "manifest.json").read_text())["normalized_from"]
    assert manifest == pytest.approx({"mean": float(mean), "sd": float(deviation)}, rel=1e-4)
    # No order changes.
    probe = tiny.rated(16, 77)
    with torch.no_grad():
        assert torch.equal(module.scores(probe).argsort(), plain.scores(probe).argsort())


def test_nothing_to_normalize_by_is_refused_before_training(
    plain_trunk: Path, tmp_path: Path
) -> None:
    module = RewardModel(str(plain_trunk), tiny.LORA, normalize_scores=True)
    before = tiny.weights(module)
    judged = [tiny.rated(6, seed, imitate=False) for seed in range(2)]
    trainer, _ = tiny.quiet_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"normalize_scores: neither the validation rows nor"):
        trainer.fit(module, datamodule=Rows(judged, judged))
    trainer, _ = tiny.quiet_trainer(tmp_path)
    # Without a datamodule the training loader, which remembers its place, is not read.
    with pytest.raises(ValueError, match=r"normalize_scores: neither"):
        trainer.fit(module, tiny.Batches([tiny.rated(6)]))
    assert tiny.changed(before, module) == set()
    with pytest.raises(ValueError, match=r"scores of 1 demonstrations have standard deviation 0"):
        module.normalize([tiny.rated(2)])
    with pytest.raises(ValueError, match=r"scores of 0 demonstrations"):
        module.normalize([])


def test_a_test_of_a_random_head_says_so(plain_trunk: Path, tmp_path: Path) -> None:
    batches = tiny.Batches([tiny.rated(6, pairs=2)])
    module = RewardModel(str(plain_trunk), tiny.LORA)
    with pytest.warns(UserWarning, match="random reward head.*Give --ckpt_path"):
        tiny.quiet_trainer(tmp_path).trainer.test(module, batches, verbose=False)
    trainer = tiny.quiet_trainer(tmp_path).trainer
    trainer.fit(module, batches)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*random reward head")
        trainer.test(module, batches, verbose=False)
