"""A user's row as rows and pairs of ours: whichever kind its columns say, and nothing read as something else."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from itertools import combinations
from typing import Any, Literal, Protocol, TypeAlias

from lightning_perl.data import dialects
from lightning_perl.data.dialects import ALIASES, MARKS, value_at, verdict_keys
from lightning_perl.data.messages import (
    answer_of,
    prompt_of,
    turns_of,
    unpacked,
    weights_of,
    without_prompt,
    wrong_type,
)
from lightning_perl.data.report import DataReport
from lightning_perl.data.rows import BadRow, Item, LeftOut, Pair, Row, Tie, Turn, same

Columns: TypeAlias = dict[str, str | dict[str, float] | None]
"""From a name of ours to the file's column, a dotted path, several columns with weights, or None: not read."""
Turns: TypeAlias = tuple[Turn, ...]
_Kind: TypeAlias = tuple[str, ...]

_PAIR = ("prompt", "chosen", "rejected")
_DIALOGS = ("chosen", "rejected")
_KINDS = (
    _PAIR,
    _DIALOGS,
    ("first", "second", "preference"),
    ("answers", "scores"),
    ("answers", "ranks"),
    ("prompt", "response", "label"),
    ("prompt", "response", "rating"),
    ("prompt", "response"),
    ("messages", "label"),
    ("messages", "rating"),
    ("messages",),
)
_DEMONSTRATIONS = (("prompt", "response"), ("messages",))
_PROMPT_KINDS = (("prompt",), ("messages",), _DIALOGS)
#: The columns that a prompt is made of.
_ASKED = frozenset({"prompt", "messages", "system", "input", "history"})
_UP = "1 1.0 true yes up thumbs_up good positive desirable like liked correct accepted 👍"
_DOWN = "0 0.0 false no down thumbs_down bad negative undesirable dislike disliked incorrect rejected 👎"
_LABELS = dict.fromkeys(_UP.split(), 1.0) | dict.fromkeys(_DOWN.split(), 0.0)
_MAP = "Map your names with data.columns, for example {prompt: question}, or read the rows with data.read_row."
#: What to do with rows that have these columns and cannot be read as they are.
_FIXES = (
    (
        {"completions", "labels"},
        "Labels of single steps are not learned: join the steps to one response with one label in data.read_row.",
    ),
    (
        {"role", "parent_id"},
        "These are single messages: read the file of whole trees, or join them to dialogs first.",
    ),
)


class ReadsRows(Protocol):
    """Reads a row of a file in plain Python.

    Any callable will do. To name a function or class in a YAML (``class_path: package.module.name``), give it
    exactly this argument's name and types: jsonargparse compares them.
    """

    def __call__(self, row: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]] | None:
        """Returns the row in the columns of `PreferenceDataModule`, several such rows, or None to leave it out."""
        ...


