"""Several ranks train what one trains: the same losses, statistics and weights, to rounding in float64."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_perl.batches import MixedBatch
from lightning_perl.callbacks import run_folder
from lightning_perl.data import PreferenceDataModule
from lightning_perl.data.rows import collate_pairs
from lightning_perl.models.sharding import TrunkSharding
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
from tests.modules import tiny
from tests.modules.ranks import on_ranks
from tests.modules.test_packed_pairs import examples

WIDE: dict[str, Any] = {"trunk_dtype": "float64"}
LORA: dict[str, Any] = {"lora": tiny.LORA, **WIDE}
RL: dict[str, Any] = {"sampling": tiny.SAMPLING, "micro_batch_size": 2, **LORA}
STEPS: dict[str, Any] = {"ppo_epochs": 2, "minibatch_size": 3, **RL}


SHARDED = ("HydraSFT", "KTO", "PPO-max", "RLOO", "SuperHF")
"""Kinds that are also run on a trunk whose blocks are in pieces, which changes no bit."""


def digits(
    prompts: Sequence[str], responses: Sequence[str], rows: Sequence[int]
) -> Sequence[float]:
    """A Python reward that no rank may call without rows."""
    assert rows
    return [float(sum(map(str.isdigit, response))) for response in responses]


PPO_MAX: dict[str, Any] = {
    "layout": "hydra",
    "score_normalization": "standardize",
    "lm_weight": 0.1,
    "critic_warmup": 1,
    "kl_control": KLControl(target=0.01, horizon=50),
    "reward_function": digits,
    **STEPS,
}
KINDS: dict[str, tuple[Callable[..., AdapterModule], dict[str, Any]]] = {
    "SFT": (SFT, LORA),
    "SFT full": (SFT, WIDE),
    "HydraSFT": (HydraSFT, LORA),
    "RewardModel": (RewardModel, {"lm_weight": 0.5, "center_coef": 0.1, **LORA}),
    "DPO": (DPO, LORA),
    "IPO": (IPO, {"keep_reference": True, **LORA}),
    "RDPO": (RDPO, LORA),
    "KTO": (KTO, LORA),
    "HydraPPO": (HydraPPO, STEPS),
    "JointHydraPPO": (JointHydraPPO, STEPS),
    "PPO full": (PPO, {"layout": "full", **STEPS}),
    "PPO-max": (PPO, PPO_MAX),
    "RLOO": (RLOO, {"samples": 3, "checkpointing": True, **RL}),
    "GRPO": (GRPO, {"samples": 2, "epochs": 2, "minibatch_size": 4, **RL}),
    "ReMax": (ReMax, RL),
    "Reinforce": (Reinforce, RL),
    "RAFT": (RAFT, {"samples": 2, "minibatch_size": 2, **RL}),
    "SuperHF": (SuperHF, {"samples": 2, **RL}),
    "INPO": (INPO, {"samples": 3, **RL}),
}


class Trained(NamedTuple):
    """What a run logged after each batch and in the end, and the weights that it trained."""

    logged: list[dict[str, float]]
    weights: dict[str, Tensor]


class Watch(Callback):
    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: object, **__: object) -> None:
        # A resumed run does not know the validation before.
        here = ("train/", "rollout/") if trainer.training else ""
        metrics = trainer.callback_metrics.items()
        self.logged.append({k: float(value) for k, value in metrics if k.startswith(here)})


def made(kind: str, trunk: str, **options: object) -> AdapterModule:
    build, settings = KINDS[kind]
    return build(trunk, **settings, **options)


def batches_for(module: AdapterModule, rows: int, count: int = 2) -> list[Any]:
    """Batches of one row more each, so that shares are unequal."""
    if not isinstance(module, OnPolicy):
        return [tiny.rated(rows + n, n, pairs=(rows + n) // 4) for n in range(count)]
    prompts = [tiny.prompts(rows + n, n) for n in range(count)]
    if isinstance(module, INPO):
        pairs = [collate_pairs(examples(3, n)) for n in range(count)]
        return [MixedBatch(*both) for both in zip(prompts, pairs, strict=True)]
    if not module.lm_weight:
        return prompts
    return [MixedBatch(batch, tiny.rated(3, n)) for n, batch in enumerate(prompts)]


def train(
    kind: str,
    trunk: str,
    root: Path,
    ranks: int,
    rows: int = 5,
    callbacks: Sequence[Callback] = (),
    sharding: TrunkSharding | None = None,
    **options: Any,
) -> Trained:
    module, watch = made(kind, trunk, trunk_sharding=sharding), Watch()
    held_out = [batch for batch in batches_for(module, 3) if not isinstance(batch, MixedBatch)]
    settings = {"held_out": held_out, "devices": ranks, **options}
    trainer, _ = tiny.fit(module, root, batches_for(module, rows), watch, *callbacks, **settings)
    watch.on_train_batch_end(trainer)
    pieces = [isinstance(weight, DTensor) for weight in module.parameters()]
    assert any(pieces) == (sharding is not None)
    names = module.trainable_names()
    weights = {name: weight for name, weight in tiny.weights(module).items() if name in names}
    return Trained(watch.logged, weights)


def assert_close(ours: Trained, expected: Trained) -> None:
    assert len(ours.logged) == len(expected.logged)
    for one, two in zip(ours.logged, expected.logged, strict=True):
        assert one == pytest.approx(two, rel=1e-12, abs=1e-12)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(ours.weights[name], weight, rtol=1e-12, atol=1e-12)


def assert_equal(ranks: list[Trained]) -> None:
    """All ranks have the same weights, bit for bit, and logged the same."""
    first, *others = ranks
    for other in others:
        assert other.logged == first.logged
        assert all(torch.equal(other.weights[name], first.weights[name]) for name in first.weights)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one(kind: str, hydra_trunk: Path, tmp_path: Path) -> None:
    expected = train(kind, str(hydra_trunk), tmp_path, 1)
    ours = on_ranks(2, tmp_path / "ranks", train, kind, str(hydra_trunk), tmp_path / "two", 2)
    assert_equal(ours)
    assert_close(ours[0], expected)
    if kind in SHARDED:
        given = (kind, str(hydra_trunk), tmp_path / "shards", 2, 5, (), "shard")
        assert_equal([*ours, *on_ranks(2, tmp_path / "sharded", train, *given)])
    # One of them writes, and both know where.
    (folder,) = (path for path in (tmp_path / "two/run").iterdir() if not path.is_symlink())
    if (kept := folder / "kept.jsonl").exists():
        assert len(kept.read_text().splitlines()) == 11 * (2 if kind == "INPO" else 1)


@pytest.mark.parametrize("kind", ["RewardModel", "KTO", "HydraPPO", "RLOO", "PPO-max"])
def test_a_rank_without_rows_waits_for_nobody(kind: str, hydra_trunk: Path, tmp_path: Path) -> None:
    expected = train(kind, str(hydra_trunk), tmp_path, 1, rows=2)
    ours = on_ranks(3, tmp_path / "ranks", train, kind, str(hydra_trunk), tmp_path / "three", 3, 2)
    assert_equal(ours)
    assert_close(ours[0], expected)


def part(kind: str, trunk: str, root: Path, ranks: int, epochs: int) -> Trained:
    """One more epoch, from the checkpoint of the epoch before."""
    path = root / f"{epochs - 1}.ckpt"
    keep = ModelCheckpoint(root, str(epochs), enable_version_counter=False)
    given = path if path.exists() else None
    return train(kind, trunk, root, ranks, 5, [keep], max_epochs=epochs, ckpt_path=given)


@pytest.mark.parametrize("kind", ["HydraSFT", "PPO-max"])
def test_a_run_goes_on_with_another_number_of_ranks(
    kind: str, hydra_trunk: Path, tmp_path: Path
) -> None:
    trunk, root = str(hydra_trunk), tmp_path / "parts"
    expected = train(kind, trunk, tmp_path, 1, max_epochs=3)
    on_ranks(2, tmp_path / "first", part, kind, trunk, root, 2, 1)
    part(kind, trunk, root, 1, 2)
    ours = on_ranks(2, tmp_path / "last", part, kind, trunk, root, 2, 3)
    assert_equal(ours)
    assert_close(ours[0], expected._replace(logged=expected.logged[-3:]))


def twenty(trunk: str, root: Path) -> dict[str, Tensor]:
    """20 rollouts in float32, a step each."""
    module = HydraPPO(
        trunk, **{**STEPS, "trunk_dtype": "float32", "minibatch_size": None, "ppo_epochs": 1}
    )
    batches = [tiny.prompts(3, seed) for seed in range(20)]
    trainer, _ = tiny.fit(module, root, batches, devices=2)
    assert trainer.global_step == 20
    return {name: weight for name, weight in tiny.weights(module).items() if "lora" in name}


def test_twenty_rollouts_end_with_equal_adapters(hydra_trunk: Path, tmp_path: Path) -> None:
    one, two = on_ranks(2, tmp_path / "ranks", twenty, str(hydra_trunk), tmp_path)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(bool(weight.any()) for name, weight in one.items() if "lora_B" in name)


def staged(trunk: str, root: Path, ranks: int, module_class: str) -> tuple[Trained, list[Any]]:
    """A fit, a test and a prediction of rows from a datamodule, packed and with their responses' places."""
    words = [f"w{number}" for number in range(3, 17)]
    pairs = [
        {"prompt": f"{word} w4", "chosen": " ".join(words[:n]), "rejected": " ".join(words[n:8])}
        for n, word in enumerate(words[:5], 2)
    ]
    sharding = "shard" if ranks > 1 and module_class == "RewardModel" else None
    module, watch = made(module_class, trunk, trunk_sharding=sharding), Watch()
    kind: Any = module.rows
    data = PreferenceDataModule(
        trunk, train=pairs, val=pairs[:3], test=pairs[:3], rows=kind, batch_size=3, val_batch_size=2
    )
    trainer, _ = tiny.quiet_trainer(root, watch, devices=ranks)
    trainer.fit(module, datamodule=data)
    logged = [*watch.logged, dict(trainer.test(module, datamodule=data, verbose=False)[0])]
    predicted: list[Any] = trainer.predict(module, datamodule=data) or []
    names = module.trainable_names()
    weights = {name: weight for name, weight in tiny.weights(module).items() if name in names}
    return Trained(logged, weights), [
        next(part[k] for k in ("score", "scores") if k in part) for part in predicted
    ]


