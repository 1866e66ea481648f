"""Trunks in 4 and 8 bits: what is quantized, that it is exact in itself, what is written, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_perl.functional.sequences import position_ids
from lightning_perl.models import quantization
from lightning_perl.models.adapters import OFF, linear_layers_in_blocks
from lightning_perl.models.heads import ScalarHead, save_heads
from lightning_perl.models.loading import TrunkDtype, load_trunk
from lightning_perl.models.manifest import save_trunk, write_adapter_manifest
from lightning_perl.models.quantization import Quantization, dense, quantization_of
from lightning_perl.models.roles import Layout, Role, Roles
from lightning_perl.models.trunk import Trunk
from lightning_perl.models.weightless import weightless
from lightning_perl.modules import SFT
from tests.conftest import TinyTrunk
from tests.models.rows import (
    ROLES,
    SPEC,
    backward,
    build,
    gradients,
    loss,
    padded,
)

if any(find_spec(name) is None for name in quantization.NEEDS):
    pytest.skip("needs bitsandbytes and accelerate", allow_module_level=True)


KINDS: tuple[Quantization, ...] = ("nf4", "int8")
both = pytest.mark.parametrize("kind", KINDS)


def quantized_layers(trunk: Trunk) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in trunk.model.named_modules():
        if quantization_of(module):
            assert isinstance(module, nn.Linear)
            yield name.removesuffix(".base_layer"), module


def own_values(layer: nn.Linear, kind: Quantization) -> Tensor:
    """The values of a layer's codes, taken out without `dense`."""
    weight = cast(Any, layer.weight)
    if kind == "int8":
        return cast(Tensor, weight.data.float() * weight.SCB.view(-1, 1) / 127)
    state = weight.quant_state
    assert state.quant_type == "nf4"
    scales = state.state2.code[state.absmax.int()].view(-1)
    nested = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(scales)]
    scales = scales * nested + state.offset
    codes = torch.stack([weight.data.view(-1) >> 4, weight.data.view(-1) & 15], 1).view(-1).int()
    values = state.code[codes] * scales.repeat_interleave(state.blocksize)[: len(codes)]
    return cast(Tensor, values.view(state.shape))


# ---- what is quantized -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(
            (family, "nf4")
            for family in ("llama", "gemma3", "phi3", "gpt2", "opt", "gpt_neox", "cohere")
        ),
        ("llama", "int8"),
        ("gpt2", "int8"),
    ],
)
def test_the_blocks_linear_layers_are_quantized_and_no_embedding_or_lm_head(
    tiny_trunk: TinyTrunk, family: str, kind: Quantization
) -> None:
    folder = str(tiny_trunk(family))
    plain, trunk = load_trunk(folder), load_trunk(folder, quantization=kind)
    wanted = linear_layers_in_blocks(plain.model)
    found = [name for name, _ in quantized_layers(trunk)]
    # OPT may have a linear layer before and behind its blocks too.
    assert [name for name in found if ".project_" not in name] == wanted
    assert linear_layers_in_blocks(trunk.model) == wanted
    assert (plain.quantization, trunk.quantization) == (None, kind)
    assert trunk.dtype == torch.float32
    assert torch.equal(trunk.lm_head.weight, plain.lm_head.weight)
    embeddings = [
        cast(nn.Embedding, one.model.get_input_embeddings()).weight for one in (plain, trunk)
    ]
    assert torch.equal(embeddings[0], embeddings[1])
    tied = plain.lm_head.weight is embeddings[0]
    assert (trunk.lm_head.weight is embeddings[1]) == tied
    for _, layer in quantized_layers(trunk):
        assert not layer.weight.requires_grad
        size = layer.weight.numel() * layer.weight.element_size()
        assert size == layer.in_features * layer.out_features * {"nf4": 0.5, "int8": 1.0}[kind]
        # LLM.int8() keeps a second name for its codes, which would stay where it was on a move.
        assert getattr(layer.weight, "CB", None) is None


