"""Four roles in six layouts, built from one trunk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lightning_perl.functional.sequences import Sequences
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.heads import HEADS_FILE, ScalarHead, load_head, save_heads
from lightning_perl.models.loading import TrunkDtype, load_trunk
from lightning_perl.models.manifest import write_adapter_manifest
from lightning_perl.models.roles import LAYOUTS, Layout, Role, RoleAnswers, Roles
from tests.conftest import TinyTrunk
from tests.models.rows import (
    LENGTHS,
    ROLES,
    SPEC,
    backward,
    build,
    gradients,
    loss,
    padded,
    texts,
    write_reward,
)

every_layout = pytest.mark.parametrize("layout", get_args(Layout))


def passes(roles: Roles) -> int:
    return sum(trunk.passes for trunk in roles.distinct_trunks())


@torch.no_grad()
def answers(roles: Roles, asked: tuple[Role, ...] = ROLES) -> RoleAnswers:
    return roles.answer(padded(), asked)


# ---- passes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "trunks", "count"),
    [
        ("full", 4, 4),
        ("lora", 4, 4),
        ("dynamic_lora", 2, 4),
        ("perl", 1, 4),
        ("hydra", 1, 3),
        ("joint_hydra", 1, 2),
    ],
)
def test_roles_that_share_trunk_and_adapter_share_a_forward(
    tiny_trunk: TinyTrunk, layout: Layout, trunks: int, count: int
) -> None:
    roles = build(tiny_trunk(), layout)
    assert len(roles.distinct_trunks()) == trunks
    found = answers(roles)
    assert passes(roles) == count
    # One by one they say the same; only the number of forwards differs.
    for role in ROLES:
        alone = answers(roles, (role,))
        assert torch.equal(getattr(alone, role), getattr(found, role))
        others = [getattr(alone, other) for other in ROLES if other != role]
        assert others == [None] * 3
        # Entropies are for updates.
        assert alone.entropy is None
    assert passes(roles) == count + 4


def test_groups_keep_the_order_asked() -> None:
    roles = Roles.__new__(Roles)
    torch.nn.Module.__init__(roles)
    roles.seats = {str(role): seat for role, seat in LAYOUTS["hydra"].items()}
    assert roles.groups(("reward", "policy", "reference")) == [("reward", "reference"), ("policy",)]
    assert roles.groups(()) == []


def test_joint_hydra_in_one_pass_is_two_passes_with_the_same_adapter(
    tiny_trunk: TinyTrunk,
) -> None:
    rows, one, two = padded(), *(build(tiny_trunk(), "joint_hydra") for _ in range(2))
    joint = one.answer(rows, ("policy", "value"))
    apart = two.answer(rows, ("policy",)), two.answer(rows, ("value",))
    assert (passes(one), passes(two)) == (1, 2)
    policy, value = joint.policy, joint.value
    assert policy is not None
    assert value is not None
    assert apart[0].policy is not None
    assert apart[1].value is not None
    assert torch.equal(policy, apart[0].policy)
    assert torch.equal(value, apart[1].value)
    mask = rows.response_mask
    backward(2 * (policy * mask).sum() + (value * mask).pow(2).sum())
    backward(2 * (apart[0].policy * mask).sum())
    backward((apart[1].value * mask).pow(2).sum())
    found, expected = gradients(one), gradients(two)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


# ---- step 0 ------------------------------------------------------------------------------------


@every_layout
def test_fresh_adapters_give_no_kl_and_a_critic_that_is_the_reward_model(
    tiny_trunk: TinyTrunk, layout: Layout
) -> None:
    roles = Roles(layout, str(tiny_trunk()), SPEC)
    found = answers(roles)
    assert found.policy is not None
    assert found.reference is not None
    assert torch.equal(found.policy, found.reference)
    assert_value_is_reward_on_every_prefix(roles)


def assert_value_is_reward_on_every_prefix(roles: Roles) -> None:
    values = answers(roles, ("value",)).value
    assert values is not None
    for row, (prompt, response) in enumerate(LENGTHS):
        ids = texts()[row]
        for cut in range(response):
            # The value of the action at `cut` is read where the text before it ends.
            prefix = torch.tensor([ids[: prompt + cut]])
            everything = torch.ones_like(prefix, dtype=torch.bool)
            with torch.no_grad():
                score = roles.answer(Sequences(prefix, everything, everything[:, -1:]), ("reward",))
            assert score.reward is not None
            assert_close(values[row, cut], score.reward[0], atol=1e-5, rtol=1e-5)


def test_every_layout_says_the_same_at_step_0(tiny_trunk: TinyTrunk) -> None:
    expected = answers(Roles("full", str(tiny_trunk()), SPEC))
    for layout in get_args(Layout):
        for seed in (0, 7):
            found = answers(Roles(layout, str(tiny_trunk()), SPEC, seed=seed))
            for name, answer in expected._asdict().items():
                ours = getattr(found, name)
                same = ours is answer if answer is None else torch.equal(ours, answer)
                assert same, (layout, name)


def test_answers_are_log_softmax_and_a_dot_product(tiny_trunk: TinyTrunk) -> None:
    # The plainest road: PEFT-free, cache-free, one row at a time, float64 after the logits.
    folder, temperature = tiny_trunk(), 0.7
    roles = Roles("hydra", str(folder), SPEC)
    found = RoleAnswers(
        *(
            None if part is None else part.detach()
            for part in roles.answer(padded(), ROLES, temperature)
        )
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    head = load_head(folder, "reward")
    for row, (prompt, response) in enumerate(LENGTHS):
        ids = torch.tensor([texts()[row]])
        with torch.no_grad():
            output = model(input_ids=ids, output_hidden_states=True)
        logprobs = (output.logits[0, prompt - 1 : -1].double() / temperature).log_softmax(-1)
        chosen = logprobs.gather(-1, ids[0, prompt:, None])[:, 0]
        scores = output.hidden_states[-1][0].double() @ head.weight.double() + head.bias
        expected = {
            "policy": chosen,
            "reference": chosen,
            "entropy": -(logprobs.exp() * logprobs).sum(-1),
            "value": scores[prompt - 1 : -1],
        }
        for name, answer in expected.items():
            ours = getattr(found, name)[row, :response].double()
            assert_close(ours, answer, atol=1e-5, rtol=1e-5)
        assert found.reward is not None
        assert_close(found.reward[row].double(), scores[-1], atol=1e-5, rtol=1e-5)


# ---- gradients ---------------------------------------------------------------------------------

LORA: tuple[Layout, ...] = ("lora", "dynamic_lora", "perl", "hydra")
BOTH: tuple[Role, ...] = ("policy", "value")


@pytest.mark.parametrize(
    ("layout", "asked"),
    [
        *((layout, asked) for layout in LORA for asked in (BOTH[:1], BOTH[1:], BOTH)),
        ("joint_hydra", BOTH),
        ("full", BOTH),
    ],
)
def test_a_role_s_step_touches_its_own_weights_only(
    tiny_trunk: TinyTrunk, layout: Layout, asked: tuple[Role, ...]
) -> None:
    folder = tiny_trunk(seed=1, tie_word_embeddings=False)
    roles, rows = build(folder, layout), padded()
    own = roles.actor_parameters() if "policy" in asked else []
    if "value" in asked:
        own = [*own, *roles.critic_parameters(), *roles.value_head.parameters()]
    before = {name: parameter.detach().clone() for name, parameter in roles.named_parameters()}
    frozen = answers(roles, ("reference", "reward"))
    trainable = [parameter for parameter in roles.parameters() if parameter.requires_grad]
    mine = {id(parameter) for parameter in own}
    assert len(own) == len(mine)
    if asked == BOTH:
        assert mine == {id(parameter) for parameter in trainable}
    # Weight decay and momentum would move what has a gradient of 0; None is what leaves it alone.
    optimizer = torch.optim.AdamW(trainable, lr=0.01, weight_decay=0.5)
    for _ in range(2):
        for role in asked:
            backward(loss(roles, rows, role))
        for parameter in roles.parameters():
            assert (parameter.grad is not None) == (id(parameter) in mine)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in roles.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in mine), name
    # Whole models are trained in one layout only; the critic's LM head says nothing, so nobody trains it.
    whole = [roles.trunk("policy"), roles.trunk("value").model.base_model]
    weights = {id(weight) for model in whole for weight in model.parameters()}
    assert (weights <= mine) == (layout == "full")
    assert id(roles.trunk("value").lm_head.weight) not in mine
    # Hydra swaps heads, never shares them: the value head was trained, the reward head stands.
    assert torch.equal(roles.reward_head().weight, load_head(folder, "reward").weight)
    now = answers(roles, ("reference", "reward"))
    for name in ("reference", "reward"):
        assert torch.equal(getattr(now, name), getattr(frozen, name))


# ---- a reward model of its own -------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_adapter(tiny_trunk: TinyTrunk, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `RewardModel` writes: a trained adapter of another rank, on fewer layers, and a head."""
    folder = tmp_path_factory.mktemp("reward")
    spec = LoraSpec(2, 1.0, ("q_proj", "v_proj", "down_proj"))
    write_reward(folder, tiny_trunk(), spec, seed=4, bias=-0.4)
    return folder


