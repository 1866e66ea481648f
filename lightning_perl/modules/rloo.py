"""RLOO: the responses to one prompt are each other's baseline."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_perl.arguments import NonNegative, TwoOrMore
from lightning_perl.losses.reinforce import policy_gradient
from lightning_perl.losses.rloo import leave_one_out
from lightning_perl.modules.base import Stats
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.modules.updating import MinibatchSize, PolicyAnswers
from lightning_perl.rollouts.rollout import Experience, Rollout, Scored


class RLOO(OnPolicy):
    """REINFORCE with leave-one-out baselines (2402.14740, Eq. 7); no critic.

    A whole response is one action with the reward ``R = r - kl_coef * sum_t (log pi - log ref)_t``. Its
    advantage is R minus the mean R of the other responses to the same prompt. One update per rollout batch.

    Args:
        trunk: Folder of the SFT or Hydra-SFT trunk, or a hub name.
        samples: Responses per prompt, the paper's k; at least 2.
        kl_coef: Weight of the KL to the reference in the reward, the paper's beta (0.03 to 0.10).
    """

    def __init__(
        self, trunk: str, samples: TwoOrMore = 4, kl_coef: NonNegative = 0.05, **settings: Any
    ) -> None:
        super().__init__(trunk, samples=samples, **settings)
        self.kl_coef = kl_coef

    def experience(self, rollout: Rollout, scored: Scored) -> tuple[Experience, Stats]:
        """One advantage per response, the same on all of its tokens."""
        mask = rollout.response_mask
        rewards = scored.scores - self.kl_coef * scored.kl(mask)
        advantages = leave_one_out(rewards, rollout.samples).unsqueeze(1) * mask
        experience = Experience(rollout.sequences(), scored.logprobs, advantages)
        return experience, {"reward": rewards.mean()}

    def policy_loss(
        self, answers: PolicyAnswers, experience: Experience, size: MinibatchSize
    ) -> tuple[Tensor, Stats]:
        """Policy gradient, a mean over episodes."""
        mask = experience.sequences.response_mask
        return policy_gradient(answers.logprobs, experience.advantages, mask, size.episodes), {}
