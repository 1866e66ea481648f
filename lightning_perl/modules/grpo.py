"""GRPO: the responses to one prompt are each other's yardstick."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_perl.arguments import Count, FractionAboveZero, NonNegative, Positive, TwoOrMore
from lightning_perl.functional.logprobs import k3
from lightning_perl.functional.masked import masked_mean
from lightning_perl.losses.grpo import group_advantages, response_weighted
from lightning_perl.losses.ppo import clipped_surrogate
from lightning_perl.modules.base import Stats
from lightning_perl.modules.evaluation import given
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.modules.updating import MinibatchSize, PolicyAnswers
from lightning_perl.rollouts.rollout import Experience, Rollout, Scored


class GRPO(OnPolicy):
    """Group relative policy optimization (2402.03300, Eq. 3 and 4); no critic.

    Advantages are scores less their prompt's mean, over the standard deviation; the loss is PPO's and a KL (k3).

    Args:
        trunk: Folder of the SFT or Hydra-SFT trunk, or a hub name.
        samples: Responses per prompt, the paper's G; at least 2.
        epochs: Passes over each rollout batch.
        minibatch_size: Episodes per optimizer step. None: the whole rollout batch.
        kl_coef: Weight of the KL to the reference in the loss, the paper's beta.
        kl_in_reward: Take that KL off the scores instead of adding it to the loss.
        clip_range: How far the ratio may move from 1 before its gradient stops.
        clip_range_high: The same above 1 (DAPO, 2503.14476: 0.28). None: ``clip_range``.
        scale_by_group: Divide by the standard deviation of the prompt's scores. False: Dr. GRPO (2503.20783).
        token_mean: Every token weighs the same. False: every response does, as in the paper.
    """

    def __init__(
        self,
        trunk: str,
        samples: TwoOrMore = 8,
        epochs: Count = 1,
        minibatch_size: Count | None = None,
        kl_coef: NonNegative = 0.04,
        kl_in_reward: bool = False,
        clip_range: FractionAboveZero = 0.2,
        clip_range_high: Positive | None = None,
        scale_by_group: bool = True,
        token_mean: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(trunk, samples=samples, **settings)
        self.learn_in(epochs, minibatch_size)
        self.kl_coef, self.kl_in_reward, self.token_mean = kl_coef, kl_in_reward, token_mean
        self.clip_range, self.clip_range_high = clip_range, clip_range_high
        self.scale_by_group = scale_by_group

    def experience(self, rollout: Rollout, scored: Scored) -> tuple[Experience, Stats]:
        """One advantage per response, the same on all of its tokens."""
        mask, kl_coef = rollout.response_mask, self.kl_coef if self.kl_in_reward else 0.0
        rewards = scored.scores - kl_coef * scored.kl(mask)
        advantages = group_advantages(rewards, rollout.samples, self.scale_by_group).unsqueeze(1)
        experience = Experience(rollout.sequences(), scored.logprobs, advantages * mask)
        return experience._replace(reference=scored.reference), {"reward": rewards.mean()}

    def policy_loss(
        self, answers: PolicyAnswers, experience: Experience, size: MinibatchSize
    ) -> tuple[Tensor, Stats]:
        """Clipped surrogate and KL, a mean over tokens or over responses."""
        mask, advantages = experience.sequences.response_mask, experience.advantages
        kl = k3(answers.logprobs, given(experience.reference))
        if not self.token_mean:
            advantages, kl = (response_weighted(part, mask, *size) for part in (advantages, kl))
        old, ranges = experience.old_logprobs, (self.clip_range, size.tokens, self.clip_range_high)
        loss, stats = clipped_surrogate(answers.logprobs, old, advantages, mask, *ranges)
        kl = masked_mean(kl, mask, size.tokens)
        in_loss = 0.0 if self.kl_in_reward else self.kl_coef
        return loss + in_loss * kl, {**stats, "kl_loss": kl.detach()}
