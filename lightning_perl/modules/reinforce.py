"""PERL's policy gradient."""

from __future__ import annotations

import math

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_perl.functional.advantages import generalized_advantages, token_rewards
from lightning_perl.functional.masked import masked_mean
from lightning_perl.losses.reinforce import baseline_loss, policy_gradient
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


class Reinforce(OnPolicy):
    """REINFORCE with a learned baseline, as PERL (2403.10704, Eq. 1) does RL.

    Maximizes ``E[(1 - beta) r(y|x) - beta KL(pi || reference)]`` over tokens as actions, with the reward
    on the last one and no discount: ``-sum_t log pi(a_t|s_t) * stopgrad(Z_t - V(s_t))`` for the policy and
    ``sum_t (Z_t - V(s_t))^2`` for the value (RLAIF, 2309.00267, App. F), summed over a response's tokens
    and averaged over episodes. No clip, no GAE, no importance ratio; one update per rollout batch.

    The KL enters as part of the return, ``Z_t = (1 - beta) r - beta sum_(t' >= t) (log pi - log ref)_t'``:
    that is the gradient of the objective. The papers fold it into the policy's loss and do not say
    whether the value is fitted to it too; here it is, since it is the return's baseline.

    Args:
        trunk: Folder of the SFT or Hydra-SFT trunk (with a reward head where the layout needs it).
        layout: ``perl`` (reward, policy and critic adapters on one trunk), ``hydra`` (the trunk's own
            reward head), ``full`` (four models), ``lora``, ``dynamic_lora`` or ``joint_hydra``.
        reward: For ``perl`` the folder RUN/adapters/reward, or several of them; for ``full``, ``lora``
            and ``dynamic_lora`` a trunk folder with a reward head. None: the trunk's own reward head.
        lora: Shape of the actor and critic adapters; in ``perl`` the critic has the reward adapter's.
            PERL: rank 1 to 16 on the attention projections.
        sampling: How rollouts are drawn; its temperature also divides the scored logits. PERL 0.7 to 0.9.
        validation_sampling: How validation answers are drawn; None as rollouts.
        micro_batch_size: Episodes per forward and backward: less memory, the same result.
        score_batch_size: Episodes per scoring pass; None as ``micro_batch_size``.
        beta: The papers' beta, in [0, 1]: 0 is the reward alone, 1 the KL alone (PERL 0.05). As PPO's
            ``kl_coef`` it would be ``beta / (1 - beta)``.
        value_coef: Weight of the value loss.
        reward_ensemble: What several reward adapters say together (PERL's outlook against reward
            hacking): ``mean`` or ``minimum`` of their scores, a forward each, or the score of their
            ``weight_average``, one forward. Scores of pairwise models have no scale of their own: train
            each with ``normalize_scores``, or the lowest decides the minimum and the widest the mean.
        learned_reward_weight: Of the learned score. 0: the Python reward alone; no reward is
            computed, and the trunk needs no reward head.
        reward_function: A reward in plain Python, added to the learned one.
        reward_function_weight: Of its score.
        score_clip: Scores (all of the above) are clipped to plus-minus this; None not at all.
        missing_eos_score: A response without EOS *gets* this score (2403.17031: -1).
        missing_eos_penalty: A response without EOS *loses* this much of its score (TRL's rule).
        critic_learning_rate: Of the critic; None takes the optimizer's.
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
        optimizer: Makes the one optimizer; its learning rate is the actor's (PERL 1e-5 to 1e-4).
        scheduler: Makes the learning-rate scheduler, stepped once per rollout batch.
        gold: A true reward, known in experiments only; logged, never learned from.
        seed: Of sampling and fresh adapters.
    """

    def __init__(
        self,
        trunk: str,
        layout: Layout = "perl",
        reward: str | list[str] | None = None,
        lora: LoraSpec = LoraSpec(),
        sampling: SamplingSpec = SamplingSpec(),
        validation_sampling: SamplingSpec | None = None,
        micro_batch_size: int = 4,
        score_batch_size: int | None = None,
        beta: float = 0.05,
        value_coef: float = 1.0,
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
        require_in_range({"beta": (beta, 0.0, 1.0), "value_coef": (value_coef, 0.0, math.inf)})
        super().__init__(
            layout=layout,
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
            epochs=1,
            minibatch_size=None,
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
        self.beta = beta
        self.value_coef = value_coef

    def experience(self, rollout: Rollout, scored: Scored) -> tuple[Experience, Stats]:
        """Undiscounted returns of the objective, and their distance from the baseline."""
        mask = rollout.response_mask
        rewards = token_rewards(
            (1 - self.beta) * self.shaped_scores(scored.scores, rollout.stopped),
            scored.logprobs,
            scored.reference,
            mask,
            self.beta,
        )
        # With lambda 1 this is no estimate: returns are the plain sums of what follows.
        advantages, returns = generalized_advantages(
            rewards, scored.values, mask, discount=1.0, gae_lambda=1.0
        )
        stats = {
            "explained_variance": explained_variance(scored.values, returns, mask),
            "reward": rewards.sum(1).mean(),
        }
        experience = Experience(
            rollout.sequences(), scored.logprobs, scored.values, advantages, returns
        )
        return experience, stats

    def role_loss(
        self, role: Role, answers: Answers, experience: Experience, size: MinibatchSize
    ) -> tuple[Tensor, Stats]:
        """Policy gradient for the policy, squared error for the value; means over episodes."""
        mask = experience.sequences.response_mask
        if role == "policy" and answers.policy is not None and answers.entropy is not None:
            loss = policy_gradient(answers.policy, experience.advantages, mask, size.episodes)
            entropy = masked_mean(answers.entropy.detach(), mask, size.tokens)
            return loss, {"policy_loss": loss.detach(), "entropy": entropy, "loss": loss.detach()}
        if role == "value" and answers.value is not None:
            loss = baseline_loss(answers.value, experience.returns, mask, size.episodes)
            weighted = self.value_coef * loss
            return weighted, {"value_loss": loss.detach(), "loss": weighted.detach()}
        raise RuntimeError(f"Reinforce trains policy and value, was asked for the loss of {role}.")
