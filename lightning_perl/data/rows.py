"""What a corpus is read into, before any token: turns, rows, pairs and the three splits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias


class Turn(NamedTuple):
    """One turn of a conversation, as plain text.

    Attributes:
        role: Who speaks. A call of an API is an ``agent`` turn (see :func:`render_call`), the
            answer of the API is an ``api`` turn.
        text: What is said, without any speaker tag.
    """

    role: Literal["system", "user", "agent", "api"]
    text: str


@dataclass(frozen=True)
class Row:
    """One answer in its context, or one demonstrated dialog.

    Attributes:
        context: The turns before the response; may be empty.
        response: One agent turn; or, for a demonstrated dialog, everything from its first agent
            turn on, of which only the agent turns count. Empty for a row that is only a prompt.
        label: 1.0 thumbs up, 0.0 thumbs down, between them for a rating, None without a label.
        imitate: Whether the response enters the language-modelling loss.
        dialog: The group that is never divided between splits.
        where: ``file:row``, for error messages.
        source: Number of the source that it comes from, where sources are weighted.
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
    """Two answers to one context, of which a judge preferred the first.

    Attributes:
        chosen: The preferred answer.
        rejected: The other answer, with the same context.
    """

    chosen: Row
    rejected: Row


Item: TypeAlias = Row | Pair


def first_row(item: Item) -> Row:
    """Returns a row, or the chosen row of a pair: both have the context, the group and the place."""
    return item.chosen if isinstance(item, Pair) else item


def judged(item: Item) -> tuple[object, ...]:
    """Returns what a judge was shown: the context and the answer, or both answers in any order."""
    if isinstance(item, Pair):
        answers = frozenset((item.chosen.response, item.rejected.response))
        return item.chosen.context, answers
    return item.context, item.response


def verdict(item: Item) -> object:
    """Returns what the judge said: the label, or of a pair which answer was chosen."""
    return item.chosen.response if isinstance(item, Pair) else item.label


def conflicting(verdicts: Iterable[object]) -> bool:
    """Whether judges of one thing disagree: thumbs up and down, or a pair in both orders.

    Ratings disagree where one is above the middle and one below.
    """
    sides = {
        verdict > 0.5 if isinstance(verdict, float) else verdict
        for verdict in verdicts
        if verdict is not None and verdict != 0.5
    }
    return len(sides) > 1


class Splits(NamedTuple):
    """The rows of a corpus, divided by dialog.

    Attributes:
        train: Rows to learn from.
        val: Rows to choose by, for example the epoch.
        test: Rows to report on.
    """

    train: list[Item]
    val: list[Item]
    test: list[Item]
