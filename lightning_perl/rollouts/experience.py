"""What an update learns from: a rollout's scores, and the experience made of them. Both immutable.

Shapes: ``B`` rollouts, ``R`` response tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_perl.functional.sequences import Cut, Sequences


class Scored(NamedTuple):
    """What the roles said of a rollout before any update.

    Attributes:
        logprobs: Of the policy that sampled. Shape: ``(B, R)``.
        reference: Shape: ``(B, R)``.
        values: Shape: ``(B, R)``; zeros where they come later, see `OnPolicy.begin`.
        scores: Raw scores of the reward role. Shape: ``(B,)``.
    """

    logprobs: Tensor
    reference: Tensor
    values: Tensor
    scores: Tensor

    def rows(self, rows: Tensor) -> Scored:
        """The named rows only."""
        return Scored(*(part[rows] for part in self))


class Experience(NamedTuple):
    """What an update learns from; every field has a row per rollout.

    Attributes:
        sequences: Prompts and responses.
        old_logprobs: Shape: ``(B, R)``.
        old_values: Shape: ``(B, R)``.
        advantages: Shape: ``(B, R)``.
        returns: Shape: ``(B, R)``.
    """

    sequences: Sequences
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor

    def rows(self, rows: Tensor) -> Experience:
        """The named rows only."""
        return Experience(
            self.sequences.rows(rows),
            self.old_logprobs[rows],
            self.old_values[rows],
            self.advantages[rows],
            self.returns[rows],
        )

    def cut(self, cut: Cut) -> Experience:
        """Some rows without the columns that none of them uses."""
        rows, columns = cut.rows, slice(cut.responses)
        return Experience(
            self.sequences.cut(cut),
            self.old_logprobs[rows, columns],
            self.old_values[rows, columns],
            self.advantages[rows, columns],
            self.returns[rows, columns],
        )
