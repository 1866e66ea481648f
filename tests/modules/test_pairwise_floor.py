"""What `Supervised` gives pairwise methods, shown by DPO against transformers and PEFT alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lightning_perl.batches import RatedBatch
from lightning_perl.data.rows import collate_rated
from lightning_perl.modules import DPO, KTO
from lightning_perl.modules.pairwise import Pairwise
from tests.modules import tiny
from tests.modules.test_packed_pairs import examples


def summed(model: nn.Module, batch: RatedBatch) -> Tensor:
    logits = model(input_ids=batch.ids, attention_mask=batch.attention_mask.long()).logits
    logprobs: Tensor = logits[:, :-1].log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    return (logprobs * batch.response_mask[:, 1:]).sum(1)


def assert_gradients_of(
    model: nn.Module, ours: dict[str, Tensor], rtol: float = 0, atol: float = 1e-12
) -> None:
    """The gradients of a PEFT model are a module's, by our names of them."""
    theirs = {name: part.grad for name, part in model.named_parameters() if part.requires_grad}
    assert len(ours) == len(theirs) > 0
    for name, gradient in theirs.items():
        own = name.replace("base_model.model.", ".model.").replace(".default.", ".actor.")
        (found,) = (part for key, part in ours.items() if key.endswith(own))
        assert_close(found, gradient, rtol=rtol, atol=atol)


@pytest.mark.parametrize("share", [True, False], ids=["packed", "rows"])
def test_loss_and_gradients_in_float64(share: bool, gpt2_trunk: Path, tmp_path: Path) -> None:
    batch = collate_rated(examples(8, 1))  # pairs, and thumbs that are in no pair
    module = DPO(
        str(gpt2_trunk), beta=0.3, lora=tiny.LORA, share_prompts=share, trunk_dtype="float64"
    )
    tiny.train_adapters(module)
    module.hand_over(tmp_path)
    folder = tmp_path / "adapters/actor"
    assert json.loads((folder / "manifest.json").read_text())["rewarded_by"] == []
    assert not (tmp_path / "trunk").exists()
    bare = AutoModelForCausalLM.from_pretrained(gpt2_trunk, dtype=torch.float64).train(False)
    reference = summed(bare, batch).detach()
    policy = PeftModel.from_pretrained(bare, str(folder), is_trainable=True).train(False)
    chosen, rejected = (summed(policy, batch) - reference)[batch.pairs].unbind(1)
    expected = -(torch.sigmoid(0.3 * (chosen - rejected)).log()).mean()
    expected.backward()  # type: ignore[no-untyped-call]
    assert_close(module.objective(batch)[0], expected, rtol=0, atol=1e-12)
    gradients = tiny.gradients_of(module, batch)
    assert_gradients_of(policy, gradients)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-3


@pytest.mark.parametrize("kind", [DPO, KTO])
def test_a_kept_reference_is_asked_once_a_row(kind: type[Pairwise], gpt2_trunk: Path) -> None:
    rows = examples(8, 1)
    first, again = collate_rated(rows[:4]), collate_rated(rows[2:])
    plain, keeping = (
        kind(str(gpt2_trunk), lora=tiny.LORA, trunk_dtype="float64", keep_reference=keep)
        for keep in (False, True)
    )
    for module in (plain, keeping):
        tiny.train_adapters(module)
    fits = collate_rated(rows[4:6])
    for batch, reads in ((first, True), (again, True), (fits, False), (first, False)):
        before = keeping.trunk.passes
        assert_close(keeping.objective(batch)[0], plain.objective(batch)[0], rtol=0, atol=1e-12)
        anchor = 2 * (kind is KTO)  # rows of other texts every time
        assert keeping.trunk.passes - before == 1 + reads + anchor
    saved: dict[str, Any] = {"state_dict": keeping.state_dict()}
    keeping.on_save_checkpoint(saved)
    later = kind(str(gpt2_trunk), lora=tiny.LORA, trunk_dtype="float64", keep_reference=True)
    later.on_load_checkpoint(saved)
    assert torch.equal(later.kept_reference(again), keeping.kept_reference(again))
    assert later.trunk.passes == 0


def test_steps_without_pairs_move_nothing_and_are_counted(gpt2_trunk: Path, tmp_path: Path) -> None:
    paired, thumbs, weights = tiny.rated(4, pairs=2), tiny.rated(4, 1), []
    for batches in ([paired], [paired, thumbs], [thumbs]):
        module = DPO(str(gpt2_trunk), lora=tiny.LORA)
        trainer, _ = tiny.quiet_trainer(tmp_path)
        if batches[0] is thumbs:
            with pytest.raises(
                ValueError,
                match=r"no row to learn a preference from .* Give rows with `chosen`",
            ):
                trainer.fit(module, tiny.Batches(batches))
            continue
        trainer.fit(module, tiny.Batches(batches))
        assert trainer.logged_metrics["train/unrated_steps"] == len(batches) - 1
        weights.append(tiny.weights(module))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    rewards = [trainer.logged_metrics[f"train/{name}_rewards"] for name in ("chosen", "rejected")]
    assert rewards == [0, 0]
