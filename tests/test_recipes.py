"""Recipes for real models: each is parsed, built and estimated on one block of its trunk's true widths."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_perl.cli import main

ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("configs/recipes/*.yaml"))
HELD = {card: (card - 1) * 1e9 / 2**30 for card in (16, 24, 80)}
"""GiB of what fits a card of so many GB, by `estimate`'s own advice."""


def model_of(path: Path) -> dict[str, Any]:
    arguments: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))["model"]["init_args"]
    return arguments


def quoted(path: Path) -> tuple[str, str]:
    """The peak and the card that a recipe names."""
    line = path.read_text("utf-8").splitlines()[2]
    found = re.match(r"# Estimated peak ([\d.]+) GiB(?: a device)?, for cards of (\d+) GB", line)
    assert found, line
    return found[1], found[2]


def estimated(path: Path, blocks: int, capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    """Peaks of the phases with the published widths and so many blocks."""
    name = Path(model_of(path)["trunk"]).name
    config = Path(f"{name}_{blocks}.json")
    config.write_text(json.dumps(architecture(name) | {"num_hidden_layers": blocks}))
    main(["estimate", "--config", str(path), "--architecture", str(config), "--json"])
    phases = json.loads(capsys.readouterr().out)["phases"]
    return {phase: peak["peak_gib"] for phase, peak in phases.items()}


def architecture(name: str) -> dict[str, Any]:
    """What the hub publishes as the model's config.json, as far as memory depends on it."""
    config = (ROOT / "tests" / "architectures" / f"{name}.json").read_text("utf-8")
    return dict(json.loads(config))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_built_and_estimated(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    peak, card = quoted(path)
    one = estimated(path, 1, capsys)
    assert 0 < max(one.values()) < float(peak)
    assert int(card) == min(size for size, held in HELD.items() if float(peak) <= held)
    reward = model_of(path).get("reward")  # what another recipe leaves
    left = [f"runs/recipes/{other.stem}/latest/adapters/reward" for other in RECIPES]
    assert reward is None or reward in left
    if path.stem == "gemma3_1b_hh_dpo":  # as all quoted peaks were found: each block adds as much
        two = estimated(path, 2, capsys)
        more = architecture("gemma-3-1b-it")["num_hidden_layers"] - 1
        whole = max(one[phase] + more * (two[phase] - one[phase]) for phase in one)
        assert float(peak) == pytest.approx(whole, abs=0.06)


def test_the_page_has_every_recipe_with_its_numbers() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    rows = re.findall(r"^\| \[`(\w[\w.]*)`\]\((\S+)\) \|.*\| ([\d.]+) \| (\d+) \|$", page, re.M)
    expected = [(path.stem, f"../configs/recipes/{path.name}", *quoted(path)) for path in RECIPES]
    assert sorted(rows) == expected
