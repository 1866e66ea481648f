"""PPO: one algorithm on every layout, in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor
from torch.testing import assert_close

from lightning_perl.batches import PromptBatch
from lightning_perl.functional.sequences import last_true
from lightning_perl.models.adapters import OFF, LoraSpec
from lightning_perl.models.heads import ScalarHead
from lightning_perl.models.loading import load_trunk
from lightning_perl.models.roles import Layout, TrainedRole
from lightning_perl.modules import PPO, HydraPPO, JointHydraPPO
from lightning_perl.modules.evaluation import given
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.rollouts.rollout import Rollout, Scored
from lightning_perl.rollouts.sampling import SamplingSpec
from tests.modules import tiny

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


# ---- a hand-made experience: two responses, of three tokens and of one ------------------------


def two_rows() -> tuple[Rollout, Scored]:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rollout = Rollout(
        prompt_ids=torch.tensor([[5, 6], [0, 7]]),
        prompt_mask=torch.tensor([[True, True], [False, True]]),
        response_ids=torch.tensor([[8, 9, 10], [2, 0, 0]]),
        response_mask=mask,
        stopped=torch.tensor([False, True]),
        row=torch.tensor([0, 1]),
    )
    junk = 99.0  # masked columns may hold anything
    scored = Scored(
        logprobs=torch.tensor([[-1.0, -2.0, -0.5], [-3.0, junk, -junk]], dtype=torch.float64),
        reference=torch.tensor([[-1.5, -1.0, -0.5], [-2.0, -junk, junk]], dtype=torch.float64),
        values=torch.tensor([[0.5, 0.25, -1.0], [2.0, junk, junk]], dtype=torch.float64),
        scores=torch.tensor([4.0, -3.0], dtype=torch.float64),
    )
    return rollout, scored


def by_hand(scores: tuple[float, float]) -> tuple[list[float], list[float], list[list[float]]]:
    """Advantages and returns of the four tokens, row by row; kl_coef .5, discount .9, lambda .8."""
    penalties = [[-0.5 * (-1.0 + 1.5), -0.5 * (-2.0 + 1.0), 0.0], [-0.5 * (-3.0 + 2.0)]]
    rewards = [[*penalties[0][:2], penalties[0][2] + scores[0]], [penalties[1][0] + scores[1]]]
    values = [[0.5, 0.25, -1.0], [2.0]]
    advantages, returns = [], []
    for row_rewards, row_values in zip(rewards, values, strict=True):
        count = len(row_values)
        errors = [
            row_rewards[t] + 0.9 * (row_values[t + 1] if t + 1 < count else 0.0) - row_values[t]
            for t in range(count)
        ]
        for t in range(count):
            advantage = sum((0.9 * 0.8) ** (s - t) * errors[s] for s in range(t, count))
            advantages.append(advantage)
            returns.append(advantage + row_values[t])
    return advantages, returns, rewards


def by_hand_ppo(trunk: Path, **options: Any) -> PPO:
    return tiny.hydra(trunk, kl_coef=0.5, discount=0.9, gae_lambda=0.8, **options)


def test_experience_by_hand(hydra_trunk: Path) -> None:
    module = by_hand_ppo(hydra_trunk, whiten_advantages=False)
    rollout, scored = two_rows()
    experience, stats = module.experience(rollout, scored)
    advantages, returns, rewards = by_hand((4.0, -3.0))
    assert rewards == [[-0.25, 0.5, 4.0], [-2.5]]
    mask = rollout.response_mask
    assert experience.advantages[mask].tolist() == pytest.approx(advantages, rel=1e-12)
    assert given(experience.returns)[mask].tolist() == pytest.approx(returns, rel=1e-12)
    assert experience.advantages[~mask].tolist() == [0.0, 0.0]
    assert_close(experience.old_logprobs[mask], scored.logprobs[mask])
    assert_close(given(experience.old_values)[mask], scored.values[mask])
    assert stats["reward"].item() == pytest.approx((4.25 - 2.5) / 2)
    mean = sum(returns) / 4
    spread = sum((value - mean) ** 2 for value in returns)
    explained = 1 - sum(value**2 for value in advantages) / spread
    assert stats["explained_variance"].item() == pytest.approx(explained)
    # Whitening shifts and scales advantages over all tokens of the rollout, and no returns.
    whitened, _ = by_hand_ppo(hydra_trunk).experience(rollout, scored)
    mean = sum(advantages) / 4
    deviation = (sum((value - mean) ** 2 for value in advantages) / 4) ** 0.5
    expected = [(value - mean) / deviation for value in advantages]
    assert whitened.advantages[mask].tolist() == pytest.approx(expected, rel=1e-6)
    assert given(whitened.returns)[mask].tolist() == pytest.approx(returns)


@pytest.mark.parametrize(
    ("options", "paid"),
    [
        ({"missing_eos_score": -1.0}, (-1.0, -3.0)),
        ({"missing_eos_penalty": 1.5}, (2.5, -3.0)),
        ({"score_clip": 2.0}, (2.0, -2.0)),
        ({"score_clip": 2.0, "missing_eos_score": -7.0}, (-7.0, -2.0)),
        ({"score_clip": 2.0, "missing_eos_penalty": 1.0}, (1.0, -2.0)),
    ],
)
def test_score_rules(
    options: dict[str, float], paid: tuple[float, float], hydra_trunk: Path
) -> None:
    module = by_hand_ppo(hydra_trunk, whiten_advantages=False, **options)
    rollout, scored = two_rows()  # the first response was cut, the second has its EOS
    scored = scored._replace(scores=module.shaped_scores(scored.scores, rollout.stopped))
    experience, _ = module.experience(rollout, scored)
    expected, _, _ = by_hand(paid)
    mask = rollout.response_mask
    assert experience.advantages[mask].tolist() == pytest.approx(expected, rel=1e-12)


# ---- step 0 ------------------------------------------------------------------------------------


def test_every_layout_gives_the_same_experience_and_first_step(hydra_trunk: Path) -> None:
    modules = {layout: tiny.hydra(hydra_trunk, layout=layout) for layout in LAYOUTS}
    rollout = modules["full"].collect(tiny.prompts(8), 0)
    assert len(set(rollout.response_tokens().tolist())) > 1
    scored = {layout: module.score(rollout) for layout, module in modules.items()}
    steps = {}
    for layout, module in modules.items():
        again = module.collect(tiny.prompts(8), 0)
        for ours, theirs in zip(again, rollout, strict=True):
            assert_close(ours, theirs, rtol=0, atol=1e-14)
        assert_close(tuple(scored[layout]), tuple(scored["full"]), rtol=0, atol=0)
        experience, _ = module.experience(rollout, scored[layout])
        steps[layout], _ = tiny.rehearse(module, experience)
    for layout in LAYOUTS:
        for key in ("loss", "policy_loss", "value_loss", "entropy", "clip_fraction", "approx_kl"):
            assert_close(steps[layout][key], steps["full"][key], rtol=1e-12, atol=1e-14)
    for pair in (("lora", "hydra"), ("dynamic_lora", "perl"), ("lora", "perl")):
        for key in ("grad_norm_actor", "grad_norm_critic", "grad_norm_head"):
            assert_close(steps[pair[0]][key], steps[pair[1]][key], rtol=1e-9, atol=1e-12)


def text_of(rollout: Rollout, row: int) -> Tensor:
    prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
    return torch.cat([prompt, rollout.response_ids[row][rollout.response_mask[row]]])


def reward_of(module: PPO, text: Tensor) -> Tensor:
    """What the reward role says of a text that stands alone."""
    ids = text.unsqueeze(0)
    with torch.no_grad(), module.roles("reward") as trunk:
        hidden = trunk(ids, torch.ones_like(ids, dtype=torch.bool))[:, -1]
    reward: Tensor = module.roles.reward_head()(hidden)[0]
    return reward


@EVERY_LAYOUT
def test_step_zero_identities(layout: Layout, hydra_trunk: Path) -> None:
    module = tiny.hydra(hydra_trunk, layout=layout)
    rollout = module.collect(tiny.prompts(6), 0)
    scored = module.score(rollout)
    mask = rollout.response_mask
    assert_close(scored.logprobs[mask], scored.reference[mask], rtol=0, atol=1e-14)
    # Value == reward on every prefix: the value before token t is the reward of the text so far.
    for row in range(6):
        text = text_of(rollout, row)
        prompt = int(rollout.prompt_mask[row].sum())
        for token in range(int(mask[row].sum())):
            reward = reward_of(module, text[: prompt + token])
            assert_close(scored.values[row, token], reward, rtol=1e-6, atol=1e-7)
    experience, _ = module.experience(rollout, scored)
    stats, _ = tiny.rehearse(module, experience)
    assert stats["approx_kl"].abs() < 1e-12
    assert stats["clip_fraction"] == 0
    assert stats["value_clip_fraction"] == 0


def test_losses_are_means_over_tokens_of_the_policy_that_learns(hydra_trunk: Path) -> None:
    module = tiny.hydra(hydra_trunk, micro_batch_size=1)
    rollout = module.collect(tiny.prompts(7), 0)
    mask = rollout.response_mask
    assert len(set(mask.sum(1).tolist())) > 2
    experience, _ = module.experience(rollout, module.score(rollout))
    stats, _ = tiny.rehearse(module, experience)
    # At ratio 1, with the values that were scored.
    assert_close(stats["policy_loss"], -experience.advantages[mask].mean())
    error = (given(experience.old_values) - given(experience.returns))[mask]
    assert_close(stats["value_loss"], 0.5 * (error**2).mean())
    assert_close(stats["loss"], stats["policy_loss"] + 0.1 * stats["value_loss"])
    # The mean of rows' means is another number here, so this can fail.
    rows_mean = (experience.advantages.sum(1) / mask.sum(1)).mean()
    assert (stats["policy_loss"] + rows_mean).abs() > 1e-3
    tiny.train_adapters(module)
    stats, _ = tiny.rehearse(module, experience)
    assert stats["approx_kl"] > 1e-4
    scored = module.score(rollout._replace(logprobs=None))
    assert (scored.logprobs - scored.reference)[mask].abs().max() > 0.01
    ratio = (scored.logprobs - experience.old_logprobs).exp()[mask]
    advantages = experience.advantages[mask]
    clipped = ratio.clamp(0.8, 1.2)
    assert_close(
        stats["policy_loss"], -torch.minimum(ratio * advantages, clipped * advantages).mean()
    )


# ---- how the work is cut ------------------------------------------------------------------------


def with_padding(rollout: Rollout, left: int, right: int) -> Rollout:
    """More columns, full of words that do not count."""
    count = len(rollout.row)
    junk = torch.arange(3, 3 + max(left, right)).expand(count, -1)
    never = torch.zeros_like(junk, dtype=torch.bool)
    return rollout._replace(
        prompt_ids=torch.cat([junk[:, :left], rollout.prompt_ids], 1),
        prompt_mask=torch.cat([never[:, :left], rollout.prompt_mask], 1),
        response_ids=torch.cat([rollout.response_ids, junk[:, :right]], 1),
        response_mask=torch.cat([rollout.response_mask, never[:, :right]], 1),
        logprobs=None,
    )


@EVERY_LAYOUT
def test_micro_batches_and_padding_change_nothing(layout: Layout, hydra_trunk: Path) -> None:
    module = tiny.hydra(hydra_trunk, layout=layout, micro_batch_size=8)
    rollout = module.collect(tiny.prompts(7), 0)._replace(logprobs=None)
    tiny.train_adapters(module)
    whole, _ = module.experience(rollout, module.score(rollout))
    tiny.train_adapters(module, seed=1)  # ratios other than 1
    stats, (gradients,) = tiny.rehearse(module, whole)
    padded = with_padding(rollout, 3, 2)
    for size in (1, 2, 3):
        module.micro_batch_size = module.score_batch_size = size
        cut_stats, (cut,) = tiny.rehearse(module, whole)
        assert_close(cut_stats, stats, rtol=1e-9, atol=1e-12)
        assert_close(cut, gradients, rtol=1e-9, atol=1e-12)
    tiny.train_adapters(module)
    wide, _ = module.experience(padded, module.score(padded))
    columns = rollout.response_mask.shape[1]
    for name in ("old_logprobs", "old_values", "advantages", "returns"):
        ours, theirs = getattr(wide, name)[:, :columns], getattr(whole, name)
        mask = rollout.response_mask
        assert_close(ours[mask], theirs[mask], rtol=1e-6, atol=1e-6)
    tiny.train_adapters(module, seed=1)
    wide_stats, (wide_gradients,) = tiny.rehearse(module, wide)
    assert_close(wide_stats, stats, rtol=1e-5, atol=1e-6)
    assert_close(wide_gradients, gradients, rtol=1e-4, atol=1e-6)


def test_minibatches_cover_every_episode_once_per_epoch(hydra_trunk: Path) -> None:
    module = tiny.hydra(hydra_trunk, ppo_epochs=3, minibatch_size=3)
    orders = [[rows.tolist() for rows in module._minibatches(8, 1, epoch)] for epoch in range(3)]
    for order in orders:
        assert [len(rows) for rows in order] == [3, 3, 2]
        assert sorted(row for rows in order for row in rows) == list(range(8))
    assert orders[0] != orders[1]
    again = [rows.tolist() for rows in module._minibatches(8, 1, 0)]
    assert again == orders[0]
    module.rollout_index = 1
    assert [rows.tolist() for rows in module._minibatches(8, 1, 0)] != orders[0]
    _, experience = tiny.experienced(module, tiny.prompts(8))
    _, steps = tiny.rehearse(module, experience)
    assert len(steps) == 9


@EVERY_LAYOUT
def test_checkpointing_changes_no_gradient(layout: Layout, hydra_trunk: Path) -> None:
    found = []
    for checkpointing in (False, True):
        module = tiny.hydra(hydra_trunk, layout=layout, checkpointing=checkpointing)
        tiny.train_adapters(module)
        _, experience = tiny.experienced(module, tiny.prompts(6))
        tiny.train_adapters(module, seed=1)
        _, (gradients,) = tiny.rehearse(module, experience)
        found.append(gradients)
    assert found[0].keys() == found[1].keys()
    assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)
    assert all(gradient.abs().max() > 0 for gradient in found[0].values())


@pytest.mark.parametrize(
    ("layout", "checkpointing", "again"),
    [
        ("hydra", False, set()),
        ("hydra", True, {"actor", "critic"}),
        ("hydra", ["value"], {"critic"}),
        ("hydra", ["policy"], {"actor"}),
        ("joint_hydra", ["value"], {"actor"}),
    ],
)
def test_checkpointing_of_one_role(
    layout: Layout, checkpointing: bool | list[TrainedRole], again: set[str], hydra_trunk: Path
) -> None:
    module = tiny.hydra(hydra_trunk, layout=layout, checkpointing=checkpointing)
    _, experience = tiny.experienced(module, tiny.prompts(3))
    switch, calls = module.policy_trunk.switch, list[str]()
    block = dict(module.policy_trunk.model.named_modules())["model.layers.0.mlp"]
    block.register_forward_pre_hook(lambda *_: calls.append(switch.current))
    tiny.rehearse(module, experience)
    # One micro-batch: a block is read once, and once more where it was not kept.
    assert {name: calls.count(name) - 1 for name in set(calls)} == {
        name: int(name in again) for name in set(calls)
    }
    assert again <= set(calls)


def test_checkpointing_names_trained_roles(hydra_trunk: Path) -> None:
    with pytest.raises(ValueError, match=r"one of \['policy', 'value'\], got \['reference'\]"):
        tiny.hydra(hydra_trunk, checkpointing=["reference"])


# ---- who learns --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["lora", "dynamic_lora", "perl", "hydra", "full"])
@pytest.mark.parametrize("alone", ["policy", "value"])
def test_step_of_one_role_leaves_the_other_alone(
    alone: str, layout: Layout, hydra_trunk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny.hydra(
        hydra_trunk,
        layout=layout,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.5),
    )
    tiny.train_adapters(module)
    _, experience = tiny.experienced(module, tiny.prompts(6))
    before = tiny.weights(module)
    monkeypatch.setattr(module, "trained_roles", (alone,))
    optimizer = tiny.one_optimizer(module)
    silent: dict[str, bool] = {}

    def record(*_: object) -> None:
        for group in optimizer.param_groups:
            silent[group["name"]] = all(one.grad is None for one in group["params"])

    optimizer.register_step_pre_hook(record)
    module.update(experience, optimizer)
    actor = alone == "policy"
    assert silent == {"actor": not actor, "critic": actor, "head": actor}
    owner = {id(one): group["name"] for group in optimizer.param_groups for one in group["params"]}
    names = dict(module.named_parameters())
    learned = {"actor"} if actor else {"critic", "head"}
    assert {owner[id(names[name])] for name in tiny.changed(before, module)} == learned


@EVERY_LAYOUT
def test_fit_changes_the_trained_weights_and_nothing_else(
    layout: Layout, hydra_trunk: Path, tmp_path: Path
) -> None:
    module = tiny.hydra(hydra_trunk, layout=layout, trunk_dtype="float32", ppo_epochs=1)
    before = tiny.weights(module)
    trainer, _ = tiny.fit(module, tmp_path, [tiny.prompts(6, seed) for seed in range(3)])
    assert trainer.global_step == 3
    changed = tiny.changed(before, module)
    assert changed <= module.trainable_names()
    assert {"roles.value_head.weight", "roles.value_head.bias"} <= changed
    assert not any("reward_head" in name for name in changed)
    if layout == "full":
        assert changed == module.trainable_names()
        assert not any("trunks.2" in name or "trunks.3" in name for name in changed)
        assert "roles.trunks.1.model.lm_head.weight" not in changed
        return
    assert all(".lora_" in name or "value_head" in name for name in changed)
    ups = {name for name in module.trainable_names() if "lora_B" in name}
    actor_and_critic = {"actor"} if layout == "joint_hydra" else {"actor", "critic"}
    assert {name.split(".lora_B.")[1].split(".")[0] for name in ups} == actor_and_critic
    state = module.state_dict()
    fresh = {name for name in ups if before[name].abs().max() == 0}
    assert fresh == ups
    assert all(state[name].norm() > 0 for name in ups)


def test_groups_have_their_own_learning_rates(hydra_trunk: Path) -> None:
    def rates(**options: float | None) -> dict[str, float]:
        optimizer = tiny.one_optimizer(tiny.hydra(hydra_trunk, **options))
        return {group["name"]: group["lr"] for group in optimizer.param_groups}

    assert rates() == {"actor": 1e-4, "critic": 1e-4, "head": 1e-4}
    assert rates(critic_learning_rate=2e-5) == {"actor": 1e-4, "critic": 2e-5, "head": 2e-5}
    both = {"critic_learning_rate": 2e-5, "head_learning_rate": 1e-3}
    assert rates(**both) == {"actor": 1e-4, "critic": 2e-5, "head": 1e-3}
    joint = tiny.one_optimizer(
        tiny.hydra(hydra_trunk, layout="joint_hydra", critic_learning_rate=5.0)
    )
    assert [group["name"] for group in joint.param_groups] == ["actor", "head"]


def test_groups_are_clipped_on_their_own_and_norms_logged_before(hydra_trunk: Path) -> None:
    module = tiny.hydra(hydra_trunk)
    tiny.train_adapters(module)
    _, experience = tiny.experienced(module, tiny.prompts(6))
    free, (before,) = tiny.rehearse(module, experience)
    shares = {"actor": 0.5, "critic": 1.0, "head": 0.1}
    norms = {group: float(free[f"grad_norm_{group}"]) for group in shares}
    limits = {
        "actor": norms["actor"] / 2,
        "critic": norms["critic"] * 2,
        "head": norms["head"] / 10,
    }
    module.max_grad_norms = limits
    stats, (clipped,) = tiny.rehearse(module, experience)
    for group in module.parameter_groups():
        assert_close(stats[f"grad_norm_{group['name']}"], free[f"grad_norm_{group['name']}"])
        own = {id(one) for one in group["params"]}
        for name, parameter in module.named_parameters():
            if id(parameter) in own:
                share = shares[group["name"]]
                assert_close(clipped[name], share * before[name], rtol=1e-4, atol=1e-9)
    for options, rest in (({}, 2.0), ({"critic_max_grad_norm": 0.5}, 0.5)):
        module = tiny.hydra(hydra_trunk, max_grad_norm=2.0, **options)
        assert module.max_grad_norms == {"actor": 2.0, "critic": rest, "head": rest}


def test_joint_pass_is_two_passes_with_the_same_adapter(hydra_trunk: Path) -> None:
    module = tiny.hydra(hydra_trunk, layout="joint_hydra", value_coef=0.7)
    tiny.train_adapters(module)
    _, experience = tiny.experienced(module, tiny.prompts(6))
    tiny.train_adapters(module, seed=1)
    _, (together,) = tiny.rehearse(module, experience)
    sums: dict[str, Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        for role in ("policy", "value"):
            patch.setattr(module, "trained_roles", (role,))
            _, (alone,) = tiny.rehearse(module, experience)
            for name, gradient in alone.items():
                sums[name] = sums.get(name, torch.zeros_like(gradient)) + gradient
    # Not closer: transformers' norms round their gradients to fp32 in either pass.
    assert_close(sums, together, rtol=1e-4, atol=1e-7)


# ---- a dropout that the trunk's config asks for --------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trunk_that_asks_for_dropout_has_ratio_one(
    checkpointing: bool, gpt2_trunk: Path, tmp_path: Path
) -> None:
    config = load_trunk(str(gpt2_trunk)).model.config
    assert config.resid_pdrop == 0  # switched off; the file says 0.1
    assert '"resid_pdrop": 0.1' in (gpt2_trunk / "config.json").read_text()
    module = tiny.hydra(gpt2_trunk, trunk_dtype="float64", checkpointing=checkpointing)
    trainer, _ = tiny.fit(module, tmp_path, [tiny.prompts(6, seed) for seed in range(2)])
    assert trainer.global_step == 2
    assert trainer.callback_metrics["train/approx_kl"] < 1e-12


# ---- does it learn the right thing ---------------------------------------------------------------


GOOD = 11
"""Words below it are good, from it on bad: before training about a third of all texts end well."""


def judging_head(trunk: Path) -> ScalarHead:
    """A head that reads from the last state whether the last word is good: about 1 or -1."""
    model = load_trunk(str(trunk))
    texts = tiny.prompts(400, seed=5)
    ids = texts.ids.clone()
    ids[:, -1] = torch.arange(400) % tiny.WORDS
    with torch.no_grad(), model.switch.use(OFF):
        states = model(ids, texts.mask)[:, -1]
    design = torch.cat([states, torch.ones(400, 1)], 1)
    wanted = torch.where(ids[:, -1] < GOOD, 1.0, -1.0)
    solution = torch.linalg.lstsq(design, wanted.unsqueeze(-1)).solution.squeeze(-1)
    head = ScalarHead(model.hidden_size)
    with torch.no_grad():
        head.weight.copy_(solution[:-1])
        head.bias.copy_(solution[-1])
    return head


@pytest.mark.parametrize("sign", [1, -1], ids=["as it is", "flipped"])
def test_policy_learns_what_the_reward_head_likes(sign: int, tmp_path: Path) -> None:
    plain = tiny.save_trunk(tmp_path / "plain", hidden=32, spread=0.02)
    head = judging_head(plain)
    with torch.no_grad():
        head.weight.mul_(sign)
        head.bias.mul_(sign)
    trunk = tiny.with_head(plain, tmp_path / "trunk", head)
    module = HydraPPO(
        str(trunk),
        lora=LoraSpec(4, 8.0),
        sampling=SamplingSpec(max_new_tokens=3),
        ppo_epochs=2,
        micro_batch_size=64,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.02),
    )
    endings: list[float] = []

    def look(trainer: Trainer, module: OnPolicy, batch: PromptBatch, number: int) -> None:
        rollout = module.collect(batch, module.rollout_index)
        rows = torch.arange(len(rollout.row))
        last = rollout.response_ids[rows, last_true(rollout.response_mask)]
        endings.append(float((last < GOOD).float().mean()))

    batches = [tiny.prompts(64, seed, longest=3) for seed in range(10)]
    trainer, _ = tiny.fit(
        module, tmp_path / "runs", batches, LambdaCallback(on_train_batch_start=look)
    )
    assert trainer.global_step == 20
    early, late = sum(endings[:2]) / 2, sum(endings[-2:]) / 2
    assert 0.2 < early < 0.5
    assert late > early + 0.3 if sign > 0 else late < early / 2
    # What it was paid for went up in either case.
    logged = tiny.measured(module, tmp_path / "runs", [tiny.prompts(64, 99)])
    assert logged["val/score"] > logged["val/reference_score"] + 0.2
    assert logged["val/win_rate"] > 0.5


# ---- refusals ------------------------------------------------------------------------------------


def test_hydra_is_ppo_with_the_layout_filled_in(hydra_trunk: Path) -> None:
    assert PPO(str(hydra_trunk), lora=tiny.LORA).roles.layout == "lora"
    assert HydraPPO(str(hydra_trunk), lora=tiny.LORA).roles.layout == "hydra"
    assert JointHydraPPO(str(hydra_trunk), lora=tiny.LORA).roles.layout == "joint_hydra"
    assert HydraPPO(str(hydra_trunk), "hydra", lora=tiny.LORA).roles.layout == "hydra"


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (
            HydraPPO,
            {"layout": "lora"},
            "HydraPPO is PPO with layout hydra; got layout 'lora'. Use the",
        ),
        (JointHydraPPO, {"layout": "hydra"}, "JointHydraPPO is PPO with layout joint_hydra; got"),
        (PPO, {"layout": "hydr"}, r"layout must be one of \['full', .*\] or None, got 'hydr'"),
        (
            PPO,
            {"missing_eos_score": -1.0, "missing_eos_penalty": 2.0},
            r"missing_eos_score \(sets the score\) or missing_eos_penalty .*; got -1.0 and 2.0",
        ),
        (
            PPO,
            {"sampling": SamplingSpec(top_p=0.9)},
            "the distribution that is scored, got temperature 1.0, top_p 0.9, top_k 0. Use",
        ),
        (
            PPO,
            {"sampling": SamplingSpec(temperature=0.0)},
            "distribution that is scored.*temperature 0",
        ),
        (PPO, {"lora": LoraSpec(dropout=0.1)}, "lora.dropout must be 0 in RL, got 0.1"),
        (HydraPPO, {"reward": "RUN/trunk"}, "`reward` must stay empty; got RUN/trunk"),
        (
            PPO,
            {"trunk_dtype": "float16"},
            r"PPO.trunk_dtype must be one of \['float32', .*got 'float16'",
        ),
    ],
)
def test_refused_at_construction(
    kind: type[PPO], options: dict[str, object], words: str, hydra_trunk: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        kind(str(hydra_trunk), **options)  # type: ignore[arg-type]


@EVERY_LAYOUT
def test_trunk_without_a_reward_head_is_refused(layout: Layout, plain_trunk: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has no reward head \(found: no heads file\)\. Train one"
    ):
        PPO(str(plain_trunk), layout)


def test_score_is_paid_for_the_eos_action(hydra_trunk: Path) -> None:
    module = tiny.hydra(hydra_trunk, kl_coef=0.0, discount=1.0, gae_lambda=1.0)
    rollout = module.collect(tiny.prompts(8), 0)
    scored = module.score(rollout)
    assert rollout.stopped.any()
    assert not rollout.stopped.all()
    last = last_true(rollout.response_mask)
    stops = module.policy_trunk.stop_ids
    for row in range(8):
        token = int(rollout.response_ids[row, last[row]])
        assert (token in stops) == bool(rollout.stopped[row])
        reward = reward_of(module, text_of(rollout, row))
        assert_close(scored.scores[row], reward, rtol=1e-6, atol=1e-7)
    experience, _ = module.experience(rollout, scored)
    mask = rollout.response_mask
    # Without a KL penalty and with lambda 1, every token's return is the score.
    assert_close(given(experience.returns)[mask], scored.scores.unsqueeze(-1).expand_as(mask)[mask])