@both
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_values_are_near_those_of_the_folder_by_the_kinds_own_bound(
    tiny_trunk: TinyTrunk, family: str, kind: Quantization
) -> None:
    folder = str(tiny_trunk(family))
    plain = load_trunk(folder).model.state_dict()
    for name, layer in quantized_layers(load_trunk(folder, quantization=kind)):
        stored = plain[f"{name}.weight"]
        stored = stored.T if family == "gpt2" else stored
        found = dense(layer)
        assert_close(found, own_values(layer, kind), atol=1e-6, rtol=1e-5)
        if kind == "int8":
            # Half a step of each output's 127, and fp16 before.
            bound = stored.abs().amax(1, keepdim=True) * (0.5 / 127 + 2**-10)
        else:
            # Half the widest gap between two of the 16 values, 0.152 of a block's largest; and the
            # scales themselves are rounded to 8 bits.
            largest = stored.reshape(-1, 64).abs().amax(1, keepdim=True)
            bound = (0.17 * largest).expand(-1, 64).reshape(stored.shape)
        assert bool(((found - stored).abs() <= bound).all())


# ---- a row's result is its own -----------------------------------------------------------------


@both
def test_a_row_does_not_depend_on_its_batch_mates_and_keeps_no_activations(
    tiny_trunk: TinyTrunk, kind: Quantization
) -> None:
    _, layer = next(quantized_layers(load_trunk(str(tiny_trunk()), quantization=kind)))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, layer.in_features, generator=generator)
    rows[1:, ::2] *= 100
    rows.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        together = layer(rows)
    assert kept == []
    alone = torch.cat([layer(row.unsqueeze(0)) for row in rows])
    assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert_close(together, rows @ dense(layer).T, atol=1e-4, rtol=1e-5)
    dy = torch.randn(together.shape, generator=generator)
    (found,) = torch.autograd.grad(together, rows, dy)
    assert_close(found, dy @ dense(layer), atol=1e-6, rtol=1e-5)


# ---- a dense twin ------------------------------------------------------------------------------


def twin_of(roles: Roles, folder: Path, **options: Any) -> Roles:
    """The same roles on the dense values of the same trunk."""
    save_trunk(roles.trunk("policy"), folder, None, {})
    save_heads(folder, {"reward": roles.reward_head()})
    return build(folder, roles.layout, **options)


@pytest.mark.parametrize(
    ("family", "kind", "checkpointing"),
    [
        ("llama", "nf4", False),
        ("llama", "int8", True),
        ("gpt2", "nf4", True),
        ("gpt2", "int8", False),
        ("opt", "nf4", False),
        ("gemma2", "int8", False),
    ],
)
def test_answers_and_gradients_are_those_of_a_dense_twin(
    tiny_trunk: TinyTrunk, tmp_path: Path, family: str, kind: Quantization, checkpointing: bool
) -> None:
    rows = padded()
    roles = build(tiny_trunk(family), quantization=kind, checkpointing=checkpointing)
    twin = twin_of(roles, tmp_path)
    assert twin.trunk("policy").quantization is None
    answers, expected = roles.answer(rows, ROLES), twin.answer(rows, ROLES)
    for name in (*ROLES, "entropy"):
        assert_close(getattr(answers, name), getattr(expected, name), atol=2e-5, rtol=1e-4)
    trained: tuple[Role, ...] = ("policy", "value")
    for role in trained:
        for one in (roles, twin):
            one.zero_grad()
            with one.trunk("policy").training_pass():
                backward(loss(one, rows, role))
        expected_gradients = gradients(twin)
        assert gradients(roles).keys() == expected_gradients.keys()
        for name, found in gradients(roles).items():
            other = "critic" if role == "policy" else "actor"
            assert f".{other}." not in name
            scale = float(expected_gradients[name].abs().max())
            assert_close(found, expected_gradients[name], atol=1e-5 + 1e-4 * scale, rtol=1e-3)


