"""The skeleton of on-policy methods: collect, score, turn into experience, update.

It owns the only manual-optimization loop. ``collect``, ``score`` and ``update`` run without a Trainer;
logging and checks are done around them, in ``training_step``.

Shapes: ``B`` rollouts, ``R`` response tokens.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer

from lightning_perl.batches import Answers as WrittenAnswers
from lightning_perl.batches import Bounded, PromptBatch
from lightning_perl.functional.masked import masked_mean
from lightning_perl.functional.sequences import Cut, Sequences, cuts
from lightning_perl.models.adapters import OFF, LoraSpec
from lightning_perl.models.heads import save_heads
from lightning_perl.models.loading import TrunkDtype
from lightning_perl.models.manifest import save_trunk, write_adapter_manifest
from lightning_perl.models.quantization import Quantization
from lightning_perl.models.roles import Answers, Layout, RewardEnsemble, Role, Roles, TrainedRole
from lightning_perl.models.shortcuts import Shortcuts
from lightning_perl.models.trunk import Trunk
from lightning_perl.modules.base import (
    AdapterModule,
    Backward,
    FiniteGuard,
    clip_by_group,
    require_trainable,
)
from lightning_perl.packaged import unpackaged
from lightning_perl.rewards import RewardFunction, checked_scores
from lightning_perl.rollouts.decoding import sample
from lightning_perl.rollouts.experience import Experience, Scored
from lightning_perl.rollouts.rollout import Rollout, split_at
from lightning_perl.rollouts.sampling import SamplingSpec, row_uniforms
from lightning_perl.rollouts.statistics import describe

POSITIVE = 1e-12
"""Lower end of a range that leaves 0 out."""
VALIDATION_ROLLOUT = -1
"""Rollout index of validation's noise: the same at every validation, never a training rollout's."""


Stats = dict[str, Tensor]
Accept = Callable[[Mapping[str, Tensor]], bool]
"""Called with the gradient norms before a step; False leaves the step out."""
FirstRead = Callable[[Answers, Experience], None]
"""Called with the policy's first answers of a rollout, before anything was updated."""


class MinibatchSize(NamedTuple):
    """How much a whole minibatch holds; what a micro-batch's sums are divided by.

    Attributes:
        episodes: Responses.
        tokens: Response tokens, at least 1. Shape: ``()``, int64.
    """

    episodes: int
    tokens: Tensor


def ratio_tolerance(dtype: torch.dtype, sampled: bool) -> float:
    """Mean |log ratio| per token that rounding explains.

    Args:
        dtype: Of the trunk.
        sampled: Whether a token was read alone, behind its cache, when its old log-probability was
            taken; else with all others, as when it is learned from.
    """
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        # TF32 has bfloat16's digits in its products and more between them.
        return 2e-2
    close = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    return 1e-1 if sampled and dtype == torch.bfloat16 else close


def require_in_range(ranges: Mapping[str, tuple[float, float, float]]) -> None:
    """Refuse a ``(value, low, high)`` whose value is not between the others.

    Raises:
        ValueError: With the name, the range and the value.
    """
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}.")


