"""GRPO: the responses to one prompt are each other's yardstick."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_perl.arguments import Count, FractionAboveZero, NonNegative, Positive, TwoOrMore
from lightning_perl.functional.logprobs import k1, k3
from lightning_perl.functional.masked import masked_mean, masked_row_sums
from lightning_perl.losses.grpo import group_advantages, response_weighted
from lightning_perl.losses.ppo import clipped_surrogate
from lightning_perl.modules.base import Stats
from lightning_perl.modules.evaluation import given
from lightning_perl.modules.on_policy import MinibatchSize, OnPolicy, PolicyAnswers
from lightning_perl.rollouts.rollout import Experience, Rollout, Scored


class GRPO(OnPolicy):
    """Group relative policy optimization (2402.03300, Eq. 3 and 4); no critic.

    A response's advantage is its score less the mean of its prompt's scores, over their standard deviation; the
    loss is PPO's clipped surrogate plus ``kl_coef`` times the k3 estimate of the KL to the reference.

    Args:
        trunk: Folder of the SFT or Hydra-SFT trunk, or a hub name.
        samples: Responses per prompt, the paper's G; at least 2.
        epochs: Passes over each rollout batch.
        minibatch_size: Episodes per optimizer step. None: the whole rollout batch.
        kl_coef: Weight of the KL to the reference, the paper's beta.
        kl_in_reward: Subtract the KL from the score of a response instead of adding it to the loss.
        clip_range: How far the ratio may move from 1 before its gradient stops.
        clip_range_high: The same above 1, where it differs (DAPO, 2503.14476: 0.28). None: ``clip_range``.
        scale_by_group: Divide by the standard deviation of the prompt's scores. False: Dr. GRPO (2503.20783).
        token_mean: Every token weighs the same. False: every response does, as in the paper, so that a token of a
            long response weighs less.
        settings: Arguments of `OnPolicy`, `Evaluation` and `AdapterModule`.
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
        high = clip_range if clip_range_high is None else clip_range_high
        super().__init__(trunk, samples=samples, **settings)
        self.learn_in(epochs, minibatch_size)
        self.kl_coef = kl_coef
        self.kl_in_reward = kl_in_reward
        self.clip_range, self.clip_range_high = clip_range, high
        self.scale_by_group = scale_by_group
        self.token_mean = token_mean

    def experience(self, rollout: Rollout, scored: Scored) -> tuple[Experience, Stats]:
        """One advantage per response, the same on all of its tokens."""
        mask, rewards = rollout.response_mask, scored.scores
        if self.kl_in_reward:
            kl = masked_row_sums(k1(scored.logprobs, scored.reference), mask)
            rewards = rewards - self.kl_coef * kl
        advantages = group_advantages(rewards, rollout.samples, self.scale_by_group)
        experience = Experience(
            rollout.sequences(), scored.logprobs, advantages.unsqueeze(1) * mask
        )
        return experience._replace(reference=scored.reference), {"reward": rewards.mean()}

    def policy_loss(
        self, answers: PolicyAnswers, experience: Experience, size: MinibatchSize
    ) -> tuple[Tensor, Stats]:
        """Clipped surrogate and KL, a mean over tokens or over responses."""
        mask = experience.sequences.response_mask

        def weighted(values: Tensor) -> Tensor:
            return values if self.token_mean else response_weighted(values, mask, *size)

        loss, stats = clipped_surrogate(
            answers.logprobs,
            experience.old_logprobs,
            weighted(experience.advantages),
            mask,
            self.clip_range,
            size.tokens,
            self.clip_range_high,
        )
        if self.kl_in_reward or self.kl_coef == 0:
            return loss, stats._asdict()
        kl = weighted(k3(answers.logprobs, given(experience.reference)))
        kl_loss = masked_mean(kl, mask, size.tokens)
        return loss + self.kl_coef * kl_loss, {**stats._asdict(), "kl_loss": kl_loss.detach()}
