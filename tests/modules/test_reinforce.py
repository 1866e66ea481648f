"""PERL's policy gradient: its gradient is the objective's, in numbers, and it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_perl.batches import PromptBatch
from lightning_perl.functional.sequences import pad_right, until_stop
from lightning_perl.models.roles import Layout
from lightning_perl.modules import SFT, Reinforce, RewardModel
from lightning_perl.modules.base import AdapterModule
from lightning_perl.modules.evaluation import given
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.rollouts.rollout import Experience, Rollout, Scored
from lightning_perl.rollouts.sampling import SamplingSpec
from tests.modules import tiny
from tests.modules.test_ppo import two_rows

LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def perl(trunk: Path, **options: Any) -> Reinforce:
    """Reinforce in float64 unless said otherwise, gradients unclipped."""
    settings: dict[str, Any] = {
        "lora": tiny.LORA,
        "sampling": tiny.SAMPLING,
        "micro_batch_size": 3,
        "max_grad_norm": tiny.NO_CLIP,
        "trunk_dtype": "float64",
    }
    return Reinforce(str(trunk), **{**settings, **options})


def first_step(module: OnPolicy, experience: Experience) -> tuple[dict[str, Tensor], Any]:
    """Statistics and gradients of the one update; no weight moves."""
    stats, (gradients,) = tiny.rehearse(module, experience)
    return stats, gradients


# ---- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_returns_by_hand(beta: float, hydra_trunk: Path) -> None:
    module = perl(hydra_trunk, beta=beta)
    rollout, scored = two_rows()
    experience, stats = module.experience(rollout, scored)
    # Scores 4 and -3; log ratios 0.5, -1, 0 and -1; values 0.5, 0.25, -1 and 2.
    first, second = (1 - beta) * 4.0, (1 - beta) * -3.0
    returns = [first + 0.5 * beta, first + beta, first, second + beta]
    values = [0.5, 0.25, -1.0, 2.0]
    mask = rollout.response_mask
    assert given(experience.returns)[mask].tolist() == pytest.approx(returns, rel=1e-12)
    expected = [wanted - value for wanted, value in zip(returns, values, strict=True)]
    assert experience.advantages[mask].tolist() == pytest.approx(expected, rel=1e-12)
    assert stats["reward"].item() == pytest.approx((returns[0] + returns[3]) / 2)
    mean = sum(returns) / 4
    spread = sum((one - mean) ** 2 for one in returns)
    explained = 1 - sum(one**2 for one in expected) / spread
    assert stats["explained_variance"].item() == pytest.approx(explained)


def test_losses_are_sums_over_tokens_and_means_over_episodes(hydra_trunk: Path) -> None:
    module = perl(hydra_trunk, value_coef=0.5)
    tiny.train_adapters(module)
    rollout = module.collect(tiny.prompts(7), 0)
    mask = rollout.response_mask
    assert len(set(mask.sum(1).tolist())) > 2
    scored = module.score(rollout)
    experience, _ = module.experience(rollout, scored)
    stats, gradients = first_step(module, experience)
    policy = -(scored.logprobs * experience.advantages)[mask].sum() / 7
    value = ((scored.values - given(experience.returns))[mask] ** 2).sum() / 7
    assert_close(stats["policy_loss"], policy)
    assert_close(stats["value_loss"], value)
    assert_close(stats["loss"], policy + 0.5 * value)
    for size in (1, 2, 7):
        module.micro_batch_size = module.score_batch_size = size
        cut_stats, cut = first_step(module, experience)
        assert_close(cut_stats, stats, rtol=1e-9, atol=1e-12)
        assert_close(cut, gradients, rtol=1e-9, atol=1e-12)


# ---- against every response there is ---------------------------------------------------------------

LONGEST = 2


def every_response(module: OnPolicy, prompt: list[int]) -> Rollout:
    """One row for each response of up to two tokens; only those that cannot go on are whole."""
    stops = module.policy_trunk.stop_ids
    words = range(tiny.WORDS)
    texts = [[word] for word in words if word in stops]
    texts += [[word, other] for word in words if word not in stops for other in words]
    ids, _ = pad_right(texts, 0)
    mask, stopped = until_stop(ids, stops)
    count = len(texts)
    return Rollout(
        torch.tensor([prompt]).expand(count, -1),
        torch.ones(count, len(prompt), dtype=torch.bool),
        ids,
        mask & (torch.arange(LONGEST) < torch.tensor([[len(text)] for text in texts])),
        stopped,
        torch.arange(count),
    )


def objective(module: Reinforce, rollout: Rollout, scores: Tensor) -> Tensor:
    """The paper's J of one prompt, as a sum over every response; differentiable."""
    answers = module.roles.answer(rollout.sequences(), ("policy", "reference"))
    assert answers.policy is not None
    assert answers.reference is not None
    zero = torch.zeros_like(answers.policy)
    ours = torch.where(rollout.response_mask, answers.policy, zero).sum(1)
    theirs = torch.where(rollout.response_mask, answers.reference, zero).sum(1)
    chance = ours.exp()
    assert_close(chance.sum().item(), 1.0)
    kl = (chance * (ours - theirs)).sum()
    return (1 - module.beta) * (chance * scores).sum() - module.beta * kl


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_expected_gradient_is_the_objectives(beta: float, hydra_trunk: Path) -> None:
    module = perl(
        hydra_trunk, beta=beta, sampling=SamplingSpec(max_new_tokens=LONGEST), micro_batch_size=512
    )
    tiny.train_adapters(module)  # a policy away from its reference, a critic that is any function
    rollout = every_response(module, [5, 9, 4])
    scored = module.score(rollout)
    expected = objective(module, rollout, scored.scores)
    actor = module.roles.actor_parameters()
    wanted = torch.autograd.grad(expected, actor)
    experience, _ = module.experience(rollout, scored)
    # Each response as often as the policy gives it: a mean over episodes becomes an expectation.
    mask = rollout.response_mask
    chance = torch.where(mask, scored.logprobs, 0.0).sum(1, keepdim=True).exp()
    weights = chance * len(chance)
    weighted = experience._replace(advantages=experience.advantages * weights)
    optimizer = torch.optim.SGD(module.parameter_groups(), lr=0.0)
    found: list[Tensor | None] = []
    optimizer.register_step_pre_hook(
        lambda *_: found.extend(None if one.grad is None else one.grad.clone() for one in actor)
    )
    module.update(weighted, optimizer)
    assert max(float(one.abs().max()) for one in wanted) > 1e-3
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours is not None
        # Not closer: transformers' norms round their gradients to fp32.
        assert_close(ours, -theirs, rtol=1e-4, atol=1e-7)

    # The baseline changes no expectation, only single responses.
    other = module.experience(rollout, scored._replace(values=scored.values + 3.0))[0]
    assert (other.advantages - experience.advantages)[mask].abs().min() > 1
    found.clear()
    module.update(other._replace(advantages=other.advantages * weights), optimizer)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours is not None
        assert_close(ours, -theirs, rtol=1e-4, atol=1e-6)


