"""Rewards that a program can check: 1 for right, 0 for wrong, or the share that is right; and a price of words."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from lightning_perl.arguments import CountOrZero, Positive, Text
from lightning_perl.rewards.function import EachAlone


class Brevity(EachAlone):
    """0 up to ``words`` words, and minus ``price`` for every further word.

    Against answers that grow because a learned reward likes length.

    Args:
        words: Number of words, between white space, that cost nothing.
        price: Cost of each further word.

    Example:
        >>> Brevity(words=2, price=0.5)(["Hi"] * 2, ["Hello there", "Hello to all of you"], [0, 1])
        [0.0, -1.5]
    """

    def __init__(self, words: CountOrZero, price: Positive = 0.1) -> None:
        self.words = words
        self.price = price

    def score(self, prompt: str, response: str, row: int) -> float:
        """The response's price, 0 or less."""
        over = max(0, len(response.split()) - self.words)
        return -self.price * over if over else 0.0


class MatchesPattern(EachAlone):
    r"""1 where the response matches a regular expression, else 0: the form of an answer.

    Args:
        pattern: Regular expression in Python's syntax; ``.`` matches line breaks too.
        whole: Whether the whole response must match, white space around it aside. False: a part may.

    Example:
        >>> MatchesPattern(r"The answer is \d+\.")(["2 + 2?"] * 2, ["The answer is 4.", "4"], [0, 0])
        [1.0, 0.0]
    """

    def __init__(self, pattern: str, whole: bool = True) -> None:
        self.pattern = _compiled("MatchesPattern", pattern)
        self.whole = whole

    def score(self, prompt: str, response: str, row: int) -> float:
        """1 where the pattern matches."""
        find = self.pattern.fullmatch if self.whole else self.pattern.search
        return find(response.strip()) is not None


class ValidJson(EachAlone):
    """1 where the response is JSON, and an object with certain keys if there are any, else 0.

    Args:
        keys: Keys that the object must have. Empty: any JSON is right.

    Example:
        >>> ValidJson(["size"])(["?"] * 3, ['{"size": "large"}', '{"size"', "[]"], [0, 0, 0])
        [1.0, 0.0, 0.0]
    """

    def __init__(self, keys: Sequence[Text] = ()) -> None:
        self.keys = set(keys)

    def score(self, prompt: str, response: str, row: int) -> float:
        """1 where the response is such JSON."""
        try:
            value = json.loads(response)
        # A policy may well open a bracket ten thousand times.
        except (ValueError, RecursionError):
            return False
        return not self.keys or (isinstance(value, dict) and value.keys() >= self.keys)


class ExactAnswer(EachAlone):
    r"""1 where the response is the known answer to its prompt, else 0.

    The answers are looked up by the prompt's text and not by its row, whose number means another
    prompt in another split. Case, white space and a final full stop do not count.

    Args:
        file: JSON lines, each with a question and its answer.
        prompt_key: Key of the question, a text that the decoded prompt contains. The longest one
            that it contains counts.
        answer_key: Key of the answer.
        pattern: Regular expression that finds the answer in the response: the last match's first
            group counts, for example ``####\s*(.+)``. None: the whole response.
    """

    def __init__(
        self,
        file: str,
        prompt_key: str = "prompt",
        answer_key: str = "answer",
        pattern: str | None = None,
    ) -> None:
        self.file = file
        self.answers = _answers(file, prompt_key, answer_key)
        self.pattern = None if pattern is None else _compiled("ExactAnswer", pattern)
        if self.pattern is not None and self.pattern.groups == 0:
            raise ValueError(
                f"ExactAnswer.pattern must have a group in parentheses around the answer, got {pattern!r}."
            )

    def score(self, prompt: str, response: str, row: int) -> float:
        """1 where the answers are the same; a question of the file must be in the prompt."""
        return self._given(response) == self._wanted(prompt, row)

    def _wanted(self, prompt: str, row: int) -> str:
        text = _plain(prompt)
        question = max((known for known in self.answers if known in text), key=len, default=None)
        if question is None:
            raise ValueError(
                f"ExactAnswer: no question of {self.file} is in prompt {row}, which ends "
                f"{prompt[-80:]!r}. Were prompts cut (data.max_tokens), or is it another file's?"
            )
        return self.answers[question]

    def _given(self, response: str) -> str | None:
        if self.pattern is None:
            return _bare(response)
        answers = [match.group(1) for match in self.pattern.finditer(response)]
        return _bare(answers[-1] or "") if answers else None


class RepeatsPrompt(EachAlone):
    r"""The share of what a pattern finds in the prompt's last lines that the response says again.

    Case does not count; a thing asked for twice counts once; 1 where the pattern finds nothing.

    Args:
        pattern: Regular expression of what must be repeated, its first group if it has any; for
            example ``\b(small|medium|large|latte|mocha)s?\b``.
        turns: How many of the prompt's last lines to read, empty ones aside. 0: all of them.

    Example:
        >>> kept = RepeatsPrompt(r"\b(small|large|latte|mocha)\b")
        >>> kept(["User: A large mocha\nAgent:"] * 2, ["One large latte", "Large mocha!"], [0, 0])
        [0.5, 1.0]
    """

    def __init__(self, pattern: str, turns: CountOrZero = 2) -> None:
        self.pattern = _compiled("RepeatsPrompt", pattern, re.IGNORECASE)
        self.turns = turns

    def score(self, prompt: str, response: str, row: int) -> float:
        """The share of the prompt's finds, in [0, 1]."""
        lines = [line for line in prompt.splitlines() if line.strip()][-self.turns :]
        asked = self._found("\n".join(lines))
        return len(asked & self._found(response)) / len(asked) if asked else 1.0

    def _found(self, text: str) -> set[str]:
        group = min(self.pattern.groups, 1)
        words = (match.group(group) for match in self.pattern.finditer(text))
        return {word.casefold() for word in words if word}


def _compiled(owner: str, pattern: str, flags: int = re.DOTALL) -> re.Pattern[str]:
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise ValueError(
            f"{owner}.pattern is no regular expression: {error} in {pattern!r}."
        ) from error


def _answers(file: str, prompt_key: str, answer_key: str) -> dict[str, str]:
    # Here, since it takes the whole room of data along.
    from lightning_perl.data.reading import Source

    def refuse(where: str, problem: str) -> None:
        raise ValueError(
            f"{where}: ExactAnswer needs a JSON object with {prompt_key!r} and {answer_key!r}: {problem}"
        )

    found: dict[str, str] = {}
    for where, row in Source("ExactAnswer.file", file).rows(refuse):
        if not all(isinstance(row.get(key), str | int | float) for key in (prompt_key, answer_key)):
            refuse(where, f"got {str(dict(row))[:80]}.")
        prompt, answer = _plain(str(row[prompt_key])), _bare(str(row[answer_key]))
        if not prompt:
            raise ValueError(f"{where}: {prompt_key!r} is empty, so every prompt contains it.")
        if found.setdefault(prompt, answer) != answer:
            raise ValueError(
                f"{where}: {prompt[:80]!r} has two answers, {found[prompt]!r} and {answer!r}."
            )
    return found


def _plain(text: str) -> str:
    return " ".join(text.split())


def _bare(text: str) -> str:
    return _plain(text).removesuffix(".").rstrip().casefold()
