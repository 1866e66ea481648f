"""The skeleton of on-policy methods: collect, score, turn into experience, update.

It owns the only manual-optimization loop. `Evaluation.collect`, `Evaluation.score` and `OnPolicy.update` run
without a Trainer; logging and checks are done around them, in `OnPolicy.training_step`.

Shapes: ``B`` rollouts, ``R`` response tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from lightning.pytorch.cli import ReduceLROnPlateau as WatchingPlateau
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from lightning_perl.arguments import Count, Finite, NonNegative, Positive
from lightning_perl.batches import PromptBatch
from lightning_perl.functional.masked import masked_mean
from lightning_perl.functional.sequences import Sequences, cuts
from lightning_perl.models.adapters import OFF
from lightning_perl.models.manifest import save_trunk, write_adapter_manifest
from lightning_perl.models.roles import Role, RoleAnswers, TrainedRole
from lightning_perl.modules.base import Backward, Stats
from lightning_perl.modules.evaluation import Evaluation
from lightning_perl.modules.running import KLControl, seen
from lightning_perl.modules.safety import (
    FiniteGuard,
    clip_by_group,
    fingerprints,
    ratio_tolerance,
    require_equal_logprobs,
    require_trainable,
    require_unmoved,
    warn_if_far,
)
from lightning_perl.rollouts.rollout import Experience, Rollout, Scored, describe

Accept = Callable[[Mapping[str, Tensor]], bool]
"""Called with the gradient norms before a step; False leaves the step out."""
FirstRead = Callable[[RoleAnswers, Experience], None]
"""Called with the policy's first answers of a rollout, before anything was updated."""


class PolicyAnswers(NamedTuple):
    """What the policy being trained says of a micro-batch.

    Attributes:
        logprobs: Log-probabilities of the response tokens. Shape: ``(B, R)``.
        entropy: Entropies in nats; with a gradient where the leaf sets ``entropy_gradient``. Shape: ``(B, R)``.
        divergence: KL(reference || policy) over the whole vocabulary in nats, where the leaf sets ``full_kl``.
            Shape: ``(B, R)``.
    """

    logprobs: Tensor
    entropy: Tensor
    divergence: Tensor | None = None


class MinibatchSize(NamedTuple):
    """How much a whole minibatch holds; what a micro-batch's sums are divided by.

    Attributes:
        tokens: Response tokens, at least 1. Shape: ``()``, int64.
        episodes: Responses.
    """

    tokens: Tensor
    episodes: int