def test_beta_weighs_reward_against_kl(hydra_trunk: Path) -> None:
    module = perl(hydra_trunk)
    tiny.train_adapters(module)
    rollout = module.collect(tiny.prompts(6), 0)
    scored = module.score(rollout)

    def returns(beta: float, scored: Scored) -> Tensor:
        module.beta = beta
        return given(module.experience(rollout, scored)[0].returns)[rollout.response_mask]

    far = scored._replace(reference=scored.reference - 5.0)
    better = scored._replace(scores=scored.scores + 5.0)
    assert torch.equal(returns(0.0, far), returns(0.0, scored))  # no KL
    assert torch.equal(returns(1.0, better), returns(1.0, scored))  # the KL alone
    assert (returns(0.3, far) < returns(0.3, scored)).all()
    assert (returns(0.3, better) > returns(0.3, scored)).all()


# ---- layouts -------------------------------------------------------------------------------------


def test_every_layout_gives_the_same_first_step(hydra_trunk: Path) -> None:
    modules = {layout: perl(hydra_trunk, layout=layout) for layout in LAYOUTS}
    rollout = modules["full"].collect(tiny.prompts(6), 0)
    steps: dict[str, dict[str, Tensor]] = {}
    for layout, module in modules.items():
        scored = module.score(rollout)
        mask = rollout.response_mask
        assert_close(scored.logprobs[mask], scored.reference[mask], rtol=0, atol=1e-14)
        steps[layout], _ = first_step(module, module.experience(rollout, scored)[0])
    for layout in LAYOUTS:
        for key in ("loss", "policy_loss", "value_loss", "entropy"):
            assert_close(steps[layout][key], steps["full"][key], rtol=1e-12, atol=1e-14)
    for layout in ("dynamic_lora", "perl", "hydra"):
        for key in ("grad_norm_actor", "grad_norm_critic", "grad_norm_head"):
            assert_close(steps[layout][key], steps["lora"][key], rtol=1e-9, atol=1e-12)


def run_of(module: AdapterModule, root: Path, batches: list[Any]) -> Path:
    return tiny.fit(module, root, batches).folder


@pytest.mark.parametrize("tuned", ["full", "adapters"])
def test_chain_from_sft_and_reward_model(tuned: str, plain_trunk: Path, tmp_path: Path) -> None:
    rows = [tiny.rated(8, seed) for seed in range(3)]
    policy = run_of(SFT(str(plain_trunk)), tmp_path / "sft", rows) / "trunk"
    lora = None if tuned == "full" else tiny.LORA
    judge = run_of(RewardModel(str(policy), lora), tmp_path / "reward", rows)
    layout: Layout = "full" if tuned == "full" else "perl"
    reward = judge / "trunk" if tuned == "full" else judge / "adapters" / "reward"
    module = Reinforce(
        str(policy), layout, reward=str(reward), lora=tiny.LORA, sampling=tiny.SAMPLING
    )
    own = {role: module.roles.trunk(role).fingerprint() for role in module.roles.seats}
    assert own["policy"] == own["reference"]
    assert own["value"] == own["reward"]
    assert (own["policy"] == own["reward"]) == (layout == "perl")
    stands = tiny.weights(module)
    trainer, folder = tiny.fit(
        module, tmp_path / "rl", [tiny.prompts(6, seed) for seed in range(2)]
    )
    assert trainer.global_step == 2  # one update per rollout batch
    assert tiny.changed(stands, module) == module.trainable_names()
    written = {path.name for path in folder.iterdir()}
    assert {"policy", "critic"} <= written if layout == "full" else "adapters" in written
    assert "train/policy_loss" in trainer.callback_metrics
    assert "train/clip_fraction" not in trainer.callback_metrics


# ---- what it is made of --------------------------------------------------------------------------


def test_other_roles_have_no_loss(hydra_trunk: Path) -> None:
    module = perl(hydra_trunk)
    rollout = module.collect(PromptBatch(*tiny.prompts(2)), 0)
    experience, _ = module.experience(rollout, module.score(rollout))
    answers = module.roles.answer(rollout.sequences(), ("reference",))
    with pytest.raises(RuntimeError, match=r"trains policy and value, was asked .* reference"):
        module.role_loss("reference", answers, experience, None)  # type: ignore[arg-type]
