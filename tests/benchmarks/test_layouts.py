from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.conftest import Script

TRUNKS = {"full": 4, "lora": 4, "dynamic_lora": 2, "perl": 1, "hydra": 1, "joint_hydra": 1}


class Machine:
    """A trunk takes 100 MB, a row of a micro-batch 10; an iteration 1 second and a tenth per episode."""

    def __call__(self, command: Sequence[str]) -> dict[str, Any]:
        flags = dict(zip(command[2::2], command[3::2], strict=True))
        layout, batch, micro = flags["--layout"], int(flags["--batch"]), int(flags["--micro"])
        return {
            "seconds_per_iteration": 1 + 0.1 * batch,
            "peak_rss_mb": 100.0 * TRUNKS[layout] + 10 * micro,
        }


def test_both_tables(script: Script, tmp_path: Path) -> None:
    report = tmp_path / "layouts.md"
    flags = ["--batch", "8", "--micro", "4", "--rounds", "1", "--report", str(report)]
    found = script("layouts").main(flags, Machine())
    # LoRA-PPO's 440 MB hold 34 rows where one trunk is enough.
    assert found["budget_mb"] == 440
    assert {layout: (cost["batch"], cost["micro"]) for layout, cost in found["within"].items()} == {
        "full": (8, 4), "lora": (8, 4), "dynamic_lora": (24, 24),
        "perl": (34, 34), "hydra": (34, 34), "joint_hydra": (34, 34),
    }  # fmt: skip
    text = report.read_text()
    assert "| `lora` | 8 / 4 | 0.225 | 1.00 (+0.0%) | 440 | 18.75 s (1.00) |" in text
    # (1 + 3.4) / 34 against (1 + 0.8) / 8
    assert "| `hydra` | 34 / 34 | 0.129 | 0.58 (-42.5%) | 440 | 6.47 s (0.35, -65.5%) |" in text
    assert "benchmarks/ppo.py --layout LAYOUT --batch 8 --micro 4 --iterations 3`" in text


@pytest.mark.parametrize("budget", [5, 11, 19, 40, 333, 10**6])
@pytest.mark.parametrize("start", [1, 4, 64])
@pytest.mark.parametrize("curve", [0.5, 1.0])
def test_the_largest_batch_is_the_largest(
    script: Script, budget: int, start: int, curve: float
) -> None:
    layouts = script("layouts")
    asked: list[int] = []

    def taken(rows: int) -> float:
        asked.append(rows)
        return 10 + 2 * rows + 0.1 * rows * math.pow(rows, curve)

    found = layouts.largest_batch(taken, budget, start)
    fits = [rows for rows in range(1, layouts.MOST_ROWS + 1) if taken(rows) <= budget]
    del asked[-layouts.MOST_ROWS :]
    best = max(fits, default=0)
    assert best * 31 / 32 <= found <= best
    assert len(set(asked)) == len(asked) <= 13


def test_layouts_that_do_not_fit_are_left_out(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    class Small(Machine):
        def __call__(self, command: Sequence[str]) -> dict[str, Any]:
            found = super().__call__(command)
            if found["peak_rss_mb"] > 300:
                raise RuntimeError("torch.OutOfMemoryError: CUDA out of memory.")
            return found

    layouts = script("layouts")
    flags = ["--rounds", "1", "--budget_mb", "150", "--layouts", "lora", "hydra"]
    assert layouts.fitting(layouts.arguments(flags), 900.0, Small()) == {"hydra": (20, 20)}
    assert list(layouts.main(flags, Machine())["within"]) == ["hydra"]
    # Without the baseline there is nothing to compare.
    with pytest.raises(SystemExit):
        layouts.main(["--layouts", "hydra"], Machine())
    assert "must have lora" in capsys.readouterr().err
