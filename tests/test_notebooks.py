"""The notebooks run from top to bottom, in a small form, and leave what they promise."""

from __future__ import annotations

import base64
import csv
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
# What a notebook's size cell says, and what a test has time for.
SMALL = {"EPISODES": 8, "BATCH": 4, "HELD_OUT": 4}


def small(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Lowers the numbers of the size cell; one that is not there is an error."""
    for name, number in SMALL.items():
        hits = 0
        for cell in notebook.cells:
            old = rf"(?m)^{name} = \d+$"
            cell.source, changed = re.subn(old, f"{name} = {number}", cell.source)
            hits += changed
        assert hits == 1, f"the notebook sets {name} {hits} times"
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_small_and_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert path.stat().st_size < 300_000
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = small(nbformat.read(path, as_version=4))  # type: ignore[no-untyped-call]
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


def test_there_is_the_quickstart() -> None:
    assert "quickstart.ipynb" in [path.name for path in NOTEBOOKS]
