from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger

from lightning_perl import phases
from lightning_perl.callbacks import CudaMemoryMonitor, CudaMemorySnapshot, cuda_memory
from tests.callbacks.phased import Phased, Rows, Work, quiet_trainer

GIB = 1024**3
DEVICE = torch.device("cuda", 3)


class FakeCuda:
    """An allocator with torch's counters; freed memory stays reserved until `empty_cache`."""

    def __init__(self) -> None:
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0
        self.calls: list[str] = []

    def allocate(self, gib: float) -> None:
        self.allocated += round(gib * GIB)
        self.reserved = max(self.reserved, self.allocated)
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def touch(self, gib: float) -> None:
        """Allocates and frees."""
        self.allocate(gib)
        self.allocated -= round(gib * GIB)

    def empty_cache(self) -> None:
        self.reserved = self.allocated

    def max_memory_allocated(self, device: torch.device) -> int:
        assert device == DEVICE
        return self.peak_allocated

    def max_memory_reserved(self, device: torch.device) -> int:
        assert device == DEVICE
        return self.peak_reserved

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        assert device == DEVICE
        self.calls.append("reset")
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Lets the callbacks believe that the run is on a GPU; the trainer knows it is not."""
    fake = FakeCuda()
    for name in ("max_memory_allocated", "max_memory_reserved", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(phases, "cuda_device", lambda trainer: DEVICE)
    return fake


def fit(folder: Path, work: Work, *callbacks: Callback, batches: int = 1) -> list[dict[str, float]]:
    """What each train batch logged."""
    seen: list[dict[str, float]] = []
    look = LambdaCallback(
        on_train_batch_end=lambda trainer, *_: seen.append(
            {key: value.item() for key, value in trainer.logged_metrics.items()}
        )
    )
    quiet_trainer(folder, [*callbacks, look]).fit(Phased(work), Rows(batches))
    return seen


def nothing(module: Phased) -> None:
    """A train batch without phases."""


def test_peaks_per_phase_in_exact_gib(
    tmp_path: Path, cuda: FakeCuda, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda.allocate(1.0)  # the trunk

    def work(module: Phased) -> None:
        with module.phase("rollout"):
            cuda.touch(2.5)  # peak 3.5
        with module.phase("score"):
            cuda.touch(0.25)  # peak 1.25: the rollout's is forgotten, its 3.5 stay reserved
        cuda.empty_cache()
        with module.phase("actor"):
            cuda.touch(2.0)  # before the inner phase resets the peaks
            cuda.empty_cache()
            with module.phase("optimizer"):
                cuda.touch(1.0)
        cuda.empty_cache()

    (logged,) = fit(tmp_path, work, CudaMemoryMonitor())
    peaks = {"rollout": 3.5, "score": 1.25, "actor": 3.0, "optimizer": 2.0}
    assert logged == {
        **{f"memory/{phase}_peak_allocated_gib": peak for phase, peak in peaks.items()},
        **{f"memory/{phase}_peak_reserved_gib": peak for phase, peak in peaks.items()},
        "memory/score_peak_reserved_gib": 3.5,
    }
    line = "rollout 3.50 | score 1.25 | actor 3.00 | optimizer 2.00"
    assert f"memory (peak GiB): {line}\n" in capsys.readouterr().out


def test_a_repeated_phase_keeps_its_largest_peak_of_the_batch(
    tmp_path: Path, cuda: FakeCuda, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks = iter([(0.5, 2.0, 1.0), (0.25, 0.5, 0.125)])

    def work(module: Phased) -> None:
        for gib in next(peaks):
            with module.phase("actor"):
                cuda.touch(gib)
            with module.phase("critic"):
                cuda.touch(gib / 2)
            cuda.empty_cache()

    logged = fit(tmp_path, work, CudaMemoryMonitor(), batches=2)
    # A train batch does not inherit the peaks of the one before.
    for phase, largest in (("actor", [2.0, 0.5]), ("critic", [1.0, 0.25])):
        assert [batch[f"memory/{phase}_peak_allocated_gib"] for batch in logged] == largest
    # One reset per train batch, one per phase.
    assert cuda.calls == ["reset"] * 2 * (1 + 6)
    # The line covers the fit.
    assert "memory (peak GiB): actor 2.00 | critic 1.00\n" in capsys.readouterr().out


def test_a_module_without_phases_is_one_phase_and_others_are_not_logged(
    tmp_path: Path, cuda: FakeCuda
) -> None:
    def before(trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, Phased)
        with module.phase("rollout"):
            cuda.touch(8.0)  # not the train batch's peak

    touch = LambdaCallback(on_train_start=before)
    (logged,) = fit(tmp_path, lambda module: cuda.touch(0.75), CudaMemoryMonitor(), touch)
    assert logged == {"memory/step_peak_allocated_gib": 0.75, "memory/step_peak_reserved_gib": 8.0}


def test_resident_memory_without_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resident = 1.0

    def work(module: Phased) -> None:
        nonlocal resident
        with module.phase("rollout"):
            resident = 1.5
        with module.phase("score"):
            resident = 0.5  # falls inside: the start's 1.5 is the larger reading

    monkeypatch.setattr(cuda_memory, "resident_bytes", lambda: round(resident * GIB))
    (logged,) = fit(tmp_path, work, CudaMemoryMonitor())
    assert logged == {"memory/rollout_resident_gib": 1.5, "memory/score_resident_gib": 1.5}
    assert "memory (resident GiB): rollout 1.50 | score 1.50\n" in capsys.readouterr().out


def test_memory_stands_in_the_row_of_the_modules_own_keys(tmp_path: Path, cuda: FakeCuda) -> None:
    def work(module: Phased) -> None:
        with module.phase("rollout"):
            cuda.allocate(0.5)
        module.log("train/loss", 7.0)

    logger = CSVLogger(tmp_path)
    trainer = quiet_trainer(tmp_path, [CudaMemoryMonitor()], logger=logger)
    trainer.fit(Phased(work), Rows(2))
    with Path(logger.log_dir, "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["memory/rollout_peak_allocated_gib"] for row in rows] == ["0.5", "1.0"]
    assert [row["train/loss"] for row in rows] == ["7.0", "7.0"]
    assert [row["step"] for row in rows] == ["0", "1"]


class FakeHistory:
    """Writes down what is asked of torch's recorder; a dump is a file with its number."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def record(self, enabled: str | None = "all", **settings: Any) -> None:
        self.calls.append((enabled, settings) if settings else enabled)

    def dump(self, filename: str) -> None:
        self.calls.append(Path(filename).name)
        Path(filename).write_text(str(len(self.calls)), encoding="utf-8")


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> FakeHistory:
    fake = FakeHistory()
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", fake.record)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", fake.dump)
    monkeypatch.setattr(cuda_memory, "cuda_device", lambda trainer: DEVICE)
    return fake


