"""The update of an on-policy method: epochs of minibatches of micro-batches, without a Trainer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_perl.arguments import Count, NonNegative, Positive
from lightning_perl.batches import RatedBatch
from lightning_perl.functional.masked import masked_mean
from lightning_perl.functional.sequences import Sequences
from lightning_perl.losses.language_modeling import cross_entropy
from lightning_perl.models.roles import Layout, Role, RoleAnswers, TrainedRole
from lightning_perl.modules.base import Backward, Stats
from lightning_perl.modules.evaluation import Evaluation, given
from lightning_perl.modules.safety import clip_by_group, require_trainable
from lightning_perl.ranks import shared_cuts, sum_gradients, trained_by
from lightning_perl.rollouts.rollout import Experience, Rollout, Scored

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


class Updating(Evaluation):
    """Learns from an experience. Leaves fill `experience` and `policy_loss`.

    One that learns from some of the responses to a prompt says from how many in ``samples_kept``.

    Args:
        trunk: Folder of the SFT or Hydra-SFT trunk, or a hub name.
        samples: Responses per prompt; a rollout batch has ``data.batch_size * samples`` episodes.
        micro_batch_size: Episodes per forward and backward pass: less memory, the same result. Where it
            holds several prompts, it is cut to a multiple of ``samples``.
        score_batch_size: Episodes per scoring pass. None: as ``micro_batch_size``.
        max_grad_norm: Clips the norm of the actor's gradient.
        lm_weight: Weight of a language-modelling loss in every step, on the texts that a `MixedDataModule` gives
            beside the prompts (PPO-ptx, 2203.02155; PPO-max, 2307.04964).
    """

    full_kl: ClassVar[bool] = False
    samples_kept: ClassVar[int | None] = None
    entropy_gradient: bool = False

    def __init__(
        self,
        trunk: str,
        samples: Count = 1,
        micro_batch_size: Count = 4,
        score_batch_size: Count | None = None,
        max_grad_norm: Positive = 1.0,
        lm_weight: NonNegative = 0.0,
        **settings: Any,
    ) -> None:
        scored = micro_batch_size if score_batch_size is None else score_batch_size
        super().__init__(trunk, score_batch_size=scored, **settings)
        self.samples = samples
        self.micro_batch_size = micro_batch_size
        self.max_grad_norms = {"actor": max_grad_norm}
        self.lm_weight = lm_weight
        self.rollout_index = 0
        self.learn_in(1, None)

    def require_settings(self, layout: Layout) -> None:
        """Refuse a ``minibatch_size`` that would cut the responses to a prompt apart."""
        super().require_settings(layout)
        samples, size = self.hparams.get("samples", 1), self.hparams.get("minibatch_size")
        kept = self.samples_kept or samples
        if size is not None and size % kept:
            raise ValueError(
                f"minibatch_size must be a multiple of {'samples' if kept == samples else 'the kept'} "
                f"({kept}), so that the responses to one prompt stay in one minibatch; got {size}."
            )

    def learn_in(self, epochs: int, minibatch_size: int | None) -> None:
        """Go over each rollout several times, in minibatches that keep the responses to a prompt together.

        Args:
            epochs: Passes over each rollout batch.
            minibatch_size: Episodes per optimizer step, the leaf's argument of this name. None: the whole batch.
        """
        self.epochs, self.minibatch_size = epochs, minibatch_size

    @property
    def samples_learned(self) -> int:
        """Responses per prompt that are learned from."""
        return self.samples_kept or self.samples

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
        logprobs = answers.policy
        if experience.importance is not None:
            # The same values; what every loss sends back through a token is weighted.
            fixed = logprobs.detach()
            logprobs = fixed + experience.importance * (logprobs - fixed)
        said = PolicyAnswers(logprobs, answers.entropy, answers.divergence)
        loss, stats = self.policy_loss(said, experience, size)
        mask = experience.sequences.response_mask
        entropy = masked_mean(answers.entropy.detach(), mask, size.tokens)
        named = {"policy_loss": loss.detach(), "entropy": entropy, "loss": loss.detach()}
        return loss, {**named, **stats}

    @property
    def learning_roles(self) -> tuple[TrainedRole, ...]:
        """The trained roles that learn from this rollout."""
        return self.trained_roles

    # ---- the update ------------------------------------------------------------------------------

    def update(
        self,
        experience: Experience,
        optimizer: Optimizer,
        backward: Backward = torch.Tensor.backward,
        first_read: FirstRead | None = None,
        accept: Accept = lambda norms: True,
        by_length: bool = True,
        first_value_stats: Stats | None = None,
        texts: RatedBatch | None = None,
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
            texts: Rows to imitate in every step, with ``lm_weight``.

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
                stats: Stats = {}
                if first_value_stats is not None:
                    groups.remove(("value",))
                    add(stats, first_value_stats)
                    first_value_stats = None
                add(stats, self._gradients(groups, minibatch, backward, first_read, by_length))
                first_read = None
                if texts is not None and "policy" in self.learning_roles:
                    add(stats, self._imitate(texts, backward))
                add(sums, sum_gradients(trained_by(optimizer), stats))
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
        """Accumulate the gradients of this rank's share of a minibatch, role group by role group."""
        sums: Stats = {}
        size = size_of(minibatch.sequences)
        by_length = by_length and self.shortcuts.length_buckets
        micro = shared_cuts(minibatch.sequences, self.micro_batch_size, by_length)
        for group in groups:
            check = first_read if "policy" in group else None
            with self.phase("actor" if "policy" in group else "critic"):
                pieces = ((minibatch.cut(cut), counts) for cut, counts in micro)
                for stats in self._backward(group, pieces, size, backward, check):
                    add(sums, stats)
        return sums

    def _backward(
        self,
        group: tuple[Role, ...],
        pieces: Iterable[tuple[Experience, bool]],
        size: MinibatchSize,
        backward: Backward,
        check: FirstRead | None,
    ) -> Iterator[Stats]:
        """A forward and a backward pass per micro-batch; the statistics of each role of the group.

        A micro-batch that does not count, of a rank that has none left, adds zeros.
        """
        for piece, counts in pieces:
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
                backward(weighed(torch.stack([loss for loss, _ in parts]).sum(), counts))
            check = None
            yield from ({k: weighed(v, counts) for k, v in stats.items()} for _, stats in parts)

    def _imitate(self, texts: RatedBatch, backward: Backward) -> Stats:
        """Add the gradient of the language-modelling loss on texts, at temperature 1."""
        responses = texts.response_mask[:, texts.prompt_tokens :]
        rows = Sequences(texts.ids, texts.attention_mask, responses)
        imitated = responses & texts.imitate.unsqueeze(1)
        total = torch.zeros((), device=responses.device)
        with self.phase("actor"):
            for cut, counts in shared_cuts(rows, self.micro_batch_size, by_length=False):
                with self.roles.training_pass(("policy",)):
                    logprobs = given(self.roles.answer(rows.cut(cut), ("policy",)).policy)
                    mask = imitated[cut.rows, : cut.responses]
                    loss = cross_entropy(logprobs, mask, imitated.sum().clamp(min=1))
                    loss = weighed(loss, counts)
                    backward(self.lm_weight * loss)
                total = total + loss.detach()
        return {"lm_loss": total}

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

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The actor's parameters."""
        return [{"name": "actor", "params": self.roles.actor_parameters()}]


def size_of(sequences: Sequences) -> MinibatchSize:
    """Episodes and response tokens of a minibatch."""
    mask = sequences.response_mask
    return MinibatchSize(mask.sum().clamp(min=1), len(mask))


def weighed(value: Tensor, counts: bool) -> Tensor:
    """The value of a micro-batch, or 0 times it where that does not count."""
    return value if counts else 0 * value


def add(sums: Stats, stats: Mapping[str, Tensor]) -> None:
    """Add named statistics to sums of the same names."""
    for key, value in stats.items():
        sums[key] = sums.get(key, torch.zeros_like(value)) + value
