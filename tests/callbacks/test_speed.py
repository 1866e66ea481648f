from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_perl import phases
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


class Counting(Phased):
    """Knows its FLOPs: what `work` adds to them."""

    flops = 0
    product_dtype = torch.float64


def fit(
    folder: Path,
    work: Work,
    batches: int = 1,
    module: type[Phased] = Phased,
    monitor: SpeedMonitor | None = None,
) -> dict[str, float]:
    trainer = quiet_trainer(folder, [monitor or SpeedMonitor()])
    trainer.fit(module(work), Rows(batches))
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


@pytest.mark.parametrize(
    ("outputs", "rates"),
    [
        (None, {}),
        ({}, {}),
        ({"episodes": 0, "tokens": {"rollout": 5}}, {}),
        ({"tokens": {"step": 32}}, {"speed/step_tokens_per_second": 64.0}),
    ],
)
def test_a_module_without_phases(
    tmp_path: Path, clock: Clock, outputs: dict[str, Any] | None, rates: dict[str, float]
) -> None:
    def work(module: Phased) -> dict[str, Any] | None:
        clock.now += 0.5
        return outputs

    assert fit(tmp_path, work) == {"speed/step_seconds": 0.5, **rates}


def test_flops_of_phases_and_of_the_train_batch(tmp_path: Path, clock: Clock) -> None:
    def work(module: Phased) -> None:
        assert isinstance(module, Counting)
        with module.phase("rollout"):
            clock.now += 2.0
            module.flops += 1 * 10**12
        with module.phase("actor"):
            clock.now += 1.0
            module.flops += 2 * 10**12
            with module.phase("optimizer"):
                clock.now += 0.5  # multiplies no matrices
        clock.now += 0.5
        module.flops += 10**12  # in no phase, but in the train batch

    # Two train batches: nothing of the first is left in the second.
    logged = fit(tmp_path, work, 2, Counting, SpeedMonitor(peak_tflops=4.0))
    assert {key: value for key, value in logged.items() if "seconds" not in key} == {
        "speed/rollout_tflops": 0.5,
        "speed/actor_tflops": 2.0,
        "speed/tflops": 1.0,  # 4 / 4 s
        "speed/mfu": 0.25,
    }


@pytest.mark.parametrize("rate", [2e9, 1e12], ids=["slow", "fast"])
def test_the_peak_is_the_machines_and_found_in_time(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    sizes: list[int] = []

    def product(left: torch.Tensor, right: torch.Tensor) -> None:
        assert left.shape == right.shape
        assert left.dtype == right.dtype == torch.bfloat16
        size = len(left)
        # Small products are slower, and every size's first one takes ten times as long.
        clock.now += 2 * size**2 * 2048 / rate * (1 if size in sizes else 10)
        sizes.append(size)

    monkeypatch.setattr(torch, "mm", product)
    before = torch.get_rng_state()
    started = clock.now
    found = speed.matmul_tflops(torch.device("cpu"), torch.bfloat16)
    assert found == pytest.approx(rate * max(sizes) / 2048 / 1e12, rel=1e-6)
    assert max(sizes) == (2048 if rate == 1e12 else 256)
    assert clock.now - started < 4.0
    assert torch.equal(torch.get_rng_state(), before)


def test_the_peak_is_measured_once_in_the_modules_dtype(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[torch.device, torch.dtype]] = []

    def measured(device: torch.device, dtype: torch.dtype) -> float:
        asked.append((device, dtype))
        return 8.0

    def work(module: Phased) -> None:
        assert isinstance(module, Counting)
        clock.now += 1.0
        module.flops += 10**12

    monkeypatch.setattr(speed, "matmul_tflops", measured)
    assert fit(tmp_path, work, 2, Counting)["speed/mfu"] == 0.125
    assert asked == [(torch.device("cpu"), torch.float64)]
    fit(tmp_path, work, 1, Counting, SpeedMonitor(peak_tflops=1.0))
    fit(tmp_path, lambda module: None)  # counts nothing, so nothing is a fraction of a peak
    assert len(asked) == 1


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

    monkeypatch.setattr(phases, "cuda_device", lambda trainer: device)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert fit(tmp_path, work) == {"speed/rollout_seconds": 3.0, "speed/score_seconds": 1.0}
