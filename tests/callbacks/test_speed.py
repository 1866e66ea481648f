from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_perl.callbacks import SpeedMonitor, speed
from tests.callbacks.phased import Phased, Rows, Work, quiet_trainer


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(speed, "perf_counter", fake)
    return fake


def fit(folder: Path, work: Work, batches: int = 1) -> dict[str, float]:
    trainer = quiet_trainer(folder, [SpeedMonitor()])
    trainer.fit(Phased(work), Rows(batches))
    return {key: value.item() for key, value in trainer.logged_metrics.items()}


def test_exact_seconds_and_rates(tmp_path: Path, clock: Clock) -> None:
    def work(module: Phased) -> dict[str, Any]:
        with module.phase("rollout"):
            clock.now += 4.0
        with module.phase("score"):
            clock.now += 0.5
        clock.now += 0.5  # advantages: in no phase, but in the train batch
        for _ in range(2):
            with module.phase("actor"):
                clock.now += 1.0
            with module.phase("critic"):
                clock.now += 0.75
            with module.phase("optimizer"):
                clock.now += 0.25
        return {"episodes": 6, "tokens": {"rollout": 128, "score": 64, "update": 512}}

    # Two train batches: nothing of the first is left in the second.
    assert fit(tmp_path, work, batches=2) == {
        "speed/rollout_seconds": 4.0,
        "speed/score_seconds": 0.5,
        "speed/actor_seconds": 2.0,
        "speed/critic_seconds": 1.5,
        "speed/optimizer_seconds": 0.5,
        "speed/rollout_tokens_per_second": 32.0,
        "speed/score_tokens_per_second": 128.0,
        "speed/update_tokens_per_second": 128.0,  # 512 / (2 + 1.5 + 0.5)
        "speed/seconds_per_episode": 1.5,  # 9 / 6
    }


def test_a_nested_phase_takes_its_time_from_the_outer(tmp_path: Path, clock: Clock) -> None:
    def work(module: Phased) -> dict[str, Any]:
        with module.phase("actor"):
            clock.now += 1.0
            with module.phase("optimizer"):
                clock.now += 2.0
            clock.now += 1.0
        return {"episodes": 1, "tokens": {"update": 8}}

    assert fit(tmp_path, work) == {
        "speed/actor_seconds": 2.0,
        "speed/optimizer_seconds": 2.0,
        "speed/update_tokens_per_second": 2.0,
        "speed/seconds_per_episode": 4.0,
    }


@pytest.mark.parametrize("outputs", [None, {}, {"episodes": 0, "tokens": {"rollout": 5}}])
def test_a_module_without_phases_or_counts(
    tmp_path: Path, clock: Clock, outputs: dict[str, Any] | None
) -> None:
    def work(module: Phased) -> dict[str, Any] | None:
        clock.now += 0.5
        return outputs

    assert fit(tmp_path, work) == {"speed/step_seconds": 0.5}


def test_the_device_is_waited_for_at_every_boundary(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", 1)
    pending = 0.0

    def synchronize(which: torch.device) -> None:
        nonlocal pending
        assert which == device
        clock.now += pending
        pending = 0.0

    def work(module: Phased) -> None:
        nonlocal pending
        with module.phase("rollout"):
            pending = 3.0  # launched here, done later
        with module.phase("score"):
            pending = 1.0

    monkeypatch.setattr(speed, "cuda_device", lambda trainer: device)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert fit(tmp_path, work) == {"speed/rollout_seconds": 3.0, "speed/score_seconds": 1.0}
