"""What all modules share: refusals, lean checkpoints, and the folder they hand over."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoTokenizer

from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.roles import Layout
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
from lightning_perl.modules.base import AdapterModule, default_optimizer
from lightning_perl.modules.evaluation import given
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.modules.safety import clip_by_group
from lightning_perl.packaged import unpackaged
from lightning_perl.phases import PhaseCallback
from lightning_perl.rollouts.sampling import SamplingSpec
from tests.conftest import TinyTrunk
from tests.modules import tiny

Make = Callable[[str], AdapterModule]
LAYOUTS = ("full", "lora", "dynamic_lora", "perl", "hydra", "joint_hydra")
MAKERS: dict[str, Make] = {
    "SFT": lambda trunk: SFT(trunk, tiny.LORA),
    "SFT full": SFT,
    "HydraSFT": lambda trunk: HydraSFT(trunk, tiny.LORA),
    "HydraSFT full": HydraSFT,
    "RewardModel": lambda trunk: RewardModel(trunk, tiny.LORA),
    "RewardModel full": lambda trunk: RewardModel(trunk, None),
    **{
        f"PPO {layout}": lambda trunk, layout=layout: PPO(  # type: ignore[misc]
            trunk, layout, lora=tiny.LORA, sampling=tiny.SAMPLING, ppo_epochs=2
        )
        for layout in LAYOUTS
    },
}
EVERY = pytest.mark.parametrize("kind", MAKERS)


def fitted(module: AdapterModule, root: Path) -> Path:
    """The checkpoint of two steps."""
    _, folder = tiny.fit(module, root, tiny.batches_for(module))
    (checkpoint,) = (folder / "checkpoints").glob("*.ckpt")
    return checkpoint


@EVERY
def test_checkpoint_holds_exactly_what_is_trained_and_loads_from_python(
    kind: str, hydra_trunk: Path, tmp_path: Path
) -> None:
    module = MAKERS[kind](str(hydra_trunk))
    path = fitted(module, tmp_path)
    stored = torch.load(path, weights_only=True)
    state = module.state_dict()
    trained = {name: one for name, one in module.named_parameters() if one.requires_grad}
    assert stored["state_dict"].keys() == trained.keys()
    for name, value in stored["state_dict"].items():
        assert torch.equal(value, state[name])
    in_optimizer = [one for group in module.parameter_groups() for one in group["params"]]
    assert {id(one) for one in in_optimizer} == {id(one) for one in trained.values()}
    # Weights and Adam's two moments in fp32; the rest is names, progress and torch's generator.
    moments = len(stored["optimizer_states"][0]["state"])
    assert moments == len(in_optimizer)
    trainable = sum(one.numel() for one in trained.values())
    slack = 30_000 + 1_200 * moments + 4 * sum(map(len, trained))
    assert 12 * trainable < path.stat().st_size < 12 * trainable + slack
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found keys")
        again = type(module).load_from_checkpoint(path, weights_only=True)
    assert tiny.changed(tiny.weights(module), again) == set()


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("PPO hydra", "PPO joint_hydra"),
        ("PPO hydra", "PPO full"),
        ("PPO lora", "PPO hydra"),
        ("SFT", "SFT full"),
        ("HydraSFT", "SFT"),
        ("RewardModel", "PPO perl"),
    ],
)
def test_checkpoint_of_another_layout_is_refused(
    kind: str, other: str, hydra_trunk: Path, tmp_path: Path
) -> None:
    path = fitted(MAKERS[kind](str(hydra_trunk)), tmp_path)
    module = MAKERS[other](str(hydra_trunk))
    before = tiny.weights(module)
    trainer, _ = tiny.quiet_trainer(tmp_path, max_epochs=2)
    words = (
        rf"The checkpoint does not fit {type(module).__name__}: missing \[.*\], unknown \[.*\] "
        r"\(\d+ and \d+ in all\)\. It belongs to another layout, LoRA shape or trunk\."
    )
    with pytest.raises(ValueError, match=words):
        trainer.fit(
            module, tiny.Batches(tiny.batches_for(module)), ckpt_path=path, weights_only=True
        )
    assert tiny.changed(before, module) == set()


@pytest.mark.parametrize("kind", [SFT, RewardModel, HydraSFT])
@pytest.mark.parametrize(
    ("seed", "changed", "words"),
    [
        (1, {}, r"others: trunk is \w{16}, there \w{16}\. Give the trunk"),
        (
            0,
            {"rslora": True},
            r"is rank 2, alpha 16 \(rsLoRA\), all linear layers, there rank 2, alpha 16, ",
        ),
        (
            0,
            {"alpha": 64.0},
            r"LoRA '\w+' is rank 2, alpha 64, all linear layers, there rank 2, alpha 16, ",
        ),
    ],
)
def test_checkpoint_of_other_weights_or_another_scale_is_refused(
    tiny_trunk: TinyTrunk,
    tmp_path: Path,
    kind: type[SFT | RewardModel],
    seed: int,
    changed: dict[str, Any],
    words: str,
) -> None:
    path = fitted(kind(str(tiny_trunk()), lora=LoraSpec(rank=2)), tmp_path)
    arguments: dict[str, Any] = {
        "trunk": str(tiny_trunk(seed=seed)),
        "lora": LoraSpec(rank=2, **changed),
    }
    with pytest.raises(ValueError, match=words):
        kind.load_from_checkpoint(path, weights_only=True, **arguments)


def test_every_argument_comes_back_from_a_checkpoint(hydra_trunk: Path, tmp_path: Path) -> None:
    lora = LoraSpec(rank=3, alpha=6.0, targets=("q_proj", "v_proj"))
    sampling = SamplingSpec(max_new_tokens=5, temperature=0.8)
    module = HydraPPO(
        str(hydra_trunk),
        lora=lora,
        sampling=sampling,
        validation_sampling=SamplingSpec(max_new_tokens=3, temperature=0.0),
        ppo_epochs=2,
        kl_coef=0.07,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1),
        seed=5,
    )
    path = fitted(module, tmp_path)
    again = HydraPPO.load_from_checkpoint(path, weights_only=True)
    assert again.sampling == sampling
    assert again.roles.trunk("policy").adapters.specs["actor"] == lora
    assert (again.kl_coef, again.epochs, again.seed) == (0.07, 2, 5)
    assert (again.rollout_index, again.episodes, again.tokens) == (2, 8, module.tokens)
    assert_close(
        tuple(again.collect(tiny.prompts(4), 7)),
        tuple(module.collect(tiny.prompts(4), 7)),
        rtol=0,
        atol=0,
    )
    elsewhere = HydraPPO.load_from_checkpoint(path, weights_only=True, seed=6)
    assert elsewhere.seed == 6


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-mixed", "64-true"])
@pytest.mark.parametrize("kind", ["HydraSFT", "RewardModel", "PPO hydra"])
@pytest.mark.filterwarnings("ignore:You passed `Trainer.accelerator")
def test_other_precisions_are_refused(
    kind: str, precision: str, hydra_trunk: Path, tmp_path: Path
) -> None:
    module = MAKERS[kind](str(hydra_trunk))
    before, batches = tiny.weights(module), tiny.Batches(tiny.batches_for(module, 1))
    trainer, folder = tiny.quiet_trainer(tmp_path, precision=precision)
    # On a CPU Lightning itself makes bf16-mixed of 16-mixed.
    found = "bf16-mixed" if precision == "16-mixed" else precision
    words = (
        f"trainer.precision must stay 32-true, got '{found}': Lightning would cast or autocast.*"
    )
    with pytest.raises(MisconfigurationException, match=words + "trunk_dtype: bfloat16"):
        trainer.fit(module, batches)
    with pytest.raises(MisconfigurationException, match=words):
        tiny.quiet_trainer(tmp_path, precision=precision).trainer.validate(module, batches)
    assert trainer.global_step == 0
    assert not list(folder.rglob("*.safetensors"))
    with pytest.raises(MisconfigurationException, match=r"trainer\.overfit_batches would exchange"):
        tiny.quiet_trainer(tmp_path, overfit_batches=1).trainer.fit(module, batches)
    for name, value in module.state_dict().items():
        assert_close(value, before[name], check_dtype=False)


@EVERY
def test_missing_trunk_is_named(kind: str, tmp_path: Path) -> None:
    missing = tmp_path / "nothing" / "trunk"
    with pytest.raises(FileNotFoundError, match=f"trunk: {missing} is no model folder"):
        MAKERS[kind](str(missing))


@pytest.mark.parametrize("kind", ["SFT", "HydraSFT", "RewardModel", "PPO hydra"])
def test_best_checkpoint_is_handed_over(kind: str, hydra_trunk: Path, tmp_path: Path) -> None:
    module = MAKERS[kind](str(hydra_trunk))
    watch = "val/score" if isinstance(module, OnPolicy) else "val/loss"

    class Worse(ModelCheckpoint):
        """The measure gets worse with every epoch, so the first checkpoint is the best."""

        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.callback_metrics[watch] = torch.tensor(float(trainer.current_epoch))
            super().on_validation_end(trainer, pl_module)

    keep = Worse(monitor=watch, mode="min", save_top_k=3)
    trainer, folder = tiny.quiet_trainer(tmp_path, keep, max_epochs=3)
    batches = tiny.batches_for(module)
    trainer.fit(module, tiny.Batches(batches), tiny.Batches(batches[:1]))
    checkpoints = sorted((folder / "checkpoints").glob("*.ckpt"))
    assert len(checkpoints) == 3
    best, *_, last = [torch.load(path, weights_only=True)["state_dict"] for path in checkpoints]
    state = module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in best.items())
    assert not all(torch.equal(state[name], value) for name, value in last.items())


@pytest.mark.parametrize("kind", ["HydraSFT", "PPO hydra"])
def test_dry_run_leaves_nothing(kind: str, hydra_trunk: Path, tmp_path: Path) -> None:
    module = MAKERS[kind](str(hydra_trunk))
    batches = tiny.batches_for(module)
    saving = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    options: dict[str, Any] = {"fast_dev_run": True, "default_root_dir": tmp_path}
    options["callbacks"] = [saving]
    trainer, _ = tiny.fit(module, tmp_path, batches, held_out=batches[:1], **options)
    assert trainer.global_step > 0
    assert list(tmp_path.rglob("*")) == []


def test_default_optimizer_writes_every_value() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = default_optimizer(3e-4)([parameter])
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["lr"], group["eps"], group["weight_decay"]) == (3e-4, 1e-5, 0.0)
    assert group["betas"] == (0.9, 0.999)


def test_lora_plus_gives_up_projections_their_own_rate(hydra_trunk: Path) -> None:
    module = HydraPPO(
        str(hydra_trunk),
        lora=tiny.LORA,
        critic_learning_rate=0.02,
        loraplus_lr_ratio=16.0,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.01),
    )
    optimizer = module.configure_optimizers()
    owner = {id(one): group for group in optimizer.param_groups for one in group["params"]}
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            rate = 0.01 if ".actor." in name else 0.02
            expected = rate * (16 if ".lora_B." in name else 1)
            assert owner[id(weight)]["lr"] == pytest.approx(expected), name
            weight.grad = torch.ones_like(weight)
    # A and B are clipped together, as one group is.
    actor = [one for name, one in module.named_parameters() if ".actor." in name]
    norms = clip_by_group(optimizer, {"actor": 1.0})
    assert set(norms) == {"actor", "critic", "head"}
    assert_close(norms["actor"], torch.tensor(float(sum(one.numel() for one in actor))).sqrt())
    assert_close(sum(given(one.grad).pow(2).sum() for one in actor), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"loraplus_lr_ratio is the ratio of .* none is trained"):
        SFT(str(hydra_trunk), loraplus_lr_ratio=16.0).configure_optimizers()


def test_a_scheduler_that_forgets_the_groups_rates_is_refused(hydra_trunk: Path) -> None:
    cycle = torch.optim.lr_scheduler.OneCycleLR
    settings: dict[str, Any] = {"lora": tiny.LORA, "critic_learning_rate": 5e-5}
    module = HydraPPO(
        str(hydra_trunk), scheduler=lambda made: cycle(made, 1e-3, total_steps=9), **settings
    )
    with pytest.raises(MisconfigurationException, match="Give it a list of rates in this order"):
        module.configure_optimizers()
    rates = [1e-3, 5e-4, 5e-4]
    module = HydraPPO(
        str(hydra_trunk), scheduler=lambda made: cycle(made, rates, total_steps=9), **settings
    )
    module.configure_optimizers()


def test_groups_are_clipped_by_their_own_limits() -> None:
    ones = [nn.Parameter(torch.zeros(4)) for _ in range(3)]
    names = ("small", "large", "unnamed")
    groups = [{"name": name, "params": [one]} for name, one in zip(names, ones, strict=True)]
    for one in ones:
        one.grad = torch.full((4,), 3.0)  # norm 6
    norms = clip_by_group(torch.optim.SGD(groups, lr=1.0), {"small": 1.5, "large": 60.0})
    assert {name: float(norm) for name, norm in norms.items()} == dict.fromkeys(names, 6.0)
    left = [float(one.grad.norm()) for one in ones if isinstance(one.grad, Tensor)]
    assert left == pytest.approx([1.5, 6.0, 6.0], rel=1e-5)


class Phases(PhaseCallback):
    """Keeps the order of phases."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        self.seen.append(f"+{phase}")

    def on_phase_end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        self.seen.append(f"-{phase}")


