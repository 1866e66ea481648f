"""What a corpus is read into, before any token: turns, rows, pairs and the three splits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias


class BadRow(ValueError):
    """A row that cannot be used: a few words to count by, and where, what is wrong and how to mend it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Turn(NamedTuple):
    """One turn of a conversation, as plain text without any speaker tag.

    A call of an API is an ``agent`` turn, the API's answer an ``api`` turn.
    """

    role: Literal["system", "user", "agent", "api"]
    text: str


@dataclass(frozen=True)
class Row:
    """One answer in its context, or one demonstrated dialog.

    Attributes:
        context: The turns before the response; may be empty.
        response: One agent turn; or, of a demonstrated dialog, all turns from its first agent turn
            on, of which only the agent turns count. Empty for a row that is only a prompt.
        label: 1.0 thumbs up, 0.0 thumbs down, between them for a rating, None without a label.
        imitate: Whether the response enters the language-modelling loss.
        dialog: The group of rows that is never divided between splits.
        where: ``file:row``, for error messages.
        source: Number of the source that the row comes from, where sources are weighted.
    """

    context: tuple[Turn, ...]
    response: tuple[Turn, ...]
    label: float | None
    imitate: bool
    dialog: str
    where: str
    source: int = 0


@dataclass(frozen=True)
class Pair:
    """Two answers to one context, of which a judge preferred ``chosen``."""

    chosen: Row
    rejected: Row


Item: TypeAlias = Row | Pair


class Splits(NamedTuple):
    """The rows of a corpus, divided by dialog: to learn from, to choose by, to report on."""

    train: list[Item]
    val: list[Item]
    test: list[Item]


def first_row(item: Item) -> Row:
    """Returns a row, or the chosen row of a pair: both have one context, dialog and place."""
    return item.chosen if isinstance(item, Pair) else item


def judgement(item: Item) -> tuple[object, object]:
    """Returns what a judge was shown, an answer or two in either order, and the verdict on it."""
    if isinstance(item, Pair):
        answers = frozenset((item.chosen.response, item.rejected.response))
        return (item.chosen.context, answers), item.chosen.response
    return (item.context, item.response), item.label


def conflicting(verdicts: Iterable[object]) -> bool:
    """Whether verdicts on one thing contradict each other: both thumbs, or a pair in both orders.

    Ratings contradict each other where one is above the middle and one below.
    """
    sides = {
        verdict > 0.5 if isinstance(verdict, float) else verdict
        for verdict in verdicts
        if verdict is not None and verdict != 0.5
    }
    return len(sides) > 1
