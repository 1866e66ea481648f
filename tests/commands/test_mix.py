"""Mixtures of adapters against the sum of their deltas, in plain PEFT; what cannot be mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lightning_perl.cli import main
from lightning_perl.commands.mix import mix
from lightning_perl.models.adapters import OFF, LoraSpec
from lightning_perl.models.heads import ScalarHead, save_heads
from lightning_perl.models.loading import load_trunk
from lightning_perl.models.manifest import require_trunk_of, write_adapter_manifest
from lightning_perl.whole import written_whole
from tests.conftest import TinyTrunk

IDS = torch.tensor([[5, 60, 71, 82, 93, 104]])
# Ranks, scales and layers differ, as those of adapters from different runs may.
SPECS = (
    LoraSpec(2, 1.0, ("q_proj", "v_proj")),
    LoraSpec(4, 8.0, ("v_proj", "down_proj"), rslora=True),
    LoraSpec(3, 3.0),
)


def trained(trunk: Path, folder: Path, number: int, name: str = "actor") -> Path:
    """An adapter as a run hands it over, in float64."""
    loaded = load_trunk(str(trunk), "float64")
    loaded.adapters.add(name, SPECS[number], number)
    generator = torch.Generator().manual_seed(number)
    for weight in loaded.adapters.parameters(name):
        weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
    with written_whole(folder, {}) as beside:
        loaded.adapters.save(name, beside / str(number), str(trunk))
        write_adapter_manifest(beside / str(number), loaded, [f"reward {number}"])
    return folder / str(number)


@torch.no_grad()
def logits(trunk: Path, *weighted: tuple[Path, float]) -> Tensor:
    """Of the trunk with the weighted deltas of adapters added to its weights, all in plain PEFT and float64."""
    model: Any = AutoModelForCausalLM.from_pretrained(trunk, dtype=torch.float64)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    total = {name: value.clone() for name, value in base.items()}
    for folder, weight in weighted:
        alone: Any = AutoModelForCausalLM.from_pretrained(trunk, dtype=torch.float64)
        merged = PeftModel.from_pretrained(alone, folder, autocast_adapter_dtype=False)
        for name, value in merged.merge_and_unload().state_dict().items():
            total[name] += weight * (value - base[name])
    model.load_state_dict(total)
    found: Tensor = model(IDS).logits
    return found


@pytest.fixture(scope="module")
def adapters(tiny_trunk: TinyTrunk, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [trained(tiny_trunk(), folder, number) for number in range(3)]


@pytest.mark.parametrize(
    "weights", [(0.7, 0.3, 0.0), (1.0, -0.5, 0.25), (0.4, None, None), (0.0, None, None), (1.0,)]
)
def test_a_mixture_is_the_trunk_with_the_weighted_deltas(
    tiny_trunk: TinyTrunk, adapters: list[Path], tmp_path: Path, weights: tuple[float | None, ...]
) -> None:
    used = [(f, w) for f, w in zip(adapters, weights, strict=False) if w is not None]
    out = tmp_path / "mixed"
    main(["mix", str(out), *(f"--adapter={folder}={weight}" for folder, weight in used)])
    trunk = tiny_trunk()
    # As plain PEFT has it, and on a trunk of ours.
    assert_close(logits(trunk, (out, 1.0)), logits(trunk, *used), rtol=1e-12, atol=1e-12)
    loaded = load_trunk(str(trunk), "float64")
    require_trunk_of(out, loaded)
    loaded.adapters.load("mixed", out)
    assert loaded.adapters.specs["mixed"].rank == sum(SPECS[n].rank for n in range(len(used)))
    with torch.no_grad(), loaded.switch.use("mixed"):
        ours = loaded.project(loaded(IDS, torch.ones_like(IDS, dtype=torch.bool)))
    assert_close(ours, logits(trunk, *used), rtol=1e-12, atol=1e-12)
    if used == [(adapters[0], 0.0)]:
        with torch.no_grad(), loaded.switch.use(OFF):
            bare = loaded.project(loaded(IDS, torch.ones_like(IDS, dtype=torch.bool)))
        assert torch.equal(ours, bare)
    about = json.loads((out / "manifest.json").read_text())
    assert about["mixture"] == {str(folder): weight for folder, weight in used}
    assert about["rewarded_by"] == [f"reward {number}" for number in range(len(used))]
    assert set(about["checksums"]) == {"adapter_model.safetensors", "adapter_config.json"}


def test_what_cannot_be_mixed_is_refused(
    tiny_trunk: TinyTrunk, adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, first = tmp_path / "mixed", str(adapters[0])

    def refused(message: str, *others: Path) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            mix(out, {first: 0.5, **{str(other): 0.5 for other in others}})

    other = trained(tiny_trunk(seed=1), tmp_path, 1)
    refused(f"{other} and {first} are not of one trunk: their trunk_fingerprint is", other)
    (other / "manifest.json").unlink()
    refused("not of one trunk: their base_model_name_or_path is", other)
    # Nothing names another trunk, but its matrices have other shapes.
    wide = trained(tiny_trunk(hidden_size=64), tmp_path, 2)
    (wide / "manifest.json").unlink()
    config = json.loads((wide / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tiny_trunk())
    (wide / "adapter_config.json").write_text(json.dumps(config))
    refused("which does not fit .* Only adapters of one trunk can be mixed", wide)
    refused("nowhere is no adapter folder", tmp_path / "nowhere")
    judge = trained(tiny_trunk(), tmp_path / "judges", 0)
    save_heads(judge, {"reward": ScalarHead(32)})
    refused("is a reward adapter", judge)
    with pytest.raises(ValueError, match="a finite weight each"):
        mix(out, {first: float("nan")})
    with pytest.raises(FileExistsError, match="exists already"):
        mix(tmp_path, {first: 1.0})
    with pytest.raises(OSError, match=r"adapter_config.json/out cannot be written: .*Name a place"):
        mix(Path(first, "adapter_config.json", "out"), {first: 1.0})
    assert not out.exists()
    for wrong in ([first], [f"{first}=much"], [f"{first}=0.5", "--adapter", f"{first}=0.1"]):
        with pytest.raises(SystemExit):
            main(["mix", str(out), "--adapter", *wrong])
        printed = capsys.readouterr().err
        assert "must be FOLDER=WEIGHT" in printed or "named twice" in printed
