"""Every family of decoders carries the four roles, unchanged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lightning_perl.batches import PromptBatch
from lightning_perl.functional.sequences import Sequences, pad_left, position_ids
from lightning_perl.models.adapters import OFF
from lightning_perl.models.loading import load_trunk
from lightning_perl.models.manifest import save_trunk
from lightning_perl.models.roles import Role, Roles
from lightning_perl.models.trunk import LogitTransform, Trunk
from lightning_perl.modules import HydraPPO
from lightning_perl.rollouts.sampling import SamplingSpec
from tests.conftest import TinyTrunk
from tests.models.families import (
    FAMILIES,
    FLOAT64_THROUGHOUT,
    LAYERS,
    LLAMA_TARGETS,
    RECURRENT,
    TARGETS,
)
from tests.models.rows import ROLES, SPEC, backward, build, gradients, loss, own_weights, padded

every_family = pytest.mark.parametrize("family", FAMILIES)
also_recurrent = pytest.mark.parametrize("family", [*FAMILIES, *RECURRENT])


def bare(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as transformers loads it: in eval mode."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model


@torch.no_grad()
def own_logits(model: torch.nn.Module, sequences: Sequences) -> Tensor:
    """Logits of the model's own forward, on the row's own tokens."""
    logits: Tensor = model(
        input_ids=sequences.ids,
        attention_mask=sequences.attention_mask.long(),
        position_ids=position_ids(sequences.attention_mask),
    ).logits
    return logits[sequences.attention_mask]


@torch.no_grad()
def our_logits(trunk: Trunk, sequences: Sequences) -> Tensor:
    hidden = trunk(sequences.ids, sequences.attention_mask)
    return trunk.project(hidden)[sequences.attention_mask]


@pytest.mark.parametrize(
    ("family", "setting", "neutral"),
    [("gemma2", "cap", None), ("granite", "divisor", 1.0), ("cohere", "scale", 1.0)],
)
def test_a_transform_that_is_not_known_stops_at_load(
    tiny_trunk: TinyTrunk,
    family: str,
    setting: str,
    neutral: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tiny_trunk(family)
    load_trunk(str(folder))
    known = LogitTransform.__init__

    def forgetful(self: LogitTransform, config: PreTrainedConfig) -> None:
        known(self, config)
        setattr(self, setting, neutral)

    monkeypatch.setattr(LogitTransform, "__init__", forgetful)
    with pytest.raises(ValueError, match=r"differ from the model's own logits by .*LogitTransform"):
        load_trunk(str(folder))


@pytest.mark.parametrize(
    ("family", "settings", "scale", "divisor", "cap"),
    [
        ("cohere", {"logit_scale": 0.2}, 0.2, 1.0, None),
        ("granite", {"logits_scaling": 5.0}, 1.0, 5.0, None),
        ("inkling_text", {"logits_mup_width_multiplier": 3.0}, 1.0, 3.0, None),
        ("minicpm3", {"dim_model_base": 1280}, 1.0, 2.0, None),
        ("hyperclovax", {"logits_scaling": 0.2}, 0.2, 1.0, None),
        ("recurrent_gemma", {"logits_soft_cap": 7.0}, 1.0, 1.0, 7.0),
    ],
)
def test_what_families_do_to_their_logits(
    family: str, settings: dict[str, Any], scale: float, divisor: float, cap: float | None
) -> None:
    transform = LogitTransform(AutoConfig.for_model(family, **settings))
    assert (transform.scale, transform.divisor, transform.cap) == (scale, divisor, cap)


def test_rows_of_a_head_behind_the_last_word_are_no_words(tiny_trunk: TinyTrunk) -> None:
    trunk = load_trunk(str(tiny_trunk("inkling", vocab_size=400, unpadded_vocab_size=380)))
    assert trunk.vocabulary_size == trunk.project(torch.zeros(2, 32)).shape[-1] == 380


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"model_type": "gpt_neox_japanese"}, "cannot compute activations again.* to false"),
        ({"model_type": "electra"}, "cannot read rows of 8 tokens"),
        ({"model_type": "xlm", "n_layers": 2, "n_heads": 4}, "see those that come after"),
    ],
)
def test_what_cannot_be_trained_as_a_decoder_is_refused_in_a_line(
    tiny_trunk: TinyTrunk, settings: dict[str, Any], fault: str
) -> None:
    folder = str(tiny_trunk("llama", **settings))
    with pytest.raises(ValueError, match=fault) as error:
        load_trunk(folder, checkpointing=settings["model_type"] == "gpt_neox_japanese")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["t5", "whisper", "llava"])
def test_encoders_and_models_with_vision_are_refused_before_their_weights_are_read(
    kind: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"no decoder|an encoder .*model_type {kind}") as error:
        load_trunk(str(tmp_path))
    assert len(str(error.value).splitlines()) == 1


@also_recurrent
def test_adapters_sit_on_every_linear_layer_of_the_blocks(
    tiny_trunk: TinyTrunk, family: str
) -> None:
    trunk = build(tiny_trunk(family)).trunk("policy")
    names = [name for name, _ in trunk.adapters.layers()]
    targets = TARGETS.get(family, LLAMA_TARGETS)
    ends = {name: [end for end in targets if f".{name}".endswith(f".{end}")] for name in names}
    assert all(ends.values())
    assert {end for found in ends.values() for end in found} == set(targets)
    if family in FAMILIES:
        assert len(names) == LAYERS.get(family, 14)
    assert len(trunk.adapters.parameters("actor")) == 2 * len(names)


@every_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_off_is_the_bare_model_bit_for_bit_before_and_after_training(
    tiny_trunk: TinyTrunk, family: str, dtype: str
) -> None:
    folder, sequences = tiny_trunk(family), padded()
    plain = own_logits(bare(folder, getattr(torch, dtype)), sequences)
    roles = build(folder, dtype=dtype)
    trunk, before = roles.trunk("policy"), own_weights(roles)
    assert trunk.window == 96
    assert plain.abs().max() > 0.1
    with roles("reference"):
        assert torch.equal(our_logits(trunk, sequences), plain)
    trainable = [parameter for parameter in roles.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.05, weight_decay=0.1)
    adapted = []
    for _ in range(2):
        with trunk.training_pass():
            backward(loss(roles, sequences, "policy") + loss(roles, sequences, "value"))
        optimizer.step()
        optimizer.zero_grad()
        with roles("policy"):
            adapted.append(our_logits(trunk, sequences))
    assert not torch.equal(adapted[0], adapted[1])
    with roles("reference"):
        assert torch.equal(our_logits(trunk, sequences), plain)
    after = own_weights(roles)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# LayerNorm, tanh and sdpa run in float64 if the weights are; RMSNorm, rotary angles and the eager
# softmax pass through fp32 in transformers whatever the weights, so there fp32 rounding stays.
# Gemma 2 cannot do float64 in every release of transformers.
@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, "float32") for family in FAMILIES]
    + [(family, "float64") for family in FAMILIES if family != "gemma2"],
)
@pytest.mark.parametrize(("left", "right"), [(0, 0), (6, 0), (0, 6), (3, 2)])
def test_padding_on_either_side_changes_nothing(
    tiny_trunk: TinyTrunk, family: str, dtype: str, left: int, right: int
) -> None:
    roles = cached_roles(tiny_trunk(family), dtype)
    tolerance = 1e-11 if dtype == "float64" and family in FLOAT64_THROUGHOUT else 1e-5
    batch = padded(left=left, right=right, pad=77)
    with torch.no_grad():
        together = roles.answer(batch, ROLES)
        for row in range(len(batch.ids)):
            single = padded(rows=(row,))
            alone = roles.answer(single, ROLES)
            count = single.response_mask.shape[1]
            for name in ROLES:
                many = getattr(together, name)[row]
                many = many if name == "reward" else many[:count]
                assert_close(many, getattr(alone, name)[0], atol=tolerance, rtol=tolerance)


_ROLES: dict[tuple[Path, str], Roles] = {}


def cached_roles(folder: Path, dtype: str) -> Roles:
    """Trained roles that a test only reads."""
    if (folder, dtype) not in _ROLES:
        _ROLES[folder, dtype] = build(folder, dtype=dtype)
    return _ROLES[folder, dtype]


@every_family
def test_gradients_with_and_without_checkpointing_are_equal(
    tiny_trunk: TinyTrunk, family: str
) -> None:
    folder, sequences = tiny_trunk(family), padded()
    plain, lean = build(folder), build(folder, checkpointing=True)
    trained: tuple[Role, ...] = ("policy", "value")
    for role in trained:
        backward(loss(plain, sequences, role))
    expected = gradients(plain)
    assert len(expected) == 2 * len(plain.trunk("policy").adapters.parameters("actor")) + 2
    assert all(bool(gradient.any()) for gradient in expected.values())
    runs = count_layer_runs(lean.trunk("policy"))

    # One backward for both, after both roles' blocks were left, and inside a third one.
    with lean.trunk("policy").training_pass():
        joint = loss(lean, sequences, "policy") + loss(lean, sequences, "value")
        forward_runs = runs[0]
        with lean("reference"):
            backward(joint)
    assert runs[0] == 2 * forward_runs > 0
    assert_equal_gradients(gradients(lean), expected)

    # And one after the other.
    lean.zero_grad()
    for role in trained:
        with lean.trunk("policy").training_pass():
            backward(loss(lean, sequences, role))
    assert_equal_gradients(gradients(lean), expected)


def count_layer_runs(trunk: Trunk) -> list[int]:
    """A counter of forwards through the first adapted layer; recomputation runs it again."""
    runs = [0]

    def count(*_: object) -> None:
        runs[0] += 1

    layer = next(trunk.adapters.layers())[1]
    assert isinstance(layer, torch.nn.Module)
    layer.register_forward_hook(count)
    return runs


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5, msg=name)


@also_recurrent
def test_plain_peft_and_a_fresh_trunk_load_a_saved_adapter(
    tiny_trunk: TinyTrunk, family: str, tmp_path: Path
) -> None:
    folder, sequences = tiny_trunk(family), padded()
    spec = replace(SPEC, rslora=family == "qwen3")
    roles = build(folder, lora=spec)
    trunk = roles.trunk("policy")
    for adapter, role in (("actor", "policy"), ("critic", "value")):
        trunk.adapters.save(adapter, tmp_path / adapter, str(folder))
        with roles(role):
            ours = our_logits(trunk, sequences)
        peft = PeftModel.from_pretrained(bare(folder), tmp_path / adapter).eval()
        rounding = 1e-4 if family in RECURRENT else 1e-5
        assert_close(own_logits(peft, sequences), ours, atol=rounding, rtol=rounding)
        again = load_trunk(str(folder))
        again.adapters.load("again", tmp_path / adapter)
        assert again.adapters.specs["again"].scale == spec.scale
        with again.switch.use("again"):
            assert torch.equal(our_logits(again, sequences), ours)
        with roles("reference"):
            assert (ours - our_logits(trunk, sequences)).abs().max() > 0.01


@every_family
def test_a_merged_trunk_is_the_trunk_with_its_adapter(
    tiny_trunk: TinyTrunk, family: str, tmp_path: Path
) -> None:
    folder, sequences = tiny_trunk(family), padded()
    roles = build(folder)
    trunk, before = roles.trunk("policy"), own_weights(roles)
    save_trunk(trunk, tmp_path, "actor", {})
    with roles("policy"):
        adapted = our_logits(trunk, sequences)
    merged = load_trunk(str(tmp_path))
    with merged.switch.use(OFF):
        assert_close(our_logits(merged, sequences), adapted, atol=1e-4, rtol=1e-4)
    assert_close(own_logits(bare(tmp_path), sequences), adapted, atol=1e-4, rtol=1e-4)
    after = own_weights(roles)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert merged.stop_ids == trunk.stop_ids


@also_recurrent
def test_one_hydra_ppo_update(tiny_trunk: TinyTrunk, family: str) -> None:
    module = HydraPPO(
        str(tiny_trunk(family)),
        lora=SPEC,
        sampling=SamplingSpec(max_new_tokens=14),
        ppo_epochs=2,
        minibatch_size=2,
        micro_batch_size=1,
        checkpointing=True,
        seed=1,
    )
    prompts = PromptBatch(*pad_left([[60 + n] * n for n in (3, 9, 1, 6)], 0), torch.arange(4))
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    rollout = module.collect(prompts, 0)
    scored = module.score(rollout)
    mask = rollout.response_mask
    # One token at a time when it was sampled, all at once when it is scored.
    rounding = 2e-3 if family in RECURRENT else 1e-5
    assert_close(scored.logprobs[mask], scored.reference[mask], rtol=0, atol=rounding)
    experience, _ = module.experience(rollout, scored)
    ratios: list[Tensor] = []
    trained = module.update(
        experience,
        torch.optim.AdamW(module.parameter_groups(), lr=0.01),
        first_read=lambda answers, piece: ratios.append(
            answers.policy - piece.old_logprobs  # type: ignore[operator]
        ),
    )
    # The first minibatch is other rows, padded as before: a ratio of 1 to rounding.
    assert float(ratios[0].detach()[0].abs().max()) < 10 * rounding
    assert all(bool(value.isfinite().all()) for value in trained.values())
    moved = {n for n, value in module.named_parameters() if not torch.equal(value, before[n])}
    assert moved == module.trainable_names()
    # `B` starts at 0, so `A` has no gradient before the second step; both are moved by then.
    assert any("lora_A.actor" in name for name in moved)
    assert any("lora_B.critic" in name for name in moved)
