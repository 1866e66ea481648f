"""The one place that calls a reward in Python: what it lets through and how it complains."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lightning_perl.rewards import RewardFunction, checked_scores

PROMPTS = ["one?", "two?", "three?"]
RESPONSES = ["a", "b" * 200, "c"]
ROWS = [7, 8, 9]


def giving(scores: object) -> RewardFunction:
    def given(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[int]) -> Any:  # noqa: ANN401
        return scores

    return given


def checked(function: RewardFunction) -> list[float]:
    return checked_scores(function, "reward_function", PROMPTS, RESPONSES, ROWS)


@pytest.mark.parametrize(
    "scores",
    [
        [1.0, -2.5, 0.0],
        (1, -2.5, False),
        np.array([1.0, -2.5, 0.0], dtype=np.float32),
        torch.tensor([1.0, -2.5, 0.0]),
        iter([torch.tensor(1.0), np.float64(-2.5), np.int32(0)]),
    ],
)
def test_whatever_is_a_number_is_a_score(scores: object) -> None:
    found = checked(giving(scores))
    assert found == [1.0, -2.5, 0.0]
    assert {type(one) for one in found} == {float}


SHOWN = "b" * 80
WHERE = rf"for row 8, response '{SHOWN}'; it must give a finite number\."


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([0.0, math.nan, 0.0], rf"\(given\) gave nan {WHERE}"),
        ([0.0, -math.inf, math.nan], rf"\(given\) gave -inf {WHERE}"),
        ([0.0, None, 0.0], rf"\(given\) gave None {WHERE}"),
        ([0.0, "3", 0.0], rf"\(given\) gave '3' {WHERE}"),
        ([0.0, 10**400, 0.0], rf"\(given\) gave 10+ {WHERE}"),
        ([0.0, 1e39, 0.0], rf"\(given\) gave 1e\+39 {WHERE}"),
        ([0.0, 1j, 0.0], rf"\(given\) gave 1j {WHERE}"),
        ([0.0, [1.0], 0.0], rf"\(given\) gave \[1\.0\] {WHERE}"),
        ([0.0, torch.zeros(2), 0.0], rf"\(given\) gave tensor\(.*\) {WHERE}"),
        ([0.0] * 2, "gave 2 scores for 3 responses; it must give one each.*row 7, response 'a'"),
        ([0.0] * 4, "gave 4 scores for 3 responses"),
        (0.5, "raised TypeError on row 7, response 'a': 'float' object is not iterable"),
        (None, "raised TypeError on row 7, response 'a'"),
        (
            {7: 1.0, 8: 2.0, 9: 3.0},
            "raised TypeError on row 7, .* a dict has no order .*give a list",
        ),
        ({1.0, 2.0, 3.0}, "raised TypeError on row 7, .* a set has no order"),
    ],
)
def test_what_is_no_score_is_refused_with_its_row(scores: object, words: str) -> None:
    with pytest.raises(ValueError, match=f"^reward_function .*{words}"):
        checked(giving(scores))


def test_what_a_function_raises_names_the_row_and_keeps_its_cause() -> None:
    def picky(
        prompts: Sequence[str], responses: Sequence[str], rows: Sequence[int]
    ) -> Sequence[float]:
        return [1 / (row - 8) for row in rows]

    with pytest.raises(
        ValueError, match=rf"\(picky\) raised ZeroDivisionError on row 8, response '{SHOWN}': "
    ) as caught:
        checked(picky)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_async_function_is_refused_with_what_to_do() -> None:
    async def late(
        prompts: Sequence[str], responses: Sequence[str], rows: Sequence[int]
    ) -> Sequence[float]:
        return [0.0 for _ in rows]

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # never awaited
        with pytest.raises(ValueError, match=r"a coroutine is no list .*asyncio.run"):
            checked(late)  # type: ignore[arg-type]


def test_a_function_that_changes_its_lists_changes_nobody_elses() -> None:
    def greedy(prompts: list[str], responses: list[str], rows: list[int]) -> list[float]:
        return [float(len([each.pop() for each in (prompts, responses, rows)])) for _ in rows[:]]

    prompts, responses, rows = PROMPTS[:], RESPONSES[:], ROWS[:]
    assert checked_scores(greedy, "r", prompts, responses, rows) == [3.0] * 3  # type: ignore[arg-type]
    assert (prompts, responses, rows) == (PROMPTS, RESPONSES, ROWS)


def test_what_only_the_whole_call_raises_is_said_to_be_that() -> None:
    def whole(
        prompts: Sequence[str], responses: Sequence[str], rows: Sequence[int]
    ) -> Sequence[float]:
        if len(rows) > 1:
            raise TimeoutError("too many")
        return [0.0]

    words = r"raised TimeoutError on 3 rows together \(7 to 9\), on none of them alone: too many"
    with pytest.raises(ValueError, match=words):
        checked(whole)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda function: function, "given"),
        (lambda function: partial(function), "partial"),
        (lambda function: type("Judge", (), {"__call__": staticmethod(function)})(), "Judge"),
    ],
)
def test_functions_and_objects_are_called_by_their_names(
    make: Callable[[RewardFunction], RewardFunction], name: str
) -> None:
    with pytest.raises(ValueError, match=rf"^reward_function \({name}\) gave 0 scores"):
        checked(make(giving([])))
