"""Adapters on one trunk: who answers, who is trained, what is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_perl.models.adapters import OFF, LoraSpec
from lightning_perl.models.lean_layers import (
    AdapterSwitch,
    FrozenLinearWithAdapter,
    NoRoleError,
    fusible,
)
from lightning_perl.models.loading import load_trunk
from lightning_perl.models.shortcuts import Shortcuts
from lightning_perl.models.trunk import Trunk
from tests.conftest import TinyTrunk
from tests.models.families import LLAMA_TARGETS
from tests.models.rows import ROLES, SPEC, backward, build, gradients, loss, padded

# ---- the switch --------------------------------------------------------------------------------


def test_the_switch_nests_and_survives_exceptions() -> None:
    switch = AdapterSwitch()
    with switch.use("actor"):
        with switch.use("critic"), switch.use(OFF):
            assert switch.current == OFF
        assert switch.current == "actor"
        with pytest.raises(KeyError, match="boom"), switch.use("critic"):
            raise KeyError("boom")
        assert switch.current == "actor"
        with switch.use("actor"):
            pass
        assert switch.current == "actor"
    with pytest.raises(NoRoleError, match=r"outside any role.*with roles\('policy'\)"):
        _ = switch.current


@pytest.mark.parametrize("adapted", [0, 1])
def test_a_forward_outside_any_role_raises(tiny_trunk: TinyTrunk, adapted: int) -> None:
    trunk, rows = load_trunk(str(tiny_trunk())), padded()
    if adapted:
        trunk.adapters.add("actor", SPEC, 0)
    with pytest.raises(NoRoleError, match="outside any role"):
        trunk(rows.ids, rows.attention_mask)
    if adapted:
        # Also where somebody goes around `Trunk.forward`.
        with pytest.raises(NoRoleError, match="outside any role"):
            trunk.model(input_ids=rows.ids)


def test_without_the_pin_the_gradients_would_be_wrong(
    tiny_trunk: TinyTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the pin is for: this is the silent error of other libraries, made loud by `NoRoleError`
    # outside a role, and visible here inside another one.
    monkeypatch.setattr(AdapterSwitch, "pinned", lambda self: (nullcontext(), nullcontext()))
    rows = padded()
    expected = build(tiny_trunk())
    backward(loss(expected, rows, "policy"))
    roles = build(tiny_trunk(), checkpointing=True)
    with roles.trunk("policy").training_pass():
        objective = loss(roles, rows, "policy")
    with pytest.raises(NoRoleError):
        backward(objective)
    roles.zero_grad()
    with roles.trunk("policy").training_pass():
        objective = loss(roles, rows, "policy")
    with roles("value"):
        backward(objective)
    right = gradients(expected)
    wrong = [n for n, found in gradients(roles).items() if not torch.allclose(found, right[n])]
    assert len(wrong) > len(right) // 2


# ---- what is trained ---------------------------------------------------------------------------


def flags(trunk: Trunk) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in trunk.named_parameters()}


def test_adding_an_adapter_keeps_the_first_trainable(tiny_trunk: TinyTrunk) -> None:
    trunk = load_trunk(str(tiny_trunk()))
    trunk.requires_grad_(False)
    trunk.adapters.add("actor", SPEC, 0)
    trunk.adapters.add("critic", LoraSpec(rank=2, targets=("q_proj",)), 1)
    trunk.adapters.add("reward", SPEC, 2, trainable=False)
    trunk.adapters.add("judge", SPEC, 3)
    trainable = {name for name, flag in flags(trunk).items() if flag}
    assert trainable == {
        name
        for name in flags(trunk)
        if any(f".{adapter}." in name for adapter in ("actor", "critic", "judge"))
    }
    assert len(trunk.adapters.parameters("critic")) == 4


def test_switching_changes_no_flag_and_no_mode(tiny_trunk: TinyTrunk) -> None:
    roles = build(tiny_trunk())
    trunk, rows = roles.trunk("policy"), padded()
    before = flags(trunk), trunk.model.training
    for role in ROLES:
        with roles(role):
            assert (flags(trunk), trunk.model.training) == before
            with torch.no_grad():
                trunk(rows.ids, rows.attention_mask)
        assert (flags(trunk), trunk.model.training) == before
    with pytest.raises(KeyError), roles("policy"):
        raise KeyError
    assert (flags(trunk), trunk.model.training) == before


def test_a_fresh_adapter_changes_nothing_and_depends_on_its_seed_alone(
    tiny_trunk: TinyTrunk,
) -> None:
    rows = padded()
    drawn = []
    for noise, seed in ((0, 5), (1, 5), (1, 6)):
        torch.manual_seed(noise)
        trunk = load_trunk(str(tiny_trunk()))
        with torch.no_grad(), trunk.switch.use(OFF):
            off = trunk(rows.ids, rows.attention_mask)
        trunk.adapters.add("actor", SPEC, seed)
        with torch.no_grad(), trunk.switch.use("actor"):
            assert torch.equal(trunk(rows.ids, rows.attention_mask), off)
        drawn.append(trunk.adapters.tensors("actor"))
    assert all(torch.equal(drawn[0][key], drawn[1][key]) for key in drawn[0])
    downs = [key for key in drawn[0] if "lora_A" in key]
    assert not any(torch.equal(drawn[1][key], drawn[2][key]) for key in downs)
    # No two layers share their first weights.
    assert len({tuple(drawn[0][key].flatten().tolist()) for key in downs}) == len(downs)
    assert all(not drawn[0][key].any() for key in drawn[0] if "lora_B" in key)


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("gpt2", {"c_attn", "c_proj"}),
        ("opt", {"q_proj", "k_proj", "v_proj", "out_proj"}),
        ("gpt_neox", {"query_key_value", "dense"}),
        ("falcon", {"query_key_value", "dense"}),
        ("phi3", {"qkv_proj", "o_proj"}),
    ],
)
def test_attention_names_the_attention_of_every_family(
    tiny_trunk: TinyTrunk, family: str, layers: set[str]
) -> None:
    trunk = load_trunk(str(tiny_trunk(family)))
    trunk.adapters.add("actor", LoraSpec(rank=2, targets=("attention",)), 0)
    names = [name for name, _ in trunk.adapters.layers()]
    assert {name.rsplit(".", 1)[-1] for name in names} == layers
    assert len(names) == 2 * len(layers)
    assert not any("mlp" in name for name in names)


# ---- the products ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_layer_computes_what_pefts_own_forward_computes(
    tiny_trunk: TinyTrunk, family: str
) -> None:
    roles = build(tiny_trunk(family))
    switch = roles.trunk("policy").switch
    layers = dict(roles.trunk("policy").adapters.layers())
    for layer in layers.values():
        assert isinstance(layer, nn.Module)
        width = layer.get_base_layer().get_parameter("weight").shape[0 if family == "gpt2" else 1]
        x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(width))
        base = layer.get_base_layer()(x)
        for adapter in ("actor", "critic"):
            with switch.use(adapter), torch.no_grad():
                ours = layer(x)
                layer.set_adapter(adapter)
                theirs = type(layer).forward(layer, x)
            assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
            assert (ours - base).abs().max() > 0.05
        with switch.use(OFF), torch.no_grad():
            assert torch.equal(layer(x), base)


@pytest.mark.parametrize("bias", [True, False])
def test_the_fused_products_have_the_right_gradients(bias: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5), (4, 5), (4,), (2, 5), (4, 2)]
    x, weight, offset, down, up = (
        torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes
    )
    given = offset if bias else None
    for tensor in (x, down, up):
        tensor.requires_grad_()

    def fused(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        y: Tensor = FrozenLinearWithAdapter.apply(x, weight, given, down, up)  # type: ignore[no-untyped-call]
        return y

    plain = F.linear(x, weight, given) + F.linear(F.linear(x, down), up)
    assert_close(fused(x, down, up), plain)
    assert torch.autograd.gradcheck(fused, (x, down, up))
    # What stands below the lowest adapter needs no gradient.
    assert torch.autograd.gradcheck(fused, (x.detach(), down, up))


def may_fuse(layer: Any, x: Tensor) -> bool:  # noqa: ANN401
    return fusible(layer.base_layer, layer.lora_dropout["actor"], x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_fused_or_not_a_trunk_gives_the_same_states_and_gradients(
    tiny_trunk: TinyTrunk, family: str, dtype: str
) -> None:
    found = []
    for fused in (True, False):
        # Gradients of this trunk are off by 0.1 in bfloat16.
        shortcuts = Shortcuts(fused_adapters=fused)
        roles = build(tiny_trunk(family), dtype=dtype, shortcuts=shortcuts)
        layer = dict(roles.trunk("policy").adapters.layers())["model.layers.0.mlp.up_proj"]
        x = torch.zeros(1, 32, dtype=roles.trunk("policy").dtype)
        assert may_fuse(layer, x)
        value = loss(roles, padded(), "policy")
        backward(value)
        found.append((value.detach(), gradients(roles)))
    allowed = 1e-4 if dtype == "float32" else 0.1
    assert_close(found[0][0], found[1][0], atol=0.0, rtol=allowed)
    for name, gradient in found[0][1].items():
        other = found[1][1][name]
        assert float((gradient - other).norm()) <= allowed * float(other.norm()), name


def test_layers_that_must_be_called_are_not_fused(tiny_trunk: TinyTrunk) -> None:
    trunk = build(tiny_trunk()).trunk("policy")
    layer = dict(trunk.adapters.layers())["model.layers.0.mlp.up_proj"]
    base = layer.get_base_layer()
    x = torch.zeros(1, 32)
    assert may_fuse(layer, x)
    hook = base.register_forward_hook(lambda *_: None)
    assert not may_fuse(layer, x)
    hook.remove()
    assert not may_fuse(layer, x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not may_fuse(layer, x)
    base.weight.requires_grad_(True)
    assert not may_fuse(layer, x)


def test_layers_whose_weights_are_read_past_them_get_no_adapter(tiny_trunk: TinyTrunk) -> None:
    kinds = ["sliding_attention", "full_attention"]
    ropes = {kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in kinds}
    per_layer = {"layer_types": kinds, "rope_parameters": ropes, "num_kv_shared_layers": 0}
    settings = {"model_type": "gemma3n_text", "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    altup = tiny_trunk("llama", **per_layer, **settings, activation_sparsity_pattern=[0.0, 0.0])
    for folder, past in ((altup, "correction_coefs"), (tiny_trunk("mamba"), "dt_proj")):
        trunk = load_trunk(str(folder))
        trunk.adapters.add("actor", SPEC, 0)
        assert any(name.endswith(past) for name, _ in trunk.model.named_modules())
        assert not any(past in name for name, _ in trunk.adapters.layers())


def test_an_adapter_that_a_layer_has_not_leaves_the_layer_alone(tiny_trunk: TinyTrunk) -> None:
    trunk = load_trunk(str(tiny_trunk()))
    trunk.adapters.add("actor", SPEC, 0)
    trunk.adapters.add("critic", LoraSpec(rank=2, targets=("q_proj",)), 1)
    layers = dict(trunk.adapters.layers())
    layer = layers["model.layers.0.mlp.up_proj"]
    assert isinstance(layer, nn.Module)
    x = torch.randn(2, 32)
    with trunk.switch.use("critic"):
        assert torch.equal(layer(x), layer.get_base_layer()(x))


def test_a_bf16_trunk_has_fp32_adapters_gradients_and_heads(tiny_trunk: TinyTrunk) -> None:
    rows = padded()
    exact, half = build(tiny_trunk()), build(tiny_trunk(), dtype="bfloat16")
    for roles in (exact, half):
        for role in ("policy", "value"):
            backward(loss(roles, rows, role))
    own = {
        parameter.dtype for name, parameter in half.trunks.named_parameters() if "lora_" not in name
    }
    assert own == {torch.bfloat16}
    wanted, found = gradients(exact), gradients(half)
    assert found.keys() == wanted.keys()
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    for name, gradient in wanted.items():
        cosine = torch.cosine_similarity(gradient.flatten(), found[name].flatten(), 0)
        assert cosine > 0.98, name
    with torch.no_grad():
        answers = half.answer(rows, ("policy", "value", "reference", "reward"))
        precise = exact.answer(rows, ("policy", "value", "reference", "reward"))
    for name in ("policy", "value", "reference", "reward"):
        answer = getattr(answers, name)
        assert answer.dtype == torch.float32, name
        assert_close(answer, getattr(precise, name), atol=0.15, rtol=0.1)
    with half("policy") as trunk:
        assert trunk(rows.ids, rows.attention_mask).dtype == torch.bfloat16


def test_a_float64_trunk_stays_float64(tiny_trunk: TinyTrunk) -> None:
    rows, roles = padded(), build(tiny_trunk("gpt2"), dtype="float64")
    assert {parameter.dtype for parameter in roles.parameters()} == {torch.float64}
    backward(loss(roles, rows, "policy") + loss(roles, rows, "value"))
    assert {gradient.dtype for gradient in gradients(roles).values()} == {torch.float64}
    answers = roles.answer(rows, ("policy", "value", "reference", "reward"))
    assert {answer.dtype for answer in answers if answer is not None} == {torch.float64}


# ---- targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "count"),
    [(("q_proj",), 2), (("q_proj", "mlp.up_proj"), 4), ((), 14), (("layers.1.mlp.up_proj",), 1)],
)
def test_targets_are_matched_by_the_end_of_the_name(
    tiny_trunk: TinyTrunk, targets: tuple[str, ...], count: int, tmp_path: Path
) -> None:
    trunk = load_trunk(str(tiny_trunk()))
    trunk.adapters.add("actor", LoraSpec(rank=2, targets=targets), 0)
    assert len(list(trunk.adapters.layers())) == count
    trunk.adapters.save("actor", tmp_path, "there")
    again = load_trunk(str(tiny_trunk()))
    again.adapters.load("actor", tmp_path)
    assert again.adapters.tensors("actor").keys() == trunk.adapters.tensors("actor").keys()


@pytest.mark.parametrize("targets", [("query",), ("q_proj", "query"), ("proj",), ("lm_head",)])
def test_a_target_that_is_not_there_is_refused(
    tiny_trunk: TinyTrunk, targets: tuple[str, ...]
) -> None:
    trunk = load_trunk(str(tiny_trunk()))
    with pytest.raises(ValueError, match=r"lora.targets: \['\w+'\] matches no linear.*'q_proj'"):
        trunk.adapters.add("actor", LoraSpec(targets=targets), 0)


def test_a_spec_from_yaml_is_hashable() -> None:
    listed: Any = ["q_proj"]
    assert hash(LoraSpec(targets=listed)) == hash(LoraSpec(targets=("q_proj",)))


# ---- files -------------------------------------------------------------------------------------


def saved(tiny_trunk: TinyTrunk, folder: Path, family: str = "llama", **changes: Any) -> Trunk:
    """A trunk with a trained adapter, written to ``folder``."""
    trunk = build(tiny_trunk(family, **changes)).trunk("policy")
    trunk.adapters.save("actor", folder, trunk.source)
    return trunk


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_saved_adapter_comes_back_under_any_name(
    tiny_trunk: TinyTrunk, dtype: str, tmp_path: Path
) -> None:
    roles = build(tiny_trunk(), dtype=dtype)
    trunk, rows = roles.trunk("policy"), padded()
    for name in ("actor", "critic"):
        trunk.adapters.save(name, tmp_path / name, trunk.source)
    again = load_trunk(str(tiny_trunk()), dtype)  # type: ignore[arg-type]
    again.adapters.load("judge", tmp_path / "critic", trainable=False)
    again.adapters.load("player", tmp_path / "actor")
    for name, source in (("judge", "critic"), ("player", "actor")):
        assert again.adapters.specs[name] == LoraSpec(3, 6.0, LLAMA_TARGETS)
        with torch.no_grad(), again.switch.use(name), trunk.switch.use(source):
            assert torch.equal(
                again(rows.ids, rows.attention_mask), trunk(rows.ids, rows.attention_mask)
            )
    assert not any(p.requires_grad for p in again.adapters.parameters("judge"))
    assert all(p.requires_grad for p in again.adapters.parameters("player"))


def test_the_folder_is_a_plain_peft_folder(tiny_trunk: TinyTrunk, tmp_path: Path) -> None:
    trunk = saved(tiny_trunk, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6.0}
    assert wanted.items() <= config.items()
    assert config["base_model_name_or_path"] == trunk.source
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 28
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(key.startswith("base_model.model.model.layers.") for key in tensors)


Spoil = Callable[[dict[str, Any], dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda config, _: config.update(peft_type="IA3"), "only plain LoRA.*'IA3'"),
        (lambda config, _: config.update(use_dora=True), "only plain LoRA.*use_dora is .*norms"),
        (
            lambda config, _: config.update(init_lora_weights="pissa_niter_4"),
            "init_lora_weights is 'pissa_niter_4', but PiSSA.* change the trunk's weights",
        ),
        (
            lambda config, _: config.update(alpha_pattern={"q_proj": 3}),
            "alpha_pattern is {'q_proj': 3}, but one alpha",
        ),
        (lambda config, _: config.update(target_modules=".*q_proj"), r"pattern '\.\*q_proj'"),
        (lambda config, _: config.pop("r"), r"does not say what r, .*KeyError: 'r'.*Copy the fold"),
        (lambda config, _: config.update(lora_alpha=math.nan), "lora_alpha and .* above 0"),
        (lambda _, tensors: tensors.popitem(), "does not fit this trunk: 1 tensors missing"),
        (
            lambda _, tensors: tensors.update({"base_model.model.score.weight": torch.ones(2)}),
            r"1 unknown \(\['base_model.model.score.weight'\]\).*another model",
        ),
    ],
)
def test_a_folder_that_is_no_plain_adapter_is_refused(
    tiny_trunk: TinyTrunk, spoil: Spoil, message: str, tmp_path: Path
) -> None:
    saved(tiny_trunk, tmp_path)
    config_path, weights_path = (
        tmp_path / "adapter_config.json",
        tmp_path / "adapter_model.safetensors",
    )
    config, tensors = json.loads(config_path.read_text()), load_file(weights_path)
    spoil(config, tensors)
    config_path.write_text(json.dumps(config))
    save_file(tensors, weights_path)
    trunk = load_trunk(str(tiny_trunk()))
    with pytest.raises(ValueError, match=message):
        trunk.adapters.load("reward", tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {}, r"does not fit this trunk.*another model.*\['c_attn', 'c_fc', 'c_proj'\]"),
        ("llama", {"hidden_size": 16}, r"another shape \(.*q_proj.*\(3, 16\) instead of \(3, 32\)"),
        ("llama", {"num_hidden_layers": 1}, "14 tensors missing"),
        ("llama", {"num_hidden_layers": 3}, "14 unknown"),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    tiny_trunk: TinyTrunk, family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trunk = load_trunk(str(tiny_trunk()))
    with pytest.raises(FileNotFoundError, match=r"no adapter folder.*RUN/adapters/reward"):
        trunk.adapters.load("reward", tmp_path)
    saved(tiny_trunk, tmp_path, family, **changes)
    with pytest.raises(ValueError, match=message):
        trunk.adapters.load("reward", tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_leave_the_model_alone(tiny_trunk: TinyTrunk, dtype: str) -> None:
    roles = build(tiny_trunk("gpt2"), dtype=dtype)
    trunk = roles.trunk("policy")
    bare_state = load_trunk(str(tiny_trunk("gpt2")), dtype).model.state_dict()  # type: ignore[arg-type]
    none, merged = trunk.adapters.merged(None), trunk.adapters.merged("actor")
    assert none.keys() == merged.keys() == bare_state.keys()
    assert all(torch.equal(none[key], bare_state[key]) for key in none)
    adapter = trunk.adapters.tensors("actor")
    names = {f"{name}.weight": name for name, _ in trunk.adapters.layers()}
    for key, value in merged.items():
        if key not in names:
            assert torch.equal(value, bare_state[key])
            continue
        assert value.dtype == torch.float32
        up = adapter[f"{names[key]}.lora_B.weight"]
        down = adapter[f"{names[key]}.lora_A.weight"]
        # alpha / rank = 2; GPT-2 stores (in, out).
        assert_close(value, bare_state[key].float() + 2 * (up @ down).T, atol=1e-5, rtol=1e-5)