@dataclass
class RowReader:
    """What a row of a file is; arguments as of `PreferenceDataModule`."""

    columns: Columns
    prompts: bool = False
    dialect: str | None = None
    rating_range: tuple[float, float] | None = None
    answer_pairs: Literal["best_worst", "all"] = "best_worst"
    read_row: ReadsRows | None = None
    report: DataReport = field(default_factory=DataReport)

    def items(self, row: Mapping[str, Any], where: str, source: int) -> Iterator[Item]:
        """Yields the rows and pairs of a row of a file, mostly one.

        Raises:
            BadRow: The row cannot be used, or is a `Tie`.
            ValueError: It has a rating, and there is no ``rating_range``.
        """
        for written in self._written(row):
            for named in self._named(written):
                yield from self.read(named, where, source)

    def read(self, named: dict[str, Any], where: str, source: int = 0) -> Iterator[Item]:
        """Yields what a row in our columns is; see :meth:`items`."""
        if self.prompts:
            context = self._context(named)
            yield Row(context, (), None, False, opening(context), where, source)
        elif "chosen" in named:
            yield self._pair(named, where, source)
        else:
            yield from self._answers(named, where, source)

    def _written(self, row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        if self.read_row is None:
            return [row]
        try:
            made = self.read_row(dict(row))
        except BadRow:
            raise
        except Exception as error:
            raise BadRow(
                f"read_row failed: data.read_row raised {type(error).__name__}: {error}. Mend it, return None to "
                "leave the row out, or set on_bad_row: reject."
            ) from error
        if made is None:
            raise LeftOut("by read_row")
        rows: list[Any] = made if isinstance(made, list) else [made]
        for each in rows:
            if not isinstance(each, Mapping):
                raise wrong_type("what data.read_row returns", "a mapping, mappings or None", each)
        return rows

    # ---- columns ---------------------------------------------------------------------------------

    def _named(self, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields a row in our columns: by ``columns``, else by what it looks like."""
        # Rows of pandas hold numpy's arrays, and columns named by numbers.
        row = {str(key): _listed(value) for key, value in row.items()}
        given = {name: _value(row, column) for name, column in self.columns.items() if column}
        given = {name: value for name, value in given.items() if value is not None}
        # Where a column was named, or none, the other ones that could be it are not meant.
        hidden = {alias for name in self.columns for alias in ALIASES[name].split()}
        row = {key: value for key, value in row.items() if key in self._mapped or key not in hidden}
        for own in self._recognised(row, given):
            named = {name: value for name, value in own.items() if value is not None} | given
            _place_input(named)
            kind = _kind(named, _KINDS)
            self._require_mapped(row, named)
            if self.prompts:
                # Answers without a prompt are dialogs, which begin with it.
                if kind and kind[0] in ("first", "answers") and "prompt" not in named:
                    named = next(self._judged(named, kind))
                if not _kind(named, _PROMPT_KINDS):
                    raise self._missing(row, _PROMPT_KINDS)
                yield named
            else:
                self._check_columns(row, named, kind)
                yield from self._judged(named, kind or ())

    @cached_property
    def _mapped(self) -> set[str]:
        """The columns that `data.columns` names."""
        named = ([name] if isinstance(name, str) else name or () for name in self.columns.values())
        paths = {path for columns in named for path in columns}
        return paths | {path.partition(".")[0] for path in paths}

    def _require_mapped(self, row: Mapping[str, Any], named: dict[str, Any]) -> None:
        """Refuses a row without a column that is mapped, unless nobody looks at it."""
        for name, column in self.columns.items():
            read = column and (not self.prompts or name in _ASKED)
            if read and name not in named and (isinstance(column, dict) or column not in row):
                raise self._missing(row, _PROMPT_KINDS if self.prompts else _KINDS)

    def _check_columns(
        self, row: Mapping[str, Any], named: dict[str, Any], kind: _Kind | None
    ) -> None:
        """Refuses rows that are half of a kind, ties, and verdicts without use."""
        half = ("chosen" in named) != ("rejected" in named)
        if half or kind is None:
            raise self._missing(row, _KINDS)
        if kind == _DIALOGS and isinstance(unpacked(named["chosen"], "chosen"), str):
            # Two answers, and not two dialogs: a prompt is missing.
            raise self._missing(row, (_PAIR,))
        if _thumb(named.get("tie", False), "tie"):
            raise Tie
        if kind == _PAIR and named.get("input") and "context" in {*row} - self._mapped:
            raise BadRow(
                "two prompts: 'context' and another column could each be the prompt. Say which is in "
                "data.columns, for example {prompt: context}, or {prompt: prompt, input: context} for both."
            )
        self._check_verdicts(row, named, kind)

    def _recognised(self, row: Mapping[str, Any], given: dict[str, Any]) -> list[dict[str, Any]]:
        # A column that was named is not read as something else, too.
        named = _kind(given, _KINDS) or dialects.dialect_of(tuple(row)) is None
        if self.dialect is None and named:
            rest = {key: value for key, value in row.items() if key not in self._mapped}
            return [own | given for own in dialects.flat(rest)]
        return dialects.read(row, self.dialect)

    def _judged(self, named: dict[str, Any], kind: _Kind) -> Iterator[dict[str, Any]]:
        """Yields a row, with pairs in place of two answers and a preference, or of many answers."""
        if "second" in kind:
            # Numbers in a verdict mean the answers where their columns are numbered so.
            ends = tuple(str(self.columns.get(name))[-1] for name in ("first", "second"))
            sides = ends if "".join(ends).isdigit() else ("first", "second")
            side = dialects.side_of(named["preference"], *named.get("sides", sides))
            if side is None:
                raise Tie
            answers = named["first"], named["second"]
            yield named | {"chosen": answers[side], "rejected": answers[1 - side]}
        elif kind == _PAIR and any(_texts(named[name]) for name in _DIALOGS):
            # Several good answers, or several bad ones.
            better, worse = (
                side if _texts(side) else [side] for side in (named[name] for name in _DIALOGS)
            )
            marks = [1.0] * len(better) + [0.0] * len(worse)
            yield from self._ranked(named, [*better, *worse], marks)
        elif "answers" in kind:
            sign = -1.0 if kind[1] == "ranks" else 1.0
            if not isinstance(named[kind[1]], list):  # of a text each letter would be one
                raise wrong_type(kind[1], "a list of numbers", named[kind[1]])
            marks = [sign * _number(mark, kind[1]) for mark in named[kind[1]]]
            yield from self._ranked(named, named["answers"], marks)
        else:
            yield named

    def _ranked(
        self, named: dict[str, Any], answers: object, marks: list[float]
    ) -> Iterator[dict[str, Any]]:
        if not isinstance(answers, list) or len(answers) != len(marks) or len(marks) < 2:
            raise BadRow(
                "several answers: answers must be a list of two or more, with a score or rank for each, got "
                f"{str(answers)[:40]!r} and {len(marks)}. Set on_bad_row: reject."
            )
        ordered = sorted(range(len(marks)), key=lambda place: -marks[place])
        if marks[ordered[0]] == marks[ordered[-1]]:
            raise Tie
        every = self.answer_pairs == "all"
        for better, worse in combinations(ordered, 2) if every else [(ordered[0], ordered[-1])]:
            if marks[better] > marks[worse]:
                yield named | {"chosen": answers[better], "rejected": answers[worse]}

    def _check_verdicts(self, row: Mapping[str, Any], named: dict[str, Any], kind: _Kind) -> None:
        """Names the verdicts that are not used; refuses to imitate an answer that has one, or that lost it."""
        unmapped = {name for name, column in self.columns.items() if column is None}
        imitated = kind in _DEMONSTRATIONS and not unmapped & {"label", "rating"}
        if imitated:
            self._refuse_null(row)
        of_use = _of_use(kind, named)
        idle = sorted(name for name in named if self.columns.get(name) and name not in of_use)
        if idle:
            what = "verdict" if MARKS & {*idle} else "column"
            raise BadRow(
                f"mapped {what} that is not used: data.columns maps {idle}, which a row of the kind "
                f"{' + '.join(kind)} has no use for. Leave it null in such rows, take it out of data.columns, or "
                "read the row with data.read_row."
            )
        used = {alias for name in of_use & named.keys() for alias in ALIASES[name].split()}
        used |= self._mapped | {*named.get("read", ()), *dialects.columns_of(row, self.dialect)}
        verdicts = verdict_keys(row) if imitated else []
        for column in [column for column in row if column not in used]:
            if column in verdicts:
                raise BadRow(
                    f"verdict that is not used: the column {column!r} says how good the answer is, and would not "
                    f"be read. Name what it is in data.columns: {{label: {column}}} for thumbs, {{rating: "
                    f"{column}}} with rating_range, or {{rating: null}} to imitate every answer."
                )
            if column in ("image", "images", "audio", "video") and row[column]:
                raise BadRow(
                    f"pictures and sounds are not read, and {column!r} belongs to the question. Set on_bad_row: "
                    "reject to leave such rows out, or return them without it from data.read_row."
                )
            if column in ALIASES["weight"].split() and row[column] not in (None, 1, "1"):
                raise BadRow(
                    f"weight that is not used: {column!r} weights the row, which no loss does. Name what it is "
                    f"in data.columns: {{margin: {column}}} for the margin of a pair, or {{weight: null}} to "
                    "count all rows alike."
                )
            self.report.unread[column] += 1

    def _refuse_null(self, row: Mapping[str, Any]) -> None:
        # An answer whose thumb got lost may be a bad one, so it is nothing to imitate.
        for name in ("label", "rating"):
            for column in (self.columns.get(name), *ALIASES[name].split()):
                if isinstance(column, str) and column in row and row[column] is None:
                    raise BadRow(
                        f"{column} is null, so whether the answer is good is not known. Leave the column out of "
                        "demonstrations, or set on_bad_row: reject."
                    )

    def _missing(self, row: Mapping[str, Any], kinds: tuple[_Kind, ...]) -> BadRow:
        names = {name: column for name, column in self.columns.items() if isinstance(column, str)}
        wanted = "; ".join(" + ".join(names.get(name, name) for name in kind) for kind in kinds)
        null = sorted(key for key, value in row.items() if value is None)
        empty = f" (null: {null})" if null else ""
        got = sorted(key[:40] for key in row)
        close = [
            near
            for name in dict.fromkeys(names.get(part, part) for kind in kinds for part in kind)
            if name not in row
            for near in get_close_matches(name, row, 1, 0.75)
        ]
        meant = f" Did you mean {close[0]!r}?" if close else ""
        fix = next((fix for keys, fix in _FIXES if keys <= row.keys()), _MAP)
        return BadRow(f"missing column: got {got}{empty}, expected one of: {wanted}.{meant} {fix}")

    # ---- rows ------------------------------------------------------------------------------------

    def _context(self, named: dict[str, Any]) -> Turns:
        """Returns the prompt of a row of any kind."""
        if "prompt" in named:
            turns = prompt_of(named["prompt"])
        elif "messages" in named:
            turns = turns_of(named["messages"], "messages")
            if turns[-1].role == "agent":
                turns = turns[: _agents(turns)[0]]
        else:
            turns = _common_prompt(named)
        return _surrounded(turns, named)

    def _pair(self, named: dict[str, Any], where: str, source: int) -> Pair:
        prompt, sides = self._sides(named)
        better, worse = (
            answer_of(side, name, prompt) for side, name in zip(sides, _DIALOGS, strict=True)
        )
        if better.text.strip() == worse.text.strip():
            raise BadRow(
                "identical pair: chosen and rejected are the same text, which says nothing. Remove the row, or "
                "set on_bad_row: reject."
            )
        prompt = _surrounded(prompt, named)
        group = opening(prompt)
        return Pair(
            Row(prompt, (better,), None, True, group, where, source),
            Row(prompt, (worse,), None, False, group, where, source),
            _margin(named),
        )

    def _sides(self, named: dict[str, Any]) -> tuple[Turns, list[Any]]:
        """Returns the prompt of a pair and its two answers."""
        sides = [unpacked(named[name], name) for name in _DIALOGS]
        asked = named.get("prompt")
        if asked is None and "messages" in named:
            turns = turns_of(named["messages"], "messages")
            asked = None if turns[-1].role == "agent" else named["messages"]
        if asked is None:
            return _common_prompt(named), sides
        prompt = prompt_of(asked)
        if isinstance(asked, str) and all(isinstance(side, str) for side in sides):
            return prompt, self._without_prompt(sides, asked)
        if len(prompt) == 1 and all(isinstance(side, list) and len(side) > 1 for side in sides):
            return _whole_prompt(prompt, _common_prompt(named)), sides
        return prompt, sides

    def _without_prompt(self, answers: list[Any], prompt: str) -> list[Any]:
        rest = without_prompt(answers, prompt)
        if rest is None:
            return answers
        self.report.notes[
            "rows whose answers held their prompt, speaker or end mark, which was cut off"
        ] += 1
        return rest

    def _answers(self, named: dict[str, Any], where: str, source: int) -> Iterator[Row]:
        label = self._label(named, where)
        for prompt, response in self._responses(named, label is not None):
            prompt = _surrounded(prompt, named)
            imitate = label is None or label > 0.5
            yield Row(prompt, response, label, imitate, opening(prompt), where, source)

    def _responses(self, named: dict[str, Any], judged: bool) -> Iterator[tuple[Turns, Turns]]:
        """Yields prompts and what was answered: one answer, or the turns of a dialog from its first answer on."""
        if "prompt" in named and "response" in named:
            asked, answer = named["prompt"], unpacked(named["response"], "response")
            prompt = prompt_of(asked)
            if isinstance(asked, str) and isinstance(answer, str):
                (answer,) = self._without_prompt([answer], asked)
            elif isinstance(answer, list) and len(answer) > 1 and not _texts(answer):
                prompt = _whole_prompt(prompt, turns_of(answer, "response")[:-1])
            yield prompt, (answer_of(answer, "response", prompt),)
            return
        turns = turns_of(named["messages"], "messages")
        agents = _agents(turns)
        weights = weights_of(named["messages"], "messages")
        if judged:
            yield turns[: agents[-1]], turns[agents[-1] : agents[-1] + 1]
            return
        # An answer that is not to be imitated belongs to the prompt of those behind it.
        begin = 0
        for end in [*(n for n in agents if not weights[n]), len(turns)]:
            counted = [n for n in agents if begin <= n < end]
            if counted:
                yield turns[: counted[0]], turns[counted[0] : counted[-1] + 1]
            begin = end + 1

    def _label(self, named: dict[str, Any], where: str) -> float | None:
        if "label" in named:
            return _thumb(named["label"], "label")
        if "rating" not in named:
            return None
        if self.rating_range is None:
            column = self.columns.get("rating") or "rating"
            raise ValueError(
                f"{where}: has a {column}, and data.rating_range does not say what it means. Give the lowest and "
                "the highest rating there can be, for example [1, 5]; or set columns: {rating: null}, to "
                "imitate every answer."
            )
        return _rating(named["rating"], self.rating_range)


def opening(turns: Turns) -> str:
    """Returns the group of a row: the first human turn of its dialog, whatever the system says before it."""
    human = [Turn(turn.role, turn.text.strip()) for turn in turns if turn.role == "user"][:1]
    return json.dumps(human or same(turns), ensure_ascii=False)


def _kind(named: Mapping[str, Any], kinds: tuple[_Kind, ...]) -> _Kind | None:
    """Returns the first of these kinds whose columns a row has."""
    return next((kind for kind in kinds if named.keys() >= set(kind)), None)


def _of_use(kind: _Kind, named: Mapping[str, Any]) -> set[str]:
    """Returns the columns of ours that a row of this kind is made of, or that may stand beside them."""
    pair = not {*kind} & {"response", "messages"}
    names = {*kind, "system", "history", "tie", *(["margin"] if pair else [])}
    if "prompt" in named and "messages" not in kind:
        return names | {"prompt", "input"}
    return names | {"messages"} if pair else names


def _listed(value: Any) -> Any:  # noqa: ANN401
    return value.tolist() if hasattr(value, "tolist") else value


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _value(row: Mapping[str, Any], column: str | dict[str, float]) -> Any:  # noqa: ANN401
    """Returns the value of a column or path, or the weighted sum of several."""
    if isinstance(column, str):
        return value_at(row, column)
    values = {path: value_at(row, path) for path in column}
    if None in values.values():
        return None
    return sum(weight * _number(values[path], path) for path, weight in column.items())


def _place_input(named: dict[str, Any]) -> None:
    """Makes of an input the prompt where there is none, and its history where it is messages."""
    about = named.get("input")
    if about is None:
        return
    if _texts(about):
        about = named["input"] = "\n\n".join(about)
    if not named.keys() & {"prompt", "messages"}:
        named |= {"prompt": about, "input": ""}
    elif not isinstance(unpacked(about, "input"), str) and "history" not in named:
        named |= {"history": about, "input": ""}
    elif about == named.get("prompt"):
        named["input"] = ""


def _surrounded(prompt: Turns, named: dict[str, Any]) -> Turns:
    """Returns a prompt with what stands beside it: an input, earlier turns, a system turn."""
    about, system = named.get("input", ""), named.get("system", "")
    system = "" if system != system else system  # pandas' NaN, where there is none
    for name, text in (("input", about), ("system", system)):
        if not isinstance(text, str):
            raise wrong_type(name, "a string", text)
    if about.strip() and "prompt" in named:
        prompt = (*prompt[:-1], Turn(prompt[-1].role, f"{prompt[-1].text.rstrip()}\n\n{about}"))
    if named.get("history"):
        prompt = (*turns_of(named["history"], "history"), *prompt)
    if system.strip() and prompt[0].role != "system":
        prompt = (Turn("system", system), *prompt)
    return prompt


def _whole_prompt(prompt: Turns, turns: Turns) -> Turns:
    """Returns the turns before an answer: some data sets repeat one question of a dialog beside the dialog."""
    return turns if len(prompt) == 1 and same(prompt)[0] in same(turns) else prompt


def _common_prompt(named: dict[str, Any]) -> Turns:
    """Returns the prompt that two dialogs share."""
    better, worse = (turns_of(named[name], name) for name in _DIALOGS)
    prompt = better[:-1]
    if not prompt or same(worse[:-1]) != same(prompt):
        raise BadRow(
            "no common prompt: there is no prompt column, and chosen and rejected differ before their last "
            "messages. Cut them where they part, or set on_bad_row: reject."
        )
    if (better[-1].role, worse[-1].role) != ("agent", "agent"):
        raise BadRow("no answer: chosen or rejected does not end with the assistant.")
    return prompt


def _agents(turns: Turns) -> list[int]:
    agents = [number for number, turn in enumerate(turns) if turn.role == "agent"]
    if not agents:
        raise BadRow("no answer: messages hold no assistant message to imitate.")
    return agents


def _thumb(value: object, column: str) -> float:
    label = _LABELS.get(str(value).strip().lower())
    if label is None:
        raise wrong_type(column, "1, 0, true or false", value)
    return label


def _margin(named: dict[str, Any]) -> float:
    """Returns by how much the scores of a pair should differ; a signed strength says more than its size."""
    margin = _number(named.get("margin", 0.0), "margin")
    if margin < 0 and not named.get("read"):
        raise BadRow(
            f"margin below 0: margin {margin:g} says that the rejected answer is the better one."
        )
    return abs(margin)


def _number(value: object, column: str) -> float:
    try:
        # In CSV a number is text.
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise wrong_type(column, "a number", value)
    return number


def _rating(value: object, limits: tuple[float, float]) -> float:
    """Returns the rating's place between the limits, from 0 to 1."""
    rating = _number(value, "rating")
    low, high = limits
    if not low <= rating <= high:
        raise BadRow(
            f"rating out of range: {rating:g} is not from {low:g} to {high:g} (data.rating_range). Widen the "
            "range, or set on_bad_row: reject."
        )
    return (rating - low) / (high - low)
