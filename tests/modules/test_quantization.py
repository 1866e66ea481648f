"""Modules on trunks in 4 and 8 bits, and 8-bit optimizers, from the first step to what is handed over."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.testing import assert_close

from lightning_perl.cli import main
from lightning_perl.models.adapters import OFF, LoraSpec
from lightning_perl.models.heads import load_head
from lightning_perl.models.loading import load_trunk
from lightning_perl.models.quantization import NEEDS, Quantization
from lightning_perl.models.trunk import Trunk
from lightning_perl.modules import (
    PPO,
    SFT,
    HydraPPO,
    HydraSFT,
    JointHydraPPO,
    Reinforce,
    RewardModel,
)
from lightning_perl.modules.base import AdapterModule
from lightning_perl.modules.on_policy import OnPolicy
from tests.conftest import TinyTrunk
from tests.data.orders import prompt_data
from tests.modules import tiny

if any(find_spec(name) is None for name in NEEDS):
    pytest.skip("needs bitsandbytes and accelerate", allow_module_level=True)

import bitsandbytes

both = pytest.mark.parametrize("kind", ["nf4", "int8"])
ROLLOUTS: dict[str, Any] = {"lora": tiny.LORA, "sampling": tiny.SAMPLING, "micro_batch_size": 3}
WIDE = LoraSpec(rank=256, alpha=16.0)
"""Weights of 4096 numbers and more, where bitsandbytes begins to keep moments in 8 bits."""


def rate_8bit(params: Any) -> Optimizer:  # noqa: ANN401 (as LightningCLI has it)
    # bitsandbytes has no types of its own.
    made: Callable[..., Optimizer] = vars(bitsandbytes.optim)["AdamW8bit"]
    return made(params, lr=1e-2, weight_decay=0.0)


def logits_of(trunk: Trunk, adapter: str) -> Tensor:
    batch = tiny.rated(3)
    with torch.no_grad(), trunk.switch.use(adapter):
        return trunk.project(trunk(batch.ids, batch.attention_mask))[batch.attention_mask]


@pytest.mark.parametrize(
    ("maker", "dtype", "kind"),
    [(SFT, "float32", "nf4"), (HydraSFT, "float32", "int8"), (HydraSFT, "bfloat16", "nf4")],
)
def test_supervised_training_hands_over_a_plain_trunk(
    maker: Callable[..., SFT | HydraSFT],
    dtype: str,
    kind: Quantization,
    plain_trunk: Path,
    tmp_path: Path,
) -> None:
    module = maker(str(plain_trunk), tiny.LORA, quantization=kind, trunk_dtype=dtype)
    assert module.hparams["quantization"] == kind
    before = tiny.weights(module)
    _, run = tiny.fit(module, tmp_path, tiny.batches_for(module))
    assert tiny.changed(before, module) == module.trainable_names()
    assert module.trainable_names() <= {
        name for name in before if re.search(r"lora_|head\.[wb]", name)
    }
    # The file holds full precision: loaded so, it says what the module said, up to its own dtype.
    again = load_trunk(str(run / "trunk"))
    assert again.quantization is None
    tolerance = 1e-4 if dtype == "float32" else 0.1
    ours, stored = logits_of(module.trunk, module.adapter).float(), logits_of(again, OFF)
    assert_close(ours, stored, atol=tolerance, rtol=tolerance)
    assert float((stored - logits_of(load_trunk(str(plain_trunk)), OFF)).abs().max()) > 0.01


@both
def test_a_reward_adapter_and_its_ppo_stand_on_the_same_quantized_trunk(
    kind: Quantization, plain_trunk: Path, tmp_path: Path
) -> None:
    reward = RewardModel(str(plain_trunk), tiny.LORA, quantization=kind)
    _, run = tiny.fit(reward, tmp_path / "reward", tiny.batches_for(reward))
    folder = run / "adapters" / "reward"
    ppo = PPO(str(plain_trunk), "perl", reward=str(folder), quantization=kind, **ROLLOUTS)
    batch = tiny.rated(3)
    with torch.no_grad():
        expected = reward.scores(batch)
        with ppo.roles("reward") as trunk:
            hidden = trunk(batch.ids, batch.attention_mask)
        last = batch.attention_mask.sum(1) - 1
        found = load_head(folder, "reward")(hidden[torch.arange(3), last])
    assert_close(found, expected, atol=1e-6, rtol=1e-5)
    # The first ratio of each rollout is checked on the way.
    before = tiny.weights(ppo)
    tiny.fit(ppo, tmp_path / "ppo", tiny.batches_for(ppo))
    assert tiny.changed(before, ppo) == ppo.trainable_names()


@pytest.mark.parametrize(
    ("maker", "checkpointing", "kind"),
    [
        (HydraPPO, False, "nf4"),
        (HydraPPO, True, "int8"),
        (JointHydraPPO, True, "nf4"),
        (Reinforce, False, "int8"),
    ],
)
def test_rl_trains_the_adapters_and_its_checkpoint_holds_nothing_else(
    maker: Callable[..., OnPolicy],
    checkpointing: bool,
    kind: Quantization,
    hydra_trunk: Path,
    tmp_path: Path,
) -> None:
    module = maker(str(hydra_trunk), quantization=kind, checkpointing=checkpointing, **ROLLOUTS)
    before = tiny.weights(module)
    _, run = tiny.fit(module, tmp_path, tiny.batches_for(module), ModelCheckpoint(save_last=True))
    assert tiny.changed(before, module) == module.trainable_names()
    stored = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["state_dict"].keys() == module.trainable_names()
    assert {value.dtype for value in stored["state_dict"].values()} == {torch.float32}


def test_a_trunk_that_is_tuned_whole_cannot_be_quantized(hydra_trunk: Path) -> None:
    message = "tuned whole cannot be quantized: .*Give `lora`"
    for maker in (SFT, HydraSFT, RewardModel):
        with pytest.raises(ValueError, match=message):
            maker(str(hydra_trunk), lora=None, quantization="nf4")
    for layout_maker in (PPO, Reinforce):
        with pytest.raises(ValueError, match=message):
            layout_maker(str(hydra_trunk), "full", quantization="nf4", **ROLLOUTS)


# ---- 8-bit optimizers --------------------------------------------------------------------------

EIGHT_BIT: dict[str, Callable[[str], AdapterModule]] = {
    "SFT": lambda trunk: SFT(trunk, WIDE, quantization="nf4", optimizer=rate_8bit),
    "HydraPPO": lambda trunk: HydraPPO(
        trunk, quantization="nf4", optimizer=rate_8bit, **{**ROLLOUTS, "lora": WIDE}
    ),
}


@pytest.mark.parametrize("kind", EIGHT_BIT)
def test_moments_in_8_bits_resume_bit_for_bit(kind: str, hydra_trunk: Path, tmp_path: Path) -> None:
    whole = EIGHT_BIT[kind](str(hydra_trunk))
    keep = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")
    straight, run = tiny.fit(whole, tmp_path, tiny.batches_for(whole, 4), keep)
    paths = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda path: int(path.stem[5:]))
    module = EIGHT_BIT[kind](str(hydra_trunk))
    resumed, _ = tiny.quiet_trainer(tmp_path)
    batches = tiny.Batches(tiny.batches_for(module, 4))
    resumed.fit(module, batches, ckpt_path=paths[1], weights_only=True)
    assert resumed.global_step == straight.global_step > 2
    assert tiny.changed(tiny.weights(whole), module) == set()
    tiny.assert_equal_moments(resumed, straight)


def test_both_are_chosen_in_yaml(
    tiny_trunk: TinyTrunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trunk = tiny_trunk("llama", max_position_embeddings=512)
    model = {
        "class_path": "HydraPPO",
        "init_args": {
            "trunk": str(trunk),
            "quantization": "nf4",
            "lora": {"rank": 128},
            "sampling": {"max_new_tokens": 3},
            "optimizer": {
                "class_path": "bitsandbytes.optim.AdamW8bit",
                "init_args": {"lr": 1e-4, "weight_decay": 0.0},
            },
        },
    }
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "tiny"}}
    trainer = {"accelerator": "cpu", "max_epochs": 1, "logger": logger}
    config = {"model": model, "data": prompt_data(train=4), "trainer": trainer}
    Path("q.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "q.yaml", "--trainer.enable_progress_bar=false"])
    run = Path("runs/tiny/version_0")
    saved = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
    assert saved["quantization"] == "nf4"
    assert saved["optimizer"]["class_path"] == "bitsandbytes.optim.AdamW8bit"
    (path,) = run.glob("checkpoints/*.ckpt")
    (state,) = torch.load(path, weights_only=True)["optimizer_states"]
    assert "dtype=torch.uint8" in str(state["state"])
    assert isinstance(load_trunk(str(trunk), quantization="nf4").lm_head, nn.Linear)