class OnPolicy(Evaluation):
    """Learns from its own samples. Leaves fill `experience` and `policy_loss`.

    A leaf that goes over each rollout several times, or in minibatches, calls `learn_in`; one that sets
    ``greedy_baseline`` finds in ``scored.baseline`` what the policy's greedy responses earn; see `PolicyAnswers`
    for ``entropy_gradient`` and ``full_kl``. One that sets ``kl_control`` reads its ``kl_coef`` as
    ``steered_kl_coef``.

    Args:
        trunk: Folder of the SFT or Hydra-SFT trunk, or a hub name.
        samples: Responses per prompt; a rollout batch has ``data.batch_size * samples`` episodes.
        micro_batch_size: Episodes per forward and backward pass: less memory, the same result. Where it
            holds several prompts, it is cut to a multiple of ``samples``.
        score_batch_size: Episodes per scoring pass. None: as ``micro_batch_size``.
        max_grad_norm: Clips the norm of the actor's gradient.
        max_episodes: Training stops once this many episodes were learned from. None: no limit.
        score_normalization: ``scale`` divides scores by their standard deviation over all episodes so far,
            ``standardize`` takes their mean off first (PPO-max, 2307.04964). None: neither.
        score_clip: Scores are then clipped to plus or minus this. None: not at all (DeepSpeed-Chat: 5).
        missing_eos_score: Score of a response without EOS, instead of its own (2403.17031: -1).
        missing_eos_penalty: Taken off the score of a response without EOS (TRL's rule).
        settings: Arguments of `Evaluation` and `AdapterModule`.
    """

    automatic_optimization: bool
    greedy_baseline: ClassVar[bool] = False
    full_kl: ClassVar[bool] = False
    entropy_gradient: bool = False
    kl_coef: float
    kl_control: KLControl = KLControl()

    def __init__(
        self,
        trunk: str,
        samples: Count = 1,
        micro_batch_size: Count = 4,
        score_batch_size: Count | None = None,
        max_grad_norm: Positive = 1.0,
        max_episodes: Count | None = None,
        score_normalization: Literal["scale", "standardize"] | None = None,
        score_clip: Positive | None = None,
        missing_eos_score: Finite | None = None,
        missing_eos_penalty: NonNegative | None = None,
        **settings: Any,
    ) -> None:
        if missing_eos_score is not None and missing_eos_penalty is not None:
            raise ValueError(
                "Give missing_eos_score (sets the score) or missing_eos_penalty (subtracts from it), not "
                f"both; got {missing_eos_score} and {missing_eos_penalty}."
            )
        scored = micro_batch_size if score_batch_size is None else score_batch_size
        super().__init__(trunk, score_batch_size=scored, **settings)
        self.automatic_optimization = False
        self.samples = samples
        self.micro_batch_size = micro_batch_size
        self.max_grad_norms = {"actor": max_grad_norm}
        self.max_episodes = max_episodes
        self.score_normalization = score_normalization
        self.score_clip = score_clip
        self.missing_eos_score = missing_eos_score
        self.missing_eos_penalty = missing_eos_penalty
        self.learn_in(1, None)
        self.guard = FiniteGuard()
        self.rollout_index = 0
        self.episodes = 0
        self.tokens = 0
        # What training itself changes; it goes into checkpoints.
        self.running: dict[str, float] = {}
        self.score_moments: dict[str, float] = {}
        self._fingerprints: dict[str, str] | None = None

    def learn_in(self, epochs: int, minibatch_size: int | None, kept: int | None = None) -> None:
        """Go over each rollout several times, in minibatches that keep the responses to a prompt together.

        Args:
            epochs: Passes over each rollout batch.
            minibatch_size: Episodes per optimizer step. None: the whole rollout batch.
            kept: Responses per prompt that are learned from. None: all ``samples``.

        Raises:
            ValueError: A minibatch that would cut the responses to a prompt apart.
        """
        kept = kept or self.samples
        if minibatch_size is not None and minibatch_size % kept:
            raise ValueError(
                f"minibatch_size must be a multiple of {'samples' if kept == self.samples else 'the kept'} "
                f"({kept}), so that the responses to one prompt stay in one minibatch; got {minibatch_size}."
            )
        self.epochs, self.minibatch_size, self.samples_learned = epochs, minibatch_size, kept

    # ---- holes -----------------------------------------------------------------------------------

    @abstractmethod
    def experience(self, rollout: Rollout, scored: Scored) -> tuple[Experience, Stats]:
        """Rewards, advantages and returns of a scored rollout, and what to log of them.

        Where a critic is trained, a row's returns depend on that row alone (see `ActorCritic.first_value_pass`);
        advantages may be whitened over all rows.
        """

    @abstractmethod
    def policy_loss(
        self, answers: PolicyAnswers, experience: Experience, size: MinibatchSize
    ) -> tuple[Tensor, Stats]:
        """The policy's loss on a micro-batch as its share of the minibatch's mean, and statistics.

        Args:
            answers: What the policy being trained says of it.
            experience: The micro-batch.
            size: How much the whole minibatch holds. Divided by it, losses and statistics of the
                micro-batches add up to the minibatch's mean over tokens or episodes, as the leaf chooses.
        """

    def role_loss(
        self, role: Role, answers: RoleAnswers, experience: Experience, size: MinibatchSize
    ) -> tuple[Tensor, Stats]:
        """Weighted loss of one trained role on a micro-batch, and its statistics."""
        if role != "policy" or answers.policy is None or answers.entropy is None:
            raise RuntimeError(
                f"{type(self).__name__} trains {' and '.join(self.trained_roles)}, was asked for the loss of "
                f"{role}."
            )
        said = PolicyAnswers(answers.policy, answers.entropy, answers.divergence)
        loss, stats = self.policy_loss(said, experience, size)
        mask = experience.sequences.response_mask
        entropy = masked_mean(answers.entropy.detach(), mask, size.tokens)
        named = {"policy_loss": loss.detach(), "entropy": entropy, "loss": loss.detach()}
        return loss, {**named, **stats}

    # ---- the update, without a Trainer -----------------------------------------------------------

    def shaped_scores(self, scores: Tensor, stopped: Tensor) -> Tensor:
        """Scores after normalization, clipping and the missing-EOS rule. Shape: ``(B,)``."""
        if self.score_moments.get("squares", 0.0) > 0:
            if self.score_normalization == "standardize":
                scores = scores - self.score_moments["mean"]
            deviation = (self.score_moments["squares"] / self.score_moments["count"]) ** 0.5
            scores = scores / deviation
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
        first_value_stats: Stats | None = None,
    ) -> Stats:
        """Epochs of minibatch steps, each accumulated over micro-batches.

        Roles that one forward answers share one backward; others go one after the other, so that the
        actor's graph is gone before the critic's is built.

        Args:
            experience: What is learned from.
            optimizer: Optimizer over `parameter_groups`.
            backward: ``loss.backward()``, or Lightning's.
            first_read: Called once, with the first answers of the policy.
            accept: Asked before every step.
            by_length: Micro-batches are of rows of similar length, which looks at tensors' values.
            first_value_stats: The critic's statistics of the first minibatch, where
                `ActorCritic.first_value_pass` has left its gradient already.

        Returns:
            Statistics averaged over the optimizer steps.
        """
        sums: Stats = {}
        steps = 0
        for epoch in range(self.epochs):
            episodes, samples = len(experience.old_logprobs), experience.sequences.samples
            for rows in self._minibatches(episodes, samples, epoch):
                minibatch = experience.rows(rows.to(experience.old_logprobs.device))
                groups = self.roles.groups(self.learning_roles)
                if first_value_stats is not None:
                    groups.remove(("value",))
                    add(sums, first_value_stats)
                    first_value_stats = None
                add(sums, self._gradients(groups, minibatch, backward, first_read, by_length))
                first_read = None
                add(sums, self._step(optimizer, accept))
                steps += 1
        return {key: value / steps for key, value in sums.items()}

    def _gradients(
        self,
        groups: Sequence[tuple[Role, ...]],
        minibatch: Experience,
        backward: Backward,
        first_read: FirstRead | None,
        by_length: bool,
    ) -> Stats:
        """Accumulate the gradients of one minibatch, role group by role group."""
        sums: Stats = {}
        size = size_of(minibatch.sequences)
        by_length = by_length and self.shortcuts.length_buckets
        micro = list(cuts(minibatch.sequences, self.micro_batch_size, by_length))
        for group in groups:
            check = first_read if "policy" in group else None
            with self.phase("actor" if "policy" in group else "critic"):
                pieces = (minibatch.cut(cut) for cut in micro)
                for stats in self._backward(group, pieces, size, backward, check):
                    add(sums, stats)
        return sums

    def _backward(
        self,
        group: tuple[Role, ...],
        pieces: Iterable[Experience],
        size: MinibatchSize,
        backward: Backward,
        check: FirstRead | None,
    ) -> Iterator[Stats]:
        """A forward and a backward pass per micro-batch; the statistics of each role of the group."""
        for piece in pieces:
            with self.roles.training_pass(group):
                answers = self.roles.answer(
                    piece.sequences,
                    group,
                    self.sampling.temperature,
                    self.entropy_gradient,
                    self.full_kl,
                )
                if check is not None:
                    check(answers, piece)
                parts = [self.role_loss(role, answers, piece, size) for role in group]
                backward(torch.stack([loss for loss, _ in parts]).sum())
            check = None
            yield from (stats for _, stats in parts)

    def _step(self, optimizer: Optimizer, accept: Accept) -> Stats:
        """Clip and step; the gradient norms before clipping."""
        with self.phase("optimizer"):
            require_trainable(optimizer)
            norms = clip_by_group(optimizer, self.max_grad_norms)
            if accept(norms):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {f"grad_norm_{name}": norm for name, norm in norms.items()}

    def _minibatches(self, episodes: int, samples: int, epoch: int) -> Iterator[Tensor]:
        """Rows of each minibatch: prompts are shuffled, the responses to one stay together.

        Raises:
            ValueError: Some prompt has not all of its responses.
        """
        if episodes % samples:
            raise ValueError(
                f"An update needs all {samples} responses to each prompt, got {episodes} responses."
            )
        generator = torch.Generator().manual_seed(
            hash((self.seed, self.rollout_index, epoch)) & 0x7FFFFFFF
        )
        prompts = torch.randperm(episodes // samples, generator=generator)
        order = (prompts.unsqueeze(1) * samples + torch.arange(samples)).flatten()
        size = self.minibatch_size or episodes
        yield from (order[start : start + size] for start in range(0, episodes, size))

    # ---- Lightning -------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Remember which weights reference and reward have."""
        super().on_train_start()
        self._fingerprints = fingerprints(self.roles)

    def on_validation_start(self) -> None:
        """Reference and reward must have the weights they had."""
        self._require_unmoved()

    def _require_unmoved(self) -> None:
        if self._fingerprints is not None:
            require_unmoved(self.roles, self._fingerprints, "when training started")

    def on_train_batch_start(  # type: ignore[override]
        self,
        batch: Any,  # noqa: ANN401 (as Lightning says it)
        batch_idx: int,
    ) -> int | None:
        """Learn nothing more where a resumed run already has its episodes."""
        super().on_train_batch_start(batch, batch_idx)
        return -1 if self._stop_when_done() else None

    def _stop_when_done(self) -> bool:
        done = self.max_episodes is not None and self.episodes >= self.max_episodes
        if done:
            self.trainer.should_stop = True
        return done

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """One rollout batch, learned from and forgotten."""
        with self.phase("rollout"):
            rollout = self.collect(batch, self.rollout_index, samples=self.samples)
            greedy = self._greedy(batch) if self.greedy_baseline else None
        with self.phase("score"):
            scored = self.score(rollout, values=not self.values_come_later)
            scores, parts = self.rewarded(rollout, scored.scores)
            described = {**describe(rollout, scored._replace(scores=scores)), **parts}
            warn_if_far(described["kl"], described["response_tokens"])
            if self.score_normalization is not None:
                self.score_moments = seen(self.score_moments, scores)
            scored = scored._replace(scores=self.shaped_scores(scores, rollout.stopped))
            if greedy is not None:
                baseline = self.shaped_scores(self.scores(greedy), greedy.stopped)
                scored = scored._replace(baseline=baseline.repeat_interleave(self.samples))
        if self.rollout_index == 0:
            self._require_fresh_start(rollout, scored)
        scored, first_value_stats = self.values_of(rollout, scored, self.manual_backward)
        experience, stats = self.experience(rollout, scored)
        trained = self._learn(experience, first_value_stats)
        trained |= self._steer(float(described["kl"]), len(rollout.row))
        scheduler = None if self._make_scheduler is None else self.lr_schedulers()
        if scheduler is not None and not isinstance(scheduler, WatchingPlateau):
            scheduler.step()  # type: ignore[union-attr]
        learned = int(experience.sequences.attention_mask.sum()) * self.epochs
        rollouts = [rollout, greedy] if greedy else [rollout]
        return self._account(rollouts, learned, described, {**stats, **trained})

    def on_validation_end(self) -> None:
        """A scheduler that watches a measure is stepped after each validation, the others after each rollout.

        Raises:
            ValueError: Validation does not log that measure.
        """
        fitting = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        if not fitting or self._make_scheduler is None:
            return
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, WatchingPlateau):
            logged = self.trainer.callback_metrics
            if scheduler.monitor not in logged:
                raise ValueError(
                    f"model.scheduler watches {scheduler.monitor!r}; validation logs {sorted(logged)}."
                )
            scheduler.step(logged[scheduler.monitor])

    def _steer(self, kl: float, episodes: int) -> Stats:
        """Steer the weight of the KL towards its target, if it has one."""
        if self.kl_control.target is None:
            return {}
        steered = self.kl_control.steered(self.steered_kl_coef, kl, episodes)
        self.running["kl_coef"] = steered
        return {"kl_coef": torch.tensor(steered)}

    @property
    def steered_kl_coef(self) -> float:
        """Today's weight of the KL."""
        fixed = self.kl_control.target is None
        return self.kl_coef if fixed else self.running.get("kl_coef", self.kl_coef)

    @property
    def learning_roles(self) -> tuple[TrainedRole, ...]:
        """The trained roles that learn from this rollout."""
        return self.trained_roles

    def _greedy(self, prompts: PromptBatch) -> Rollout:
        """The policy's likeliest responses, one per prompt."""
        likeliest = replace(self.sampling, temperature=0.0)
        return self.collect(prompts, self.rollout_index, sampling=likeliest)

    @property
    def values_come_later(self) -> bool:
        """Whether `values_of` asks the critic, and not `score`."""
        return False

    def values_of(
        self, rollout: Rollout, scored: Scored, backward: Backward = torch.Tensor.backward
    ) -> tuple[Scored, Stats | None]:
        """The scored rollout with the critic's values; and its statistics, where it has learned with them."""
        return scored, None

    def _learn(self, experience: Experience, first_value_stats: Stats | None) -> Stats:
        optimizer = self.optimizers()
        targets = experience.advantages
        for other in (experience.returns, experience.reference):
            targets = targets if other is None else targets + other
        targets = torch.where(experience.sequences.response_mask, targets, 0.0)
        if not bool(torch.isfinite(targets).all()):
            # Every epoch would fail on it again; one count for the whole rollout.
            optimizer.zero_grad()  # type: ignore[union-attr]  # the critic may have begun
            self.guard({"rollout (scores, values or log-probabilities)": targets.sum()})
            return {}
        return self.update(
            experience,
            optimizer,  # type: ignore[arg-type]  # Lightning's wrapper counts the steps
            self.manual_backward,
            first_read=self._require_first_ratio,
            accept=self.guard,
            first_value_stats=first_value_stats,
        )

    def _account(
        self, rollouts: list[Rollout], learned: int, described: Stats, stats: Stats
    ) -> dict[str, Any]:
        """Count and log one rollout batch: the first of the rollouts; ``learned`` tokens went into its update."""
        rollout = rollouts[0]
        generated = [int(drawn.response_mask.sum()) for drawn in rollouts]
        read = [int(drawn.prompt_mask.sum()) for drawn in rollouts]
        episodes = len(rollout.row)
        self.rollout_index += 1
        self.episodes += episodes
        self.tokens += generated[0]
        self.log_stats({f"train/{key}": value for key, value in stats.items()}, episodes)
        counts = {
            "train/episodes": self.episodes,
            "train/tokens": self.tokens,
            "train/skipped_steps": self.guard.skipped,
        }
        self.log_stats({key: float(count) for key, count in counts.items()}, episodes)
        if self.gold is not None:
            gold = self.call(self.gold, "gold", rollout)
            self.log("gold/score", gold.mean(), batch_size=episodes)
        for key, value in described.items():
            shown = key in ("score", "kl")
            self.log(f"rollout/{key}", value, batch_size=episodes, prog_bar=shown)
        self._stop_when_done()
        drawn = sum(generated)
        tokens = {"rollout": drawn, "score": sum(read) + drawn, "update": learned}
        return {"episodes": episodes, "tokens": tokens}

    def _require_fresh_start(self, rollout: Rollout, scored: Scored) -> None:
        """Identities of the first step: fresh adapters change nothing, and scores are finite."""
        if not bool(torch.isfinite(scored.scores).all()):
            raise RuntimeError(
                "The reward role gives non-finite scores before any update. Look at the reward head in "
                "heads.safetensors and at trunk_dtype."
            )
        self._require_equal(
            masked_mean((scored.logprobs - scored.reference).abs(), rollout.response_mask),
            "The KL to the reference is not 0 before the first update",
            "Do policy and reference stand on the same trunk folder, and are the adapters fresh?",
        )

    def _require_first_ratio(self, answers: RoleAnswers, experience: Experience) -> None:
        """Before a rollout's first step the policy is still the one that sampled."""
        if answers.policy is None:
            return
        gap = (answers.policy.detach() - experience.old_logprobs).abs()
        self._require_equal(
            masked_mean(gap, experience.sequences.response_mask),
            "The ratio of the first minibatch is not 1",
            "Is there dropout in the trunk or adapter, or a temperature that differs between sampling and "
            "scoring?",
        )

    def _require_equal(self, gap: Tensor, problem: str, cause: str) -> None:
        allowed = ratio_tolerance(self.policy_trunk.dtype, self.shortcuts.sampled_logprobs)
        require_equal_logprobs(gap, allowed, problem, cause)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The actor's parameters."""
        return [{"name": "actor", "params": self.roles.actor_parameters()}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also how far the run is; sampling noise follows from it."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["on_policy"] = {
            "rollout_index": self.rollout_index,
            "episodes": self.episodes,
            "tokens": self.tokens,
            "running": self.running,
            "score_moments": self.score_moments,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
        super().on_load_checkpoint(checkpoint)
        progress = checkpoint["on_policy"]
        self.rollout_index = progress["rollout_index"]
        self.episodes, self.tokens = progress["episodes"], progress["tokens"]
        self.running = dict(progress.get("running", {}))
        self.score_moments = dict(progress.get("score_moments", {}))

    def hand_over(self, folder: Path) -> None:
        """Write ``RUN/adapters/actor``, or the policy's trunk as ``RUN/policy`` in the layout full."""
        self._require_unmoved()
        self.write_role("policy", folder, "policy")

    def write_role(self, role: Role, folder: Path, name: str) -> Path:
        """Write a trained role's adapter below ``folder/adapters``, or its whole trunk as ``folder/name``.

        Returns:
            The folder that was written.
        """
        trunk, adapter = self.roles.trunk(role), self.roles.seats[role].adapter
        if adapter == OFF:
            save_trunk(trunk, folder / name, None, {"module": type(self).__name__})
            return folder / name
        target = folder / "adapters" / adapter
        trunk.adapters.save(adapter, target, trunk.source)
        write_adapter_manifest(target, trunk)
        return target


def size_of(sequences: Sequences) -> MinibatchSize:
    """Episodes and response tokens of a minibatch."""
    mask = sequences.response_mask
    return MinibatchSize(mask.sum().clamp(min=1), len(mask))


def add(sums: Stats, stats: Mapping[str, Tensor]) -> None:
    """Add named statistics to sums of the same names."""
    for key, value in stats.items():
        sums[key] = sums.get(key, torch.zeros_like(value)) + value
