"""Rewards that are Python functions, beside the learned one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["RewardFunction"]


class RewardFunction(Protocol):
    """Scores responses in plain Python.

    Called once per rollout, outside the graph and on texts alone, so it may parse, look up or call
    a checker; it must not depend on the other rows of a call. To name a class in a YAML, give its
    ``__call__`` exactly these argument names and types (``Sequence[float]``, not ``list[float]``):
    jsonargparse compares them.

    Example:
        >>> class Brevity:
        ...     def __call__(self, prompts, responses, rows):
        ...         return [-float(len(response)) for response in responses]
        >>> shortest_wins: RewardFunction = Brevity()
        >>> shortest_wins(["Hi"], ["Hello!"], [0])
        [-6.0]
    """

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[int]
    ) -> Sequence[float]:
        """Returns one score per response; higher is better.

        Args:
            prompts: The prompts as the policy read them, decoded without special tokens.
            responses: The answers, decoded without special tokens; may be empty or garbage.
            rows: The prompts' numbers, :attr:`~lightning_perl.batches.PromptBatch.row`. They count
                the prompts of one split, so they name a prompt only within it.

        Returns:
            As many finite numbers as there are responses.
        """
        ...