def recording(max_entries: int = 100_000) -> tuple[str, dict[str, Any]]:
    return ("all", {"stacks": "python", "max_entries": max_entries, "clear_history": True})


def test_snapshot_of_some_train_batches(
    tmp_path: Path, history: FakeHistory, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(module: Phased) -> None:
        history.calls.append("batch")

    snapshot = CudaMemorySnapshot(tmp_path / "deep" / "folder", 1, 2, max_entries=7)
    fit(tmp_path, work, snapshot, batches=4)
    name = "batches_1_to_2_rank0.pickle"
    assert history.calls == [
        recording(7),  # for an out-of-memory in the first batch
        "batch",
        recording(7),  # drops what came before
        "batch",
        "batch",
        name,
        "batch",
        None,
    ]
    path = tmp_path / "deep" / "folder" / name
    assert path.exists()
    assert f"memory snapshot: {path} (open it at https://pytorch.org" in capsys.readouterr().out


def test_snapshot_goes_into_the_run_folder_and_overwrites_nothing(
    tmp_path: Path, history: FakeHistory
) -> None:
    fit(tmp_path, nothing, CudaMemorySnapshot(start_step=0, steps=1))
    assert (tmp_path / "version_0" / "memory" / "batches_0_to_0_rank0.pickle").exists()
    for _ in range(2):
        fit(tmp_path, nothing, CudaMemorySnapshot(tmp_path, 0, 1))
    names = sorted(path.name for path in tmp_path.glob("*.pickle"))
    assert names == ["batches_0_to_0_rank0.pickle", "batches_0_to_0_rank0_2.pickle"]


@pytest.mark.parametrize(("start", "first"), [(1, 1), (9, 0)])
def test_a_fit_that_ends_early_leaves_what_there_is(
    start: int, first: int, tmp_path: Path, history: FakeHistory
) -> None:
    fit(tmp_path, nothing, CudaMemorySnapshot(tmp_path, start, 5), batches=3)
    assert [path.name for path in tmp_path.glob("*")] == [f"batches_{first}_to_2_rank0.pickle"]


def explode(module: Phased) -> None:
    with module.phase("rollout"):
        pass
    with module.phase("actor"), module.phase("optimizer"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def explode_wrapped(module: Phased) -> None:
    try:
        explode(module)
    except torch.OutOfMemoryError as error:
        raise RuntimeError("out of memory in optimizer: lower micro_batch_size") from error


def explode_outside(module: Phased) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def explode_otherwise(module: Phased) -> None:
    raise RuntimeError("out of memory, says another library")


@pytest.mark.parametrize(
    ("work", "names"),
    [
        (explode, ["out_of_memory_in_optimizer_rank0.pickle"]),
        (explode_wrapped, ["out_of_memory_in_optimizer_rank0.pickle"]),
        (explode_outside, ["out_of_memory_in_no_phase_rank0.pickle"]),
        (explode_otherwise, []),
    ],
)
def test_out_of_memory_leaves_a_file_named_for_its_phase(
    tmp_path: Path,
    history: FakeHistory,
    capsys: pytest.CaptureFixture[str],
    work: Callable[[Phased], None],
    names: list[str],
) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(tmp_path, work, CudaMemorySnapshot(tmp_path))
    assert history.calls == [recording(), *names, None]
    printed = capsys.readouterr().out
    assert all(f"memory snapshot: {tmp_path / name}" in printed for name in names)


def test_snapshot_without_cuda_warns_and_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHistory()
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", fake.record)
    with pytest.warns(UserWarning, match=r"this run is on cpu.*Nothing is recorded"):
        fit(tmp_path, nothing, CudaMemorySnapshot(tmp_path, 0, 1), batches=2)
    assert fake.calls == []
