"""What a corpus is read into, before any token: turns, rows, pairs and the three splits."""

from __future__ import annotations

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
        label: 1.0 thumbs up, 0.0 thumbs down, None without a thumb.
        imitate: Whether the response enters the language-modelling loss.
        dialog: The group that is never divided between splits.
        where: ``file:row``, for error messages.
    """

    context: tuple[Turn, ...]
    response: tuple[Turn, ...]
    label: float | None
    imitate: bool
    dialog: str
    where: str


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
