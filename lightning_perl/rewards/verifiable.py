"""Rewards that a program can check: 1 for right, 0 for wrong, or the share that is right."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

from lightning_perl.rewards.function import RewardFunction


class EachAlone(RewardFunction):
    """A reward that scores each response by itself; subclasses fill `score`."""

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[int]
    ) -> Sequence[float]:
        """Returns a score per response; see `RewardFunction`."""
        texts = zip(prompts, responses, rows, strict=True)
        return [float(self.score(prompt, response, row)) for prompt, response, row in texts]

    @abstractmethod
    def score(self, prompt: str, response: str, row: int) -> float:
        """Score of one response; the row is for messages only."""


class MatchesPattern(EachAlone):
    r"""1 where the response matches a regular expression, else 0: the form of an answer.

    Args:
        pattern: In Python's syntax; ``.`` matches line breaks too.
        whole: The whole response must match, white space around it aside. False: a part will do.

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
        keys: What the object must have. Empty: any JSON will do.

    Example:
        >>> ValidJson(["size"])(["?"] * 3, ['{"size": "large"}', '{"size"', "[]"], [0, 0, 0])
        [1.0, 0.0, 0.0]
    """

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self.keys = tuple(keys)

    def score(self, prompt: str, response: str, row: int) -> float:
        """1 where the response is such JSON."""
        try:
            value = json.loads(response)
        # A policy may well open a bracket ten thousand times.
        except (ValueError, RecursionError):
            return False
        if not self.keys:
            return True
        return isinstance(value, dict) and all(key in value for key in self.keys)


class ExactAnswer(EachAlone):
    r"""1 where the response is the known answer to its prompt, else 0.

    The answers are looked up by the prompt's text and not by its row, whose number means another
    prompt in another split. Case, white space and a final full stop do not count.

    Args:
        file: JSONL, a question and its answer per line.
        prompt_key: Where the question stands: a text that the decoded prompt contains. The longest
            one that it contains is meant.
        answer_key: Where the answer stands.
        pattern: What of the response is its answer: the last match's first group, for example
            ``####\s*(.+)``. None: the whole response.
    """

    def __init__(
        self,
        file: str,
        prompt_key: str = "prompt",
        answer_key: str = "answer",
        pattern: str | None = None,
    ) -> None:
        self.file = file
        self.answers = _answers(Path(file).expanduser(), prompt_key, answer_key)
        self.pattern = None if pattern is None else _compiled("ExactAnswer", pattern)
        if self.pattern is not None and self.pattern.groups == 0:
            raise ValueError(
                f"ExactAnswer.pattern must have a group in parentheses around the answer, got {pattern!r}."
            )

    def score(self, prompt: str, response: str, row: int) -> float:
        """1 where the answers are the same.

        Raises:
            ValueError: No question of the file is in the prompt.
        """
        return self._given(response) == self._wanted(prompt, row)

    def _wanted(self, prompt: str, row: int) -> str:
        text = _plain(prompt)
        known = max((one for one in self.answers if one in text), key=len, default=None)
        if known is None:
            raise ValueError(
                f"ExactAnswer: no question of {self.file} is in prompt {row}, which ends "
                f"{prompt[-80:]!r}. Were prompts cut (data.max_tokens), or is it another file's?"
            )
        return self.answers[known]

    def _given(self, response: str) -> str | None:
        if self.pattern is None:
            return _bare(response)
        found = [match.group(1) for match in self.pattern.finditer(response)]
        return _bare(found[-1] or "") if found else None


class RepeatsPrompt(EachAlone):
    r"""The share of what a pattern finds in the prompt's last lines that the response says again.

    For answers that must keep what was asked for: sizes and drinks of an order, names, numbers.
    Case does not count; a thing asked for twice counts once; 1 where the pattern finds nothing.

    Args:
        pattern: In Python's syntax, for example ``\b(small|medium|large|latte|mocha)s?\b``. Where it
            has groups, the first one is what must be repeated.
        turns: Read only the last so many lines of the prompt that are not empty; 0 reads them all.

    Example:
        >>> kept = RepeatsPrompt(r"\b(small|large|latte|mocha)\b")
        >>> kept(["User: A large mocha\nAgent:"] * 2, ["One large latte", "Large mocha!"], [0, 0])
        [0.5, 1.0]
    """

    def __init__(self, pattern: str, turns: int = 2) -> None:
        if turns < 0:
            raise ValueError(f"RepeatsPrompt.turns must be at least 0, got {turns}.")
        self.pattern = _compiled("RepeatsPrompt", pattern, re.IGNORECASE)
        self.turns = turns

    def score(self, prompt: str, response: str, row: int) -> float:
        """The share of the prompt's finds, in [0, 1]."""
        lines = [line for line in prompt.splitlines() if line.strip()][-self.turns :]
        asked = self._found("\n".join(lines))
        return len(asked & self._found(response)) / len(asked) if asked else 1.0

    def _found(self, text: str) -> set[str]:
        group = min(self.pattern.groups, 1)
        found = (match.group(group) for match in self.pattern.finditer(text))
        return {one.casefold() for one in found if one}


def _compiled(owner: str, pattern: str, flags: int = re.DOTALL) -> re.Pattern[str]:
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise ValueError(
            f"{owner}.pattern is no regular expression: {error} in {pattern!r}."
        ) from error


def _answers(path: Path, prompt_key: str, answer_key: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, answer = _plain(str(row[prompt_key])), _bare(str(row[answer_key]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: ExactAnswer needs a JSON object with {prompt_key!r} and "
                f"{answer_key!r}, got {line[:80]!r}."
            ) from error
        if not prompt:
            raise ValueError(
                f"{path}:{number}: {prompt_key!r} is empty, so every prompt contains it."
            )
        if found.setdefault(prompt, answer) != answer:
            raise ValueError(
                f"{path}:{number}: {prompt[:80]!r} has two answers, {found[prompt]!r} and {answer!r}."
            )
    return found


def _plain(text: str) -> str:
    return " ".join(text.split())


def _bare(text: str) -> str:
    return _plain(text).removesuffix(".").rstrip().casefold()
