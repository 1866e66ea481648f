"""PPO on any layout, and its two Hydra forms."""

from __future__ import annotations

import math
from typing import Any, ClassVar, get_args

from torch import Tensor

from lightning_perl.arguments import Count, Fraction, NonNegative, Positive
from lightning_perl.functional.advantages import generalized_advantages, token_rewards
from lightning_perl.functional.masked import masked_mean, whiten
from lightning_perl.losses.ppo import clipped_surrogate
from lightning_perl.losses.value import clipped_value_loss
from lightning_perl.models.roles import Layout
from lightning_perl.modules.actor_critic import ActorCritic
from lightning_perl.modules.base import Stats
from lightning_perl.modules.evaluation import given
from lightning_perl.modules.on_policy import KLControl
from lightning_perl.modules.updating import MinibatchSize, PolicyAnswers
from lightning_perl.rollouts.rollout import Experience, Rollout, Scored, explained_variance


class PPO(ActorCritic):
    """Proximal policy optimization with four roles on one, two or four trunks.

    The reward of a token is ``-kl_coef * (log pi - log ref)``, plus the score at the last token; advantages
    by GAE; clipped surrogate and clipped value loss. The layout says who answers policy, value, reference
    and reward; the algorithm does not depend on it. PPO-max (2307.04964) is ``score_normalization``,
    ``score_clip``, ``advantage_clip``, ``critic_warmup`` and ``lm_weight`` together:
    configs/relatives/ppo_max.yaml.

    Args:
        trunk: Folder of the SFT or Hydra-SFT trunk, or a hub name.
        layout: ``full``, ``lora``, ``dynamic_lora``, ``perl``, ``hydra`` or ``joint_hydra``, see `Evaluation`.
            None: lora in `PPO`, hydra in `HydraPPO`, joint_hydra in `JointHydraPPO`.
        ppo_epochs: Passes over each rollout batch.
        minibatch_size: Episodes per optimizer step. None: the whole rollout batch.
        kl_coef: Weight of the KL to the reference in the reward, the papers' beta (Hydra-RLHF 0.02).
        kl_control: Estimator of that KL, and a target that steers its weight.
        clip_range: How far the ratio may move from 1 before its gradient stops, PPO's epsilon.
        value_clip_range: How far a value may move from its old one before its gradient stops.
        value_coef: Weight of the value loss; matters where actor and critic share an adapter.
        discount: Discount per token, the papers' gamma.
        gae_lambda: Lambda of generalized advantage estimation (Hydra-RLHF 0.95).
        whiten_advantages: Shift and scale advantages over the whole rollout batch.
        advantage_clip: Advantages are then clipped to plus or minus this. None: not at all.
        entropy_coef: Weight of an entropy bonus, in nats per token (PPO-max's authors found it fragile).
    """

    own_layout: ClassVar[Layout] = "lora"
    layouts: ClassVar[tuple[Layout, ...]] = get_args(Layout)

    def __init__(
        self,
        trunk: str,
        layout: Layout | None = None,
        ppo_epochs: Count = 4,
        minibatch_size: Count | None = None,
        kl_coef: NonNegative = 0.02,
        kl_control: KLControl = KLControl(),
        clip_range: Positive = 0.2,
        value_clip_range: Positive = 0.2,
        value_coef: NonNegative = 0.1,
        discount: Fraction = 1.0,
        gae_lambda: Fraction = 0.95,
        whiten_advantages: bool = True,
        advantage_clip: Positive | None = None,
        entropy_coef: NonNegative = 0.0,
        **settings: Any,
    ) -> None:
        if layout is not None and layout in PPO.layouts and layout not in self.layouts:
            raise ValueError(
                f"{type(self).__name__} is PPO with layout {self.own_layout}; got layout {layout!r}. Use the "
                "class PPO for other layouts."
            )
        super().__init__(trunk, layout=layout or self.own_layout, value_coef=value_coef, **settings)
        self.learn_in(ppo_epochs, minibatch_size)
        self.kl_coef = kl_coef
        self.kl_control = kl_control
        self.clip_range = clip_range
        self.value_clip_range = value_clip_range
        self.discount = discount
        self.gae_lambda = gae_lambda
        self.whiten_advantages = whiten_advantages
        self.advantage_clip = math.inf if advantage_clip is None else advantage_clip
        self.entropy_coef = entropy_coef
        self.entropy_gradient = entropy_coef > 0

    def experience(self, rollout: Rollout, scored: Scored) -> tuple[Experience, Stats]:
        """KL-shaped token rewards, GAE, whitening."""
        mask = rollout.response_mask
        rewards = token_rewards(
            scored.scores,
            scored.logprobs,
            scored.reference,
            mask,
            self.steered_kl_coef,
            self.kl_control.estimate,
        )
        advantages, returns = generalized_advantages(
            rewards, scored.values, mask, self.discount, self.gae_lambda
        )
        stats = {
            "explained_variance": explained_variance(scored.values, returns, mask),
            "reward": rewards.sum(1).mean(),
        }
        if self.whiten_advantages:
            advantages = whiten(advantages, mask)
        advantages = advantages.clamp(-self.advantage_clip, self.advantage_clip)
        experience = Experience(
            rollout.sequences(), scored.logprobs, advantages, scored.values, returns
        )
        return experience, stats

    def policy_loss(
        self, answers: PolicyAnswers, experience: Experience, size: MinibatchSize
    ) -> tuple[Tensor, Stats]:
        """Clipped surrogate less the entropy bonus, a mean over tokens."""
        mask = experience.sequences.response_mask
        loss, stats = clipped_surrogate(
            answers.logprobs,
            experience.old_logprobs,
            experience.advantages,
            mask,
            self.clip_range,
            size.tokens,
        )
        if self.entropy_gradient:
            loss = loss - self.entropy_coef * masked_mean(answers.entropy, mask, size.tokens)
        return loss, stats

    def value_loss(
        self, values: Tensor, experience: Experience, size: MinibatchSize
    ) -> tuple[Tensor, Stats]:
        """Clipped squared error, a mean over tokens."""
        return clipped_value_loss(
            values,
            given(experience.old_values),
            given(experience.returns),
            experience.sequences.response_mask,
            self.value_clip_range,
            size.tokens,
        )


class HydraPPO(PPO):
    """Hydra-PPO (2309.00754): actor and critic are adapters on one frozen Hydra-SFT trunk.

    Reference and reward are the same trunk with adapters off, read in one pass. Arguments as `PPO`;
    ``trunk`` is what `HydraSFT` wrote, and ``reward`` stays empty.
    """

    own_layout: ClassVar[Layout] = "hydra"
    layouts: ClassVar[tuple[Layout, ...]] = ("hydra",)


class JointHydraPPO(PPO):
    """J-Hydra-PPO (2309.00754): one adapter for actor and critic, one pass for both.

    Fastest, and unstable in the paper (below SFT): an option, not the default. Arguments as `PPO`.
    """

    own_layout: ClassVar[Layout] = "joint_hydra"
    layouts: ClassVar[tuple[Layout, ...]] = ("joint_hydra",)
