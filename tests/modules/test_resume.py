"""N steps straight are k steps, a checkpoint and the rest, bit for bit, for every module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_perl.batches import PromptBatch, RatedBatch
from lightning_perl.data.loaders import BucketBatches, ResumableLoader
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.modules import PPO, SFT, HydraPPO, HydraSFT, Reinforce, RewardModel
from lightning_perl.modules.base import AdapterModule
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.optim import HostAdamW
from tests.modules import tiny
from tests.modules.test_pairwise_floor import Dpo


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)


RL: dict[str, Any] = {
    "lora": tiny.LORA,
    "sampling": tiny.SAMPLING,
    "ppo_epochs": 2,
    "minibatch_size": 3,
    "micro_batch_size": 2,
    "scheduler": halving,
}
DROPOUT = LoraSpec(2, 4.0, dropout=0.3)
MAKERS: dict[str, Callable[[str], AdapterModule]] = {
    "SFT full": lambda trunk: SFT(trunk, scheduler=halving),
    "SFT": lambda trunk: SFT(trunk, DROPOUT),
    "HydraSFT": lambda trunk: HydraSFT(trunk, DROPOUT, scheduler=halving),
    "RewardModel": lambda trunk: RewardModel(trunk, DROPOUT),
    "DPO": lambda trunk: Dpo(trunk, DROPOUT),
    "HydraPPO": lambda trunk: HydraPPO(trunk, **RL),
    "HydraPPO, moments on the host": lambda trunk: HydraPPO(
        trunk, **RL, optimizer=lambda params: HostAdamW(params, lr=1e-3)
    ),
    "PPO lora": lambda trunk: PPO(trunk, "lora", **RL),
    "PPO full": lambda trunk: PPO(trunk, "full", **RL),
    "Reinforce": lambda trunk: Reinforce(
        trunk, lora=tiny.LORA, sampling=tiny.SAMPLING, micro_batch_size=2, scheduler=halving
    ),
}
BATCHES = 4


def one_prompt_batch(seeds: list[int]) -> PromptBatch:
    return tiny.prompts(5, seeds[0])


def one_rated_batch(seeds: list[int]) -> RatedBatch:
    return tiny.rated(6, seeds[0], pairs=seeds[0] % 3)


def loader_for(module: AdapterModule) -> ResumableLoader:
    """Four batches in an order that changes with the epoch."""
    collate = one_prompt_batch if isinstance(module, OnPolicy) else one_rated_batch
    sampler = BucketBatches([1] * BATCHES, 1, seed=3, bucket=False)
    return ResumableLoader(list(range(BATCHES)), sampler, collate)


class SaveAfter(Callback):
    """Writes one checkpoint after a number of batches, and ends there if asked."""

    def __init__(self, path: Path, batches: int, stop: bool) -> None:
        self.path, self.left, self.stop = path, batches, stop

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)
            if self.stop:
                raise KilledError


class KilledError(Exception):
    """The process dies here."""


class Losses(Callback):
    """Keeps what was logged of every batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        logged = trainer.callback_metrics.items()
        self.seen.append({key: float(value) for key, value in logged})


def moments(trainer: Trainer) -> list[torch.Tensor]:
    """Every tensor of the optimizer's state."""
    return [
        value
        for state in trainer.optimizers[0].state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]


@pytest.mark.parametrize("killed_after", [2, 4, 5], ids=["inside", "at the end", "second epoch"])
@pytest.mark.parametrize("kind", MAKERS)
def test_resumed_run_is_the_uninterrupted_one(
    kind: str, killed_after: int, hydra_trunk: Path, tmp_path: Path
) -> None:
    def run(seed: int, *callbacks: Callback, **options: Any) -> tuple[Trainer, AdapterModule]:
        torch.manual_seed(seed)
        module = MAKERS[kind](str(hydra_trunk))
        trainer, _ = tiny.quiet_trainer(tmp_path, *callbacks, max_epochs=2)
        trainer.fit(module, loader_for(module), **options)
        return trainer, module

    straight, resumed, path = Losses(), Losses(), tmp_path / "killed.ckpt"
    whole, expected = run(1, straight)
    with pytest.raises(KilledError):
        run(1, SaveAfter(path, killed_after, stop=True))
    # Another process draws other numbers before it resumes.
    again, module = run(2, resumed, ckpt_path=path, weights_only=True)
    assert resumed.seen == straight.seen[killed_after:]
    assert again.global_step == whole.global_step
    assert tiny.changed(tiny.weights(expected), module) == set()
    ours, theirs = moments(again), moments(whole)
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    rates = [[group["lr"] for group in one.optimizers[0].param_groups] for one in (again, whole)]
    assert rates[0] == rates[1]
    if isinstance(module, OnPolicy) and isinstance(expected, OnPolicy):
        assert module.rollout_index == expected.rollout_index == 2 * BATCHES
        assert (module.episodes, module.tokens) == (expected.episodes, expected.tokens)


@pytest.mark.parametrize("kind", ["HydraSFT", "HydraPPO"])
def test_lightnings_own_checkpoints_resume_too(
    kind: str, hydra_trunk: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    module = MAKERS[kind](str(hydra_trunk))
    every = 4 if isinstance(module, OnPolicy) else 1  # four updates a rollout
    keep = ModelCheckpoint(every_n_train_steps=every, save_top_k=-1, filename="{step}")
    trainer, folder = tiny.quiet_trainer(tmp_path, keep)
    trainer.fit(module, loader_for(module))
    paths = sorted((folder / "checkpoints").glob("*.ckpt"))
    assert len(paths) == BATCHES
    torch.manual_seed(2)
    again = MAKERS[kind](str(hydra_trunk))
    later, _ = tiny.quiet_trainer(tmp_path)
    later.fit(again, loader_for(again), ckpt_path=paths[1], weights_only=True)
    assert later.global_step == trainer.global_step
    assert tiny.changed(tiny.weights(module), again) == set()