@pytest.mark.parametrize(
    ("kind", "first", "learning"),
    [
        # The critic's part of the first step comes with the values.
        (
            HydraPPO,
            ["+critic", "-critic", "+actor", "-actor"],
            ["+actor", "-actor", "+critic", "-critic"],
        ),
        (JointHydraPPO, ["+actor", "-actor"], ["+actor", "-actor"]),
    ],
)
def test_phases_are_told(
    kind: type[PPO], first: list[str], learning: list[str], hydra_trunk: Path, tmp_path: Path
) -> None:
    module = kind(
        str(hydra_trunk),
        lora=tiny.LORA,
        sampling=tiny.SAMPLING,
        ppo_epochs=2,
        minibatch_size=2,
        micro_batch_size=1,
    )
    phases = Phases()
    tiny.fit(module, tmp_path, tiny.batches_for(module, 1), phases)
    step = ["+optimizer", "-optimizer"]
    before = ["+rollout", "-rollout", "+score", "-score"]
    assert phases.seen == [*before, *first, *step, *[*learning, *step] * 3]


class Told(LightningDataModule):
    """Ready batches that say how their turns were rendered."""

    def __init__(self, batches: Sequence[Any], template: str | None) -> None:
        super().__init__()
        self.batches = tiny.Batches(batches)
        if template is not None:
            self.template = template

    def train_dataloader(self) -> tiny.Batches:
        return self.batches


