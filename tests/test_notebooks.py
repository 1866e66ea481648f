"""The notebooks run from top to bottom, in a small form, and leave what they promise."""

from __future__ import annotations

import base64
import csv
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from lightning_perl.models.adapters import stored_spec

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
# What a notebook's size cells say, and what a test has time for.
SMALL: dict[str, object] = {"EPISODES": 8, "BATCH": 4, "HELD_OUT": 4}
SIZES: dict[str, dict[str, object]] = {
    "quickstart": SMALL,
    "reward_model": {"ROWS": 32, "HELD_OUT": 16},
    "memory": {"LAYERS": 2, "TOKENS": 32, "LAYOUTS": '("hydra",)'},
    "which_method": {"ROWS": 32, "HELD_OUT": 4},
    "own_method": SMALL,
    "real_model": SMALL | {"TRUNK": '"packaged:quickstart/trunk"'},
}
LEFT = {
    "reward_model": "runs/thumbs/version_0/adapters/reward",
    "memory": "runs/memory/version_0/adapters/actor",
    "which_method": "runs/dpo/version_0/adapters/actor",
    "own_method": "runs/own/version_0/adapters/actor",
    "real_model": "runs/real/version_0/adapters/actor",
}
"""An adapter that the notebook trained."""
SAYS = {
    "reward_model": "length-score correlation",
    "memory": "memory (resident GiB)",
    "which_method": "win_rate",
    "own_method": "largest difference",
    "real_model": "policy earns",
}


def small(path: Path) -> nbformat.NotebookNode:
    """A notebook with smaller sizes; one that is not there is an error."""
    notebook: nbformat.NotebookNode = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    for name, size in SIZES[path.stem].items():
        hits = 0
        for cell in notebook.cells:
            cell.source, changed = re.subn(
                rf"(?m)^{name} = (\d+|\".*\"|\(.*\))$", f"{name} = {size}", cell.source
            )
            hits += changed
        assert hits == 1, f"{path.name} sets {name} {hits} times"
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_small_and_shows_what_it_gave(path: Path) -> None:
    assert path.stat().st_size < 300_000
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]


def test_the_quickstart_runs_in_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = small(ROOT / "notebooks" / "quickstart.ipynb")
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output.get("data", {}) for output in outputs]
    first = next(data["image/png"] for data in shown if "image/png" in data)
    assert base64.b64decode(first).startswith(b"\x89PNG")
    run = tmp_path / "runs" / "notebook" / "version_0"
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        episodes = [row["train/episodes"] for row in csv.DictReader(file) if row["train/episodes"]]
    assert episodes == ["4.0", "8.0"]
    assert (run / "adapters" / "actor" / "adapter_config.json").is_file()
    said = "".join(output.get("text", "") for output in outputs)
    assert "memory (" in said
    assert "held-out prompts, reference -> policy" in said
    # Nothing of the run lies in the repository.
    assert not (ROOT / "notebooks" / "runs").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LEFT)
def test_the_others_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process: a kernel would import everything again.
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in small(ROOT / "notebooks" / f"{name}.ipynb").cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, name, "exec"), names)
    assert SAYS[name] in capsys.readouterr().out
    stored_spec(tmp_path / LEFT[name])


def test_every_notebook_is_tested() -> None:
    assert {path.stem for path in NOTEBOOKS} == SIZES.keys() == {"quickstart", *LEFT}