class OnPolicy(AdapterModule):
    """Learns from its own samples. Leaves fill `experience` and `role_loss`.

    Args:
        layout: Who answers which role.
        trunk: Folder of the SFT or Hydra-SFT trunk.
        reward: Folder of the reward model where the layout has one; in ``perl`` also several.
        reward_ensemble: What several reward adapters say together.
        learned_reward_weight: Of the reward role's score; 0 asks nobody, and no head is needed.
        reward_function: A reward in Python, added to the learned one.
        reward_function_weight: Of its score.
        score_clip: Scores, learned and in Python together, are clipped to plus-minus this.
        missing_eos_score: What a response without EOS gets.
        missing_eos_penalty: What a response without EOS loses.
        lora: Shape of the actor and critic adapters.
        sampling: How rollouts are drawn.
        validation_sampling: How validation answers are drawn; None as rollouts.
        epochs: Passes over each rollout batch.
        minibatch_size: Episodes per optimizer step; None takes the whole rollout batch.
        micro_batch_size: Episodes per forward and backward.
        score_batch_size: Episodes per scoring pass; None as ``micro_batch_size``.
        critic_learning_rate: Of the critic; None takes the optimizer's.
        head_learning_rate: Of the value head; None takes the critic's.
        max_grad_norm: Clips the actor's gradient.
        critic_max_grad_norm: Clips the critic's and the value head's; None as the actor's.
        max_episodes: Stops training once this many episodes were learned from; None never.
        trunk_dtype: Of the trunks.
        checkpointing: Recompute activations in backward: of every training pass, or of those of the roles
            named (policy, value), where only one of them needs the memory.
        attention: transformers' ``attn_implementation``, such as sdpa, eager or flash_attention_2; None
            leaves it to transformers.
        quantization: Keep the frozen trunk's linear layers in 4 bits (nf4) or 8 bits (int8).
        shortcuts: Which work is saved where the result is the same.
        optimizer: Makes the optimizer.
        scheduler: Makes the scheduler, stepped once per rollout batch.
        gold: A true reward, known in experiments only; logged, never learned from.
        seed: Of sampling, shuffling and fresh adapters.
    """

    automatic_optimization: bool
    rows: ClassVar[Literal["rated", "prompts"]] = "prompts"
    trained_roles: ClassVar[tuple[Role, ...]] = ("policy", "value")

    def __init__(
        self,
        *,
        layout: Layout,
        trunk: str,
        reward: str | list[str] | None,
        reward_ensemble: RewardEnsemble,
        learned_reward_weight: float,
        reward_function: RewardFunction | None,
        reward_function_weight: float,
        score_clip: float | None,
        missing_eos_score: float | None,
        missing_eos_penalty: float | None,
        lora: LoraSpec,
        sampling: SamplingSpec,
        validation_sampling: SamplingSpec | None,
        epochs: int,
        minibatch_size: int | None,
        micro_batch_size: int,
        score_batch_size: int | None,
        critic_learning_rate: float | None,
        head_learning_rate: float | None,
        max_grad_norm: float,
        critic_max_grad_norm: float | None,
        max_episodes: int | None,
        trunk_dtype: TrunkDtype,
        checkpointing: bool | list[TrainedRole],
        attention: str | None,
        quantization: Quantization | None,
        shortcuts: Shortcuts,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        gold: RewardFunction | None,
        seed: int,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.automatic_optimization = False
        sampling.refuse_unscored()
        sizes = {
            "micro_batch_size": micro_batch_size,
            "minibatch_size": minibatch_size,
            "score_batch_size": score_batch_size,
            "epochs": epochs,
            "max_episodes": max_episodes,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        critic_norm = max_grad_norm if critic_max_grad_norm is None else critic_max_grad_norm
        require_in_range(
            {
                "max_grad_norm": (max_grad_norm, POSITIVE, math.inf),
                "critic_max_grad_norm": (critic_norm, POSITIVE, math.inf),
                "learned_reward_weight": (learned_reward_weight, 0.0, math.inf),
                "reward_function_weight": (reward_function_weight, 0.0, math.inf),
            }
        )
        if learned_reward_weight == 0 and (reward_function is None or reward_function_weight == 0):
            raise ValueError(
                "learned_reward_weight is 0 and there is no reward_function with a weight, so every "
                "score would be 0. Give one of them."
            )
        if missing_eos_score is not None and missing_eos_penalty is not None:
            raise ValueError(
                "Give missing_eos_score (sets the score) or missing_eos_penalty (subtracts from it), not "
                f"both; got {missing_eos_score} and {missing_eos_penalty}."
            )
        self.roles = Roles(
            layout,
            unpackaged(trunk),
            lora,
            reward,
            trunk_dtype,
            checkpointing,
            attention,
            quantization,
            shortcuts,
            seed,
            reward_ensemble,
            learned_reward=learned_reward_weight > 0,
        )
        self.policy_trunk.require_cache()
        self.learned_reward_weight = learned_reward_weight
        self.reward_function = reward_function
        self.reward_function_weight = reward_function_weight
        self.score_clip = score_clip
        self.missing_eos_score = missing_eos_score
        self.missing_eos_penalty = missing_eos_penalty
        self.sampling = sampling
        self.validation_sampling = validation_sampling or sampling
        self.epochs = epochs
        self.minibatch_size = minibatch_size
        self.micro_batch_size = micro_batch_size
        self.score_batch_size = score_batch_size or micro_batch_size
        self.critic_learning_rate = critic_learning_rate
        self.head_learning_rate = (
            critic_learning_rate if head_learning_rate is None else head_learning_rate
        )
        self.max_grad_norms = {"actor": max_grad_norm, "critic": critic_norm, "head": critic_norm}
        self.max_episodes = max_episodes
        self.gold = gold
        self._reference_gold: list[Tensor] = []
        self.seed = seed
        self.shortcuts = shortcuts
        self.guard = FiniteGuard()
        self._stood_on: dict[str, str] | None = None
        self.rollout_index = 0
        self.episodes = 0
        self.tokens = 0

    # ---- holes ---------------------------------------------------------------------------------

    @abstractmethod
    def experience(self, rollout: Rollout, scored: Scored) -> tuple[Experience, Stats]:
        """Rewards, advantages and returns of a scored rollout, and what to log of them.

        A row's returns depend on nothing but that row (see `begin`); advantages may be whitened over
        all of them.
        """

    @abstractmethod
    def role_loss(
        self, role: Role, answers: Answers, experience: Experience, size: MinibatchSize
    ) -> tuple[Tensor, Stats]:
        """Loss of one trained role on a micro-batch, as its share of the minibatch's mean.

        ``size`` is the minibatch's: over micro-batches the losses add up to the mean over its tokens
        or its episodes, as the leaf divides, and so do the statistics.
        """

    # ---- the algorithm's acts, without a Trainer -------------------------------------------------

    @property
    def policy_trunk(self) -> Trunk:
        """Where the tokenizer lives."""
        return self.roles.trunk("policy")

    def collect(
        self,
        prompts: PromptBatch,
        rollout_index: int,
        role: Role = "policy",
        sampling: SamplingSpec | None = None,
        early_exit: bool = True,
    ) -> Rollout:
        """Sample one response per prompt. Noise comes from (seed, rollout index, row)."""
        spec = sampling or self.sampling
        uniforms = row_uniforms(self.seed, rollout_index, prompts.row, spec.max_new_tokens)
        with self.roles(role) as trunk, trunk.switch.at_rest():
            rollout = sample(trunk, prompts, spec, uniforms, early_exit)
        kept = (
            role == "policy"
            and spec.scored_as_sampled
            and spec.temperature == self.sampling.temperature
            and self.shortcuts.sampled_logprobs
        )
        return rollout if kept else rollout._replace(logprobs=None)

    def score(self, rollout: Rollout, by_length: bool = True, values: bool = True) -> Scored:
        """All four roles on a rollout, one forward per distinct (trunk, adapter).

        The policy is not asked where its log-probabilities were kept while it sampled. Where there is no
        learned reward, nobody is asked for it and every score is 0.

        Args:
            rollout: What was sampled.
            by_length: Rows of similar length are read together, which looks at tensors' values.
            values: Ask the critic; `begin` does it otherwise.
        """
        return self._read(rollout, self.sampling.temperature, by_length, values)

    def _read(
        self, rollout: Rollout, temperature: float, by_length: bool = True, values: bool = True
    ) -> Scored:
        asked: tuple[Role, ...] = ("reference", "reward")
        if values:
            asked = ("value", *asked)
        if rollout.logprobs is None:
            asked = ("policy", *asked)
        found = self._asked(rollout, asked, temperature, by_length)
        reference = _given(found.reference)
        return Scored(
            _given(found.policy if rollout.logprobs is None else rollout.logprobs),
            reference,
            torch.zeros_like(reference) if found.value is None else found.value,
            torch.zeros_like(reference[:, 0]) if found.reward is None else found.reward,
        )

    @torch.no_grad()
    def _asked(
        self, rollout: Rollout, roles: tuple[Role, ...], temperature: float, by_length: bool
    ) -> Answers:
        """What the roles say of a rollout, micro-batch by micro-batch; 0 in columns that were cut."""
        sequences = rollout.sequences()
        whole: dict[str, Tensor] = {}
        for cut in self._cuts(sequences, self.score_batch_size, by_length):
            answers = self.roles.answer(sequences.cut(cut), roles, temperature)
            for name, part in answers._asdict().items():
                if part is None:
                    continue
                shape = rollout.response_mask.shape[: part.dim()]
                into = whole.setdefault(name, part.new_zeros(shape))
                into[(cut.rows, slice(cut.responses))[: part.dim()]] = part
        return Answers(**whole)

    def _cuts(self, sequences: Sequences, size: int, by_length: bool) -> Iterator[Cut]:
        return cuts(sequences, size, by_length and self.shortcuts.length_buckets)

    @property
    def begins(self) -> bool:
        """Whether `begin` takes the critic's part of the first minibatch: if it is a pass of its own."""
        alone = ("value",) in self.roles.groups(self.trained_roles)
        return alone and self.shortcuts.shared_value_pass

    def begin(
        self,
        rollout: Rollout,
        scored: Scored,
        backward: Backward = torch.Tensor.backward,
        by_length: bool = True,
    ) -> tuple[Scored, Stats]:
        """The critic's values, and from the same passes its gradient in the first minibatch.

        The critic has not moved since the rollout, so the first update would read the same rows with the
        same weights again. A row's value loss needs that row's returns alone.

        Args:
            rollout: What was sampled.
            scored: Without values, the scores final.
            backward: As in `update`.
            by_length: As in `update`.

        Returns:
            ``scored`` with values; and the statistics of the value loss, for `update`.
        """
        first, *later = (
            rows.to(rollout.row.device) for rows in self._minibatches(len(rollout.row), 0)
        )
        values = torch.zeros_like(scored.values)
        if later:
            rest = torch.cat(later)
            others = self._asked(
                rollout.rows(rest), ("value",), self.sampling.temperature, by_length
            )
            values[rest] = _given(others.value)
        sequences = rollout.sequences().rows(first)
        size = MinibatchSize(len(first), sequences.response_mask.sum().clamp(min=1))
        sums: Stats = {}
        for cut in self._cuts(sequences, self.micro_batch_size, by_length):
            rows = first[cut.rows]
            with self.roles.training_pass(("value",)):
                answers = self.roles.answer(sequences.cut(cut), ("value",))
                values[rows, : cut.responses] = _given(answers.value).detach()
                some = scored._replace(values=values).rows(rows)
                experience, _ = self.experience(rollout.rows(rows), some)
                every = torch.arange(len(rows), device=rows.device)
                loss, stats = self.role_loss(
                    "value", answers, experience.cut(cut._replace(rows=every)), size
                )
                backward(loss)
            _add(sums, stats)
        return scored._replace(values=values), sums

    def rewarded(self, rollout: Rollout, learned: Tensor) -> tuple[Tensor, Stats]:
        """What the responses earn: the learned scores and the Python reward, each by its weight.

        Decodes texts and calls Python, so it stands between `score`, which does neither, and
        `experience`.

        Args:
            rollout: What was sampled.
            learned: Scores of the reward role. Shape: ``(B,)``.

        Returns:
            Scores, shape ``(B,)``, and the means of their parts where there is a Python reward.

        Raises:
            ValueError: The Python reward raised, or did not give a finite number per response.
        """
        scores = self.learned_reward_weight * learned
        if self.reward_function is None:
            return scores, {}
        own = self._ask(self.reward_function, "reward_function", rollout).to(learned)
        parts = {"function_score": own.mean()}
        if self.roles.judges:
            parts["learned_score"] = learned.mean()
        return scores + self.reward_function_weight * own, parts

    def shaped_scores(self, scores: Tensor, stopped: Tensor) -> Tensor:
        """Scores after clipping and the missing-EOS rule. Shape: ``(B,)``."""
        if self.score_clip is not None:
            scores = scores.clamp(-self.score_clip, self.score_clip)
        if self.missing_eos_score is not None:
            scores = torch.where(stopped, scores, torch.full_like(scores, self.missing_eos_score))
        if self.missing_eos_penalty is not None:
            scores = torch.where(stopped, scores, scores - self.missing_eos_penalty)
        return scores

    def update(
        self,
        experience: Experience,
        optimizer: Optimizer,
        backward: Backward = torch.Tensor.backward,
        first_read: FirstRead | None = None,
        accept: Accept = lambda norms: True,
        by_length: bool = True,
        begun: Stats | None = None,
    ) -> Stats:
        """Epochs of minibatch steps, each accumulated over micro-batches.

        Roles that one forward answers share one backward; others go one after the other, so that the
        actor's graph is gone before the critic's is built.

        Args:
            experience: What is learned from.
            optimizer: Of `parameter_groups`.
            backward: ``loss.backward()``, or Lightning's.
            first_read: Called once, with the first answers of the policy.
            accept: Asked before every step.
            by_length: Micro-batches are of rows of similar length, which looks at tensors' values.
            begun: What `begin` said, where it took the critic's part of the first minibatch.

        Returns:
            Statistics averaged over the optimizer steps.
        """
        sums: Stats = {}
        steps = 0
        for epoch in range(self.epochs):
            for rows in self._minibatches(len(experience.old_logprobs), epoch):
                minibatch = experience.rows(rows.to(experience.old_logprobs.device))
                groups = self.roles.groups(self.trained_roles)
                if begun is not None:
                    groups.remove(("value",))
                    _add(sums, begun)
                    begun = None
                _add(sums, self._gradients(groups, minibatch, backward, first_read, by_length))
                first_read = None
                with self.phase("optimizer"):
                    require_trainable(optimizer)
                    norms = clip_by_group(optimizer, self.max_grad_norms)
                    _add(sums, {f"grad_norm_{name}": norm for name, norm in norms.items()})
                    if accept(norms):
                        optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                steps += 1
        return {key: value / steps for key, value in sums.items()}

    def _gradients(
        self,
        groups: list[tuple[Role, ...]],
        minibatch: Experience,
        backward: Backward,
        first_read: FirstRead | None,
        by_length: bool,
    ) -> Stats:
        sums: Stats = {}
        mask = minibatch.sequences.response_mask
        size = MinibatchSize(len(mask), mask.sum().clamp(min=1))
        micro = list(self._cuts(minibatch.sequences, self.micro_batch_size, by_length))
        for group in groups:
            with self.phase("actor" if "policy" in group else "critic"):
                for cut in micro:
                    piece = minibatch.cut(cut)
                    with self.roles.training_pass(group):
                        answers = self.roles.answer(
                            piece.sequences, group, self.sampling.temperature
                        )
                        if first_read is not None and answers.policy is not None:
                            first_read(answers, piece)
                            first_read = None
                        parts = [self.role_loss(role, answers, piece, size) for role in group]
                        backward(torch.stack([loss for loss, _ in parts]).sum())
                    for _, stats in parts:
                        _add(sums, stats)
        return sums

    def _minibatches(self, episodes: int, epoch: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(
            hash((self.seed, self.rollout_index, epoch)) & 0x7FFFFFFF
        )
        order = torch.randperm(episodes, generator=generator)
        size = self.minibatch_size or episodes
        for start in range(0, episodes, size):
            yield order[start : start + size]

    # ---- Lightning -----------------------------------------------------------------------------

    def _fingerprints(self) -> dict[str, str]:
        """Of what reference and reward stand on; it never moves."""
        found = {"reference trunk": self.roles.trunk("reference").fingerprint()}
        for judge in self.roles.judges:
            found[f"{judge} trunk"] = self.roles.trunk(judge).fingerprint()
            found[f"{judge} head"] = self.roles.reward_head(judge).fingerprint()
        return found

    def _require_unmoved(self, before: Mapping[str, str], since: str) -> None:
        moved = [name for name, found in self._fingerprints().items() if before.get(name) != found]
        if moved:
            raise RuntimeError(
                f"{moved} has other weights than {since}, so scores and KL are measured "
                "against something else. Was it trained, merged into, or exchanged in its folder?"
            )

    def on_train_start(self) -> None:
        """Remember what reference and reward stand on."""
        super().on_train_start()
        self._stood_on = self._fingerprints()

    def on_validation_start(self) -> None:
        """The reference must be what it was."""
        if self._stood_on is not None:
            self._require_unmoved(self._stood_on, "when training started")

    def on_train_batch_start(  # type: ignore[override]
        self,
        batch: Any,  # noqa: ANN401 (as Lightning says it)
        batch_idx: int,
    ) -> int | None:
        """Learn nothing more where a resumed run already has its episodes."""
        super().on_train_batch_start(batch, batch_idx)
        if self.max_episodes is not None and self.episodes >= self.max_episodes:
            self.trainer.should_stop = True
            return -1
        return None

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """One rollout batch, learned from and forgotten."""
        with self.phase("rollout"):
            rollout = self.collect(batch, self.rollout_index)
        with self.phase("score"):
            scored = self.score(rollout, values=not self.begins)
            scores, parts = self.rewarded(rollout, scored.scores)
            scored = scored._replace(scores=scores)
        if self.rollout_index == 0:
            self._check_fresh_start(rollout, scored)
        begun = None
        if self.begins:
            with self.phase("critic"):
                scored, begun = self.begin(rollout, scored, self.manual_backward)
        experience, stats = self.experience(rollout, scored)
        trained = self._learn(experience, begun)
        if self._make_scheduler is not None:
            self.lr_schedulers().step()  # type: ignore[union-attr]
        return self._account(rollout, {**describe(rollout, scored), **parts}, {**stats, **trained})

    def _learn(self, experience: Experience, begun: Stats | None) -> Stats:
        optimizer = self.optimizers()
        mask = experience.sequences.response_mask
        learned_from = torch.where(mask, experience.advantages + experience.returns, 0.0)
        if not bool(torch.isfinite(learned_from).all()):
            # Every epoch would fail on it again; one count for the whole rollout.
            optimizer.zero_grad()  # type: ignore[union-attr]  # the critic may have begun
            self.guard({"rollout (scores, values or log-probabilities)": learned_from.sum()})
            return {}
        return self.update(
            experience,
            optimizer,  # type: ignore[arg-type]  # Lightning's wrapper counts the steps
            self.manual_backward,
            self._check_first_ratio,
            self.guard,
            begun=begun,
        )

    def _account(self, rollout: Rollout, seen: Stats, stats: Stats) -> dict[str, Any]:
        episodes, generated = len(rollout.row), int(rollout.response_mask.sum())
        whole = int(rollout.prompt_mask.sum()) + generated
        self.rollout_index += 1
        self.episodes += episodes
        self.tokens += generated
        self.log_stats({f"train/{key}": value for key, value in stats.items()}, episodes)
        self.log("train/episodes", float(self.episodes), batch_size=episodes)
        self.log("train/tokens", float(self.tokens), batch_size=episodes)
        self.log("train/skipped_steps", float(self.guard.skipped), batch_size=episodes)
        if self.gold is not None:
            gold = self._ask(self.gold, "gold", rollout)
            self.log("gold/score", gold.mean(), batch_size=episodes)
        for key, value in seen.items():
            shown = key in ("score", "kl")
            self.log(f"rollout/{key}", value, batch_size=episodes, prog_bar=shown)
        if self.max_episodes is not None and self.episodes >= self.max_episodes:
            self.trainer.should_stop = True
        tokens = {"rollout": generated, "score": whole, "update": whole * self.epochs}
        return {"episodes": episodes, "tokens": tokens}

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Answer held-out prompts as policy and as reference, with the same noise, and compare."""
        spec = self.validation_sampling
        rollout = self.collect(batch, VALIDATION_ROLLOUT, "policy", spec)
        scored = self._read(rollout, spec.temperature or 1.0)
        scores, parts = self.rewarded(rollout, scored.scores)
        scored = scored._replace(scores=scores)
        before = self.collect(batch, VALIDATION_ROLLOUT, "reference", spec)
        before_scores = self._scores(before)
        wins = (scored.scores > before_scores).float() + 0.5 * (scored.scores == before_scores)
        seen = describe(rollout, scored)
        logged = {key: seen[key] for key in ("score", "response_tokens")} | parts
        if spec.scored_as_sampled:
            logged["kl"] = seen["kl"]
        logged["win_rate"] = wins.mean()
        logged["reference_score"] = before_scores.mean()
        if self.gold is not None:
            gold_before = self._ask(self.gold, "gold", before)
            logged["gold"] = self._ask(self.gold, "gold", rollout).mean()
            logged["reference_gold"] = gold_before.mean()
            self._reference_gold.append(gold_before)
        for key, value in logged.items():
            shown = key in ("score", "kl")
            self.log(
                f"{self.held_out}/{key}",
                value,
                batch_size=len(batch.row),
                prog_bar=shown,
                on_epoch=True,
            )

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the spread of the reference's gold over all prompts; batch by batch it is smaller."""
        if self._reference_gold:
            spread = torch.cat(self._reference_gold).std(correction=0)
            self.log(f"{self.held_out}/reference_gold_sd", spread)
            self._reference_gold.clear()

    on_test_epoch_end = on_validation_epoch_end

    def answer(self, prompts: PromptBatch, role: Literal["policy", "reference"]) -> WrittenAnswers:
        """Texts and scores for prompts, with validation's sampling and noise."""
        rollout = self.collect(
            PromptBatch(*(part.to(self.device) for part in prompts)),
            VALIDATION_ROLLOUT,
            role,
            self.validation_sampling,
        )
        prompt_texts, response_texts = self._texts(rollout)
        return WrittenAnswers(prompt_texts, response_texts, self._scores(rollout).tolist())

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Row numbers, prompts, the policy's responses and their scores."""
        found = self.answer(batch, "policy")
        return {"row": batch.row, **found._asdict()}

    @torch.no_grad()
    def _scores(self, rollout: Rollout) -> Tensor:
        learned = torch.zeros(len(rollout.row), device=rollout.row.device)
        if self.roles.judges:
            learned = _given(self._asked(rollout, ("reward",), 1.0, True).reward)
        return self.rewarded(rollout, learned)[0]

    def _texts(self, rollout: Rollout) -> tuple[list[str], list[str]]:
        tokenizer, stop_ids = self.policy_trunk.tokenizer, self.policy_trunk.stop_ids

        def decoded(ids: Tensor, mask: Tensor) -> list[str]:
            rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
            # EOS ends every turn of a prompt; dropped, one turn would run into the next.
            turns = [split_at(row, stop_ids) for row in rows]
            return [
                "\n".join(str(tokenizer.decode(turn, skip_special_tokens=True)) for turn in row)
                for row in turns
            ]

        return (
            decoded(rollout.prompt_ids, rollout.prompt_mask),
            decoded(rollout.response_ids, rollout.response_mask),
        )

    def _ask(self, function: RewardFunction, argument: str, rollout: Rollout) -> Tensor:
        prompts, responses = self._texts(rollout)
        scores = checked_scores(function, argument, prompts, responses, rollout.row.tolist())
        return torch.tensor(scores, dtype=torch.float32)

    def _check_fresh_start(self, rollout: Rollout, scored: Scored) -> None:
        """Step-0 identities: fresh adapters change nothing, and scores are numbers."""
        if not bool(torch.isfinite(scored.scores).all()):
            raise RuntimeError(
                "The reward role gives non-finite scores before any update. Look at the reward head in "
                "heads.safetensors and at trunk_dtype."
            )
        gap = (scored.logprobs - scored.reference).abs()
        self._refuse_gap(
            masked_mean(gap, rollout.response_mask),
            "The KL to the reference is not 0 before the first update",
            "Do policy and reference stand on the same trunk folder, and are the adapters fresh?",
        )

    def _check_first_ratio(self, answers: Answers, experience: Experience) -> None:
        if answers.policy is None:
            return
        gap = (answers.policy.detach() - experience.old_logprobs).abs()
        self._refuse_gap(
            masked_mean(gap, experience.sequences.response_mask),
            "The ratio of the first minibatch is not 1",
            "Is there dropout in the trunk or adapter, or a temperature that differs between sampling and "
            "scoring?",
        )

    def _refuse_gap(self, gap: Tensor, what: str, cause: str) -> None:
        allowed = ratio_tolerance(self.policy_trunk.dtype, self.shortcuts.sampled_logprobs)
        if not float(gap) <= allowed:
            raise RuntimeError(
                f"{what}: mean |difference of log-probabilities| is {float(gap):.3g} per token, rounding "
                f"explains {allowed:.0e}. {cause}"
            )

    @property
    def window(self) -> int | None:
        """The smallest of the trunks'."""
        windows = [trunk.window for trunk in self.roles.distinct_trunks()]
        return min((window for window in windows if window is not None), default=None)

    def longest_row(self, data: Bounded) -> int:
        """The longest prompt and the longest sampled response."""
        sampled = max(self.sampling.max_new_tokens, self.validation_sampling.max_new_tokens)
        return data.max_tokens - data.max_response_tokens + sampled

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Actor, critic and value head, each with its own learning rate and clipping."""
        groups: list[dict[str, Any]] = [
            {"name": "actor", "params": self.roles.actor_parameters()},
            {
                "name": "critic",
                "params": self.roles.critic_parameters(),
                "lr": self.critic_learning_rate,
            },
            {
                "name": "head",
                "params": list(self.roles.value_head.parameters()),
                "lr": self.head_learning_rate,
            },
        ]
        return [
            {key: value for key, value in group.items() if value is not None}
            for group in groups
            if group["params"]
        ]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also where the run stands; sampling noise follows from it."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["on_policy"] = {
            "rollout_index": self.rollout_index,
            "episodes": self.episodes,
            "tokens": self.tokens,
            "fingerprints": self._fingerprints(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stand where the checkpoint stood."""
        super().on_load_checkpoint(checkpoint)
        stood = checkpoint["on_policy"]
        self._require_unmoved(stood["fingerprints"], "in the checkpoint")
        self.rollout_index = stood["rollout_index"]
        self.episodes, self.tokens = stood["episodes"], stood["tokens"]

    def hand_over(self, folder: Path) -> None:
        """Write ``RUN/adapters/{actor,critic}``, or trunks under ``RUN/{policy,critic}`` after full PPO."""
        if self._stood_on is not None:
            self._require_unmoved(self._stood_on, "when training started")
        heads = {"value": self.roles.value_head}
        if self.roles.layout == "full":
            for role, name in (("policy", "policy"), ("value", "critic")):
                manifest = {"module": type(self).__name__}
                save_trunk(self.roles.trunk(role), folder / name, None, manifest)
            save_heads(folder / "critic", heads)
            return
        written = set()
        for role in self.trained_roles:
            trunk, adapter = self.roles.trunk(role), self.roles.seats[role].adapter
            if adapter != OFF and adapter not in written:
                trunk.adapters.save(adapter, folder / "adapters" / adapter, trunk.source)
                write_adapter_manifest(folder / "adapters" / adapter, trunk)
                written.add(adapter)
        save_heads(folder / "adapters" / self.roles.seats["value"].adapter, heads)


def _add(sums: Stats, stats: Mapping[str, Tensor]) -> None:
    for key, value in stats.items():
        sums[key] = sums.get(key, torch.zeros_like(value)) + value


def _given(answer: Tensor | None) -> Tensor:
    """An answer that was asked for."""
    if answer is None:
        raise RuntimeError("A role was not asked for what is needed of it.")
    return answer
