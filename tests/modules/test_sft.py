"""What SFT imitates, and what it hands over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lightning_perl.models.adapters import OFF, LoraSpec
from lightning_perl.models.heads import HEADS_FILE
from lightning_perl.models.loading import load_trunk
from lightning_perl.modules import SFT
from tests.conftest import TinyTrunk
from tests.modules import tiny


def test_loss_is_the_models_own_cross_entropy_of_the_rows_to_imitate(plain_trunk: Path) -> None:
    batch = tiny.rated(6)
    loss, stats = SFT(str(plain_trunk), trunk_dtype="float64").objective(batch)
    model = AutoModelForCausalLM.from_pretrained(plain_trunk, dtype=torch.float64)
    logits = model(input_ids=batch.ids, attention_mask=batch.attention_mask.long()).logits
    labels = batch.ids.masked_fill(~(batch.response_mask & batch.imitate.unsqueeze(-1)), -100)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(loss, expected)
    assert stats["lm_tokens"].item() == (labels != -100).sum().item()


def test_validation_loss_weighs_tokens_not_batches(plain_trunk: Path, tmp_path: Path) -> None:
    module = SFT(str(plain_trunk), trunk_dtype="float64")
    batches = [tiny.rated(2, seed=1), tiny.rated(8, seed=2), tiny.rated(3, seed=3, imitate=False)]
    logged = tiny.measured(module, tmp_path, batches)
    seen = [module.objective(batch) for batch in batches[:2]]
    tokens = torch.stack([stats["lm_tokens"] for _, stats in seen])
    losses = torch.stack([loss.detach() for loss, _ in seen])
    expected = ((losses * tokens).sum() / tokens.sum()).item()
    assert logged == pytest.approx({"val/lm_loss": expected, "val/loss": expected}, rel=1e-6)


@pytest.mark.parametrize("lora", [None, tiny.LORA], ids=["full", "lora"])
def test_trunk_that_is_handed_over_gives_the_trained_models_logits(
    lora: LoraSpec | None, plain_trunk: Path, tmp_path: Path
) -> None:
    module = SFT(str(plain_trunk), lora, optimizer=lambda params: torch.optim.SGD(params, lr=0.5))
    before = tiny.weights(module)
    _, folder = tiny.fit(module, tmp_path, [tiny.rated(6, seed) for seed in range(3)])
    assert tiny.changed(before, module) == module.trainable_names()
    batch = tiny.rated(4, seed=9)
    kept = tiny.weights(module)
    module.hand_over(tmp_path / "again")
    assert tiny.changed(kept, module) == set()  # merging happens in the file only
    with torch.no_grad():
        ours = module.trunk.project(module.hidden(batch))
        for path in (folder / "trunk", tmp_path / "again" / "trunk", plain_trunk):
            stored = load_trunk(str(path))
            with stored.switch.use(OFF):
                theirs = stored.project(stored(batch.ids, batch.attention_mask))
            if path == plain_trunk:
                assert (theirs - ours).abs().max() > 0.01
            else:
                assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    manifest = json.loads((folder / "trunk" / "manifest.json").read_text())
    assert manifest["module"] == "SFT"
    assert manifest["from"] == str(plain_trunk)
    assert not (folder / "trunk" / HEADS_FILE).exists()


def test_folder_that_gives_other_logits_is_reported(
    plain_trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SFT(str(plain_trunk), tiny.LORA)
    tiny.train_adapters(module)
    adapters = type(module.trunk.adapters)
    forgetful = adapters.merged
    monkeypatch.setattr(adapters, "merged", lambda self, name: forgetful(self, None))
    with pytest.raises(RuntimeError, match=r"was written but gives logits that differ by"):
        module.hand_over(tmp_path)


def test_the_handover_compares_ordinary_tokens(tiny_trunk: TinyTrunk) -> None:
    trunk = SFT(str(tiny_trunk()), tiny.LORA).trunk
    (ids,) = trunk.probe().tolist()
    assert len({*ids}) == 16
    # Not the first ids alone, which may be special tokens that nobody trained.
    assert sum(token >= 16 for token in ids) >= 12
    assert max(ids) < trunk.vocabulary_size


def test_adapter_dropout_acts_in_training_only(plain_trunk: Path) -> None:
    module = SFT(str(plain_trunk), LoraSpec(2, 4.0, dropout=0.5))
    tiny.train_adapters(module)
    batch = tiny.rated(6)
    assert module.objective(batch)[0] == module.objective(batch)[0]
    with module.trunk.training_pass():
        assert module.objective(batch)[0] != module.objective(batch)[0]
