"""The skeleton of on-policy methods: collect, score, turn into experience, update.

It owns the only manual-optimization loop. `Evaluation.collect`, `Evaluation.score` and `OnPolicy.update` run
without a Trainer; logging and checks are done around them, in `OnPolicy.training_step`.

Shapes: ``B`` rollouts, ``R`` response tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import ReduceLROnPlateau as WatchingPlateau
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_perl.arguments import Count, Finite, NonNegative, Positive, require_allowed
from lightning_perl.batches import Bounded, MixedBatch, PairBatch, PromptBatch, RatedBatch
from lightning_perl.callbacks.console import count_episodes
from lightning_perl.callbacks.policy_guard import PolicyGuard
from lightning_perl.functional.logprobs import jensen_shannon, k1, k2, k3
from lightning_perl.functional.masked import masked_mean
from lightning_perl.models.adapters import OFF
from lightning_perl.models.manifest import save_trunk, write_adapter_manifest
from lightning_perl.models.roles import Role, RoleAnswers
from lightning_perl.modules.base import Backward, Stats
from lightning_perl.modules.evaluation import given
from lightning_perl.modules.safety import FiniteGuard, fingerprints, ratio_tolerance
from lightning_perl.modules.updating import Updating
from lightning_perl.optim import room_for_moments
from lightning_perl.ranks import world
from lightning_perl.rollouts.rollout import (
    Ahead,
    Drawn,
    Experience,
    Rollout,
    Scored,
    describe,
    experiences,
)

PROGRESS = ("rollout_index", "episodes", "tokens", "steered_to", "score_moments")
"""What training itself changes besides weights, as a checkpoint holds it."""


@dataclass(frozen=True)
class KLControl:
    """How the KL to the reference is estimated for the reward, and who sets its weight.

    Args:
        estimator: Of a token's KL: ``k1``, ``k2``, ``k3`` or ``jensen_shannon`` (LoRA-RLHF, 2309.09055).
        target: KL in nats per response that ``kl_coef`` is steered to (1909.08593, Eq. 4). None: it stays fixed.
        horizon: Episodes over which it is steered: a fifth too much KL for so long makes it 1.2 times as large.
    """

    estimator: Literal["k1", "k2", "k3", "jensen_shannon"] = "k1"
    target: Positive | None = None
    horizon: Count = 10_000

    def __post_init__(self) -> None:
        """Refuse what the types rule out."""
        require_allowed(type(self), vars(self))

    @property
    def estimate(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The estimator: from log-probabilities of policy and reference to nats per token."""
        return {"k1": k1, "k2": k2, "k3": k3, "jensen_shannon": jensen_shannon}[self.estimator]

    def steered(self, kl_coef: float, kl: float, episodes: int) -> float:
        """The next weight of the KL, after a rollout of so many episodes with so much KL per response."""
        if self.target is None or not math.isfinite(kl):
            return kl_coef
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return kl_coef * (1 + error * min(episodes / self.horizon, 1.0))


# Checkpoints hold it among the hyper-parameters, those of 0.2 by an earlier place.
torch.serialization.add_safe_globals(
    [KLControl, (KLControl, "lightning_perl.modules.running.KLControl")]
)


