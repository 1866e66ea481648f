"""What a W&B run keeps of a run's folder."""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger

from lightning_perl.callbacks.wandb_summary import WandbSummary


class Run:
    """A run that remembers its artifacts."""

    id = "abc"

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def log_artifact(self, artifact: wandb.Artifact) -> None:
        self.kept.append(artifact)


@pytest.mark.parametrize("place", ["adapters/actor", "trunk"])
def test_adapters_are_kept_and_of_a_trunk_its_place(tmp_path: Path, place: str) -> None:
    run, folder = Run(), tmp_path / place
    folder.mkdir(parents=True)
    (folder / "weights").write_text("0")
    (tmp_path / "config.yaml").write_text("model: {}\n")
    WandbSummary._keep(run, tmp_path)
    (artifact,) = run.kept
    files = {"config.yaml", "adapters/actor/weights"} if "adapters" in place else {"config.yaml"}
    assert artifact.manifest.entries.keys() == files
    (top,) = artifact.metadata
    assert place.startswith(top)
    assert artifact.metadata[top] == str(tmp_path / top)


def test_a_run_that_handed_nothing_over_keeps_nothing(tmp_path: Path) -> None:
    run = Run()
    WandbSummary._keep(run, tmp_path)
    assert run.kept == []


MODULE: Any = None


def test_a_run_that_goes_on_draws_what_came_before() -> None:
    logged = {"rollout/kl": 1.0, "rollout/score": 2.0, "memory/actor_gib": 3.0}
    trainer: Any = SimpleNamespace(loggers=[object.__new__(WandbLogger)], callback_metrics=logged)
    before, after = WandbSummary(), WandbSummary()
    before.on_train_batch_end(trainer, MODULE, {"episodes": 4})
    after.load_state_dict(deepcopy(before.state_dict()))
    logged |= {"rollout/score": 4.0, "memory/actor_gib": 2.0}
    after.on_train_batch_end(trainer, MODULE, {"episodes": 4})
    after.on_train_batch_end(trainer, MODULE, {"episodes": 0})  # only sent to servers
    assert after._points["rollout/score"] == [[1.0, 2.0], [1.0, 4.0]]
    assert after._memory == {"actor": 3.0}


def test_without_wandb_nothing_is_read_from_the_device() -> None:
    summary, trainer = WandbSummary(), SimpleNamespace(loggers=[])
    summary.on_train_batch_end(trainer, MODULE, {"episodes": 4})  # type: ignore[arg-type]  # has no measures, which nobody may ask for
    assert summary.state_dict() == {}
