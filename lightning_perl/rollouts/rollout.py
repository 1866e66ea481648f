"""A rollout, its scores, and the experience that an update learns from; and measures of them.

Shapes: ``B`` rollouts, ``P`` prompt tokens, ``R`` response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_perl.batches import MixedBatch, PairBatch, PromptBatch, RatedBatch
from lightning_perl.functional.logprobs import k1
from lightning_perl.functional.masked import masked_mean, masked_row_sums
from lightning_perl.functional.packing import Packing
from lightning_perl.functional.sequences import Cut, Sequences

# Checkpoints hold the batch of a rollout on its way, and are read with weights_only.
torch.serialization.add_safe_globals([PromptBatch, MixedBatch, RatedBatch, PairBatch, Packing])


class Rollout(NamedTuple):
    """Prompts and their sampled responses.

    Attributes:
        prompt_ids: Padded on the left. Shape: ``(B, P)``, int64.
        prompt_mask: Shape: ``(B, P)``, bool.
        response_ids: Padded on the right. Shape: ``(B, R)``, int64.
        response_mask: True up to and including the stop token. Shape: ``(B, R)``, bool.
        stopped: False where the length limit cut the response. Shape: ``(B,)``, bool.
        row: The prompts' numbers in their corpus. Shape: ``(B,)``, int64.
        logprobs: Of the response tokens, in the distribution they were drawn from and as who drew them says, if
            kept. Shape: ``(B, R)``.
        servers: The number of the server that gave each response, where servers did. Shape: ``(B,)``, int64.
        samples: Responses per prompt, which stand next to each other.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    stopped: Tensor
    row: Tensor
    logprobs: Tensor | None = None
    servers: Tensor | None = None
    samples: int = 1

    def rows(self, rows: Tensor | slice) -> Rollout:
        """The named rows only; all that have one prompt, or ``samples`` is no longer right."""
        parts = [None if part is None else part[rows] for part in self[:-1]]
        return Rollout(*parts)._replace(samples=self.samples)  # type: ignore[arg-type]

    def sequences(self) -> Sequences:
        """Prompt and response as whole rows."""
        return Sequences(
            ids=torch.cat([self.prompt_ids, self.response_ids], dim=1),
            attention_mask=torch.cat([self.prompt_mask, self.response_mask], dim=1),
            response_mask=self.response_mask,
            samples=self.samples,
        )

    def widened(self, response_tokens: int, pad_id: int) -> Rollout:
        """The same with so many response columns, the new ones masked out."""
        missing = (0, response_tokens - self.response_ids.shape[1])
        logprobs = None if self.logprobs is None else F.pad(self.logprobs, missing)
        return self._replace(
            response_ids=F.pad(self.response_ids, missing, value=pad_id),
            response_mask=F.pad(self.response_mask, missing, value=False),
            logprobs=logprobs,
        )

    def response_tokens(self) -> Tensor:
        """Length of each response, the stop token included. Shape: ``(B,)``, int64."""
        return self.response_mask.sum(1)


def joined(parts: Sequence[Rollout], pad_id: int) -> Rollout:
    """Rollouts of prompts with the same columns as one; shorter responses are padded on the right."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.response_ids.shape[1] for part in parts)
    widened = [part.widened(width, pad_id) for part in parts]
    columns = zip(*(part[:-1] for part in widened), strict=True)
    return Rollout(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def split_at(ids: list[int], stop_ids: tuple[int, ...]) -> list[list[int]]:
    """The runs of ids between stop ids, without them; empty runs are left out, but for a lone one."""
    runs: list[list[int]] = [[]]
    for token in ids:
        if token in stop_ids:
            runs.append([])
        else:
            runs[-1].append(token)
    return [run for run in runs if run] or [[]]


Drawn = tuple[Rollout, Rollout | None]
"""What was sampled: the responses, and the policy's likeliest ones where they are a baseline."""


class Ahead(NamedTuple):
    """A rollout on its way, which may be started before it is learned from, with the policy as it is then.

    Attributes:
        batch: The prompts, perhaps with texts beside them.
        weights: Of the adapter that samples, on the CPU. Empty: as the adapter is when sampling starts.
        rollout: Waits for the rollout. None: not started, as a checkpoint has it.
        greedy: Waits for the policy's likeliest responses, where they are a baseline.
    """

    batch: PromptBatch | MixedBatch
    weights: dict[str, Tensor]
    rollout: Callable[[], Rollout] | None = None
    greedy: Callable[[], Rollout] | None = None

    @property
    def prompts(self) -> PromptBatch:
        """The prompts, ``B / samples`` of them."""
        return self.batch.prompts if isinstance(self.batch, MixedBatch) else self.batch

    @property
    def texts(self) -> RatedBatch | PairBatch | None:
        """What is learned beside the responses."""
        return self.batch.texts if isinstance(self.batch, MixedBatch) else None

    def wait(self) -> Drawn:
        """What was sampled, once it is there."""
        if self.rollout is None:
            raise RuntimeError("A rollout is waited for that was not started.")
        return self.rollout(), None if self.greedy is None else self.greedy()


