"""Scalar heads: fp32, two tensors, and found or asked for."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from lightning_perl.models.heads import HEADS_FILE, ScalarHead, has_head, load_head, save_heads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_head_is_a_dot_product_in_at_least_fp32(dtype: torch.dtype) -> None:
    head = ScalarHead(6, seed=1)
    head.bias.data.fill_(0.7)
    hidden = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = (hidden.double() * head.weight.double()).sum(-1) + 0.7
    found = head(hidden)
    assert found.shape == (2, 3)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
    assert head(hidden[0, 0]).shape == ()


def test_initial_weights_are_small_and_follow_from_the_seed() -> None:
    head, same, other = ScalarHead(4096, 3), ScalarHead(4096, 3), ScalarHead(4096, 4)
    assert torch.equal(head.weight, same.weight)
    assert not torch.equal(head.weight, other.weight)
    assert float(head.weight.detach().std()) == pytest.approx(4097**-0.5, rel=0.05)
    assert not head.bias.any()


def test_heads_come_back_by_name(tmp_path: Path) -> None:
    heads = {"reward": ScalarHead(4, 0), "value": ScalarHead(4, 1)}
    heads["value"].bias.data.fill_(-1.5)
    save_heads(tmp_path / "new", heads)
    for name, head in heads.items():
        found = load_head(tmp_path / "new", name)
        assert torch.equal(found.weight, head.weight)
        assert torch.equal(found.bias, head.bias)
    assert has_head(tmp_path / "new", "reward")
    assert not has_head(tmp_path, "reward")
    # Not beside the weights, where servers take it for weights; but found there, as folders of 0.1 have it.
    assert not list((tmp_path / "new").glob("*.safetensors"))
    shutil.copy(tmp_path / "new" / HEADS_FILE, tmp_path / "heads.safetensors")
    assert torch.equal(load_head(tmp_path, "value").weight, heads["value"].weight)
    assert not has_head(tmp_path / "new", "judge")


def test_a_missing_head_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no reward head \(found: no heads file\).*HydraSFT"):
        load_head(tmp_path, "reward")
    save_heads(tmp_path, {"value": ScalarHead(4)})
    with pytest.raises(ValueError, match=r"has no reward head \(found: \['value'\]\)"):
        load_head(tmp_path, "reward")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bias", None),
        ("bias", torch.zeros(1)),
        ("weight", torch.zeros(2, 2)),
        ("weight", torch.tensor([0.0, math.nan])),
    ],
)
def test_a_damaged_head_is_refused(tmp_path: Path, name: str, value: torch.Tensor | None) -> None:
    save_heads(tmp_path, {"reward": ScalarHead(4)})
    file = tmp_path / HEADS_FILE
    tensors = {**load_file(file), f"reward.{name}": value}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(ValueError, match="its reward head is no vector of finite weights"):
        load_head(tmp_path, "reward")
    file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(ValueError, match=r"heads.safetensors cannot be read .*Copy the folder"):
        load_head(tmp_path, "reward")
