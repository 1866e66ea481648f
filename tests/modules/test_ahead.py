"""Rollouts that are sampled while the one before is learned from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_perl.callbacks import PolicyGuard
from lightning_perl.models.trunk import Trunk
from lightning_perl.modules import RLOO
from lightning_perl.modules.base import Stats
from lightning_perl.rollouts.rollout import Ahead, Rollout, Scored
from lightning_perl.rollouts.sampling import Asked, RolloutEngine
from tests.modules import tiny


class Noted(tiny.Early):
    """Notes which policy samples which rollout, of which prompts."""

    def __init__(self, overlap: int = 1) -> None:
        self.overlap = overlap
        self.sampled: list[tuple[int, str]] = []
        self.rows: list[list[int]] = []

    def start(self, trunk: Trunk, adapter: str, asked: Asked, *rest: Any) -> Callable[[], Rollout]:
        self.sampled.append((asked.rollout, trunk.adapters.fingerprint(adapter)))
        self.rows.append(asked.prompts.row.tolist())
        return super().start(trunk, adapter, asked, *rest)


class Learned(Callback):
    """Notes the policy before each batch."""

    def __init__(self) -> None:
        self.policies: list[str] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, *_: object) -> None:  # noqa: ANN401
        self.policies.append(module.policy_trunk.adapters.fingerprint("actor"))


def made(trunk: Path, engine: RolloutEngine | None, **options: Any) -> RLOO:
    torch.manual_seed(1)
    return tiny.on_policy(RLOO, trunk, samples=2, rollout_engine=engine, **options)


def batches(count: int) -> list[Any]:
    """Batches with rows of their own."""
    ready = [tiny.prompts(2, seed) for seed in range(count)]
    rows = [torch.arange(2 * number, 2 * number + 2) for number in range(count)]
    return [batch._replace(row=row) for batch, row in zip(ready, rows, strict=True)]


def saves() -> ModelCheckpoint:
    return ModelCheckpoint(save_last=True, every_n_train_steps=1)


def last(root: Path) -> Path:
    (path,) = root.rglob("last.ckpt")
    return path


def test_rollouts_are_one_update_old(hydra_trunk: Path, tmp_path: Path) -> None:
    """Over two epochs; the first batch is only sent, and the last one only learns."""
    engine, learned = Noted(), Learned()
    module = made(hydra_trunk, engine)
    trainer, _ = tiny.fit(module, tmp_path, batches(4), learned, max_epochs=2)
    assert trainer.global_step == module.rollout_index == 7
    assert len(set(learned.policies[1:])) == 7
    # Batch k sends rollout k, and then learns from the one before.
    assert engine.sampled == list(enumerate(learned.policies[:7]))
    assert trainer.callback_metrics["rollout/mismatch"] < 1e-12


def test_steps_are_not_passed(hydra_trunk: Path, tmp_path: Path) -> None:
    module = made(hydra_trunk, tiny.Early())
    trainer, _ = tiny.fit(module, tmp_path, batches(5), max_steps=3, max_epochs=-1)
    assert trainer.global_step == module.rollout_index == 3
    # What was under way is sampled again by a second fit.
    tiny.fit(module, tmp_path, batches(3))
    assert module.rollout_index == 6


def test_a_fit_of_one_batch_learns_from_it(hydra_trunk: Path, tmp_path: Path) -> None:
    module = made(hydra_trunk, tiny.Early())
    trainer, _ = tiny.fit(module, tmp_path, batches(1))
    assert trainer.global_step == module.rollout_index == 1


@pytest.mark.parametrize("end", ["max_episodes", "max_epochs"])
def test_a_run_that_goes_on_further_is_the_straight_one(
    hydra_trunk: Path, tmp_path: Path, end: str
) -> None:
    def run(name: str, length: int, path: Path | None = None) -> tuple[list[list[int]], Any]:
        engine = Noted()
        epochs, episodes = (length, None) if end == "max_epochs" else (1, 8 * length)
        module = made(hydra_trunk, engine, max_episodes=episodes)
        ready = batches(3 if episodes is None else 6)
        tiny.fit(module, tmp_path / name, ready, saves(), ckpt_path=path, max_epochs=epochs)
        return engine.rows, tiny.weights(module)

    rows, weights = run("straight", 2)
    first, _ = run("first", 1)
    then, again = run("then", 2, last(tmp_path / "first"))
    assert first + then == rows
    assert all(torch.equal(again[key], weight) for key, weight in weights.items())


@pytest.mark.parametrize("engine", [None, Noted(0)])
def test_a_run_may_go_on_without_overlap(
    hydra_trunk: Path, tmp_path: Path, engine: RolloutEngine | None
) -> None:
    tiny.fit(made(hydra_trunk, tiny.Early()), tmp_path / "one", batches(5), saves(), max_steps=2)
    module, learned = made(hydra_trunk, engine), Learned()
    tiny.fit(module, tmp_path / "two", batches(5), learned, ckpt_path=last(tmp_path / "one"))
    # Batch 2 was under way, and batches 3 and 4 follow.
    assert module.rollout_index == 5
    if isinstance(engine, Noted):
        assert engine.rows == [[4, 5], [6, 7], [8, 9]]
        assert len({policy for _, policy in engine.sampled}) == 3


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.filterwarnings("ignore:Step .*KL of")
def test_the_guard_goes_back_to_a_policy_whose_rollout_was_good(
    hydra_trunk: Path, tmp_path: Path, overlap: int
) -> None:
    guard, engine, learned = PolicyGuard(max_kl=0.2, window=None), Noted(overlap), Learned()
    module = made(hydra_trunk, engine)
    learn = module._learn

    def once_badly(*experience: Any) -> Stats:
        stats = learn(*experience)
        if module.rollout_index == 2 and not guard.rollbacks:
            tiny.train_adapters(module, seed=5, scale=3.0)
        return stats

    module._learn = once_badly  # type: ignore[method-assign, assignment]
    trainer, _ = tiny.fit(module, tmp_path, batches(9), guard, learned)
    assert (guard.rollbacks, guard.stopped_by) == (1, None)
    assert trainer.callback_metrics["rollout/kl"] < 0.2
    bad = learned.policies[3 + overlap]
    numbers = [number for number, _ in engine.sampled]
    assert [number for number, policy in engine.sampled if policy == bad] == [3 + overlap]
    # What was under way when it went back was sampled again.
    assert sorted(numbers) == sorted([*range(9 - overlap), *[5] * overlap])


def test_a_batch_that_was_left_out_is_the_one_that_was_learned_from(
    hydra_trunk: Path, tmp_path: Path
) -> None:
    module = made(hydra_trunk, tiny.Early())
    score = module.score

    def broken(rollout: Rollout, *rest: Any, **options: Any) -> Scored:
        scored = score(rollout, *rest, **options)
        bad = module.rollout_index == 1
        return scored._replace(logprobs=scored.logprobs * torch.nan) if bad else scored

    module.score = broken  # type: ignore[method-assign]
    with pytest.warns(match="A step was left out"):
        _, folder = tiny.fit(module, tmp_path, batches(4))
    stored = torch.load(folder / "skipped" / "1.pt", weights_only=True)
    assert stored["row"].tolist() == [2, 3]


def test_only_a_rollout_that_was_started_is_waited_for() -> None:
    with pytest.raises(RuntimeError, match="was not started"):
        Ahead(tiny.prompts(2), {}).wait()