@pytest.mark.parametrize("kind", ["RewardModel", "HydraPPO"])
def test_stages_of_a_datamodule_are_those_of_one_rank(
    kind: str, hydra_trunk: Path, tmp_path: Path
) -> None:
    trunk = str(hydra_trunk)
    expected, scores = staged(trunk, tmp_path / "one", 1, kind)
    two = on_ranks(2, tmp_path / "ranks", staged, trunk, tmp_path / "two", 2, kind)
    assert_equal([run for run, _ in two])
    assert_close(two[0][0], expected)
    for found in (two[0][1], two[1][1]):
        for part, wanted in zip(found, scores, strict=True):
            assert torch.as_tensor(part).tolist() == pytest.approx(torch.as_tensor(wanted).tolist())
    (path,) = (tmp_path / "two/run/version_0").glob("predictions.jsonl")
    assert len(path.read_text().splitlines()) == sum(map(len, scores))


class Term(Callback):
    """Sends SIGTERM to the last rank alone, in its second batch."""

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def terminated(trunk: str, root: Path) -> tuple[int, bool, str]:
    """When a run ended, whether it left a checkpoint, and its manifest."""
    module = made("RewardModel", trunk)
    trainer, _ = tiny.quiet_trainer(root, Term(), devices=2)
    with pytest.raises(SystemExit) as stopped:
        trainer.fit(module, tiny.Batches([tiny.rated(4, seed, pairs=2) for seed in range(4)]))
    assert stopped.value.code == 128 + signal.SIGTERM
    trainer.strategy.barrier()
    folder = run_folder(trainer)
    manifest = (folder / "adapters/reward/manifest.json").read_text()
    return trainer.global_step, (folder / "checkpoints/stopped.ckpt").is_file(), manifest


