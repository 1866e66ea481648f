"""Rewards that a program can check."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import pytest

from lightning_perl.rewards import (
    Brevity,
    ExactAnswer,
    MatchesPattern,
    RepeatsPrompt,
    RewardFunction,
    ValidJson,
    verifiable,
)


def scores(function: RewardFunction, responses: list[str], prompt: str = "?") -> list[float]:
    rows = range(len(responses))
    return list(function([prompt] * len(responses), responses, rows))


def test_examples_are_true() -> None:
    found = doctest.testmod(verifiable)
    assert found.attempted >= 4
    assert found.failed == 0


def test_matches_pattern() -> None:
    texts = [" 12\n", "12 apples", "so 12", "", "1\n2"]
    assert scores(MatchesPattern(r"\d+"), texts) == [1, 0, 0, 0, 0]
    assert scores(MatchesPattern(r"\d+", whole=False), texts) == [1, 1, 1, 0, 1]
    assert scores(MatchesPattern(r"1.2"), texts) == [0, 0, 0, 0, 1]
    with pytest.raises(
        ValueError, match=r"MatchesPattern\.pattern is no regular expression: .*'\('"
    ):
        MatchesPattern("(")


def test_valid_json() -> None:
    texts = ['{"size": 1, "drink": 2}', ' {"size": 1}\n', "[1]", "", "{", "[" * 100_000, "latte"]
    assert scores(ValidJson(), texts) == [1, 1, 1, 0, 0, 0, 0]
    assert scores(ValidJson(["size", "drink"]), texts) == [1, 0, 0, 0, 0, 0, 0]


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def test_exact_answer(tmp_path: Path) -> None:
    file = write(
        tmp_path / "answers.jsonl",
        {"q": "2 + 2?", "a": 4},
        {"q": "What is 2 + 2?  In words.", "a": "It is  Four."},
    )
    reward = ExactAnswer(str(file), "q", "a")
    assert scores(reward, ["4", " 4. ", "4 apples", "four"], "User: 2 + 2?\nAgent:") == [1, 1, 0, 0]
    # Both questions stand in the prompt; the longer one was asked.
    longer = "User: What is 2 + 2?\nIn words.\nAgent:"
    assert scores(reward, ["4", "it is four", "IT IS\nFOUR."], longer) == [0, 1, 1]
    chosen = ExactAnswer(str(file), "q", "a", pattern=r"#### *(\S*)")
    texts = ["#### 5, no\n#### 4", "4", "#### 4\n#### 5", "####"]
    assert scores(chosen, texts, "2 + 2?") == [1, 0, 0, 0]


def test_exact_answer_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    good = {"prompt": "a?", "answer": "b"}
    file = write(tmp_path / "answers.jsonl", good)
    with pytest.raises(
        ValueError, match=r"no question of .*jsonl is in prompt 3, which ends 'c\?'"
    ):
        ExactAnswer(str(file))(["c?"], ["b"], [3])
    with pytest.raises(ValueError, match="must have a group in parentheses"):
        ExactAnswer(str(file), pattern="b+")
    for row, words in (
        ({"prompt": "a?"}, r":2: ExactAnswer needs a JSON object with 'prompt' and 'answer'"),
        ([1], ":2: ExactAnswer needs"),
        ({"prompt": " ", "answer": "b"}, ":2: 'prompt' is empty"),
        ({"prompt": "a?", "answer": "c"}, r":2: 'a\?' has two answers, 'b' and 'c'"),
    ):
        with pytest.raises(ValueError, match=words):
            ExactAnswer(str(write(tmp_path / "answers.jsonl", good, row)))
    write(tmp_path / "answers.jsonl", good, {**good, "answer": "B."})  # the same answer


def test_repeats_prompt() -> None:
    prompt = "Agent: A small mocha?\nUser: No, two LARGE lattes, large ones please\nAgent:"
    pattern = r"\b(small|large|latte|mocha)s?\b"
    reward = RepeatsPrompt(pattern)
    texts = ["Two large lattes.", "one latte", "a mocha, small", "", "latte latte latte"]
    assert scores(reward, texts, prompt) == [1, 0.5, 0, 0, 0.5]
    assert scores(RepeatsPrompt(pattern, turns=0), texts, prompt) == [0.5, 0.25, 0.5, 0, 0.25]
    assert scores(reward, [""], "User: Hello\nAgent:") == [1]
    assert scores(RepeatsPrompt(r"\d+"), ["12"], "User: 12 or 1\n") == [0.5]


def test_brevity() -> None:
    assert scores(Brevity(2, 0.5), ["", "a b", "a b c", "a  b\nc d"]) == [0, 0, -0.5, -1]
