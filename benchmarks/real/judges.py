"""What the studies with a learned reward share: short pairs of HH harmless, reward models of them, and a judge.

Pairs of at most 144 + 48 tokens in eight parts by dialog: on the first everything is tested, rewards and policies
learn from the next two, the judge from four others.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from methods import SIZES, policy
from reward_models import everything
from small_trunk import GivenRows, adam, fitted, linear_decay, resident_mb

from lightning_perl.data.rows import Item, Splits, assign_folds
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.modules import RLOO, RewardModel
from lightning_perl.modules.base import AdapterModule
from lightning_perl.rollouts.rollout import Rollout

PARTS, LEARNED, JUDGED = 8, range(1, 3), range(3, 7)
LORA, RATE, BATCH = LoraSpec(16, alpha=32.0), 5e-4, 8
HELD_OUT = 32
"""Prompts of the first part that policies answer in the end."""
NORMALIZED = 64
"""Training rows, about half of them short, whose chosen answers score 0 with deviation 1."""


def pairs(trunk: Path, data_dir: Path, parts: Sequence[int], count: int | None = None) -> GivenRows:
    """The parts to learn from (the first ``count`` of their rows), the first part to test on."""
    items = everything("harmless", data_dir)
    folds = assign_folds((item.dialog for item in items), PARTS)
    train: list[Item] = [item for item in items if folds[item.dialog] in parts]
    test = [item for item in items if folds[item.dialog] == 0]
    splits = Splits(train[:count], train[:NORMALIZED], test)
    data = GivenRows(str(trunk), splits, batch_size=BATCH, **SIZES)
    data.setup()
    return data


def prompts(trunk: Path, data_dir: Path, batch_size: int, seed: int) -> GivenRows:
    """The prompts of the pairs that rewards learned from, and those of the first part."""
    splits = pairs(trunk, data_dir, LEARNED).splits
    assert splits is not None
    options: dict[str, Any] = {"batch_size": batch_size, "val_batch_size": HELD_OUT, "seed": seed}
    return GivenRows(str(trunk), splits, rows="prompts", **options, **SIZES)


def supervised(
    make: type[AdapterModule], trunk: Path, data: GivenRows, folder: Path, **settings: Any
) -> dict[str, Any]:
    """One pass over the pairs, handed over to a folder; what it says of the test pairs, and what it took."""
    warnings.filterwarnings("ignore")
    schedule = linear_decay(len(data.train_dataloader()))
    before, cpu = resident_mb("VmRSS"), time.process_time()
    options: dict[str, Any] = {"lora": LORA, "trunk_dtype": "bfloat16", "optimizer": adam(RATE)}
    module = make(str(trunk), scheduler=schedule, **options, **settings)
    trainer, _ = fitted(module, data, default_root_dir=folder)
    took = {"cpu_minutes": (time.process_time() - cpu) / 60}
    took["fit_peak_mb"] = resident_mb("VmHWM") - before
    module.hand_over(folder)
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    rows = {split: data.report.splits[split].kept for split in ("train", "test")}
    return {**took, **rows, **{key.partition("/")[2]: value for key, value in found.items()}}


def reward_model(
    trunk: Path, data_dir: Path, parts: Sequence[int], folder: Path, seed: int = 0, count: int | None = None
) -> dict[str, Any]:  # fmt: skip
    """A reward adapter; demonstrations score 0 with deviation 1."""
    data = pairs(trunk, data_dir, parts, count)
    return supervised(RewardModel, trunk, data, folder, normalize_scores=True, seed=seed)


def learner(trunk: Path, make: Any, **settings: Any) -> Any:  # noqa: ANN401 (any on-policy class)
    """An on-policy module that learns from its learned reward alone."""
    alone = {"learned_reward_weight": 1.0, "reward_function": None, "gold": None}
    return policy(trunk, make, **alone | settings)


def judged_by(module: Any, trunk: Path, reward: Path) -> list[Tensor]:  # noqa: ANN401 (any on-policy module)
    """Let another reward model be a module's gold; a list that what it says is added to, call by call.

    It reads the very tokens, not texts.
    """
    judge = learner(trunk, RLOO, layout="perl", reward=str(reward))
    heard: list[Tensor] = []

    def call(function: object, argument: str, rollout: Rollout) -> Tensor:
        heard.append(judge.scores(rollout))
        return heard[-1]

    module.gold, module.call = judge.scores, call
    return heard


def held_out(module: Any, data: GivenRows, heard: list[Tensor]) -> dict[str, float]:  # noqa: ANN401
    """What the module reaches on the held-out prompts, and how often the judge prefers its answers."""
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", enable_checkpointing=False, limit_test_batches=1, **quiet)
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    before, after = heard[-2:]
    wins = (after > before).double() + 0.5 * (after == before)
    deviation = float(wins.std() / len(wins) ** 0.5)
    measures = {key.partition("/")[2]: float(value) for key, value in found.items()}
    return {**measures, "judge_wins": float(wins.mean()), "judge_wins_error": deviation}


def adapter_of(folder: Path) -> Path:
    """Where a reward model was handed over."""
    return folder / "adapters/reward"
