"""ReMax: the greedy response to a prompt is its baseline."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lightning_perl.arguments import NonNegative
from lightning_perl.losses.reinforce import policy_gradient
from lightning_perl.losses.remax import greedy_advantages
from lightning_perl.modules.base import Stats
from lightning_perl.modules.evaluation import given
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.modules.updating import MinibatchSize, PolicyAnswers
from lightning_perl.rollouts.rollout import Experience, Rollout, Scored


class ReMax(OnPolicy):
    """REINFORCE whose baseline is the score of the policy's greedy response (2310.10505, Alg. 2); no critic.

    The greedy response is drawn and scored like any other, up to its own end. A sample that equals it has, but for
    the KL, no advantage. One update per rollout batch.

    Args:
        trunk: Folder of the SFT or Hydra-SFT trunk, or a hub name.
        kl_coef: Weight of the KL to the reference in the reward.
    """

    greedy_baseline: ClassVar[bool] = True

    def __init__(self, trunk: str, kl_coef: NonNegative = 0.05, **settings: Any) -> None:
        super().__init__(trunk, **settings)
        self.kl_coef = kl_coef

    def experience(self, rollout: Rollout, scored: Scored) -> tuple[Experience, Stats]:
        """How much better than the greedy response, less the KL that follows."""
        mask, baseline = rollout.response_mask, given(scored.baseline)
        advantages = greedy_advantages(
            scored.scores, baseline, scored.logprobs, scored.reference, mask, self.kl_coef
        )
        experience = Experience(rollout.sequences(), scored.logprobs, advantages)
        return experience, {"baseline": baseline.mean()}

    def policy_loss(
        self, answers: PolicyAnswers, experience: Experience, size: MinibatchSize
    ) -> tuple[Tensor, Stats]:
        """Policy gradient, a mean over episodes."""
        mask = experience.sequences.response_mask
        return policy_gradient(answers.logprobs, experience.advantages, mask, size.episodes), {}
