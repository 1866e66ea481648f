"""Hydra-SFT is SFT and the reward model at once: take one away and the other is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lightning_perl.functional.sequences import at_last_response
from lightning_perl.models.adapters import OFF, LoraSpec
from lightning_perl.models.heads import load_head
from lightning_perl.models.loading import load_trunk
from lightning_perl.modules import SFT, HydraSFT, RewardModel
from lightning_perl.modules.supervised import sequences_of
from tests.modules import tiny

LORAS = pytest.mark.parametrize("lora", [None, tiny.LORA], ids=["full", "lora"])


@LORAS
def test_without_its_reward_term_it_is_sft_bit_for_bit(
    lora: LoraSpec | None, plain_trunk: Path
) -> None:
    hydra = HydraSFT(str(plain_trunk), lora, reward_weight=0.0)
    sft = SFT(str(plain_trunk), lora)
    start = tiny.weights(sft)
    batches = [tiny.rated(6, seed, pairs=seed % 3) for seed in range(4)]
    assert tiny.steps_of(hydra, batches) == tiny.steps_of(sft, batches)
    assert tiny.changed(start, sft) == sft.trainable_names()
    assert tiny.changed(tiny.weights(sft), hydra) == set()


@LORAS
@pytest.mark.parametrize("pairs", [0, 2, 3], ids=["thumbs", "both", "pairs"])
def test_without_rows_to_imitate_it_is_the_reward_model(
    pairs: int, lora: LoraSpec | None, plain_trunk: Path
) -> None:
    batch = tiny.rated(6, pairs=pairs, imitate=False)
    hydra = HydraSFT(
        str(plain_trunk), lora, 1.0, margin=0.3, positive_weight=0.4, trunk_dtype="float64"
    )
    reward = RewardModel(
        str(plain_trunk), lora, margin=0.3, positive_weight=0.4, trunk_dtype="float64"
    )
    for module in (hydra, reward):
        tiny.train_adapters(module)
    loss, stats = hydra.objective(batch)
    assert stats["lm_loss"] == 0
    assert_close(loss, reward.objective(batch)[0], rtol=0, atol=0)
    ours, theirs = tiny.gradients_of(hydra, batch), tiny.gradients_of(reward, batch)
    for name, gradient in theirs.items():
        ours_too = ours[name.replace(".reward.", ".sft.")]  # the adapters' names
        assert_close(ours_too, gradient, rtol=1e-9, atol=1e-12)
        assert gradient.abs().max() > 0 or name.endswith("bias")  # cancels in a pair


def test_a_head_that_is_never_trained_cannot_be_normalized(plain_trunk: Path) -> None:
    with pytest.raises(ValueError, match="normalize_scores needs a trained reward head"):
        HydraSFT(str(plain_trunk), reward_weight=0.0, normalize_scores=True)


def test_head_has_its_own_learning_rate(plain_trunk: Path) -> None:
    for given, head in ((0.5, 0.5), (None, 1e-4)):
        module = HydraSFT(str(plain_trunk), tiny.LORA, head_learning_rate=given)
        rates = {group["name"]: group["lr"] for group in tiny.one_optimizer(module).param_groups}
        assert rates == {"trunk": 1e-4, "head": head}


@LORAS
def test_hands_over_trunk_and_head_with_equal_logits_and_scores(
    lora: LoraSpec | None, plain_trunk: Path, tmp_path: Path
) -> None:
    module = HydraSFT(
        str(plain_trunk), lora, 1.0, optimizer=lambda params: torch.optim.SGD(params, lr=0.3)
    )
    start = tiny.weights(module)
    trainer, folder = tiny.quiet_trainer(tmp_path)
    rows = [tiny.rated(6, seed, pairs=seed % 2) for seed in range(3)]
    trainer.fit(module, tiny.Batches(rows), tiny.Batches([tiny.rated(6, 9, pairs=2)]))
    assert tiny.changed(start, module) == module.trainable_names()
    batch = tiny.rated(4, seed=8)
    stored, head = load_trunk(str(folder / "trunk")), load_head(folder / "trunk", "reward")
    with torch.no_grad(), stored.switch.use(OFF):
        hidden = stored(batch.ids, batch.attention_mask)
        scores = head(at_last_response(hidden, sequences_of(batch).response_mask))
        assert_close(stored.project(hidden), module.trunk.project(module.hidden(batch)))
        assert_close(scores, module.predict_step(batch, 0)["score"])
    both = {"lm_loss", "reward_loss", "accuracy", "margin"}
    val = both | {"loss", "auroc", "balanced_accuracy"}
    logged = {f"train/{key}" for key in both} | {f"val/{key}" for key in val}
    assert logged <= trainer.callback_metrics.keys()
