"""The commands of docs/scale.md, with two ranks on CPUs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_perl.cli import main
from tests.modules.ranks import Launched, on_ranks, srun, torchrun

DOCS = Path(__file__).parents[1] / "docs" / "scale.md"
SMALL = [
    "--trainer.accelerator=cpu",
    "--data.train=packaged:quickstart/orders/prompts_test.jsonl.gz",
    "--data.batch_size=6",
    "--model.minibatch_size=6",
    "--model.max_episodes=12",
    "--trainer.limit_val_batches=1",
    "--data.val_batch_size=4",
]


def arguments_after(launcher: str, command: str = "fit") -> list[str]:
    """What the one such command of the page gives to the program, for two ranks on one node."""
    text = re.sub(r"\\\n *", "", DOCS.read_text("utf-8"))
    (line,) = re.findall(rf"^{launcher} (?:.* )?-m lightning_perl ({command} .*)$", text, re.M)
    given = line.replace("devices 8", "devices 2").replace("num_nodes 2", "num_nodes 1")
    return shlex.split(given)


def assert_one_run(folder: Path) -> None:
    assert [path.name for path in folder.glob("runs/quickstart/version_*")] == ["version_0"]
    run = folder / "runs/quickstart/version_0"
    episodes = (run / "metrics.csv").read_text().splitlines()
    column = episodes[0].split(",").index("train/episodes")
    assert "12.0" in [row.split(",")[column] for row in episodes[1:]]
    assert (run / "adapters/actor/adapter_model.safetensors").is_file()
    assert len((run / "samples.jsonl").read_text().splitlines()) in (6, 12)


def test_lightning_launches_two_ranks(tmp_path: Path) -> None:
    given = [*arguments_after("python", "fit"), *SMALL]
    command = [sys.executable, "-m", "lightning_perl", *given]
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parents[1])}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=240)
    assert_one_run(tmp_path)


@pytest.mark.parametrize(("launcher", "launched"), [("torchrun", torchrun), ("srun", srun)])
def test_others_launch_two_ranks(
    launcher: str, launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [*arguments_after(launcher), *SMALL]
    on_ranks(2, tmp_path / "ranks", main, given, launched=launched)
    assert_one_run(tmp_path)


def test_the_estimate_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments_after("python", "estimate")
    # One block instead of 32, which would take a minute.
    sizes = ["--layers=1", "--model.micro_batch_size=1", "--vocabulary_size=500"]
    main([*given, *sizes])
    assert "32 rows a batch on each of 4 devices" in capsys.readouterr().out
