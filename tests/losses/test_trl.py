"""Our losses against TRL's own lines on the same tensors, which `benchmarks/trl_golden.py` ran and froze."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_perl.functional.advantages import generalized_advantages, token_rewards
from lightning_perl.functional.logprobs import k1
from lightning_perl.functional.masked import masked_row_sums, whiten
from lightning_perl.functional.sequences import Sequences
from lightning_perl.losses.dpo import dpo, ipo
from lightning_perl.losses.grpo import group_advantages
from lightning_perl.losses.kto import kl_anchor, kto
from lightning_perl.losses.ppo import clipped_surrogate
from lightning_perl.losses.reinforce import policy_gradient
from lightning_perl.losses.rloo import leave_one_out
from lightning_perl.losses.value import clipped_value_loss
from lightning_perl.modules import GRPO
from lightning_perl.modules.updating import MinibatchSize, PolicyAnswers
from lightning_perl.rollouts.rollout import Experience

GOLDEN = json.loads((Path(__file__).parent / "trl_golden.json").read_text(encoding="utf-8"))


def inputs_of(part: str) -> dict[str, Any]:
    """A part's inputs, lists as float64 tensors."""
    inputs = GOLDEN[part]["inputs"]
    found = {k: numbers(v) if isinstance(v, list) else v for k, v in inputs.items()}
    return found | ({"mask": found["mask"].bool()} if "mask" in found else {})


def numbers(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same(loss: Callable[..., Tensor], golden: dict[str, Any], *inputs: Tensor) -> None:
    """Value and gradients; a loss whose value says nothing has none."""
    leaves = [one.clone().requires_grad_() for one in inputs]
    value = loss(*leaves)
    gradients = torch.autograd.grad(value, leaves)
    assert_close(
        [*gradients], [numbers(one) for one in golden["gradients"]], rtol=1e-12, atol=1e-14
    )
    if "loss" in golden:
        assert value.item() == pytest.approx(golden["loss"], rel=1e-12)


def test_dpo_and_ipo() -> None:
    """TRL has conservative DPO no more: its loss in both orders is mixed here.

    Its IPO takes means over a response's tokens, ours sums, as the paper's Eq. 17; on one token they agree.
    """
    part, given = GOLDEN["pairs"], inputs_of("pairs")
    chosen, rejected, beta = given["chosen"], given["rejected"], given["beta"]
    same(lambda c, r: dpo(c, r, beta), part["dpo"], chosen, rejected)
    mixed = 0.9 * part["dpo"]["loss"] + 0.1 * part["dpo_swapped"]["loss"]
    assert float(dpo(chosen, rejected, beta, 0.1)) == pytest.approx(mixed, rel=1e-12)
    better, worse = given["lengths"]
    same(lambda c, r: ipo(c / better, r / worse, beta), part["ipo"], chosen, rejected)


@pytest.mark.parametrize("anchor", ["anchored", "not_anchored"])
def test_kto(anchor: str) -> None:
    part, given = GOLDEN["thumbs"][anchor], inputs_of("thumbs")
    up = torch.arange(5) < len(given["up"])
    weights = given["desirable_weight"], given["undesirable_weight"]
    z = kl_anchor(numbers(part["mismatched"]))
    assert bool(z > 0) == (anchor == "anchored")
    same(
        lambda *rows: kto(torch.cat(rows), up, ~up, z, given["beta"], *weights),
        part,
        given["up"],
        given["down"],
    )


def test_group_advantages() -> None:
    part, given = GOLDEN["groups"], inputs_of("groups")
    rewards, samples = given["rewards"], given["samples"]
    assert_close(group_advantages(rewards, samples), numbers(part["advantages"]))
    assert_close(group_advantages(rewards, samples, False), numbers(part["dr_advantages"]))


@pytest.mark.parametrize(
    ("name", "high", "token_mean"),
    [
        ("grpo", 0.2, False),
        ("clip_higher", 0.28, False),
        ("token_mean", 0.2, True),
        ("dr_grpo", 0.2, True),
    ],
)
def test_grpo(name: str, high: float, token_mean: bool) -> None:
    """TRL's Dr. GRPO divides by responses times the longest there can be, ours by the tokens that there are."""
    part, given = GOLDEN["groups"][name], inputs_of("groups")
    mask = given["mask"]
    settings = {"token_mean": token_mean, "kl_in_reward": False, "kl_coef": given["kl_coef"]}
    module = SimpleNamespace(clip_range=given["clip"], clip_range_high=high, **settings)
    advantages = given["advantages"].unsqueeze(1) * mask
    experience = Experience(Sequences(mask.long(), mask, mask), given["old"], advantages)
    experience = experience._replace(reference=given["reference"])
    tokens = len(mask) * given["longest"] if name == "dr_grpo" else mask.sum()

    def loss(logprobs: Tensor) -> Tensor:
        answers = PolicyAnswers(logprobs, logprobs)
        size = MinibatchSize(torch.as_tensor(tokens), len(mask))
        return GRPO.policy_loss(cast(GRPO, module), answers, experience, size)[0]

    same(loss, part, given["logprobs"])


def test_rloo() -> None:
    """TRL's ratio is 1 where the policy sampled: the gradient is ours, the value is not."""
    part, given = GOLDEN["groups"]["rloo"], inputs_of("groups")
    old, mask = given["old"], given["mask"]
    kl = masked_row_sums(k1(old, given["reference"]), mask)
    rewards = numbers(part["rewards"]) - part["kl_coef"] * kl
    advantages = leave_one_out(rewards, part["samples"])
    assert_close(advantages, numbers(part["advantages"]))
    each = advantages.unsqueeze(1) * mask
    golden = {"gradients": part["gradients"]}
    same(lambda now: policy_gradient(now, each, mask, len(mask)), golden, old)


def test_ppo() -> None:
    """TRL pays the score one token later than we do, but for rows that are full, and whitens by n - 1."""
    part, given = GOLDEN["ppo"], inputs_of("ppo")
    mask, values, logprobs = given["mask"], given["values"], given["logprobs"]
    discounts, everywhere = (given["gamma"], given["lam"]), torch.ones_like(mask)
    kl_coef = given["kl_coef"]
    rewards = token_rewards(given["scores"], logprobs, given["reference"], everywhere, kl_coef)
    _, returns = generalized_advantages(rewards, values, everywhere, *discounts)
    assert_close(returns, numbers(part["whole_returns"]))
    advantages, returns = generalized_advantages(given["rewards"], values, mask, *discounts)
    assert_close(returns, numbers(part["returns"]))
    count = int(mask.sum())
    whitened = numbers(part["whitened"])
    assert_close(whiten(advantages, mask) * ((count - 1) / count) ** 0.5, whitened)

    def losses(now: Tensor, critic: Tensor) -> Tensor:
        policy, _ = clipped_surrogate(now, logprobs, whitened, mask, given["cliprange"])
        clip = given["cliprange_value"]
        value, _ = clipped_value_loss(critic, values, returns, mask, clip)
        loss: Tensor = policy + given["vf_coef"] * value
        return loss

    same(losses, part["losses"], given["now"], given["critic"])
