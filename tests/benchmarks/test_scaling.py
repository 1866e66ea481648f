from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.conftest import Script


def test_exponents_of_known_powers(script: Script) -> None:
    exponent = script("scaling").exponent
    assert exponent([1, 2, 4, 8], [3, 6, 12, 24]) == pytest.approx(1)
    assert exponent([1, 10, 100], [5, 5, 5]) == pytest.approx(0)
    assert exponent([2, 3, 7], [4, 9, 49]) == pytest.approx(2)


def test_memory_grows_as_it_should_at_toy_size(script: Script, tmp_path: Path) -> None:
    report, axes = tmp_path / "scaling.md", ("layers", "batch", "micro")
    flags = ["--tiny", "--repeats", "1", "--threads", "1", "--report", str(report), "--axes", *axes]
    found = script("scaling").main(flags)
    assert all(f"\n## {axis}\n" in report.read_text() for axis in axes)
    # Micro-batches keep an update's memory where it is, however large the batch; keys and values grow.
    assert found["batch"]["update, MB"] < 0.3
    assert found["batch"]["rollout, MB"] > 0.4
    assert found["micro"]["update, MB"] > 0.6
    assert found["layers"]["update, MB"] > 0.3


def test_a_rollout_is_fitted_against_its_tokens(script: Script) -> None:
    scaling = script("scaling")
    ones = dict.fromkeys(("rollout", "score", "update"), 1.0)
    # Four rows; prompts with their first tokens take 7 s, every other token half a second.
    points = [
        scaling.Point({**ones, "rollout": 7 + 0.5 * (tokens - 4)}, ones, tokens, 7.0, 4)
        for tokens in (68, 20, 8)
    ]
    lines, exponents = scaling.axis_lines("stop", (0, 0.25, 0.5), points)
    assert exponents[scaling.BEHIND] == pytest.approx(1)
    assert exponents["rollout, s"] < 0.8
    assert lines[2:5] == ["| 0 | 68 | 39 | 32 |", "| 0.25 | 20 | 15 | 8 |", "| 0.5 | 8 | 9 | 2 |"]
    assert lines[5].endswith("**1.00** (1.00) |")
    assert scaling.axis_lines("layers", (1, 2, 4), points)[1]["score, MB"] == pytest.approx(0)
