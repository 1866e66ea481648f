"""N steps straight are k steps, a checkpoint and the rest, bit for bit, for every module."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader

from lightning_perl import modules
from lightning_perl.data import PreferenceDataModule
from lightning_perl.data.loaders import ResumableLoader
from lightning_perl.data.preferences import beside
from lightning_perl.data.rows import collate_pairs
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.modules import (
    DPO,
    GRPO,
    INPO,
    IPO,
    KTO,
    PPO,
    RAFT,
    RDPO,
    RLOO,
    SFT,
    HydraPPO,
    HydraSFT,
    JointHydraPPO,
    Reinforce,
    ReMax,
    RewardModel,
    SuperHF,
)
from lightning_perl.modules.base import AdapterModule
from lightning_perl.modules.on_policy import KLControl, OnPolicy
from lightning_perl.optim import HostAdamW
from tests.modules import tiny
from tests.modules.test_packed_pairs import examples


def drawn(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[int]) -> list[float]:
    """Every score is noise from Python's and NumPy's generators."""
    return [random.random() + float(np.random.rand()) for _ in responses]


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
SHORT: dict[str, Any] = {
    "lora": tiny.LORA,
    "sampling": tiny.SAMPLING,
    "micro_batch_size": 3,
    "scheduler": halving,
}
DROPOUT = LoraSpec(2, 4.0, dropout=0.3)
MAKERS: dict[str, Callable[[str], AdapterModule]] = {
    "SFT full": lambda trunk: SFT(trunk, scheduler=halving),
    "SFT": lambda trunk: SFT(trunk, DROPOUT),
    "HydraSFT": lambda trunk: HydraSFT(trunk, DROPOUT, scheduler=halving),
    "RewardModel": lambda trunk: RewardModel(trunk, DROPOUT),
    "DPO": lambda trunk: DPO(trunk, lora=DROPOUT),
    "DPO, kept reference": lambda trunk: DPO(trunk, lora=DROPOUT, keep_reference=True),
    "KTO": lambda trunk: KTO(trunk, lora=DROPOUT),
    "HydraPPO": lambda trunk: HydraPPO(trunk, **RL),
    "HydraPPO, moments on the host": lambda trunk: HydraPPO(
        trunk, **RL, optimizer=lambda params: HostAdamW(params, lr=1e-3)
    ),
    "PPO-max": lambda trunk: PPO(
        trunk,
        "hydra",
        **RL,
        score_normalization="standardize",
        lm_weight=0.1,
        critic_warmup=3,
        kl_control=KLControl(target=0.01, horizon=50),
    ),
    "PPO lora": lambda trunk: PPO(trunk, "lora", **RL),
    "PPO full": lambda trunk: PPO(trunk, "full", **RL),
    "RLOO, LoRA+": lambda trunk: RLOO(trunk, samples=2, loraplus_lr_ratio=4.0, **SHORT),
    "JointHydraPPO": lambda trunk: JointHydraPPO(trunk, **RL),
    "ReMax": lambda trunk: ReMax(trunk, **SHORT),
    "ReMax, ahead, with texts": lambda trunk: ReMax(
        trunk, **SHORT, lm_weight=0.1, rollout_engine=tiny.Early()
    ),
    "GRPO": lambda trunk: GRPO(trunk, samples=2, epochs=2, minibatch_size=4, **SHORT),
    "RAFT": lambda trunk: RAFT(trunk, samples=2, minibatch_size=2, **SHORT),
    "SuperHF": lambda trunk: SuperHF(trunk, samples=2, **SHORT),
    "INPO": lambda trunk: INPO(trunk, samples=3, **SHORT),
    "INPO, pairs": lambda trunk: INPO(trunk, samples=3, epochs=2, minibatch_size=4, **SHORT),
    "Reinforce": lambda trunk: Reinforce(trunk, **SHORT),
    "IPO": lambda trunk: IPO(trunk, lora=DROPOUT, scheduler=halving),
    "RDPO": lambda trunk: RDPO(trunk, lora=DROPOUT),
    "PPO dynamic_lora, a reward that draws": lambda trunk: PPO(
        trunk, "dynamic_lora", **RL, reward_function=drawn
    ),
}
BATCHES = 3


def test_every_module_is_resumed_here() -> None:
    assert {kind.partition(",")[0].split()[0].split("-")[0] for kind in MAKERS} == set(
        modules.__all__
    )


def loader_for(module: AdapterModule, pairs: bool = False) -> ResumableLoader | CombinedLoader:
    """Three batches in an order that changes with the epoch."""
    batches = tiny.batches_for(module, BATCHES)
    loader = ResumableLoader(batches, 1, itemgetter(0), seed=3, bucket=False)
    if pairs:
        rows = [example for example in examples(7, 1) if len(example.rows) == 2]
        return beside(loader, ResumableLoader(rows, 2, collate_pairs, seed=4))
    if isinstance(module, OnPolicy) and module.lm_weight:
        texts = [tiny.rated(3, seed) for seed in range(BATCHES - 1)]
        fewer = ResumableLoader(texts, 1, itemgetter(0), seed=4, bucket=False)
        return beside(loader, fewer)
    return loader


class KilledError(Exception):
    """The process dies here."""


class Watch(Callback):
    """Keeps what was logged of every batch; saves after some numbers of them, and dies after the last one."""

    def __init__(self, folder: Path, *saved_after: int) -> None:
        self.folder, self.saved_after = folder, saved_after
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, module: AdapterModule, outputs: Mapping[str, Any], *_: object
    ) -> None:
        # A batch that only begins a rollout logs nothing, and the trainer still has the last one's.
        metrics = trainer.callback_metrics if outputs.get("episodes") != 0 else {}
        self.logged.append({key: float(value) for key, value in metrics.items()})
        if len(self.logged) in self.saved_after:
            trainer.save_checkpoint(self.folder / f"{len(self.logged)}.ckpt")
        if len(self.logged) == max(self.saved_after, default=0):
            raise KilledError


@pytest.mark.parametrize("kind", MAKERS)
def test_resumed_run_is_the_uninterrupted_one(kind: str, hydra_trunk: Path, tmp_path: Path) -> None:
    def run(seed: int, watch: Watch, **options: Any) -> tuple[Trainer, AdapterModule]:
        seed_everything(seed, verbose=False)
        module = MAKERS[kind](str(hydra_trunk))
        trainer, _ = tiny.quiet_trainer(tmp_path, watch, max_epochs=2)
        trainer.fit(module, loader_for(module, kind == "INPO, pairs"), **options)
        return trainer, module

    straight = Watch(tmp_path)
    whole, expected = run(1, straight)
    saved_after = 2, BATCHES, BATCHES + 1  # inside, at the end, in the second epoch
    with pytest.raises(KilledError):
        run(1, Watch(tmp_path, *saved_after))
    for batches in saved_after:
        # Another process draws other numbers before it resumes.
        resumed = Watch(tmp_path)
        path = tmp_path / f"{batches}.ckpt"
        again, module = run(2, resumed, ckpt_path=path, weights_only=True)
        assert resumed.logged == straight.logged[batches:]
        assert again.global_step == whole.global_step
        assert tiny.changed(tiny.weights(expected), module) == set()
        tiny.assert_equal_moments(again, whole)
        rates = [
            [group["lr"] for group in one.optimizers[0].param_groups] for one in (again, whole)
        ]
        assert rates[0] == rates[1]
        if isinstance(module, OnPolicy) and isinstance(expected, OnPolicy):
            rollouts = 2 * BATCHES - module.rollout_engine.overlap
            assert module.rollout_index == expected.rollout_index == rollouts
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


def rows_of(*words: str) -> list[dict[str, Any]]:
    return [{"prompt": f"{word} w4", "chosen": "w5", "rejected": "w6 w7"} for word in words]


@pytest.mark.parametrize(
    ("kind", "options", "data", "words"),
    [
        (RewardModel, {"seed": 1}, {}, "cannot change: seed is 1, there 0"),
        (RewardModel, {"loraplus_lr_ratio": 4.0}, {}, "loraplus_lr_ratio is 4.0, there None"),
        (DPO, {}, {}, "cannot change: class is DPO, there IPO"),
        (RLOO, {"samples": 3}, {}, "cannot change: samples is 3, there 2"),
        (
            RewardModel,
            {},
            {"train": rows_of("w8", "w9", "w3")},
            "other rows: data is 3 rows with digest .* of data.train, there 3 rows with digest ",
        ),
        (
            RewardModel,
            {},
            {"streaming": True},
            "data is a stream with digest .* of data.train, there 3",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_from_python(
    kind: type[AdapterModule],
    options: dict[str, Any],
    data: dict[str, Any],
    words: str,
    hydra_trunk: Path,
    tmp_path: Path,
) -> None:
    def run(
        made: type[AdapterModule],
        data: dict[str, Any],
        ckpt_path: str | Path | None = None,
        **options: Any,
    ) -> Path:
        make: Any = made
        if issubclass(made, RLOO):
            options = {"samples": 2, "sampling": tiny.SAMPLING, **options}
        module = make(str(hydra_trunk), lora=tiny.LORA, **options)
        rows = {"train": rows_of("w8", "w9", "w10"), "val_fraction": 0.0, "rows": made.rows, **data}
        datamodule = PreferenceDataModule(hydra_trunk, batch_size=1, max_response_tokens=8, **rows)
        trainer, folder = tiny.quiet_trainer(tmp_path, max_steps=3, max_epochs=2)
        trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
        (path,) = (folder / "checkpoints").glob("*.ckpt")
        return path

    path = run(IPO if kind is DPO else kind, {})
    with pytest.raises(ValueError, match=words):
        run(kind, data, path, **options)
    with pytest.raises(UserWarning, match="there is no last checkpoint"):
        run(kind, data, "last")


def test_another_reward_is_refused_by_name(plain_trunk: Path, tmp_path: Path) -> None:
    folders = []
    for seed in (0, 1):
        reward_model = RewardModel(str(plain_trunk), tiny.LORA, seed=seed)
        _, folder = tiny.fit(reward_model, tmp_path, tiny.batches_for(reward_model))
        folders.append(str(folder / "adapters/reward"))
    path = tmp_path / "1.ckpt"

    def policy(reward: str) -> PPO:
        return PPO(str(plain_trunk), "perl", reward=reward, **RL)

    with pytest.raises(KilledError):
        tiny.fit(
            policy(folders[0]), tmp_path, tiny.batches_for(policy(folders[0])), Watch(tmp_path, 1)
        )
    shutil.move(folders[0], tmp_path / "moved")
    for reward in (folders[1], str(tmp_path / "moved")):
        trainer, _ = tiny.quiet_trainer(tmp_path)
        module = policy(reward)
        arguments = (module, tiny.Batches(tiny.batches_for(module)))
        if reward == folders[1]:
            words = rf"LoRA 'reward' is rank 2.*there rank 2.*\(trunk .*, reward .*{folders[0]}.*\)"
            with pytest.raises(ValueError, match=words):
                trainer.fit(*arguments, ckpt_path=path)
        else:
            trainer.fit(*arguments, ckpt_path=path)
    config = Path(folders[1], "adapter_config.json")
    moved = config.read_text().replace(
        '"base_model_name_or_path": ', '"base_model_name_or_path": "moved", "was": '
    )
    config.write_text(moved)
    policy(folders[1])
    for before, after in (
        ('"lora_alpha": 4.0', '"lora_alpha": 8.0'),
        ('"use_rslora": false', '"use_rslora": true'),
    ):
        config.write_text(moved.replace(before, after))
        with pytest.raises(ValueError, match=r"adapter_config.json is missing, cut short or chang"):
            policy(folders[1])
