"""The relatives' losses: by hand in plain Python, their gradients against closed forms, their optima."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_perl.functional.advantages import generalized_advantages, token_rewards
from lightning_perl.functional.logprobs import k3
from lightning_perl.losses.dpo import dpo, ipo
from lightning_perl.losses.grpo import group_advantages
from lightning_perl.losses.inpo import inpo
from lightning_perl.losses.language_modeling import cross_entropy
from lightning_perl.losses.ppo import clipped_surrogate
from lightning_perl.losses.reinforce import policy_gradient
from lightning_perl.losses.remax import greedy_advantages
from lightning_perl.losses.rloo import leave_one_out
from lightning_perl.losses.superhf import anchored_cross_entropy
from lightning_perl.modules.selecting import kept_rows

MASK = torch.tensor([[True, True, True], [True, False, False]])


def numbers(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slope(losses: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses(at), at)
    return gradient


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


# ---- on-policy -----------------------------------------------------------------------------------


def check_group_advantages(fn: Callable[..., Tensor]) -> None:
    rewards = numbers(1, 2, 6, 5, 5, 5)
    assert_close(fn(rewards, 3, False), numbers(-2, -1, 3, 0, 0, 0))
    deviation = math.sqrt((4 + 1 + 9) / 2) + 1e-4
    assert_close(fn(rewards, 3), numbers(-2, -1, 3, 0, 0, 0) / deviation)
    assert_close(fn(rewards, 2, False), numbers(-0.5, 0.5, 0.5, -0.5, 0, 0))


def check_response_weighted(fn: Callable[..., Tensor]) -> None:
    losses, tokens = numbers([1, 2, 6], [10.3, 9, 9]), torch.tensor(4)
    token_mean = fn(losses, MASK, tokens, 2)[MASK].sum() / 4
    assert_close(token_mean, numbers((3 + 10.3) / 2).squeeze(0), rtol=1e-15, atol=0)
    assert fn(losses.float(), MASK, tokens, 2).dtype == torch.float32


def check_greedy_advantages(fn: Callable[..., Tensor]) -> None:
    logprobs, reference = numbers([-1, -2, -3], [-4, 7, 7]), numbers([-2, -1, -3.5], [-1, 0, 0])
    advantages = fn(numbers(3, 1), numbers(1, 2), logprobs, reference, MASK, 0.1)
    # What is paid from a token on: the score above the greedy one's, and the KL of all that follows.
    expected = numbers([2 - 0.1 * 0.5, 2 - 0.1 * -0.5, 2 - 0.1 * 0.5], [-1 - 0.1 * -3, 0, 0])
    assert_close(advantages, expected)
    same = fn(numbers(3, 1), numbers(3, 1), logprobs, reference, MASK, 0.0)
    assert not same.any()


def check_anchored_cross_entropy(fn: Callable[..., tuple[Tensor, Tensor]]) -> None:
    logprobs, kl = numbers([-1, -2, -3], [-4, 7, 7]), numbers([0.3, 0.6, 0], [0.5, 9, 9])
    loss, mean = fn(logprobs, kl, MASK, 0.2)
    assert_close(mean, numbers((0.3 + 0.5) / 2).squeeze(0))
    assert_close(loss, numbers((2 + 4) / 2 + 0.2 * 0.4).squeeze(0))
    assert_close(fn(logprobs, kl, MASK, 0.2, 8)[0], loss / 4)
    assert not fn(logprobs, kl.requires_grad_(), MASK, 0.2)[1].requires_grad


def check_inpo(fn: Callable[..., tuple[Tensor, Tensor]]) -> None:
    eta, tau = 0.5, 0.2
    now, reference, old = numbers(2, -1), numbers(1, 3), numbers(0.5, -2)
    h = [2 - 0.4 * 1 - 0.6 * 0.5, -1 - 0.4 * 3 + 0.6 * 2]
    loss, mean = fn(now, reference, old, eta, tau)
    assert_close(loss, numbers(sum((value - 1) ** 2 for value in h) / 2).squeeze(0))
    assert_close(mean, numbers(sum(h) / 2).squeeze(0))
    assert_close(fn(now, reference, old, eta, tau, 8)[0], loss / 4)
    assert_close(
        slope(lambda at: fn(at, reference, old, eta, tau)[0], now), numbers(*(v - 1 for v in h))
    )


def test_grpo_with_its_kl_is_unbiased_on_one_token() -> None:
    """Expected over the samples, the gradient is that of ``E[A] - beta KL(ref || pi)``, which is what k3 gives."""
    reward = numbers(1.0, -0.5, 2.0)
    reference = numbers(0.1, 0.4, -0.2).log_softmax(0)
    logits = numbers(0.3, -0.7, 0.2).requires_grad_()
    logprobs = logits.log_softmax(0)
    probabilities = logprobs.exp()
    forward_kl = (reference.exp() * (reference - logprobs)).sum()
    objective = (probabilities * reward).sum() - 0.3 * forward_kl
    (exact,) = torch.autograd.grad(objective, logits, retain_graph=True)
    mask = torch.ones(3, 1, dtype=torch.bool)
    weights = probabilities.detach().unsqueeze(1)
    loss = policy_gradient(logprobs.unsqueeze(1), weights * reward.unsqueeze(1), mask, 1)
    loss = loss + 0.3 * (weights * k3(logprobs, reference).unsqueeze(1)).sum()
    (estimate,) = torch.autograd.grad(loss, logits)
    assert_close(-estimate, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("greedy", [0, 1, 2])
def test_remax_is_unbiased_whatever_the_greedy_score(greedy: int) -> None:
    """Two tokens of three: over all responses the expected gradient is that of ``E[r] - beta KL``."""
    beta = 0.3
    reward = torch.linspace(-1, 2, 9, dtype=torch.float64).view(3, 3) ** 2
    reference = numbers([0.1, 0.4, -0.2], [0.5, 0.1, 0.9]).log_softmax(1)
    logits = numbers([0.3, -0.7, 0.2], [1.0, 0.2, -0.4]).requires_grad_()
    logprobs = logits.log_softmax(1)
    joint = logprobs[0][:, None] + logprobs[1][None, :]
    log_ratio = joint - (reference[0][:, None] + reference[1][None, :])
    objective = (joint.exp() * (reward - beta * log_ratio)).sum()
    (exact,) = torch.autograd.grad(objective, logits, retain_graph=True)
    first, second = (
        part.flatten() for part in torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")
    )
    of_tokens = torch.stack([logprobs[0][first], logprobs[1][second]], 1)
    of_reference = torch.stack([reference[0][first], reference[1][second]], 1)
    mask = torch.ones(9, 2, dtype=torch.bool)
    baseline = reward[greedy, greedy].expand(9)
    advantages = greedy_advantages(
        reward.flatten(), baseline, of_tokens.detach(), of_reference, mask, beta
    )
    weighted = advantages * joint.exp().flatten().detach().unsqueeze(1)
    (estimate,) = torch.autograd.grad(policy_gradient(of_tokens, weighted, mask, 1), logits)
    assert_close(-estimate, exact, rtol=1e-12, atol=1e-12)


# ---- one token, four responses: the optimum is known -----------------------------------------------

REWARD = numbers(1.0, -0.5, 2.0, 0.25)
REFERENCE = numbers(0.1, 0.4, -0.2, 0.3).log_softmax(0)
PAIRS = torch.cartesian_prod(torch.arange(4), torch.arange(4))
BETA, ETA, TAU = 0.5, 0.5, 0.2
TILTED = REFERENCE + REWARD / BETA
BEST_OF_TWO = numbers(5, 1, 7, 3) / 16
"""How often the better one of two responses of the uniform policy is each of the four."""
Bandit = Callable[[Tensor, Tensor], Tensor]
"""The expected loss, of the policy's log-probabilities and of the same as the sampler's."""


def alone(advantages_of: Callable[[Tensor, Tensor], Tensor]) -> Bandit:
    """A response to each prompt."""

    def loss(logprobs: Tensor, sampler: Tensor) -> Tensor:
        mask = torch.ones(4, 1, dtype=torch.bool)
        advantages = advantages_of(sampler.unsqueeze(1), mask) * sampler.exp().unsqueeze(1)
        return clipped_surrogate(logprobs[:, None], sampler[:, None], advantages, mask, 0.2, 1)[0]

    return loss


def with_critic(weight: float, beta: float, gae_lambda: float) -> Bandit:
    def advantages(sampler: Tensor, mask: Tensor) -> Tensor:
        rewards = token_rewards(weight * REWARD, sampler, REFERENCE[:, None], mask, beta)
        values = torch.full_like(rewards, 0.7)
        return generalized_advantages(rewards, values, mask, 1.0, gae_lambda)[0]

    return alone(advantages)


def remax(sampler: Tensor, mask: Tensor) -> Tensor:
    greedy = REWARD[sampler.argmax()].expand(4)
    return greedy_advantages(REWARD, greedy, sampler, REFERENCE[:, None], mask, BETA)


def in_groups(advantages_of: Callable[[Tensor], Tensor]) -> Bandit:
    """Two responses to each prompt."""

    def loss(logprobs: Tensor, sampler: Tensor) -> Tensor:
        rewards = (REWARD - BETA * (sampler - REFERENCE))[PAIRS].flatten()
        chance = sampler[PAIRS].sum(1, keepdim=True).exp()
        mask = torch.ones(16, 2, dtype=torch.bool)
        advantages = advantages_of(rewards).view(16, 2) * chance
        return policy_gradient(logprobs[PAIRS], advantages, mask, 2)

    return loss


def best_of_two(logprobs: Tensor, kl_coef: float) -> Tensor:
    """RAFT's step, or SuperHF's, on samples of the uniform policy."""
    best = PAIRS.flatten()[kept_rows(REWARD[PAIRS].flatten(), 2, worst=False)]
    kl = (REFERENCE.exp() * (REFERENCE - logprobs)).sum().expand(16, 1)
    mask = torch.ones(16, 1, dtype=torch.bool)
    chosen = logprobs[best].unsqueeze(1)
    return (
        anchored_cross_entropy(chosen, kl, mask, kl_coef)[0]
        if kl_coef
        else cross_entropy(chosen, mask)
    )


def inpo_round(logprobs: Tensor, sampler: Tensor) -> Tensor:
    """A round whose pi_t is uniform."""
    rows = PAIRS.flatten()[kept_rows(REWARD[PAIRS].flatten(), 2, worst=True)].view(16, 2)

    def log_odds(of: Tensor) -> Tensor:
        return of[rows[:, 0]] - of[rows[:, 1]]

    return inpo(log_odds(logprobs), log_odds(REFERENCE), torch.zeros(16), ETA, TAU)[0]


BANDITS: dict[str, tuple[Bandit, Tensor]] = {
    "PPO": (with_critic(1.0, BETA, 0.95), TILTED),
    "Reinforce": (with_critic(0.6, 0.4, 1.0), REFERENCE + 0.6 * REWARD / 0.4),
    "RLOO": (in_groups(lambda rewards: leave_one_out(rewards, 2)), TILTED),
    "GRPO, KL in the reward": (
        in_groups(lambda rewards: group_advantages(rewards, 2, False)),
        TILTED,
    ),
    "ReMax": (alone(remax), TILTED),
    "RAFT": (lambda logprobs, _: best_of_two(logprobs, 0.0), BEST_OF_TWO.log()),
    "SuperHF": (
        lambda logprobs, _: best_of_two(logprobs, 0.3),
        ((BEST_OF_TWO + 0.3 * REFERENCE.exp()) / 1.3).log(),
    ),
    # The win rate against pi_t, over eta, on top of the anchor.
    "INPO": (inpo_round, TAU / ETA * REFERENCE + numbers(2.5, 0.5, 3.5, 1.5) / 4 / ETA),
}


@pytest.mark.parametrize("name", BANDITS)
def test_the_policy_that_an_estimator_ends_at(name: str) -> None:
    """``ref exp(r / beta)`` where the KL is paid: the gradient is 0 there, and leads back from beside it."""
    loss, optimum = BANDITS[name]

    def at(logits: Tensor) -> Tensor:
        logprobs = logits.log_softmax(0)
        return loss(logprobs, logprobs.detach())

    assert_close(slope(at, optimum), torch.zeros_like(optimum), rtol=0, atol=1e-12)
    aside = numbers(0.3, -0.1, -0.3, 0.1)
    assert float((slope(at, optimum + aside) * aside).sum()) > 1e-3


# ---- pairs and thumbs ----------------------------------------------------------------------------


def check_dpo(fn: Callable[..., Tensor]) -> None:
    chosen, rejected, offset = numbers(1.5, -2), numbers(0.5, 1), numbers(0.3, -0.2)
    margins = [0.3 * 1 + 0.3, 0.3 * -3 - 0.2]
    expected = -sum(math.log(sigmoid(margin)) for margin in margins) / 2
    assert float(fn(chosen, rejected, 0.3, offset=offset)) == pytest.approx(expected)
    smooth = -sum(0.9 * math.log(sigmoid(m)) + 0.1 * math.log(sigmoid(-m)) for m in margins) / 2
    assert float(fn(chosen, rejected, 0.3, 0.1, offset)) == pytest.approx(smooth)
    # Eq. 7's gradient: beta times the probability of the wrong order.
    weights = numbers(*(-0.3 * sigmoid(-margin) / 2 for margin in margins))
    assert_close(slope(lambda at: fn(at, rejected, 0.3, offset=offset), chosen), weights)
    assert float(fn(chosen[:0], rejected[:0], 0.3)) == 0


def check_ipo(fn: Callable[..., Tensor]) -> None:
    assert float(fn(numbers(1.5, -2), numbers(0.5, 1), 0.25)) == pytest.approx((1 + 25) / 2)
    assert float(fn(numbers(2.0), numbers(0.0), 0.25)) == 0
    assert float(fn(numbers(1.0)[:0], numbers(1.0)[:0], 0.25)) == 0


def check_kto(fn: Callable[..., Tensor]) -> None:
    ratios, anchor = numbers(2, -1, 0.5, 40), numbers(0.4).squeeze(0)
    up, down = torch.tensor([True, False, False, False]), torch.tensor([False, True, True, False])
    gains = [0.5 * (value - 0.4) for value in (2, -1, 0.5)]
    losses = [1.2 * (1 - sigmoid(gains[0])), *(0.7 * (1 - sigmoid(-gain)) for gain in gains[1:])]
    found = fn(ratios, up, down, anchor, 0.5, 1.2, 0.7)
    assert float(found) == pytest.approx(sum(losses) / 3)
    assert float(fn(ratios, ~up & up, ~up & up, anchor, 0.5)) == 0
    gradient = slope(lambda at: fn(at, up, down, anchor, 0.5), ratios)
    assert gradient[0] < 0 < gradient[1]
    assert gradient[3] == 0


def check_kl_anchor(fn: Callable[[Tensor], Tensor]) -> None:
    ratios = numbers(0.5, -0.1, 0.8).requires_grad_()
    assert float(fn(ratios)) == pytest.approx(0.4)
    assert float(fn(-ratios)) == 0
    assert not fn(ratios).requires_grad


@pytest.mark.parametrize("loss", [dpo, ipo], ids=["dpo", "ipo"])
def test_the_optimum_is_the_known_policy(loss: Callable[..., Tensor]) -> None:
    """One prompt, three answers, all pairs: DPO ends at ``ref exp(r / beta)``, IPO at its margin of win rates."""
    beta, reward = 0.5, numbers(0.2, -0.3, 0.7)
    reference = numbers(0.1, 0.9, -0.4).log_softmax(0)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    better, worse = (
        part.flatten() for part in torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")
    )
    wins = torch.sigmoid(reward[better] - reward[worse])
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        ratios = logits.log_softmax(0) - reference
        each = [
            loss(ratios[i].unsqueeze(0), ratios[j].unsqueeze(0), beta) * win
            for i, j, win in zip(better, worse, wins, strict=True)
        ]
        total = torch.stack(each).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    if loss is dpo:
        expected = (reference + reward / beta).log_softmax(0)
    else:
        # Least squares: the log-ratio of an answer is its mean win rate less the loss rate, over 2 beta.
        rates = (wins - (1 - wins)).view(3, 3).mean(1) / (2 * beta)
        expected = (reference + rates).log_softmax(0)
    assert_close(logits.detach().log_softmax(0), expected, rtol=1e-6, atol=1e-6)
