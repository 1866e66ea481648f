"""PERL's policy gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_perl.arguments import Fraction
from lightning_perl.functional.advantages import generalized_advantages, token_rewards
from lightning_perl.losses.reinforce import baseline_loss, policy_gradient
from lightning_perl.models.roles import Layout
from lightning_perl.modules.actor_critic import ActorCritic
from lightning_perl.modules.base import Stats
from lightning_perl.modules.evaluation import given
from lightning_perl.modules.updating import MinibatchSize, PolicyAnswers
from lightning_perl.rollouts.rollout import Experience, Rollout, Scored, explained_variance


class Reinforce(ActorCritic):
    """REINFORCE with a learned baseline, as PERL (2403.10704, Eq. 1) does RL.

    Maximizes ``E[(1 - beta) r(y|x) - beta KL(pi || reference)]`` over tokens as actions, with the reward
    on the last one and no discount: ``-sum_t log pi(a_t|s_t) * stopgrad(Z_t - V(s_t))`` for the policy and
    ``sum_t (Z_t - V(s_t))^2`` for the value (RLAIF, 2309.00267, App. F), summed over a response's tokens
    and averaged over episodes. No clip, no GAE, no importance ratio; one update per rollout batch.

    The KL enters as part of the return, ``Z_t = (1 - beta) r - beta sum_(t' >= t) (log pi - log ref)_t'``:
    that is the gradient of the objective. The papers fold it into the policy's loss and do not say
    whether the value is fitted to it too; here it is, since it is the return's baseline. PERL's temperatures
    are 0.7 to 0.9, its learning rates 1e-5 to 1e-4.

    Args:
        trunk: Folder of the SFT or Hydra-SFT trunk, or a hub name.
        layout: Which trunk, adapter and head answers which role; PERL's own is ``perl``. See `Evaluation`.
        beta: Weight of the KL against the reward, in [0, 1]: 0 is the reward alone, 1 the KL alone (PERL
            0.05). As PPO's ``kl_coef`` it would be ``beta / (1 - beta)``.
    """

    def __init__(
        self, trunk: str, layout: Layout = "perl", beta: Fraction = 0.05, **settings: Any
    ) -> None:
        super().__init__(trunk, layout=layout, **settings)
        self.beta = beta

    def experience(self, rollout: Rollout, scored: Scored) -> tuple[Experience, Stats]:
        """Undiscounted returns of the objective, and their distance from the baseline."""
        mask = rollout.response_mask
        scores = (1 - self.beta) * scored.scores
        rewards = token_rewards(scores, scored.logprobs, scored.reference, mask, self.beta)
        # With lambda 1 this is no estimate: returns are the plain sums of what follows.
        advantages, returns = generalized_advantages(
            rewards, scored.values, mask, discount=1.0, gae_lambda=1.0
        )
        stats = {
            "explained_variance": explained_variance(scored.values, returns, mask),
            "reward": rewards.sum(1).mean(),
        }
        experience = Experience(
            rollout.sequences(), scored.logprobs, advantages, scored.values, returns
        )
        return experience, stats

    def policy_loss(
        self, answers: PolicyAnswers, experience: Experience, size: MinibatchSize
    ) -> tuple[Tensor, Stats]:
        """Policy gradient, a mean over episodes."""
        mask = experience.sequences.response_mask
        return policy_gradient(answers.logprobs, experience.advantages, mask, size.episodes), {}

    def value_loss(
        self, values: Tensor, experience: Experience, size: MinibatchSize
    ) -> tuple[Tensor, Stats]:
        """Squared error, a mean over episodes."""
        mask = experience.sequences.response_mask
        return baseline_loss(values, given(experience.returns), mask, size.episodes), {}
