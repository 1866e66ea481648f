"""What a reward in plain Python is, and the one place that calls it."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from typing import Protocol

import torch

from lightning_perl.arguments import Checked


class RewardFunction(Protocol):
    """Scores responses in plain Python.

    Called once per rollout, outside the graph and on texts alone, so it may parse, look up or call
    a checker; it must not depend on the other rows of a call. Any callable will do. To name a class
    or a function in a YAML (``class_path: package.module.name``), give it exactly these argument
    names and types (``Sequence[float]``, not ``list[float]``): jsonargparse compares them.
    """

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[int]
    ) -> Sequence[float]:
        """Returns one score per response, a finite number; higher is better.

        Args:
            prompts: The prompts that the policy read, a line per turn (``User: ...``, at the end ``Agent:``),
                whatever template wrote them.
            responses: The answers, decoded without special tokens; may be empty or garbage.
            rows: The prompts' numbers, :attr:`~lightning_perl.batches.PromptBatch.row`. They count
                the prompts of one split, so they name a prompt only within it.
        """
        ...


class EachAlone(Checked, RewardFunction):
    """A reward that scores each response by itself; subclasses fill :meth:`score`."""

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[int]
    ) -> Sequence[float]:
        """Returns a score per response."""
        texts = zip(prompts, responses, rows, strict=True)
        return [float(self.score(prompt, response, row)) for prompt, response, row in texts]

    @abstractmethod
    def score(self, prompt: str, response: str, row: int) -> float:
        """Returns the score of one response; the row is for messages only."""


def checked_scores(
    function: RewardFunction,
    argument: str,
    prompts: Sequence[str],
    responses: Sequence[str],
    rows: Sequence[int],
) -> list[float]:
    """Returns what ``function`` gives, one finite number per response; ``argument`` names it in messages."""
    who = f"{argument} ({getattr(function, '__name__', type(function).__name__)})"
    try:
        scores = _scores(function, prompts, responses, rows)
    except Exception as error:
        at = _where_it_raises(function, prompts, responses, rows)
        raise ValueError(f"{who} raised {type(error).__name__} {at}: {error}") from error
    if len(scores) != len(responses):
        raise ValueError(
            f"{who} gave {len(scores)} scores for {len(responses)} responses; it must give one each. "
            f"The first: {_place(rows[0], responses[0])}."
        )
    return [
        _finite(score, who, _place(row, response))
        for score, row, response in zip(scores, rows, responses, strict=True)
    ]


def _scores(
    function: RewardFunction, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[int]
) -> list[object]:
    """Calls with lists of its own: what a function does to them happens to nobody else."""
    given: object = function(list(prompts), list(responses), list(rows))
    if inspect.iscoroutine(given):
        given.close()
        raise TypeError(
            "a coroutine is no list of scores; wait for it in a plain function (asyncio.run)"
        )
    if isinstance(given, Mapping | Set):
        raise TypeError(f"a {type(given).__name__} has no order that responses have; give a list")
    return list(given)  # type: ignore[call-overload, no-any-return]


def _finite(score: object, who: str, place: str) -> float:
    value = math.nan
    # float() reads numpy's and torch's numbers too, but also "3".
    if not isinstance(score, str | bytes):
        with suppress(TypeError, ValueError, RuntimeError, OverflowError):
            value = float(score)  # type: ignore[arg-type]
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{who} gave {score!r} for {place}; it must give a finite number.")
    return value


def _where_it_raises(
    function: RewardFunction, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[int]
) -> str:
    # A row's score depends on no other row, so alone it raises again.
    for prompt, response, row in zip(prompts, responses, rows, strict=True):
        try:
            _scores(function, [prompt], [response], [row])
        except Exception:
            return f"on {_place(row, response)}"
    return f"on {len(rows)} rows together ({rows[0]} to {rows[-1]}), on none of them alone"


def _place(row: int, response: str) -> str:
    return f"row {row}, response {response[:80]!r}"
