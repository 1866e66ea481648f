"""What a W&B run keeps of a run's folder."""

from pathlib import Path
from typing import Any

import pytest
import wandb

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
