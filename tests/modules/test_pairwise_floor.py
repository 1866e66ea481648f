"""What `Supervised` owes methods that learn from pairs: a DPO of a few lines stands on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lightning_perl.batches import RatedBatch
from lightning_perl.functional.packing import plan
from lightning_perl.models.adapters import OFF, LoraSpec
from lightning_perl.modules.base import Stats
from lightning_perl.modules.supervised import Supervised
from tests.modules import tiny

BETA = 0.3


class TinyDPO(Supervised):
    """``-log sigmoid(beta (log-ratio of chosen - log-ratio of rejected))``; the reference is the trunk alone."""

    adapter_name: ClassVar[str] = "actor"
    keeps_adapter: ClassVar[bool] = True

    def __init__(self, trunk: str, lora: LoraSpec = LoraSpec(), **settings: Any) -> None:
        super().__init__(trunk, lora=lora, **settings)
        self.needs_ratings = True

    def objective(self, batch: RatedBatch) -> tuple[Tensor, Stats]:
        with torch.no_grad():
            reference = self.response_logprobs(batch, OFF)
        ratios = self.response_logprobs(batch) - reference
        margins = BETA * (ratios[batch.pairs[:, 0]] - ratios[batch.pairs[:, 1]])
        return -F.logsigmoid(margins).mean(), {"margin": margins.detach().mean()}


def by_hand(module: TinyDPO, batch: RatedBatch) -> Tensor:
    """The loss row by row, from whole softmaxes."""

    def logprob(row: int, adapter: str) -> Tensor:
        ids = batch.ids[row : row + 1, : int(batch.attention_mask[row].sum())]
        with module.trunk.switch.use(adapter):
            logits = module.trunk.project(module.trunk(ids, torch.ones_like(ids).bool()))[0]
        chosen = logits.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
        return chosen[batch.response_mask[row, 1 : ids.shape[1]]].sum()

    losses = []
    for pair in batch.pairs.tolist():
        won, lost = (logprob(row, "actor") - logprob(row, OFF) for row in pair)
        losses.append(-torch.log(torch.sigmoid(BETA * (won - lost))))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("share", [True, False])
def test_the_loss_is_the_one_by_hand(share: bool, tmp_path: Path) -> None:
    # GPT-2 computes in float64 throughout.
    trunk = tiny.save_trunk(tmp_path / "trunk", "gpt2")
    module = TinyDPO(str(trunk), tiny.LORA, trunk_dtype="float64", share_prompts=share)
    tiny.train_adapters(module)
    batch = tiny.rated(6, pairs=3)
    rows = [row[kept].tolist() for row, kept in zip(batch.ids, batch.attention_mask, strict=True)]
    batch = batch._replace(packing=plan([rows[start : start + 2] for start in (0, 2, 4)]))
    gradients = tiny.gradients_of(module, batch)
    loss, expected = module.objective(batch)[0], by_hand(module, batch)
    assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    expected.backward()  # type: ignore[no-untyped-call]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-12)


def test_it_hands_over_its_adapter(plain_trunk: Path, tmp_path: Path) -> None:
    module = TinyDPO(str(plain_trunk), tiny.LORA)
    trainer, folder = tiny.quiet_trainer(tmp_path)
    trainer.fit(module, tiny.Batches([tiny.rated(6, seed, pairs=3) for seed in range(3)]))
    assert {path.name for path in folder.iterdir()} >= {"adapters"}
    assert not (folder / "trunk").exists()
    bare = AutoModelForCausalLM.from_pretrained(plain_trunk)
    loaded = PeftModel.from_pretrained(bare, str(folder / "adapters" / "actor")).eval()
    ids = torch.arange(3, 15).unsqueeze(0)
    with torch.no_grad(), module.trunk.switch.use("actor"):
        ours = module.trunk.project(module.trunk(ids, torch.ones_like(ids).bool()))
        assert_close(loaded(input_ids=ids).logits, ours, rtol=1e-5, atol=1e-5)


def test_rows_without_a_pair_are_refused_after_an_epoch(plain_trunk: Path, tmp_path: Path) -> None:
    rows = tiny.rated(4)
    demonstrations = rows._replace(labelled=torch.zeros(4, dtype=torch.bool))
    trainer, _ = tiny.quiet_trainer(tmp_path)
    with pytest.raises(ValueError, match="TinyDPO saw no thumb and no pair in a whole epoch"):
        trainer.fit(TinyDPO(str(plain_trunk), tiny.LORA), tiny.Batches([demonstrations]))
