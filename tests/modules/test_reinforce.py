"""PERL's policy gradient: its gradient is the objective's, in numbers, and it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_perl.functional.sequences import pad_right, until_stop
from lightning_perl.models.roles import Layout
from lightning_perl.modules import SFT, Reinforce, RewardModel
from lightning_perl.modules.evaluation import given
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.rollouts.rollout import Rollout
from lightning_perl.rollouts.sampling import SamplingSpec
from tests.modules import tiny
from tests.modules.test_ppo import two_rows

LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def perl(trunk: Path, **options: Any) -> Reinforce:
    return tiny.on_policy(Reinforce, trunk, **options)


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
    stats, (gradients,) = tiny.rehearse(module, experience)
    policy = -(scored.logprobs * experience.advantages)[mask].sum() / 7
    value = ((scored.values - given(experience.returns))[mask] ** 2).sum() / 7
    assert_close(stats["policy_loss"], policy)
    assert_close(stats["value_loss"], value)
    assert_close(stats["loss"], policy + 0.5 * value)
    for size in (1, 2, 7):
        module.micro_batch_size = module.score_batch_size = size
        cut_stats, (cut,) = tiny.rehearse(module, experience)
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
    actor = {name: one for name, one in module.named_parameters() if ".actor." in name}
    expected = objective(module, rollout, scored.scores)
    wanted = torch.autograd.grad(expected, list(actor.values()))
    assert max(float(one.abs().max()) for one in wanted) > 1e-3
    # Each response as often as the policy gives it: a mean over episodes becomes an expectation.
    chance = torch.where(rollout.response_mask, scored.logprobs, 0.0).sum(1, keepdim=True).exp()
    # The baseline changes no expectation, only single responses.
    for baseline in (0.0, 3.0):
        judged = scored._replace(values=scored.values + baseline)
        experience, _ = module.experience(rollout, judged)
        weighted = experience.advantages * chance * len(chance)
        _, (found,) = tiny.rehearse(module, experience._replace(advantages=weighted))
        for name, gradient in zip(actor, wanted, strict=True):
            # Not closer: transformers' norms round their gradients to fp32.
            assert_close(found[name], -gradient, rtol=1e-4, atol=1e-6)


# ---- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuned", ["full", "adapters"])
def test_chain_from_sft_and_reward_model(tuned: str, plain_trunk: Path, tmp_path: Path) -> None:
    rows = [tiny.rated(8, seed) for seed in range(3)]
    policy = tiny.fit(SFT(str(plain_trunk)), tmp_path, rows).folder / "trunk"
    lora = None if tuned == "full" else tiny.LORA
    judge = tiny.fit(RewardModel(str(policy), lora), tmp_path, rows).folder
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
    trainer, folder = tiny.fit(module, tmp_path, [tiny.prompts(6, seed) for seed in range(2)])
    assert trainer.global_step == 2  # one update per rollout batch
    assert tiny.changed(stands, module) == module.trainable_names()
    written = {path.name for path in folder.iterdir()}
    assert {"policy", "critic"} <= written if layout == "full" else "adapters" in written
    assert "train/policy_loss" in trainer.callback_metrics
    assert "train/clip_fraction" not in trainer.callback_metrics