def told_fit(module: AdapterModule, template: str | None, root: Path) -> Path:
    trainer, folder = tiny.quiet_trainer(root)
    trainer.fit(module, datamodule=Told(tiny.batches_for(module, 1), template))
    return folder


def said(folder: Path) -> str | None:
    template: str | None = json.loads((folder / "manifest.json").read_text()).get("template")
    return template


def policy(trunk: Path, layout: Layout, reward: Path) -> PPO:
    return PPO(str(trunk), layout, lora=tiny.LORA, sampling=tiny.SAMPLING, reward=str(reward))


def told_copy(trunk: Path, folder: Path, template: str) -> Path:
    """A trunk's folder whose manifest names a template."""
    shutil.copytree(trunk, folder)
    (folder / "manifest.json").write_text(json.dumps({"template": template}))
    return folder


def test_the_template_goes_from_stage_to_stage(plain_trunk: Path, tmp_path: Path) -> None:
    hydra = told_fit(HydraSFT(str(plain_trunk), tiny.LORA), "plain-1", tmp_path) / "trunk"
    assert said(hydra) == "plain-1"
    reward = told_fit(RewardModel(str(hydra), tiny.LORA), None, tmp_path) / "adapters/reward"
    assert said(reward) == "plain-1"
    with pytest.raises(ValueError, match=rf"data has the template 'chat-0', {hydra} has 'plain-1'"):
        told_fit(SFT(str(hydra), tiny.LORA), "chat-0", tmp_path)
    full = PPO(str(hydra), "full", sampling=tiny.SAMPLING)
    written = list(told_fit(full, "plain-1", tmp_path).rglob("manifest.json"))
    assert [said(path.parent) for path in written] == ["plain-1", "plain-1"]