class OnPolicy(Updating):
    """Learns from its own samples. Leaves fill `experience` and `policy_loss`.

    A leaf that goes over each rollout several times, or in minibatches, calls `learn_in`; one that sets
    ``greedy_baseline`` finds in ``scored.baseline`` what the policy's greedy responses earn; see `PolicyAnswers`
    for ``entropy_gradient`` and ``full_kl``. One that sets ``learns_pairs`` finds pairs of the data behind its
    experience, a better and a worse answer each, without advantages. One that sets ``kl_control`` reads its
    ``kl_coef`` as ``steered_kl_coef``.

    Args:
        trunk: Folder of the SFT or Hydra-SFT trunk, or a hub name.
        max_episodes: Training stops once this many episodes were learned from. None: no limit.
        score_normalization: ``scale`` divides scores by their standard deviation over all episodes so far,
            ``standardize`` takes their mean off first (PPO-max, 2307.04964). None: neither.
        score_clip: Scores are then clipped to plus or minus this. None: not at all (DeepSpeed-Chat: 5).
        missing_eos_score: Score of a response without EOS, instead of its own (2403.17031: -1).
        missing_eos_penalty: Taken off the score of a response without EOS (TRL's rule).
        settings: Arguments of `Updating`, `Evaluation` and `AdapterModule`.
    """

    automatic_optimization: bool
    greedy_baseline: ClassVar[bool] = False
    learns_pairs: ClassVar[bool] = False
    kl_coef: float
    kl_control: KLControl = KLControl()

    def __init__(
        self,
        trunk: str,
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
        super().__init__(trunk, **settings)
        self.automatic_optimization = False
        self.max_episodes = max_episodes
        self.score_normalization = score_normalization
        self.score_clip = score_clip
        self.missing_eos_score = missing_eos_score
        self.missing_eos_penalty = missing_eos_penalty
        self.guard = FiniteGuard()
        self.episodes = 0
        self.tokens = 0
        self.steered_to: float | None = None
        self.score_moments: dict[str, float] = {}
        # What is sampled while the rollout before is learned from; and the batch that was learned from last.
        self._ahead: Ahead | None = None
        self.learned_from: PromptBatch | MixedBatch | None = None
        self._fingerprints: dict[str, str] | None = None

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

    # ---- Lightning -------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """A bar that counts episodes, and a guard that warns, unless the trainer was given another."""
        given = [] if self._trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
        count_episodes(given)
        if any(isinstance(callback, PolicyGuard) for callback in given):
            return super().configure_callbacks()
        return [PolicyGuard(), *super().configure_callbacks()]

    def setup(self, stage: str) -> None:
        """Refuse texts beside the prompts, or their lack, as soon as the data is known."""
        super().setup(stage)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and hasattr(data, "texts_as"):
            self._require_texts(data.texts_as)

    def on_train_start(self) -> None:
        """Remember which weights reference and reward have."""
        super().on_train_start()
        self._fingerprints = fingerprints(self.roles)

    def on_validation_start(self) -> None:
        """Reference and reward must have the weights they had."""
        self._require_unmoved()

    def _require_unmoved(self) -> None:
        """Refuse to go on where reference or reward have other weights than when training started."""
        before = self._fingerprints or {}
        now = fingerprints(self.roles) if before else {}
        if moved := [name for name, value in now.items() if before.get(name) != value]:
            raise RuntimeError(
                f"{moved} has other weights than when training started, so scores and KL are measured "
                "against something else. Was it trained, merged into, or exchanged in its folder?"
            )

    def on_train_batch_start(  # type: ignore[override]
        self,
        batch: Any,  # noqa: ANN401 (as Lightning says it)
        batch_idx: int,
    ) -> int | None:
        """Learn nothing more where a resumed run already has its episodes."""
        super().on_train_batch_start(batch, batch_idx)
        texts = batch.texts if isinstance(batch, MixedBatch) else None
        self._require_texts({RatedBatch: "demonstrations", PairBatch: "pairs"}.get(type(texts)))
        return -1 if self._stop_when_done() else None

    def _require_texts(self, kind: str | None) -> None:
        """Refuse texts beside the prompts that nothing learns, and an ``lm_weight`` without any."""
        if kind == "pairs" and not self.learns_pairs:
            raise ValueError(
                f"{type(self).__name__} learns no pairs beside its own responses; INPO does. Set "
                "data.texts_as: demonstrations and lm_weight to imitate the chosen ones."
            )
        if (kind == "demonstrations") != (self.lm_weight > 0):
            raise ValueError(
                f"lm_weight is {self.lm_weight:g}, and the data gives {'no ' * (self.lm_weight > 0)}texts beside "
                "its prompts. Texts to imitate come from MixedDataModule, and lm_weight above 0 learns them."
            )

    def _stop_when_done(self) -> bool:
        done = self.max_episodes is not None and self.episodes >= self.max_episodes
        if done:
            self.trainer.should_stop = True
        return done

    def training_step(self, batch: PromptBatch | MixedBatch, batch_idx: int) -> dict[str, Any]:
        """Learn from a rollout of this batch; where rollouts overlap, start it and learn from the one before.

        The last batch of a fit is then not sampled, but noted for a run that goes on.
        """
        before, self._ahead = self._ahead, None
        sampled: Iterable[tuple[Ahead, Drawn]]
        if self.rollout_engine.overlap and not (before is None and self._ends_with_batch()):
            sampled = self._overlapped(before, batch)
        else:  # A checkpoint of a run with overlap has one more.
            sampled = self._one_by_one([batch] if before is None else [before.batch, batch])
        counts = [self._learn_from(*one) for one in sampled]
        tokens = sum((Counter(count["tokens"]) for count in counts), Counter[str]())
        return {"episodes": sum(count["episodes"] for count in counts), "tokens": dict(tokens)}

    def _one_by_one(
        self, batches: Sequence[PromptBatch | MixedBatch]
    ) -> Iterator[tuple[Ahead, Drawn]]:
        """A rollout of each batch by the policy as it is by then, until there are enough."""
        for batch in batches:
            if not self._stop_when_done():
                with self.phase("rollout"):
                    ahead = self._start(self._noted(batch))
                    drawn = ahead.wait()
                yield ahead, drawn

    def _overlapped(
        self, before: Ahead | None, batch: PromptBatch | MixedBatch
    ) -> list[tuple[Ahead, Drawn]]:
        """Start a rollout of the batch, unless the fit ends with the one before, and wait for that one."""
        self._ahead = self._noted(batch)
        with self.phase("rollout"):
            learned = [] if before is None else [before if before.rollout else self._start(before)]
            if not self._ends_with(learned):
                self._ahead = self._start(self._ahead, len(learned))
            return [(ahead, ahead.wait()) for ahead in learned]

    def sample_again(self) -> None:
        """Let what is under way be sampled by the policy as it is in the next batch."""
        self._ahead = None if self._ahead is None else Ahead(self._ahead.batch, {})

    def _noted(self, batch: PromptBatch | MixedBatch) -> Ahead:
        """A rollout for the policy as it is now, not started."""
        adapters, adapter = self.policy_trunk.adapters, self.roles.seats["policy"].adapter
        return Ahead(batch, adapters.kept(adapter) if self.rollout_engine.elsewhere else {})

    def _start(self, ahead: Ahead, later: int = 0) -> Ahead:
        """Start a rollout with the policy that it was noted for, and greedy responses if they are a baseline."""
        batch = self.transfer_batch_to_device(ahead.batch, self.device, 0)
        ahead = ahead._replace(batch=batch) if ahead.weights else self._noted(batch)
        number = self.rollout_index + later
        with self._as_it_was(ahead):
            if self.greedy_baseline:
                likeliest = replace(self.sampling, temperature=0.0)
                ahead = ahead._replace(greedy=self.start(ahead.prompts, number, sampling=likeliest))
            rollout = self.start(ahead.prompts, number, samples=self.samples)
        return ahead._replace(rollout=rollout)

    def _sampled_logprobs(self, ahead: Ahead, rollout: Rollout, logprobs: Tensor) -> Tensor:
        """Log-probabilities of the policy that should have sampled, read once more where it has learned since."""
        with self._as_it_was(ahead) as moved:
            if not moved:
                return logprobs
            return given(self.ask(rollout, ["policy"], self.sampling.temperature).policy)

    @contextmanager
    def _as_it_was(self, ahead: Ahead) -> Iterator[bool]:
        """Inside, the policy is the one that a rollout was noted for; gives whether it has moved since."""
        adapters, adapter = self.policy_trunk.adapters, self.roles.seats["policy"].adapter
        moved = bool(ahead.weights) and not adapters.equal(adapter, ahead.weights)
        with adapters.holding(adapter, ahead.weights) if moved else nullcontext():
            yield moved

    def _ends_with_batch(self) -> bool:
        """Whether ``max_epochs`` end with this batch."""
        epochs = self.trainer.max_epochs or -1
        return self.trainer.is_last_batch and 0 < epochs <= self.current_epoch + 1

    def _ends_with(self, learned: Sequence[Ahead]) -> bool:
        """Whether nothing is learned from after these rollouts."""
        episodes = self.episodes + self.samples * sum(len(one.prompts.row) for one in learned)
        enough = self.max_episodes is not None and episodes >= self.max_episodes
        return bool(learned) and (enough or self._ends_with_batch())

    def _learn_from(self, ahead: Ahead, drawn: Drawn) -> dict[str, Any]:
        """Score a rollout, learn from it, and forget it."""
        (rollout, greedy), self.learned_from = drawn, ahead.batch
        with self.phase("score"):
            scored = self.score(rollout, values=not self.values_come_later)
            scores, parts = self.rewarded(rollout, scored.scores)
            sampled = self._sampled_logprobs(ahead, rollout, scored.logprobs)
            parts |= self.rollout_engine.mismatch(rollout, sampled)
            measured = scored._replace(scores=scores, logprobs=sampled)
            described = describe(rollout, measured) | parts
            scored = self.rollout_engine.weighted(rollout, scored)
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
        if experience.importance is None:
            experience = experience._replace(importance=scored.importance)
        experience, texts = self.with_pairs(experience, ahead.texts)
        trained = self._learn(experience, first_value_stats, texts)
        trained |= self._steer(float(described["kl"]), len(rollout.row))
        scheduler = None if self._make_scheduler is None else self.lr_schedulers()
        if scheduler is not None and not isinstance(scheduler, WatchingPlateau):
            scheduler.step()  # type: ignore[union-attr]
        learned = int(experience.sequences.attention_mask.sum()) * self.epochs
        rollouts = [rollout, greedy] if greedy else [rollout]
        return self._account(rollouts, learned, described, {**stats, **trained})

    def with_pairs(
        self, experience: Experience, texts: RatedBatch | PairBatch | None
    ) -> tuple[Experience, RatedBatch | None]:
        """The experience and behind it the data's pairs, as the policy reads them now; the texts to imitate."""
        if not isinstance(texts, PairBatch):
            return experience, texts
        stopped = texts.response_mask[:, 0]  # nobody asks
        pairs = Rollout(*texts[:4], stopped, texts.row, samples=experience.sequences.samples)
        with self.phase("score"):
            answers = self.ask(pairs, ("policy", "reference"), self.sampling.temperature)
        before, reference = given(answers.policy), given(answers.reference)
        nothing = torch.zeros_like(before)
        ones = None if experience.importance is None else torch.ones_like(before)
        added = Experience(pairs.sequences(), before, nothing, reference=reference, importance=ones)
        return experiences([experience, added]), None

    def preflight(self, batch: PromptBatch | MixedBatch, optimizer: Optimizer) -> None:
        """Sample and score a rollout of the longest rows, and take one micro-batch's gradients."""
        prompts, texts = batch if isinstance(batch, MixedBatch) else (batch, None)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        longest = prompts.ids.shape[1]
        if isinstance(data, Bounded):
            longest = max(longest, data.max_tokens - data.max_response_tokens)
        ids = prompts.ids[:, -1:].repeat(1, longest)
        prompts = prompts._replace(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))
        with self.phase("rollout"):
            rollout = self.collect(prompts, 0, early_exit=False, samples=self.samples)
            rollout = rollout._replace(response_mask=torch.ones_like(rollout.response_mask))
        with self.phase("score"):
            scored = self.score(rollout, values=not self.values_come_later)
            scored = scored._replace(baseline=scored.scores if self.greedy_baseline else None)
        scored, _ = self.values_of(rollout, scored)
        experience, _ = self.experience(rollout, scored)
        experience, texts = self.with_pairs(experience, texts)
        kept = self.samples_learned
        learned = -(-self.micro_batch_size // kept) * kept * world()
        piece = experience.rows(torch.arange(min(learned, len(experience.old_logprobs))))
        taken: list[Tensor] = []

        def leave_out(_: object) -> bool:
            taken.extend(room_for_moments(optimizer))
            return False

        self.update(piece, optimizer, accept=leave_out, by_length=False, texts=texts)

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
        if self.kl_control.target is None or "policy" not in self.learning_roles:
            return {}
        steered = self.kl_control.steered(self.steered_kl_coef, kl, episodes)
        self.steered_to = steered
        return {"kl_coef": torch.tensor(steered)}

    @property
    def steered_kl_coef(self) -> float:
        """Today's weight of the KL."""
        if self.kl_control.target is None or self.steered_to is None:
            return self.kl_coef
        return self.steered_to

    @property
    def values_come_later(self) -> bool:
        """Whether `values_of` asks the critic, and not `score`."""
        return False

    def values_of(
        self, rollout: Rollout, scored: Scored, backward: Backward = torch.Tensor.backward
    ) -> tuple[Scored, Stats | None]:
        """The scored rollout with the critic's values; and its statistics, where it has learned with them."""
        return scored, None

    def _learn(
        self, experience: Experience, first_value_stats: Stats | None, texts: RatedBatch | None
    ) -> Stats:
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
            texts=texts,
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
                "heads/heads.safetensors and at trunk_dtype."
            )
        self._require_equal(
            masked_mean((scored.logprobs - scored.reference).abs(), rollout.response_mask),
            "The KL to the reference is not 0 before the first update",
            "Do policy and reference stand on the same trunk folder, and are the adapters fresh?",
        )

    def _require_first_ratio(self, answers: RoleAnswers, experience: Experience) -> None:
        """At a rollout's first step the policy is still the one that scored it."""
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
        """Refuse log-probabilities that should be equal and differ by more than rounding explains."""
        allowed = ratio_tolerance(self.policy_trunk.dtype, self.shortcuts.sampled_logprobs)
        if not float(gap) <= allowed:
            raise RuntimeError(
                f"{problem}: mean |difference of log-probabilities| is {float(gap):.3g} per token, rounding "
                f"explains {allowed:.0e}. {cause}"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also how far the run is; sampling noise follows from it."""
        super().on_save_checkpoint(checkpoint)
        progress = {name: getattr(self, name) for name in (*PROGRESS, "rewarded_by")}
        progress |= {"skipped": self.guard.skipped, "skipped_in_a_row": self.guard.in_a_row}
        if self._ahead is not None:
            progress["ahead"] = {"batch": self._ahead.batch, "weights": self._ahead.weights}
        checkpoint["on_policy"] = progress

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
        super().on_load_checkpoint(checkpoint)
        progress = checkpoint["on_policy"]
        for name in PROGRESS:  # checkpoints of older releases lack some
            setattr(self, name, progress.get(name, getattr(self, name)))
        self._ahead = Ahead(**progress["ahead"]) if "ahead" in progress else None
        self.guard.skipped = progress.get("skipped", 0)
        self.guard.in_a_row = progress.get("skipped_in_a_row", 0)
        if (before := progress.get("rewarded_by", self.rewarded_by)) != self.rewarded_by:
            rank_zero_warn(
                f"The checkpoint learned from the rewards {before}, this run goes on with {self.rewarded_by}."
            )

    def teardown(self, stage: str) -> None:
        """Take from servers what was pushed; what is under way is started anew by a fit to come."""
        super().teardown(stage)
        if self._ahead is not None:
            self._ahead = self._ahead._replace(rollout=None, greedy=None)

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
        write_adapter_manifest(target, trunk, self.rewarded_by)
        return target


def seen(moments: Mapping[str, float], scores: Tensor) -> dict[str, float]:
    """Count, mean and sum of squared deviations of the scores so far (Chan's update); infinite ones are left out.

    Args:
        moments: Those before; empty at first.
        scores: A rollout's. Shape: ``(B,)``.
    """
    scores = scores[torch.isfinite(scores)].double()
    count, before = moments.get("count", 0.0), moments.get("mean", 0.0)
    if not len(scores):
        return dict(moments)
    total, gap = count + len(scores), float(scores.mean()) - before
    squares = float(((scores - scores.mean()) ** 2).sum()) + gap**2 * count * len(scores) / total
    mean = before + gap * len(scores) / total
    return {"count": total, "mean": mean, "squares": moments.get("squares", 0.0) + squares}