@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["lora", "dynamic_lora", "perl", "hydra", "joint_hydra"])
def test_at_step_0_ratio_and_kl_are_nothing(
    tiny_trunk: TinyTrunk, kind: Quantization, dtype: TrunkDtype, layout: Layout
) -> None:
    # bitsandbytes' own layers give other bits in train mode, on a CPU with AVX512-BF16.
    roles, rows = Roles(layout, str(tiny_trunk()), SPEC, quantization=kind, dtype=dtype), padded()
    assert {trunk.quantization for trunk in roles.distinct_trunks()} == {kind}
    with torch.no_grad():
        found = roles.answer(rows, ROLES)
    with roles.trunk("policy").training_pass():
        again = roles.answer(rows, ("policy",))
    assert found.policy is not None
    assert found.reference is not None
    assert again.policy is not None
    assert torch.equal(found.policy, found.reference)
    assert torch.equal(found.policy, again.policy.detach())


# ---- what is written ---------------------------------------------------------------------------


@both
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_what_is_written_is_plain_and_gives_what_was_trained(
    tiny_trunk: TinyTrunk, tmp_path: Path, family: str, kind: Quantization
) -> None:
    rows, folder = padded(), tiny_trunk(family)
    roles = build(folder, quantization=kind)
    trunk = roles.trunk("policy")
    save_trunk(trunk, tmp_path, "actor", {})
    about = json.loads((tmp_path / "manifest.json").read_text())
    assert about["quantization"] == kind
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    stored, original = (AutoModelForCausalLM.from_pretrained(where) for where in (tmp_path, folder))
    shapes = {name: value.shape for name, value in original.state_dict().items()}
    assert {name: value.shape for name, value in stored.state_dict().items()} == shapes
    assert stored.generation_config.eos_token_id == original.generation_config.eos_token_id
    again = load_trunk(str(tmp_path))
    with torch.no_grad(), trunk.switch.use("actor"), again.switch.use(OFF):
        ours = trunk.project(trunk(rows.ids, rows.attention_mask))
        theirs = again.project(again(rows.ids, rows.attention_mask))
    assert_close(ours[rows.attention_mask], theirs[rows.attention_mask], atol=1e-4, rtol=1e-4)
    # So are the dense trunk and the adapter in a folder each, to PEFT.
    trunk.adapters.save("actor", tmp_path / "actor", trunk.source)
    about = json.loads((tmp_path / "actor" / "adapter_config.json").read_text())
    assert about["fan_in_fan_out"] == (family == "gpt2")
    save_trunk(trunk, tmp_path / "dense", None, {})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    peft = PeftModel.from_pretrained(plain, tmp_path / "actor").eval()
    with torch.no_grad():
        theirs = peft(
            input_ids=rows.ids,
            attention_mask=rows.attention_mask.long(),
            position_ids=position_ids(rows.attention_mask),
        ).logits
    assert_close(ours[rows.attention_mask], theirs[rows.attention_mask], atol=1e-4, rtol=1e-4)


@both
def test_the_fingerprint_is_of_the_codes(
    tiny_trunk: TinyTrunk, tmp_path: Path, kind: Quantization
) -> None:
    # A file in bfloat16, as hubs have them: its codes are the same in either dtype.
    save_trunk(load_trunk(str(tiny_trunk()), "bfloat16"), tmp_path, None, {})
    folder = str(tmp_path)
    plain, trunk = load_trunk(folder), load_trunk(folder, quantization=kind)
    first = trunk.fingerprint()
    assert load_trunk(folder, "bfloat16", quantization=kind).fingerprint() == first
    assert trunk.adapters.own_weights().keys() == plain.adapters.own_weights().keys()
    rows = padded()
    trunk.adapters.add("actor", SPEC, 0)
    with torch.no_grad(), trunk.switch.use("actor"):
        trunk(rows.ids, rows.attention_mask)
    assert trunk.fingerprint() == first == load_trunk(folder, quantization=kind).fingerprint()
    others = {load_trunk(folder, quantization=other).fingerprint() for other in KINDS}
    assert len({plain.fingerprint(), *others}) == 3
    name, layer = next(quantized_layers(trunk))
    layer.weight.data[0] ^= 1
    assert trunk.fingerprint() != first, name


