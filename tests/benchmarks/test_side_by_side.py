from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.conftest import Script

PRINTS = "print('on the way'); print('{\"pairs_per_second\": 2.0, \"threads\": 2}')"
SAYS: dict[str, dict[str, Any]] = {
    "ours": {"peak_rss_mb": 300.0, "trunk_dtype": "torch.bfloat16"},
    "peer": {"peak_rss_mb": 400.0, "bf16": 2},
}


class Machine:
    """Ours and a peer's figures in the order they are asked for."""

    def __init__(self, ours: list[float], peer: list[float]) -> None:
        self.figures = {"ours": iter(ours), "peer": iter(peer)}
        self.asked: list[str] = []

    def __call__(self, command: Sequence[str]) -> dict[str, Any]:
        side = command[-1]
        self.asked.append(side)
        return {"episodes_per_second": next(self.figures[side]), **SAYS[side]}


def flags(*more: str) -> list[str]:
    return ["--ours", "run ours", "--peer", "run peer", "--key", "episodes_per_second", *more]


def test_medians_and_ratios(script: Script, tmp_path: Path) -> None:
    machine = Machine([6.0, 2.0, 4.0], [1.0, 2.0, 9.0])
    report = tmp_path / "new" / "report.md"
    main = script("side_by_side").main
    found = main(flags("--title", "PPO, bf16", "--report", str(report)), machine)
    # Who goes first turns, so that neither always finds the machine warm.
    assert machine.asked == ["ours", "peer", "peer", "ours", "ours", "peer"]
    speed = found["episodes_per_second"]
    assert (speed["ours"], speed["peer"], speed["ratio"]) == (4.0, 2.0, 2.0)
    assert speed["ours_range"] == [2.0, 6.0]
    assert speed["ratios"] == [6.0, 1.0, pytest.approx(4 / 9)]
    assert found["peak_rss_mb"]["ratio"] == 0.75
    text = report.read_text()
    assert text.startswith("# Side by side\n\n## PPO, bf16\n\n")
    for line in (
        "| episodes_per_second | 4 (2 to 6) | 2 (1 to 9) | **2.00** (rounds 0.44 to 6.00) |",
        "| peak_rss_mb | 300 (300 to 300) | 400 (400 to 400) | **0.75** (rounds 0.75 to 0.75) |",
        "- ours: `run ours`: trunk_dtype bfloat16",
        "- peer: `run peer`: bf16 2",
    ):
        assert line in text


def test_unprinted_figures_and_two_rounds_are_refused(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    main = script("side_by_side").main
    with pytest.raises(KeyError, match=r"ours prints no 'pairs_per_second'; it prints \['episodes"):
        main(flags("--key", "pairs_per_second"), Machine([1.0] * 3, [1.0] * 3))
    with pytest.raises(SystemExit):
        main(flags("--rounds", "2"))
    assert "--rounds 2: a median needs at least 3" in capsys.readouterr().err


def test_a_child_is_read_by_its_last_line_or_quoted(script: Script) -> None:
    run_json = script("record").run_json
    assert run_json(["python", "-c", PRINTS]) == {"pairs_per_second": 2.0, "threads": 2}
    for code in ("print('no JSON')", "print('{}'); raise SystemExit(3)", ""):
        words = r"python -c .* ended with status \d and without a JSON"
        with pytest.raises(RuntimeError, match=words):
            run_json(["python", "-c", code])


def test_no_machine_path_gets_into_a_report(script: Script) -> None:
    words = [sys.executable, str(Path.cwd().parent / "elsewhere" / "ppo.py"), "--bf16", "1"]
    assert script("record").shown(words) == "python ../elsewhere/ppo.py --bf16 1"
    assert json.dumps(script("record").machine()).count("torch ") == 1
