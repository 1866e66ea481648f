"""PPO on any layout, and its two Hydra forms."""

from __future__ import annotations

import math
from typing import ClassVar

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_perl.functional.advantages import generalized_advantages, token_rewards
from lightning_perl.functional.masked import masked_mean, whiten
from lightning_perl.losses.ppo import clipped_surrogate, clipped_value_loss
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.loading import TrunkDtype
from lightning_perl.models.quantization import Quantization
from lightning_perl.models.roles import Answers, Layout, RewardEnsemble, Role, TrainedRole
from lightning_perl.models.shortcuts import Shortcuts
from lightning_perl.modules.base import default_optimizer
from lightning_perl.modules.on_policy import MinibatchSize, OnPolicy, Stats, require_in_range
from lightning_perl.rewards import RewardFunction
from lightning_perl.rollouts.experience import Experience, Scored
from lightning_perl.rollouts.rollout import Rollout
from lightning_perl.rollouts.sampling import SamplingSpec
from lightning_perl.rollouts.statistics import explained_variance


class PPO(OnPolicy):
    """Proximal policy optimization with four roles on one, two or four trunks.

    The reward of a token is ``-kl_coef * (log pi - log ref)``, plus the score at the last token; advantages
    by GAE; clipped surrogate and clipped value loss. The layout says who answers policy, value, reference
    and reward; the algorithm does not depend on it.

    Args:
        trunk: Folder of the SFT or Hydra-SFT trunk (with a reward head where the layout needs it).
        layout: ``full`` (four models), ``lora`` (LoRA-PPO), ``dynamic_lora``, ``perl``, ``hydra`` or
            ``joint_hydra``. None takes the class's own: `PPO` lora, `HydraPPO` hydra, `JointHydraPPO`
            joint_hydra.
        reward: For ``perl`` the folder RUN/adapters/reward, or several of them; for ``full``, ``lora``
            and ``dynamic_lora`` a trunk folder with a reward head. None: the trunk's own reward head.
        lora: Shape of the actor and critic adapters. Hydra-RLHF: rank 128 on all linear layers.
        sampling: How rollouts are drawn; its temperature also divides the scored logits.
        validation_sampling: How validation answers are drawn; None as rollouts.
        ppo_epochs: Passes over each rollout batch.
        minibatch_size: Episodes per optimizer step; None takes the whole rollout batch.
        micro_batch_size: Episodes per forward and backward: less memory, the same result.
        score_batch_size: Episodes per scoring pass; None as ``micro_batch_size``.
        kl_coef: The papers' beta (Hydra-RLHF 0.02).
        clip_range: PPO's epsilon.
        value_clip_range: How far a value may move from its old one.
        value_coef: Weight of the value loss; matters where actor and critic share an adapter.
        discount: The papers' gamma.
        gae_lambda: Hydra-RLHF 0.95.
        whiten_advantages: Shift and scale advantages over the whole rollout batch.
        reward_ensemble: What several reward adapters say together (PERL's outlook against reward
            hacking): ``mean`` or ``minimum`` of their scores, a forward each, or the score of their
            ``weight_average``, one forward. Scores of pairwise models have no scale of their own: train
            each with ``normalize_scores``, or the lowest decides the minimum and the widest the mean.
        learned_reward_weight: Of the learned score. 0: the Python reward alone; no reward is
            computed, and the trunk needs no reward head.
        reward_function: A reward in plain Python, added to the learned one.
        reward_function_weight: Of its score.
        score_clip: Scores (all of the above) are clipped to plus-minus this; None not at all
            (DeepSpeed-Chat 5).
        missing_eos_score: A response without EOS *gets* this score (2403.17031: -1).
        missing_eos_penalty: A response without EOS *loses* this much of its score (TRL's rule).
        critic_learning_rate: Of the critic; None takes the optimizer's. Often a tenth of the actor's.
        head_learning_rate: Of the value head; None takes the critic's.
        max_grad_norm: Clips the actor's gradient norm.
        critic_max_grad_norm: Clips the critic's and the head's; None as the actor's.
        max_episodes: Training stops once this many episodes were learned from.
        trunk_dtype: Of the trunk's weights and matrix products; adapters and heads stay fp32.
        checkpointing: Recompute activations in backward: of every training pass, or of those of the roles
            named (policy, value), where only one of them needs the memory.
        attention: transformers' ``attn_implementation``, such as sdpa, eager or flash_attention_2; None
            leaves it to transformers.
        quantization: Keep the frozen trunk's linear layers in 4 bits (nf4, QLoRA's, 2305.14314) or 8 bits
            (int8) by bitsandbytes, the extra ``quantization``; LM head and embeddings stay in
            ``trunk_dtype``. Needs another layout than full. None: everything in ``trunk_dtype``.
        shortcuts: Which work is saved where the result is the same.
        optimizer: Makes the one optimizer; its learning rate is the actor's.
        scheduler: Makes the learning-rate scheduler, stepped once per rollout batch.
        gold: A true reward, known in experiments only; logged, never learned from.
        seed: Of sampling, shuffling and fresh adapters.
    """

    own_layout: ClassVar[Layout] = "lora"
    layouts: ClassVar[tuple[Layout, ...]] = (
        "full",
        "lora",
        "dynamic_lora",
        "perl",
        "hydra",
        "joint_hydra",
    )

    def __init__(
        self,
        trunk: str,
        layout: Layout | None = None,
        reward: str | list[str] | None = None,
        lora: LoraSpec = LoraSpec(),
        sampling: SamplingSpec = SamplingSpec(),
        validation_sampling: SamplingSpec | None = None,
        ppo_epochs: int = 4,
        minibatch_size: int | None = None,
        micro_batch_size: int = 4,
        score_batch_size: int | None = None,
        kl_coef: float = 0.02,
        clip_range: float = 0.2,
        value_clip_range: float = 0.2,
        value_coef: float = 0.1,
        discount: float = 1.0,
        gae_lambda: float = 0.95,
        whiten_advantages: bool = True,
        reward_ensemble: RewardEnsemble = "mean",
        learned_reward_weight: float = 1.0,
        reward_function: RewardFunction | None = None,
        reward_function_weight: float = 1.0,
        score_clip: float | None = None,
        missing_eos_score: float | None = None,
        missing_eos_penalty: float | None = None,
        critic_learning_rate: float | None = None,
        head_learning_rate: float | None = None,
        max_grad_norm: float = 1.0,
        critic_max_grad_norm: float | None = None,
        max_episodes: int | None = None,
        trunk_dtype: TrunkDtype = "float32",
        checkpointing: bool | list[TrainedRole] = False,
        attention: str | None = None,
        quantization: Quantization | None = None,
        shortcuts: Shortcuts = Shortcuts(),
        optimizer: OptimizerCallable = default_optimizer(1e-4),
        scheduler: LRSchedulerCallable | None = None,
        gold: RewardFunction | None = None,
        seed: int = 0,
    ) -> None:
        chosen = layout or self.own_layout
        if layout is not None and layout in PPO.layouts and layout not in self.layouts:
            raise ValueError(
                f"{type(self).__name__} is PPO with layout {self.own_layout}; got layout {layout!r}. Use the "
                "class PPO for other layouts."
            )
        require_in_range(
            {
                "kl_coef": (kl_coef, 0.0, math.inf),
                "clip_range": (clip_range, 1e-6, math.inf),
                "value_clip_range": (value_clip_range, 1e-6, math.inf),
                "value_coef": (value_coef, 0.0, math.inf),
                "discount": (discount, 0.0, 1.0),
                "gae_lambda": (gae_lambda, 0.0, 1.0),
            }
        )
        super().__init__(
            layout=chosen,
            trunk=trunk,
            reward=reward,
            reward_ensemble=reward_ensemble,
            learned_reward_weight=learned_reward_weight,
            reward_function=reward_function,
            reward_function_weight=reward_function_weight,
            score_clip=score_clip,
            missing_eos_score=missing_eos_score,
            missing_eos_penalty=missing_eos_penalty,
            lora=lora,
            sampling=sampling,
            validation_sampling=validation_sampling,
            epochs=ppo_epochs,
            minibatch_size=minibatch_size,
            micro_batch_size=micro_batch_size,
            score_batch_size=score_batch_size,
            critic_learning_rate=critic_learning_rate,
            head_learning_rate=head_learning_rate,
            max_grad_norm=max_grad_norm,
            critic_max_grad_norm=critic_max_grad_norm,
            max_episodes=max_episodes,
            trunk_dtype=trunk_dtype,
            checkpointing=checkpointing,
            attention=attention,
            quantization=quantization,
            shortcuts=shortcuts,
            optimizer=optimizer,
            scheduler=scheduler,
            gold=gold,
            seed=seed,
        )
        self.kl_coef = kl_coef
        self.clip_range = clip_range
        self.value_clip_range = value_clip_range
        self.value_coef = value_coef
        self.discount = discount
        self.gae_lambda = gae_lambda
        self.whiten_advantages = whiten_advantages

    def experience(self, rollout: Rollout, scored: Scored) -> tuple[Experience, Stats]:
        """KL-shaped token rewards, GAE, whitening."""
        mask = rollout.response_mask
        rewards = token_rewards(
            self.shaped_scores(scored.scores, rollout.stopped),
            scored.logprobs,
            scored.reference,
            mask,
            self.kl_coef,
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
        experience = Experience(
            rollout.sequences(), scored.logprobs, scored.values, advantages, returns
        )
        return experience, stats

    def role_loss(
        self, role: Role, answers: Answers, experience: Experience, size: MinibatchSize
    ) -> tuple[Tensor, Stats]:
        """Clipped surrogate for the policy, clipped squared error for the value."""
        mask, denominator = experience.sequences.response_mask, size.tokens
        if role == "policy" and answers.policy is not None and answers.entropy is not None:
            loss, policy = clipped_surrogate(
                answers.policy,
                experience.old_logprobs,
                experience.advantages,
                mask,
                self.clip_range,
                denominator,
            )
            entropy = masked_mean(answers.entropy.detach(), mask, denominator)
            named = {"policy_loss": loss.detach(), "entropy": entropy}
            return loss, {**named, "loss": loss.detach(), **policy._asdict()}
        if role == "value" and answers.value is not None:
            loss, value = clipped_value_loss(
                answers.value,
                experience.old_values,
                experience.returns,
                mask,
                self.value_clip_range,
                denominator,
            )
            weighted = self.value_coef * loss
            named = {"value_loss": loss.detach(), "loss": weighted.detach()}
            return weighted, {**named, **value._asdict()}
        raise RuntimeError(f"PPO trains policy and value, was asked for the loss of {role}.")


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
