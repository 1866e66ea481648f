from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_perl.callbacks import speed
from tests.benchmarks.conftest import Script


def test_every_part_at_toy_size(
    script: Script,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, report = script("gpu"), tmp_path / "gpu.md"
    monkeypatch.setattr(gpu, "ESTIMATED", ("SFT", "PPO hydra"))
    monkeypatch.setattr(gpu, "CHECKPOINTING", (True,))
    monkeypatch.setitem(gpu.SHAPES, "tiny", replace(gpu.SHAPES["tiny"], layers=1))
    for module in (gpu, speed):
        monkeypatch.setattr(module, "matmul_tflops", lambda device, dtype: 0.5)
    status = gpu.main(["--tiny", "--layouts", "full", "hydra", "--report", str(report)])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == dict.fromkeys(("speed", "decoding", "estimate", "callbacks"), "done")
    assert status == 0
    parts = report.read_text().split("\n## ")
    sections = dict(part.split("\n", 1) for part in parts if "\n" in part)
    for layout in ("full", "hydra"):
        (row,) = [line for line in sections["speed, tiny"].splitlines() if f"`{layout}`" in line]
        assert all(float(cell) > 0 for cell in row.strip("|").split("|")[1:])
    lines = sections["estimate, tiny"].splitlines()
    runs = [line.split(" | ") for line in lines if " | yes" in line]
    assert [run[0].strip("| ") for run in runs] == ["SFT", "PPO hydra"]
    # The prediction at the peak, in percent, of tensors of some hundred bytes each.
    assert all(abs(float(run[5].rstrip("%"))) < 15 for run in runs)
    assert "speed/mfu" in sections["callbacks, tiny"]


def test_without_cuda_it_says_so(
    script: Script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        script("gpu").main([])
    assert "this machine has no CUDA device" in capsys.readouterr().err


def test_a_part_that_fails_leaves_the_others(
    script: Script,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, report = script("gpu"), tmp_path / "gpu.md"

    def broken(bench: object) -> list[str]:
        raise RuntimeError("no such kernel")

    parts = {"speed": broken, "decoding": lambda bench: ["fine"], "late": lambda bench: ["never"]}
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.main(["--tiny", "--parts", "speed", "decoding", "--report", str(report)]) == 1
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == {"speed": "failed: RuntimeError: no such kernel", "decoding": "done"}
    assert all(words in report.read_text() for words in ("no such kernel", "fine"))
    assert gpu.main(["--tiny", "--parts", "late", "--minutes", "-1"]) == 1
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["late"].startswith("left out")


def test_bytes_of_a_decoded_token(script: Script, tmp_path: Path) -> None:
    gpu = script("gpu")
    sizes = gpu.SHAPES["tiny"]
    bench = gpu.Bench(torch.device("cpu"), gpu.TINY, sizes, tmp_path, ())
    trunk = gpu.made(bench, "PPO hydra", gpu.trunk_folder(bench), rank=3).policy_trunk
    linear = 4 * 32 * 32 + 3 * 32 * 64
    low_rank = 3 * (4 * (32 + 32) + 3 * (32 + 64))
    weights = 2 * (512 * 32 + 2 * (linear + 2 * 32) + 2 * low_rank)  # norms; adapters at rest
    cache = 2 * 2 * 2 * 32 * 5 * 7  # layers, keys and values, bytes, width, rows, tokens
    assert gpu.bytes_per_step(trunk, sizes, 5, 7) == weights + cache