class Scored(NamedTuple):
    """What the roles say of a rollout before any update.

    Attributes:
        logprobs: Log-probabilities of the policy as it is before the update. Shape: ``(B, R)``.
        reference: Log-probabilities of the reference. Shape: ``(B, R)``.
        values: Values of the critic; 0 where there is none, or where `ActorCritic.first_value_pass` gives them
            later. Shape: ``(B, R)``.
        scores: What each response earns; by the time of `OnPolicy.experience` clipped and changed by the
            missing-EOS rules. Shape: ``(B,)``.
        baseline: What the greedy response to the same prompt earns, by the same rules, where a method wants
            it. Shape: ``(B,)``.
        importance: Weights of the response tokens, where another policy sampled them. Shape: ``(B, R)``.
        spread: How far apart an ensemble's rewards are, see `RoleAnswers`. Shape: ``(B,)``.
    """

    logprobs: Tensor
    reference: Tensor
    values: Tensor
    scores: Tensor
    baseline: Tensor | None = None
    importance: Tensor | None = None
    spread: Tensor | None = None

    def kl(self, mask: Tensor) -> Tensor:
        """``sum_t (log pi - log ref)_t`` of each response, in nats. Shape: ``(B,)``."""
        return masked_row_sums(k1(self.logprobs, self.reference), mask)

    def rows(self, rows: Tensor) -> Scored:
        """The named rows only."""
        return Scored(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]


class Experience(NamedTuple):
    """What an update learns from; every field has a row per rollout.

    Attributes:
        sequences: Prompts and responses.
        old_logprobs: Log-probabilities of the policy as it is before the update. Shape: ``(B, R)``.
        advantages: Shape: ``(B, R)``.
        old_values: Values before the update; None without a critic. Shape: ``(B, R)``.
        returns: What values are fitted to; None without a critic. Shape: ``(B, R)``.
        reference: Log-probabilities of the reference, where a loss reads them. Shape: ``(B, R)``.
        importance: Weights of the tokens in the policy's gradient; None: all 1. Shape: ``(B, R)``.
    """

    sequences: Sequences
    old_logprobs: Tensor
    advantages: Tensor
    old_values: Tensor | None = None
    returns: Tensor | None = None
    reference: Tensor | None = None
    importance: Tensor | None = None

    def rows(self, rows: Tensor) -> Experience:
        """The named rows only."""
        return Experience(self.sequences.rows(rows), *self._parts(rows))  # type: ignore[arg-type]

    def cut(self, cut: Cut) -> Experience:
        """Some rows without the columns that none of them uses."""
        parts = self._parts((cut.rows, slice(cut.responses)))
        return Experience(self.sequences.cut(cut), *parts)  # type: ignore[arg-type]

    def _parts(self, index: Tensor | tuple[Tensor, slice]) -> list[Tensor | None]:
        return [None if part is None else part[index] for part in self[1:]]

    def widened(self, prompt_tokens: int, response_tokens: int) -> Experience:
        """The same with so many columns; the new ones, at the left and at the right, are masked out."""
        ids, attention_mask, response_mask, samples = self.sequences
        right = response_tokens - response_mask.shape[1]
        both = (prompt_tokens - self.sequences.prompt_tokens, right)
        sequences = Sequences(
            F.pad(ids, both), F.pad(attention_mask, both), F.pad(response_mask, (0, right)), samples
        )
        parts = [None if part is None else F.pad(part, (0, right)) for part in self[1:]]
        return Experience(sequences, *parts)  # type: ignore[arg-type]


def experiences(parts: Sequence[Experience]) -> Experience:
    """Several with the same fields and samples as one."""
    prompts = max(part.sequences.prompt_tokens for part in parts)
    responses = max(part.sequences.response_mask.shape[1] for part in parts)
    wide = [part.widened(prompts, responses) for part in parts]
    ids, attention_mask, response_mask = (
        torch.cat(column) for column in zip(*(part.sequences[:3] for part in wide), strict=True)
    )
    sequences = Sequences(ids, attention_mask, response_mask, parts[0].sequences.samples)
    fields = zip(*(part[1:] for part in wide), strict=True)
    joint = (None if field[0] is None else torch.cat(field) for field in fields)
    return Experience(sequences, *joint)  # type: ignore[arg-type]


def describe(rollout: Rollout, scored: Scored) -> dict[str, Tensor]:
    """What a rollout looked like, each a mean over its responses.

    ``score``, ``kl`` (k1 summed over the response, nats), ``response_tokens``, ``truncated_fraction``,
    ``distinct_2`` (different pairs of neighbouring tokens over all pairs, in the whole batch),
    ``length_score_correlation`` (Pearson; 0 where either does not vary) and ``score_gap`` where rewards are an
    ensemble.
    """
    mask = rollout.response_mask
    lengths = rollout.response_tokens().float()
    gap = {} if scored.spread is None else {"score_gap": scored.spread.mean()}
    return {
        "score": scored.scores.mean(),
        "kl": scored.kl(mask).mean(),
        "response_tokens": lengths.mean(),
        "truncated_fraction": (~rollout.stopped).float().mean(),
        "distinct_2": distinct_pairs(rollout.response_ids, mask),
        "length_score_correlation": correlation(lengths, scored.scores.float()),
        **gap,
    }


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the returns' variance that the values explain; 1 is all. Shape: ``(B, R)`` each to ``()``."""
    unexplained = masked_mean((returns - values) ** 2, mask)
    spread = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return 1 - unexplained / spread.clamp(min=1e-8)


def distinct_pairs(ids: Tensor, mask: Tensor) -> Tensor:
    """Distinct neighbouring token pairs over all of them; 1 where there is no pair."""
    both = mask[:, :-1] & mask[:, 1:]
    pairs = torch.stack([ids[:, :-1][both], ids[:, 1:][both]], dim=1)
    if len(pairs) == 0:
        return torch.ones(())
    return torch.tensor(len(torch.unique(pairs, dim=0)) / len(pairs))


def correlation(left: Tensor, right: Tensor) -> Tensor:
    """Pearson correlation over rows; 0 where either side does not vary. Shape: ``()``."""
    left, right = left - left.mean(), right - right.mean()
    scale = left.norm() * right.norm()
    return torch.where(
        scale > 0, (left * right).sum() / scale.clamp(min=1e-12), torch.zeros(()).to(scale)
    )