def test_perl_starts_its_critic_from_a_copy_of_the_reward_model(
    tiny_trunk: TinyTrunk, reward_adapter: Path
) -> None:
    roles = Roles("perl", str(tiny_trunk()), SPEC, str(reward_adapter))
    adapters = roles.trunk("reward").adapters
    reward, critic = adapters.tensors("reward"), adapters.tensors("critic")
    assert reward.keys() == critic.keys()
    assert len(reward) == 12
    for key, parameter in reward.items():
        assert torch.equal(parameter, critic[key])
        assert parameter.data_ptr() != critic[key].data_ptr()
        assert (parameter.requires_grad, critic[key].requires_grad) == (False, True)
    assert len(adapters.tensors("actor")) == 28
    assert roles.value_head.weight.data_ptr() != roles.reward_head().weight.data_ptr()
    assert float(roles.value_head.bias.detach()) == pytest.approx(-0.4)
    assert_value_is_reward_on_every_prefix(roles)
    assert_scores_are_plain_pefts(roles, tiny_trunk(), reward_adapter)

    # Training the critic leaves the reward model where it was.
    before, rows = answers(roles), padded()
    optimizer = torch.optim.AdamW(
        [*roles.critic_parameters(), *roles.value_head.parameters()], lr=0.05
    )
    backward(loss(roles, rows, "value"))
    optimizer.step()
    after = answers(roles)
    for name, same in (("reward", True), ("reference", True), ("policy", True), ("value", False)):
        assert torch.equal(getattr(before, name), getattr(after, name)) == same, name