@both
def test_a_reward_adapter_belongs_to_a_trunk_of_its_quantization(
    tiny_trunk: TinyTrunk, tmp_path: Path, kind: Quantization
) -> None:
    folder = str(tiny_trunk())
    trunk = load_trunk(folder, quantization=kind)
    trunk.adapters.add("reward", SPEC, 4)
    trunk.adapters.save("reward", tmp_path, trunk.source)
    write_adapter_manifest(tmp_path, trunk)
    save_heads(tmp_path, {"reward": ScalarHead(32, seed=5)})
    roles = Roles("perl", folder, SPEC, str(tmp_path), quantization=kind)
    assert roles.answer(padded(), ("reward",)).reward is not None
    with pytest.raises(ValueError, match=f"with quantization {kind}, .* is loaded with None"):
        Roles("perl", folder, SPEC, str(tmp_path))
    manifest = tmp_path / "manifest.json"
    about = json.loads(manifest.read_text())
    del about["trunk_fingerprint"]
    manifest.write_text(json.dumps(about))
    Roles("perl", folder, SPEC, str(tmp_path))


# ---- what is refused ---------------------------------------------------------------------------


def test_what_cannot_be_quantized_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = str(tmp_path)
    with pytest.raises(ValueError, match=r"one of \['nf4', 'int8'\] or None, got 'int4'"):
        SFT(nowhere, quantization="int4")
    with pytest.raises(ValueError, match="float64 is refused: bitsandbytes"):
        load_trunk(nowhere, "float64", quantization="nf4")
    with pytest.raises(ValueError, match="tuned whole cannot be quantized"):
        Roles("full", nowhere, SPEC, quantization="nf4")
    monkeypatch.setattr(
        quantization, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name)
    )
    with pytest.raises(ImportError, match=r"needs bitsandbytes: pip .*lightning-perl\[quantiz"):
        load_trunk(nowhere, quantization="nf4")
    monkeypatch.undo()
    shapes = weightless(LlamaConfig(num_hidden_layers=1))
    with shapes, pytest.raises(ValueError, match="shapes alone cannot be quantized"):
        load_trunk("anything", quantization="nf4")


def test_families_that_cannot_be_and_folders_that_are_quantized_are_refused(
    tiny_trunk: TinyTrunk, tmp_path: Path
) -> None:
    for family in ("falcon", "falcon_new"):
        with pytest.raises(ValueError, match=r"nothing to quantize .*FalconForCausalLM"):
            load_trunk(str(tiny_trunk(family)), quantization="nf4")
    load_trunk(str(tiny_trunk()), quantization="nf4").model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"stored quantized .*full-precision weights"):
        load_trunk(str(tmp_path))


# ---- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@both
def test_moving_to_a_gpu_and_back_keeps_the_values(
    tiny_trunk: TinyTrunk, kind: Quantization
) -> None:
    roles, rows = build(tiny_trunk(), quantization=kind, dtype="bfloat16"), padded()
    trunk = roles.trunk("policy")
    before = {name: dense(layer).clone() for name, layer in quantized_layers(trunk)}
    fingerprint = trunk.fingerprint()
    with torch.no_grad(), trunk.switch.use("actor"):
        here = trunk(rows.ids, rows.attention_mask)
        roles.cuda()
        there = trunk(rows.ids.cuda(), rows.attention_mask.cuda())
        assert_close(there.cpu(), here, atol=0.2, rtol=0.05)
        for name, layer in quantized_layers(trunk):
            assert dense(layer).is_cuda
            assert_close(dense(layer).cpu(), before[name], atol=0, rtol=0.01)
        roles.cpu()
    assert all(torch.equal(dense(layer), before[name]) for name, layer in quantized_layers(trunk))
    assert trunk.fingerprint() == fingerprint