def test_data_of_another_tokenizer_is_refused(plain_trunk: Path) -> None:
    module = SFT(str(plain_trunk), tiny.LORA)
    same = AutoTokenizer.from_pretrained(plain_trunk)
    module.require_fitting(SimpleNamespace(tokenizer=same))
    same.add_special_tokens({"pad_token": "<nothing>"})  # which no batch holds
    module.require_fitting(SimpleNamespace(tokenizer=same))
    other = AutoTokenizer.from_pretrained(unpackaged("packaged:quickstart/trunk"))
    with pytest.raises(ValueError, match=r"data.tokenizer has other words .*Give data the trunk"):
        module.require_fitting(SimpleNamespace(tokenizer=other))


def test_prompts_must_be_written_as_the_reward_model_read_them(
    plain_trunk: Path, tmp_path: Path
) -> None:
    # The trunk itself says nothing: it comes from elsewhere.
    reward = told_fit(RewardModel(str(plain_trunk), tiny.LORA), "chat-0", tmp_path)
    adapter = reward / "adapters" / "reward"
    assert said(adapter) == "chat-0"
    words = rf"data has the template 'plain-1', {adapter} has 'chat-0': .*Set data.chat_template"
    with pytest.raises(ValueError, match=words):
        told_fit(policy(plain_trunk, "perl", adapter), "plain-1", tmp_path)
    # Loaders without a datamodule say nothing, and nothing is compared.
    for template in ("chat-0", None):
        told_fit(policy(plain_trunk, "perl", adapter), template, tmp_path)
    trunk = told_copy(plain_trunk, tmp_path / "trunk", "plain-1")
    with pytest.raises(ValueError, match=r"has the template 'chat-0', .*trunk has 'plain-1'"):
        policy(trunk, "perl", adapter)


def test_trunks_of_two_templates_do_not_play_together(hydra_trunk: Path, tmp_path: Path) -> None:
    one, other = (told_copy(hydra_trunk, tmp_path / name, name) for name in ("plain-1", "chat-0"))
    words = r"has the template '.*', .* has '.*': the model would read"
    with pytest.raises(ValueError, match=words):
        told_fit(policy(one, "lora", other), None, tmp_path)


@pytest.mark.parametrize("kind", [SFT, HydraSFT, RewardModel, PPO, Reinforce])
def test_every_module_takes_an_attention_implementation(
    kind: Callable[..., AdapterModule], hydra_trunk: Path
) -> None:
    options = {"layout": "hydra"} if kind in (PPO, Reinforce) else {}
    module = kind(str(hydra_trunk), lora=tiny.LORA, attention="eager", **options)
    (trunk,) = [part for part in module.modules() if isinstance(part, Trunk)]
    assert trunk.model.config._attn_implementation == "eager"