def assert_scores_are_plain_pefts(roles: Roles, trunk: Path, adapter: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trunk)
    peft = PeftModel.from_pretrained(model, adapter)
    head, found = load_head(adapter, "reward"), answers(roles, ("reward",)).reward
    assert found is not None
    for row, ids in enumerate(texts()):
        with torch.no_grad():
            states = peft(input_ids=torch.tensor([ids]), output_hidden_states=True)
            expected: Tensor = states.hidden_states[-1][0, -1] @ head.weight + head.bias
        assert_close(found[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["full", "lora", "dynamic_lora"])
def test_a_reward_trunk_answers_value_and_reward(tiny_trunk: TinyTrunk, layout: Layout) -> None:
    folder, reward = tiny_trunk(), tiny_trunk("gpt2", seed=3)
    roles = Roles(layout, str(folder), SPEC, str(reward))
    alone, plain = Roles("hydra", str(reward), SPEC), Roles("hydra", str(folder), SPEC)
    found = answers(roles)
    for name in ("value", "reward"):
        assert torch.equal(getattr(found, name), getattr(answers(alone), name))
    for name in ("policy", "reference"):
        assert torch.equal(getattr(found, name), getattr(answers(plain), name))
    assert_value_is_reward_on_every_prefix(roles)


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "settings", "message"),
    [
        ("hydra2", {}, r"layout must be one of \['full'.*got 'hydra2'"),
        ("hydra", {"reward": "runs/reward"}, "layout hydra takes its reward from the trunk's own"),
        ("joint_hydra", {"reward": "there"}, "layout joint_hydra takes its reward from the"),
        ("hydra", {"lora": LoraSpec(dropout=0.1)}, r"lora.dropout must be 0 in RL, got 0.1"),
        (
            "perl",
            {"ensemble": "median"},
            r"ensemble must be one of \['mean', .* got 'median'",
        ),
        (
            "full",
            {"reward": ["a", "b"]},
            r"layout full holds one reward model, got 2: .*layout perl",
        ),
        ("full", {"dtype": "bfloat16"}, r"tuned whole must be float32, got bfloat16.*or LoRA"),
        ("hydra", {"head": 48}, r"head reads 48 numbers .* gives 32.*another model"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tiny_trunk: TinyTrunk, layout: Layout, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    shutil.copytree(tiny_trunk(), tmp_path, dirs_exist_ok=True)
    settings = {"lora": SPEC, **settings}
    if width := settings.pop("head", None):
        save_heads(tmp_path, {"reward": ScalarHead(width)})
    with pytest.raises(ValueError, match=message):
        Roles(layout, str(tmp_path), **settings)


@every_layout
def test_a_missing_reward_head_is_found_before_any_weight_is_read(
    tiny_trunk: TinyTrunk, layout: Layout, tmp_path: Path
) -> None:
    shutil.copytree(tiny_trunk(), tmp_path, dirs_exist_ok=True)
    (tmp_path / HEADS_FILE).unlink()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no reward head \(found: no heads file\)"):
        Roles(layout, str(tmp_path), SPEC)


def test_trunks_with_different_tokenizers_are_refused(
    tiny_trunk: TinyTrunk, tmp_path: Path
) -> None:
    shutil.copytree(tiny_trunk(), tmp_path, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<espresso>"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"have different tokenizers.*the policy's tokenizer"):
        Roles("dynamic_lora", str(tiny_trunk()), SPEC, str(tmp_path))


@pytest.fixture
def named_adapter(tiny_trunk: TinyTrunk, reward_adapter: Path, tmp_path: Path) -> Path:
    """The reward adapter, with the manifest that says on which trunk it was trained."""
    folder = tmp_path / "reward"
    shutil.copytree(reward_adapter, folder)
    write_adapter_manifest(folder, load_trunk(str(tiny_trunk())))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reward_adapter_goes_on_its_own_trunk_wherever_that_lies(
    tiny_trunk: TinyTrunk, named_adapter: Path, dtype: TrunkDtype, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny_trunk(), tmp_path / "moved")
    for trunk in (tiny_trunk(), moved):
        roles = Roles("perl", str(trunk), SPEC, str(named_adapter), dtype=dtype)
        stored = load_file(named_adapter / "adapter_model.safetensors")
        for key, value in roles.trunk("reward").adapters.tensors("reward").items():
            assert torch.equal(value, stored[f"base_model.model.{key}"])


def test_a_reward_adapter_of_another_trunk_or_other_stop_tokens_is_refused(
    tiny_trunk: TinyTrunk, named_adapter: Path, reward_adapter: Path, tmp_path: Path
) -> None:
    other = tiny_trunk(seed=1)
    words = (
        rf"{named_adapter} was trained on another trunk \({tiny_trunk()}\): its trunk_fingerprint is "
        rf"[0-9a-f]{{16}}, that of {other} is [0-9a-f]{{16}}\. Give the trunk that it was trained on"
    )
    with pytest.raises(ValueError, match=words):
        Roles("perl", str(other), SPEC, str(named_adapter))
    # An adapter that names no trunk (PEFT's own) is taken at its word.
    Roles("perl", str(other), SPEC, str(reward_adapter))
    trunk = shutil.copytree(tiny_trunk(), tmp_path / "trunk")
    GenerationConfig(eos_token_id=[2, 7]).save_pretrained(trunk)  # type: ignore[no-untyped-call]
    words = r"its stop_ids is \[2, 20, .*, 49\], that of .* is \[2, 7\]"
    with pytest.raises(ValueError, match=words):
        Roles("perl", str(trunk), SPEC, str(named_adapter))