def test_a_rank_that_is_asked_to_stop_stops_all(hydra_trunk: Path, tmp_path: Path) -> None:
    one, two = on_ranks(2, tmp_path / "ranks", terminated, str(hydra_trunk), tmp_path)
    assert one == two
    assert one[:2] == (2, True)
    assert "stopped by SIGTERM after 2 steps" in one[2]


def shuffled_by_rank(trunk: str, root: Path) -> str:
    """What a loader is refused with that gives each rank other rows."""
    module = made("SFT", trunk)
    batches = [tiny.rated(4, seed) for seed in range(2)]
    batches = batches if os.environ["RANK"] == "0" else batches[::-1]
    with pytest.raises(RuntimeError) as error:
        tiny.fit(module, root, batches, devices=2)
    return str(error.value)


def test_ranks_with_batches_of_their_own_are_refused(hydra_trunk: Path, tmp_path: Path) -> None:
    words = on_ranks(2, tmp_path / "ranks", shuffled_by_rank, str(hydra_trunk), tmp_path)
    assert all("The ranks hold different rows, but each must be given the same" in w for w in words)


def test_blocks_in_the_hosts_memory_change_nothing(hydra_trunk: Path, tmp_path: Path) -> None:
    given = ("HydraPPO", str(hydra_trunk), tmp_path, 1)
    ours = on_ranks(1, tmp_path / "ranks", train, *given, 5, (), "offload")
    assert_equal([*ours, train(*given)])


def test_other_strategies_are_refused(hydra_trunk: Path, tmp_path: Path) -> None:
    class Own(DDPStrategy):
        """A subclass may wrap the module in a way of its own."""

    trainer, _ = tiny.quiet_trainer(tmp_path, strategy=Own(), devices=2)
    module = made("SFT", str(hydra_trunk))
    with pytest.raises(MisconfigurationException, match=r"trainer\.strategy Own cannot train"):
        module.refuse(trainer, None)
