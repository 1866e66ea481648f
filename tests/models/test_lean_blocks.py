"""Cheap parts computed again in backward: the same numbers, and less that is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close

from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.lean_layers import make_lean, recomputed
from lightning_perl.models.loading import TrunkDtype, load_trunk
from lightning_perl.models.shortcuts import Shortcuts
from lightning_perl.models.trunk import Trunk
from tests.conftest import TinyTrunk
from tests.models.families import FAMILIES

WRITTEN_OUT = ("llama", "qwen3", "mistral", "gemma3", "phi3", "olmo2", "granite", "cohere")


def trained_pass(trunk: Trunk, length: int = 9) -> tuple[Tensor, dict[str, Tensor], int]:
    """Hidden states, every gradient, and the bytes that backward was left."""
    kept: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(3, 3 + 4 * length).view(4, length) % trunk.vocabulary_size
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :3] = False
    with trunk.switch.use("actor"), trunk.training_pass():
        with saved_tensors_hooks(remember, lambda tensor: tensor):
            hidden = trunk(ids, mask)
        weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
        (hidden * weights)[mask].sum().backward()
    gradients = {
        name: parameter.grad
        for name, parameter in trunk.named_parameters()
        if parameter.grad is not None
    }
    return hidden.detach()[mask], gradients, sum(kept.values())


def trunk_of(folder: Path, lean: bool, dtype: TrunkDtype, **options: Any) -> Trunk:
    trunk = load_trunk(str(folder), dtype, shortcuts=Shortcuts(lean_blocks=lean), **options)
    trunk.requires_grad_(False)
    trunk.adapters.add("actor", LoraSpec(rank=2, alpha=4.0), seed=0)
    with torch.no_grad():
        for key, weight in trunk.adapters.tensors("actor").items():
            if "lora_B" in key:
                weight.normal_(generator=torch.Generator().manual_seed(1))
    return trunk


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "olmo"])
def test_every_family_gives_the_same_numbers(
    tiny_trunk: TinyTrunk, family: str, checkpointing: bool
) -> None:
    dtype: TrunkDtype = "float32" if family == "gemma2" else "float64"
    # OLMo clamps the outputs of adapted layers in place.
    olmo = {"model_type": "olmo", "clip_qkv": 0.5} if family == "olmo" else {}
    folder = tiny_trunk("llama", **olmo) if olmo else tiny_trunk(family)
    lean, plain = (
        trained_pass(trunk_of(folder, way, dtype, checkpointing=checkpointing))
        for way in (True, False)
    )
    assert torch.equal(lean[0], plain[0])
    tolerance = 1e-12 if dtype == "float64" else 1e-4
    assert_close(lean[1], plain[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", WRITTEN_OUT)
def test_less_is_kept(tiny_trunk: TinyTrunk, family: str) -> None:
    folder = tiny_trunk(family)
    lean, plain = (trained_pass(trunk_of(folder, way, "bfloat16"))[2] for way in (True, False))
    assert lean < 0.9 * plain


def test_trained_weights_get_their_gradients(tiny_trunk: TinyTrunk) -> None:
    found = []
    for way in (True, False):
        trunk = trunk_of(tiny_trunk("llama"), way, "float64")
        trunk.requires_grad_(True)
        found.append(trained_pass(trunk)[1])
    assert any("norm" in name for name in found[0])
    assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_one_of_two_inputs_without_a_gradient() -> None:
    left = torch.randn(3, dtype=torch.float64, requires_grad=True)
    right = torch.randn(3, dtype=torch.float64)
    recomputed(lambda a, b: (a * b).sin(), left, right).sum().backward()  # type: ignore[no-untyped-call]
    assert left.grad is not None
    assert_close(left.grad, (left * right).cos().detach() * right)
    with torch.no_grad():
        assert not recomputed(torch.sin, left).requires_grad


class GatedMLP(nn.Module):
    """What most families' MLP is."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, hidden: Tensor) -> Tensor:
        """Another name for the input changes nothing."""
        down_proj = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return down_proj  # type: ignore[no-any-return]  # noqa: RET504 (as families write it)


class ClampedMLP(GatedMLP):
    """The same for all numbers that anybody would try out."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Clamped on the way."""
        gate = self.gate_proj(hidden).clamp(max=100.0)
        down_proj = self.down_proj(self.act_fn(gate) * self.up_proj(hidden))
        return down_proj  # type: ignore[no-any-return]  # noqa: RET504 (as families write it)


class SparseMLP(GatedMLP):
    """Says more before it says the same."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Half of the rows thrown away first."""
        hidden = hidden * (hidden > 0)
        down_proj = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return down_proj  # type: ignore[no-any-return]  # noqa: RET504 (as families write it)


@pytest.mark.parametrize(
    ("kind", "taken"), [(GatedMLP, True), (ClampedMLP, False), (SparseMLP, False)]
)
def test_only_a_gated_mlp_to_the_word_is_taken(kind: type[nn.Module], taken: bool) -> None:
    model = nn.Sequential(kind())
    x = 1000 * torch.randn(2, 4)
    before = model(x)
    make_lean(model)
    assert ("forward" in vars(model[0])) == taken
    assert torch.equal(model(x), before)


class HalfABlockNorm(nn.Module):
    """Ends like a norm and holds a layer that may get an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Not a norm."""
        result: Tensor = self.fc(x)
        return result


class PairNorm(nn.Module):
    """Norms two tensors at once."""

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both."""
        return query / query.norm(), key / key.norm()


class WrittenOutNorm(nn.Module):
    """One tensor, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4), requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """RMSNorm."""
        return self.weight * hidden_states * hidden_states.pow(2).mean(-1, keepdim=True).rsqrt()


def test_what_ends_like_a_norm_and_is_more_is_left_alone() -> None:
    model = nn.ModuleList([HalfABlockNorm(), PairNorm(), nn.LayerNorm(4), WrittenOutNorm()])
    make_lean(model)
    assert ["forward" in vars(module) for module in model] == [False, False, False, True]
    x = torch.randn(2, 4, requires_grad=True)
    assert torch.equal(model[3](hidden_states=x), model[3](x))


def test_a_forward_that_somebody_exchanged_stays() -> None:
    norm = WrittenOutNorm()
    theirs = norm.forward = lambda hidden_states: hidden_states  # type: ignore[method-assign]
    make_lean(nn.Sequential(norm))
    assert norm.forward is theirs
