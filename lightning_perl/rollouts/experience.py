"""What an update learns from: a rollout's scores, and the experience made of them. Both immutable.

Shapes: ``B`` rollouts, ``R`` response tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_perl.functional.sequences import Cut, Sequences


class Scored(NamedTuple):
    """What the roles say of a rollout before any update.

    Attributes:
        logprobs: Log-probabilities of the policy that sampled. Shape: ``(B, R)``.
        reference: Log-probabilities of the reference. Shape: ``(B, R)``.
        values: Of the critic; 0 where there is none, or where `ActorCritic.first_value_pass` gives them
            later. Shape: ``(B, R)``.
        scores: What each response earns, before clipping and missing-EOS rules. Shape: ``(B,)``.
        baseline: Shaped scores of a second rollout of the same prompts, where a method wants one; one per
            prompt. Shape: ``(B / samples,)``.
    """

    logprobs: Tensor
    reference: Tensor
    values: Tensor
    scores: Tensor
    baseline: Tensor | None = None

    def rows(self, rows: Tensor) -> Scored:
        """The named rows only, without a baseline."""
        return Scored(*(part[rows] for part in self[:4]))


class Experience(NamedTuple):
    """What an update learns from; every field has a row per rollout.

    Attributes:
        sequences: Prompts and responses.
        old_logprobs: Log-probabilities of the policy that sampled. Shape: ``(B, R)``.
        advantages: Shape: ``(B, R)``.
        old_values: Values before the update; None without a critic. Shape: ``(B, R)``.
        returns: What values are fitted to; None without a critic. Shape: ``(B, R)``.
        reference: Log-probabilities of the reference, where a loss reads them. Shape: ``(B, R)``.
    """

    sequences: Sequences
    old_logprobs: Tensor
    advantages: Tensor
    old_values: Tensor | None = None
    returns: Tensor | None = None
    reference: Tensor | None = None

    def rows(self, rows: Tensor) -> Experience:
        """The named rows only."""
        return Experience(self.sequences.rows(rows), *self._parts(rows))  # type: ignore[arg-type]

    def cut(self, cut: Cut) -> Experience:
        """Some rows without the columns that none of them uses."""
        parts = self._parts((cut.rows, slice(cut.responses)))
        return Experience(self.sequences.cut(cut), *parts)  # type: ignore[arg-type]

    def _parts(self, index: Tensor | tuple[Tensor, slice]) -> list[Tensor | None]:
        return [None if part is None else part[index] for part in self[1:]]
