"""What an on-policy module does without learning: sample answers, score them, compare them with the reference's.

Shapes: ``B`` rollouts, ``R`` response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_perl.arguments import Count, NonNegative
from lightning_perl.batches import Answers, Bounded, PromptBatch
from lightning_perl.chat import Headers, headers_of
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.roles import (
    Layout,
    RewardEnsemble,
    Role,
    RoleAnswers,
    Roles,
    TrainedRole,
)
from lightning_perl.models.sharding import NO_SHARDED_TUNING
from lightning_perl.models.trunk import Trunk
from lightning_perl.modules.base import NO_LORAPLUS, AdapterModule, Stats
from lightning_perl.packaged import unpackaged
from lightning_perl.ranks import largest, share, shared_cuts, summed, world
from lightning_perl.rewards import RewardFunction, checked_scores
from lightning_perl.rollouts.rollout import Rollout, Scored, describe, split_at
from lightning_perl.rollouts.sampling import Asked, RolloutEngine, SamplingSpec

VALIDATION_ROLLOUT = -1
"""Rollout index of validation's noise: the same at every validation, never a training rollout's."""


class Evaluation(AdapterModule):
    """Policy, reference and reward (and in `ActorCritic` value) on the trunks of one layout.

    `collect` and `score` run without a Trainer.

    Args:
        trunk: Folder of the SFT or Hydra-SFT trunk, or a hub name.
        layout: Which trunks, adapters and heads answer the roles: ``full`` (four models), ``lora`` (four
            trunks, two adapters), ``dynamic_lora`` (two trunks), ``perl`` (one trunk, the reward is an
            adapter), ``hydra`` (one trunk with a reward head) or ``joint_hydra`` (actor and critic share).
        lora: Shape of the actor and critic adapters (Hydra-RLHF: rank 128; PERL: rank 1 to 16, attention).
        reward: Folder of the reward model: RUN/adapters/reward for ``perl``, or several of them; a trunk with
            a reward head for ``full``, ``lora`` and ``dynamic_lora``. None: the trunk's own reward head.
        reward_ensemble: How several reward adapters make one score: ``mean`` or ``minimum`` of their scores, a
            forward pass each, or the score of their ``weight_average``, one pass. Train each with
            ``normalize_scores``: else the lowest scale decides the minimum and the widest the mean.
        learned_reward_weight: Weight of the learned reward. 0 disables it; the trunk needs no reward head then.
        reward_function: A reward in plain Python, added to the learned one.
        reward_function_weight: Weight of the Python reward.
        sampling: How rollouts are drawn; its temperature also divides the logits in scoring.
        validation_sampling: How validation answers are drawn. None: as rollouts.
        score_batch_size: Episodes per scoring pass.
        rollout_engine: Where responses are sampled, such as `VllmServers`. None: in this process.
        gold: The true reward, where an experiment knows it; logged, never learned from.
        settings: Arguments of `AdapterModule`.
    """

    rows: ClassVar[Literal["rated", "prompts"]] = "prompts"
    trained_roles: ClassVar[tuple[TrainedRole, ...]] = ("policy",)

    def __init__(
        self,
        trunk: str,
        layout: Layout = "hydra",
        lora: LoraSpec | None = LoraSpec(),
        reward: str | list[str] | None = None,
        reward_ensemble: RewardEnsemble = "mean",
        learned_reward_weight: NonNegative = 1.0,
        reward_function: RewardFunction | None = None,
        reward_function_weight: NonNegative = 1.0,
        sampling: SamplingSpec = SamplingSpec(),
        validation_sampling: SamplingSpec | None = None,
        score_batch_size: Count = 4,
        rollout_engine: RolloutEngine | None = None,
        gold: RewardFunction | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        sampling.refuse_unscored()
        if learned_reward_weight == 0 and (reward_function is None or reward_function_weight == 0):
            raise ValueError(
                "learned_reward_weight is 0 and there is no reward_function with a weight, so every "
                "score would be 0. Give one of them."
            )
        self.require_settings(layout)
        engine = rollout_engine or RolloutEngine()
        engine.require_served(layout == "full", self.quantization)
        self.roles = Roles(
            layout,
            unpackaged(trunk),
            self.needed(lora),
            reward=reward,
            dtype=self.trunk_dtype,
            checkpointing=self.checkpointing,
            attention=self.attention,
            quantization=self.quantization,
            shortcuts=self.shortcuts,
            seed=self.seed,
            ensemble=reward_ensemble,
            learned_reward=learned_reward_weight > 0,
            critic="value" in self.trained_roles,
        )
        self.policy_trunk.require_cache()
        self.learned_reward_weight = learned_reward_weight
        self.reward_function = reward_function
        self.reward_function_weight = reward_function_weight
        self.sampling = sampling
        self.validation_sampling = validation_sampling or sampling
        self.score_batch_size = score_batch_size
        self.rollout_engine = engine
        self.gold = gold
        self._reference_gold: list[Tensor] = []

    def require_settings(self, layout: Layout) -> None:
        """Refuse arguments, found in ``hparams``, that do not go together, before any weight is loaded."""
        if layout == "joint_hydra" and "value" not in self.trained_roles:
            raise ValueError(
                f"layout joint_hydra is one adapter for actor and critic, and {type(self).__name__} trains no "
                "critic. Use layout hydra, which is the same without one."
            )
        if layout == "full" and self.trunk_sharding is not None:
            raise ValueError(NO_SHARDED_TUNING)
        if layout == "full" and self.loraplus_lr_ratio is not None:
            raise ValueError(NO_LORAPLUS)
        named = self.checkpointing if isinstance(self.checkpointing, list) else []
        if untrained := [role for role in named if role not in self.trained_roles]:
            raise ValueError(
                f"checkpointing: {untrained} are no trained roles of {type(self).__name__}, which trains "
                f"{list(self.trained_roles)}. Give true, false, or some of those."
            )

    @cached_property
    def policy_trunk(self) -> Trunk:
        """The policy's trunk; its tokenizer is everybody's."""
        return self.roles.trunk("policy")

    @property
    def rewarded_by(self) -> list[str]:
        """Names of the rewards, for manifests: fingerprints of the judges' heads, and the Python reward's path."""
        if self.reward_function is None:
            return self.roles.reward_fingerprints
        named: Any = self.reward_function
        named = named if hasattr(named, "__qualname__") else type(named)
        return [*self.roles.reward_fingerprints, f"{named.__module__}.{named.__qualname__}"]

    # ---- sampling and scoring, without a Trainer -------------------------------------------------

    def start(
        self,
        prompts: PromptBatch,
        rollout_index: int,
        role: Role = "policy",
        sampling: SamplingSpec | None = None,
        early_exit: bool = True,
        samples: int = 1,
    ) -> Callable[[], Rollout]:
        """Start to sample responses to prompts, those to one prompt next to each other.

        The noise of a response comes from (seed, rollout index, row, sample) and from nothing else.

        Args:
            prompts: ``B / samples`` of them.
            rollout_index: Number of the rollout.
            role: Whose adapter answers.
            sampling: How tokens are drawn. None: the module's ``sampling``.
            early_exit: See `rollouts.sampling.sample`.
            samples: Responses per prompt.

        Returns:
            Gives the rollout; servers sample until it is called.
        """
        spec, mine = sampling or self.sampling, share(len(prompts.row))
        own = PromptBatch(*(part[mine.rows] for part in prompts))
        asked = Asked(own, spec, self.seed, rollout_index, samples, early_exit)
        trunk, adapter = self.roles.trunk(role), self.roles.seats[role].adapter
        drawn = self.rollout_engine.start(trunk, adapter, asked, self.phase)
        kept = (
            role == "policy"
            and spec.scored_as_sampled
            and spec.temperature == self.sampling.temperature
            and (self.shortcuts.sampled_logprobs or self.rollout_engine.elsewhere)
        )

        def finished() -> Rollout:
            rollout = gathered(drawn(), prompts, self.policy_trunk.pad_id)
            return rollout if kept else rollout._replace(logprobs=None)

        return finished

    def collect(self, prompts: PromptBatch, rollout_index: int, *how: Any, **named: Any) -> Rollout:
        """Sample responses to prompts; arguments as `start`."""
        return self.start(prompts, rollout_index, *how, **named)()

    def score(
        self,
        rollout: Rollout,
        by_length: bool = True,
        values: bool = True,
        temperature: float | None = None,
    ) -> Scored:
        """What the roles say of a rollout, one forward pass per distinct (trunk, adapter).

        The policy is not asked where its log-probabilities were kept while it sampled here, the critic only
        where one is trained. Without a learned reward every score is 0.

        Args:
            rollout: What was sampled.
            by_length: Read rows of similar length together, which looks at tensors' values.
            values: Ask the critic; else its values are 0.
            temperature: Divides the logits. None: the temperature of ``sampling``.
        """
        roles: list[Role] = ["reference", "reward"]
        if values and "value" in self.trained_roles:
            roles.insert(0, "value")
        kept = None if self.rollout_engine.elsewhere else rollout.logprobs
        if kept is None:
            roles.insert(0, "policy")
        temperature = self.sampling.temperature if temperature is None else temperature
        answers = self.ask(rollout, roles, temperature, by_length)
        reference = given(answers.reference)
        return Scored(
            given(answers.policy if kept is None else kept),
            reference,
            torch.zeros_like(reference) if answers.value is None else answers.value,
            torch.zeros_like(reference[:, 0]) if answers.reward is None else answers.reward,
            spread=answers.spread,
        )

    @torch.no_grad()
    def ask(
        self,
        rollout: Rollout,
        roles: Sequence[Role],
        temperature: float = 1.0,
        by_length: bool = True,
    ) -> RoleAnswers:
        """The roles' answers about a rollout, micro-batch by micro-batch; 0 in columns that were cut off."""
        sequences = rollout.sequences()
        by_length = by_length and self.shortcuts.length_buckets
        whole: dict[str, Tensor] = {}
        for cut, counts in shared_cuts(sequences, self.score_batch_size, by_length):
            answers = self.roles.answer(sequences.cut(cut), roles, temperature)
            for name, part in answers._asdict().items():
                if part is None:
                    continue
                shape = rollout.response_mask.shape[: part.dim()]
                into = whole.setdefault(name, part.new_zeros(shape))
                if counts:
                    into[(cut.rows, slice(cut.responses))[: part.dim()]] = part
        return RoleAnswers(**{name: summed(part) for name, part in whole.items()})

    def rewarded(self, rollout: Rollout, learned: Tensor) -> tuple[Tensor, Stats]:
        """What the responses earn: the learned score and the Python reward, each times its weight.

        It decodes texts and calls Python, which `score` and the update never do.

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
        python = self.call(self.reward_function, "reward_function", rollout).to(learned)
        parts = {"function_score": python.mean()}
        if self.roles.judges:
            parts["learned_score"] = learned.mean()
        return scores + self.reward_function_weight * python, parts

    @torch.no_grad()
    def scores(self, rollout: Rollout) -> Tensor:
        """What the responses earn; only the reward role is asked. Shape: ``(B,)``."""
        learned = torch.zeros(len(rollout.row), device=rollout.row.device)
        if self.roles.judges:
            learned = given(self.ask(rollout, ["reward"]).reward)
        return self.rewarded(rollout, learned)[0]

    def texts(self, rollout: Rollout) -> tuple[list[str], list[str]]:
        """Prompts as `prompts_read` gives them, and responses, decoded without special tokens."""
        return (
            self.prompts_read(kept_tokens(rollout.prompt_ids, rollout.prompt_mask)),
            self.decoded(kept_tokens(rollout.response_ids, rollout.response_mask)),
        )

    def prompts_read(self, rows: list[list[int]]) -> list[str]:
        """Texts of prompts, a line per turn (``User:``, ``Agent:``) whatever template wrote them."""
        decode, headers = self.policy_trunk.tokenizer.decode, self._headers
        if not headers.first:
            return self.decoded(rows)
        return [headers.plain(str(decode(row))) or self.decoded([row])[0] for row in rows]

    @cached_property
    def _headers(self) -> Headers:
        return headers_of(self.policy_trunk.tokenizer)

    def decoded(self, rows: list[list[int]]) -> list[str]:
        """Texts of rows of tokens without special tokens; what a stop token ends is a line of its own."""
        tokenizer, stop_ids = self.policy_trunk.tokenizer, self.policy_trunk.stop_ids
        # EOS ends every turn of a prompt; dropped, one turn would run into the next.
        turns = [split_at(row, stop_ids) for row in rows]
        return [
            "\n".join(str(tokenizer.decode(turn, skip_special_tokens=True)) for turn in row)
            for row in turns
        ]

    def call(self, function: RewardFunction, argument: str, rollout: Rollout) -> Tensor:
        """Scores of a Python reward, the argument that named it being used in messages. Shape: ``(B,)``.

        It is called once for each response, on one of the ranks.
        """
        mine = share(len(rollout.row))
        own, scores = rollout.rows(mine.rows), [0.0]
        if mine.counted:
            scores = checked_scores(function, argument, *self.texts(own), own.row.tolist())
        return mine.gathered(torch.tensor(scores, dtype=torch.float32))

    # ---- Lightning -------------------------------------------------------------------------------

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Answer held-out prompts as policy and as reference, with the same noise, and compare."""
        spec = self.validation_sampling
        rollout = self.collect(batch, VALIDATION_ROLLOUT, "policy", spec)
        scored = self.score(rollout, values=False, temperature=spec.temperature or 1.0)
        # Raises where another model sampled.
        self.rollout_engine.mismatch(rollout, scored.logprobs)
        scores, parts = self.rewarded(rollout, scored.scores)
        before = self.collect(batch, VALIDATION_ROLLOUT, "reference", spec)
        before_scores = self.scores(before)
        wins = (scores > before_scores).float() + 0.5 * (scores == before_scores)
        described = describe(rollout, scored._replace(scores=scores))
        stats = {key: described[key] for key in ("score", "response_tokens")} | parts
        if spec.scored_as_sampled:
            stats["kl"] = described["kl"]
        stats["win_rate"] = wins.mean()
        stats["reference_score"] = before_scores.mean()
        if self.gold is not None:
            gold_before = self.call(self.gold, "gold", before)
            stats["gold"] = self.call(self.gold, "gold", rollout).mean()
            stats["reference_gold"] = gold_before.mean()
            self._reference_gold.append(gold_before)
        for key, value in stats.items():
            shown = key in ("score", "kl")
            name, rows = f"{self.held_out}/{key}", len(batch.row)
            self.log(name, value, batch_size=rows, prog_bar=shown, on_epoch=True)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the spread of the reference's gold over all prompts; batch by batch it is smaller."""
        if self._reference_gold:
            spread = torch.cat(self._reference_gold).std(correction=0)
            self.log(f"{self.held_out}/reference_gold_sd", spread)
            self._reference_gold.clear()

    on_test_epoch_end = on_validation_epoch_end

    def answer(self, prompts: PromptBatch, role: Literal["policy", "reference"]) -> Answers:
        """Texts and scores for prompts, with validation's sampling and noise."""
        moved = PromptBatch(*(part.to(self.device) for part in prompts))
        rollout = self.collect(moved, VALIDATION_ROLLOUT, role, self.validation_sampling)
        prompt_texts, response_texts = self.texts(rollout)
        return Answers(prompt_texts, response_texts, self.scores(rollout).tolist())

    def require_fitting(self, data: object) -> None:
        """Also ask who samples whether the longest rows fit, and whether the trunk is ours."""
        super().require_fitting(data)
        longest = self.longest_row(data) if isinstance(data, Bounded) else 0
        self.rollout_engine.begin(self.policy_trunk, longest)

    def teardown(self, stage: str) -> None:
        """Take from servers what was pushed."""
        self.rollout_engine.close()

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Row numbers, prompts, the policy's responses and their scores."""
        return {"row": batch.row, **self.answer(batch, "policy")._asdict()}

    @property
    def window(self) -> int | None:
        """The smallest window of the trunks, in tokens."""
        windows = [trunk.window for trunk in self.roles.distinct_trunks()]
        return min((window for window in windows if window is not None), default=None)

    def longest_row(self, data: Bounded) -> int:
        """The longest prompt and the longest sampled response, in tokens."""
        sampled = max(self.sampling.max_new_tokens, self.validation_sampling.max_new_tokens)
        return data.max_tokens - data.max_response_tokens + sampled


def gathered(own: Rollout, prompts: PromptBatch, pad_id: int) -> Rollout:
    """The rollouts of all ranks: the responses to their shares of the prompts, padded to one length."""
    if world() == 1:
        return own
    samples, (width,) = own.samples, largest([own.response_ids.shape[1]])
    own, rows = own.widened(width, pad_id), share(len(prompts.row), samples)
    parts = (part.repeat_interleave(samples, 0) for part in prompts)
    every = PromptBatch(*parts)
    return Rollout(
        every.ids,
        every.mask,
        rows.gathered(own.response_ids),
        rows.gathered(own.response_mask),
        rows.gathered(own.stopped),
        every.row,
        None if own.logprobs is None else rows.gathered(own.logprobs),
        None if own.servers is None else rows.gathered(own.servers),
        samples,
    )


def kept_tokens(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The tokens of each row that its mask keeps."""
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]


def given(answer: Tensor | None) -> Tensor:
    """The answer of a role that was asked.

    Raises:
        RuntimeError: It was not asked.
    """
    if answer is None:
        raise RuntimeError("A role was not asked for what is needed of it.")
    return answer
