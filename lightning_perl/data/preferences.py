"""A user's own rows: preferences, thumbs, demonstrations or prompts from JSONL, CSV or Parquet."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
from transformers import PreTrainedTokenizerBase

from lightning_perl.data.base import ConversationDataModule, parse_json
from lightning_perl.data.folds import hold_out
from lightning_perl.data.rows import Item, Pair, Row, Splits, Turn
from lightning_perl.data.tokenization import BadRow

_KINDS = (
    ("prompt", "chosen", "rejected"),
    ("prompt", "response", "label"),
    ("prompt", "response"),
    ("messages",),
)
_PROMPT_KINDS = (("prompt",), ("messages",))
_NAMES = ("prompt", "chosen", "rejected", "response", "label", "messages")
_ROLES: dict[object, Literal["system", "user", "agent"]] = {
    "system": "system",
    "user": "user",
    "assistant": "agent",
}
_LABELS = {"1": 1.0, "1.0": 1.0, "true": 1.0, "0": 0.0, "0.0": 0.0, "false": 0.0}


class PreferenceDataModule(ConversationDataModule):
    """Rows of your own, of one of these kinds, recognised by the columns of the file.

    ==========================  ==========================================================
    columns                     a row is
    ==========================  ==========================================================
    prompt, chosen, rejected    a preference pair
    prompt, response, label     an answer with a thumb: 1 or true up, 0 or false down
    prompt, response            a demonstration
    messages                    a demonstrated dialog; every assistant message counts
    prompt                      a prompt to answer (``rows: prompts``)
    ==========================  ==========================================================

    With ``rows: prompts`` the prompt of any kind is enough, and answers are not looked at; of
    ``messages`` it is all of them where the user has the last word, else those before the first
    answer (before the last one with ``chat_template``).

    A prompt is a string (one user turn) or a list of ``{"role", "content"}`` messages, role
    ``system``, ``user`` or ``assistant``; in CSV such a list is written as JSON. An answer is a
    string or a list of one assistant message. Chosen and thumbs-up answers also enter the
    language-modelling loss of Hydra-SFT. Other columns are ignored; a label that is there but null
    is a bad row.

    Args:
        tokenizer: A folder or a name that transformers loads; from Python also a tokenizer.
        train: ``.jsonl``, ``.csv`` (with ``.gz`` if compressed) or ``.parquet``, in UTF-8.
        val: Validation rows; None takes ``val_fraction`` of the training prompts, at least one
            of two or more.
        test: Test rows; None takes the validation rows.
        val_fraction: Share of the training prompts held out when ``val`` is None. All rows of one
            prompt go to one split.
        columns: The file's names for ours, for example ``{prompt: question, chosen: better}``.
        chat_template: Render prompts with the tokenizer's own chat template, for a trunk that was
            tuned with it, instead of the plain turn template. Of ``messages`` then only the last
            answer counts.
        rows: ``rated`` for :class:`~lightning_perl.batches.RatedBatch`, ``prompts`` for the
            distinct prompts as :class:`~lightning_perl.batches.PromptBatch`.
        batch_size: Rows of a training batch; a pair counts as one.
        val_batch_size: Rows of a validation or test batch; None takes ``batch_size``.
        max_tokens: Tokens of a row. Longer prompts lose whole turns on the left.
        max_response_tokens: Tokens of an answer, EOS included.
        bucket: Batch rows of like length.
        seed: Seed of the order of rows.
        num_workers: Processes that collate.
        on_bad_row: ``raise`` stops at the first row that cannot be used, with file and line;
            ``reject`` counts it in ``report`` and goes on. A file that cannot be read at all always
            stops.

    Raises:
        ValueError: An argument out of its range; in ``setup`` a bad file or row.
        FileNotFoundError: In ``setup``, a file that is not there.
    """

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase,
        train: str | Path,
        val: str | Path | None = None,
        test: str | Path | None = None,
        val_fraction: float = 0.1,
        columns: dict[str, str] | None = None,
        chat_template: bool = False,
        rows: Literal["rated", "prompts"] = "rated",
        batch_size: int = 8,
        val_batch_size: int | None = None,
        max_tokens: int = 512,
        max_response_tokens: int = 128,
        bucket: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        on_bad_row: Literal["reject", "raise"] = "raise",
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            rows=rows,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            max_tokens=max_tokens,
            max_response_tokens=max_response_tokens,
            bucket=bucket,
            seed=seed,
            num_workers=num_workers,
            on_bad_row=on_bad_row,
        )
        unknown = sorted(set(columns or {}) - set(_NAMES))
        if unknown:
            raise ValueError(f"data.columns: unknown {unknown}; the names are {list(_NAMES)}.")
        if not 0 <= val_fraction < 1:
            raise ValueError(
                f"data.val_fraction must be at least 0 and below 1, got {val_fraction}."
            )
        self.train_file = Path(train)
        self.val_file = None if val is None else Path(val)
        self.test_file = None if test is None else Path(test)
        self.val_fraction = val_fraction
        self.columns = {name: name for name in _NAMES} | (columns or {})
        self.chat_template = chat_template

    def read(self) -> Splits:
        """Returns the rows of the files, the training file divided by prompt if need be."""
        train = self._items(self.train_file)
        if self.val_file is None:
            held = hold_out((_dialog(item) for item in train), self.val_fraction)
            val = [item for item in train if _dialog(item) in held]
            train = [item for item in train if _dialog(item) not in held]
        else:
            val = self._items(self.val_file)
            prompts = {_dialog(item) for item in train}
            shared = sum(_dialog(item) in prompts for item in val)
            if shared:
                self.report.notes["validation rows whose prompt is a training prompt"] = shared
        test = list(val) if self.test_file is None else self._items(self.test_file)
        return Splits(train, val, test)

    def _items(self, file: Path) -> list[Item]:
        items = []
        for where, row in _rows(file, self.bad_row):
            try:
                items.append(self._item(row, where))
            except BadRow as error:
                self.bad_row(error.reason, str(error))
        return items

    def _item(self, row: Mapping[str, Any], where: str) -> Item:
        kinds = _PROMPT_KINDS if self.rows == "prompts" else _KINDS
        columns = {name: self.columns[name] for kind in kinds for name in kind}
        named = {
            name: row[column] for name, column in columns.items() if row.get(column) is not None
        }
        null = sorted(
            column for column in columns.values() if column in row and row[column] is None
        )
        # An answer whose thumb got lost may be a bad one: nothing to imitate.
        answered = named.keys() & {"prompt", "response", "chosen", "rejected"}
        if answered == {"prompt", "response"} and columns["label"] in null:
            raise BadRow(
                "label is null",
                f"{where}: {columns['label']} is null, so whether the answer is good is not known. "
                "Leave the column out of demonstrations, or set on_bad_row: reject.",
            )
        # Half of a kind is a slip of the pen, not a row of a smaller kind.
        half = ("chosen" in named) != ("rejected" in named) or any(
            column != name and name not in named for name, column in columns.items()
        )
        if half or not any(all(name in named for name in kind) for kind in kinds):
            wanted = "; ".join(" + ".join(columns[name] for name in kind) for kind in kinds)
            empty = f" (null: {null})" if null else ""
            raise BadRow(
                "missing column",
                f"{where}: missing column: got {sorted(row)}{empty}, expected one of: {wanted}. "
                "Map your names with data.columns, for example {prompt: question}.",
            )
        if "prompt" not in named:
            return self._dialog_row(named["messages"], where)
        prompt = _prompt(named["prompt"], where)
        if "chosen" in named and "rejected" in named:
            return self._pair(prompt, named["chosen"], named["rejected"], where)
        if "response" not in named:
            return Row(prompt, (), None, False, _key(prompt), where)
        response = (_answer(named["response"], "response", where),)
        label = _label(named["label"], where) if "label" in named else None
        return Row(prompt, response, label, label != 0.0, _key(prompt), where)

    def _pair(self, prompt: tuple[Turn, ...], chosen: object, rejected: object, where: str) -> Pair:
        better = _answer(chosen, "chosen", where)
        worse = _answer(rejected, "rejected", where)
        if better.text.strip() == worse.text.strip():
            raise BadRow(
                "identical pair",
                f"{where}: identical pair: chosen and rejected are the same text, which says "
                "nothing. Remove the row, or set on_bad_row: reject.",
            )
        key = _key(prompt)
        return Pair(
            Row(prompt, (better,), None, True, key, where),
            Row(prompt, (worse,), None, False, key, where),
        )

    def _dialog_row(self, messages: object, where: str) -> Row:
        turns = _messages(messages, "messages", where)
        if self.rows == "prompts" and turns[-1].role != "agent":
            return Row(turns, (), None, False, _key(turns[:1]), where)
        agent = [number for number, turn in enumerate(turns) if turn.role == "agent"]
        if not agent:
            raise BadRow("no answer", f"{where}: messages hold no assistant message to imitate.")
        first = agent[-1] if self.chat_template else agent[0]
        context = turns[:first]
        return Row(context, turns[first : agent[-1] + 1], None, True, _key(turns[:1]), where)


def _dialog(item: Item) -> str:
    return item.chosen.dialog if isinstance(item, Pair) else item.dialog


def _key(turns: tuple[Turn, ...]) -> str:
    return json.dumps(turns, ensure_ascii=False)


def _wrong_type(where: str, column: str, expected: str, got: object) -> BadRow:
    return BadRow(
        "wrong type",
        f"{where}: {column} must be {expected}, got {type(got).__name__} ({str(got)[:40]!r}).",
    )


def _messages(value: object, column: str, where: str) -> tuple[Turn, ...]:
    expected = 'a list of {"role": "system" | "user" | "assistant", "content": text} messages'
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except json.JSONDecodeError:
            raise _wrong_type(where, column, expected, value) from None
    if not isinstance(value, list) or not value:
        raise _wrong_type(where, column, expected, value)
    turns = []
    for message in value:
        match message:
            case {"role": str(role), "content": str(content)} if role in _ROLES:
                turns.append(Turn(_ROLES[role], content))
            case _:
                raise _wrong_type(where, column, expected, message)
    return tuple(turns)


def _is_message_list(value: str) -> bool:
    """Whether the text of a CSV cell is a list of messages rather than words in brackets."""
    if not value.lstrip().startswith("[{"):
        return False
    try:
        messages = parse_json(value)
    except json.JSONDecodeError:
        return False
    return isinstance(messages, list) and all(
        isinstance(message, dict) and "role" in message for message in messages
    )


def _prompt(value: object, where: str) -> tuple[Turn, ...]:
    if isinstance(value, str) and not _is_message_list(value):
        if not value.strip():
            raise BadRow("empty prompt", f"{where}: empty prompt. Remove the row.")
        return (Turn("user", value),)
    if isinstance(value, str | list):
        return _messages(value, "prompt", where)
    raise _wrong_type(where, "prompt", "a string or a list of messages", value)


def _answer(value: object, column: str, where: str) -> Turn:
    if isinstance(value, list):
        turns = _messages(value, column, where)
        if len(turns) != 1 or turns[0].role != "agent":
            raise _wrong_type(where, column, "one assistant message", value)
        value = turns[0].text
    if not isinstance(value, str):
        raise _wrong_type(where, column, "a string or one assistant message", value)
    if not value.strip():
        raise BadRow(
            "empty answer",
            f"{where}: empty answer in {column}. Remove the row, or set on_bad_row: reject.",
        )
    return Turn("agent", value)


def _label(value: object, where: str) -> float:
    label = _LABELS.get(str(value).strip().lower())
    if label is None:
        raise _wrong_type(where, "label", "1, 0, true or false", value)
    return label


def _rows(
    file: Path, bad_row: Callable[[str, str], None]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields ``file:line`` and the row; ``bad_row`` gets the lines that are not a row."""
    if not file.is_file():
        raise FileNotFoundError(
            f"No file {str(file)!r} (data.train, data.val or data.test; looked from {Path.cwd()}). "
            "Give the path of a .jsonl, .csv or .parquet file."
        )
    suffix = Path(file.name.removesuffix(".gz")).suffix
    if suffix == ".jsonl":
        yield from _jsonl_rows(file, bad_row)
    elif suffix == ".csv":
        yield from _csv_rows(file, bad_row)
    elif file.suffix == ".parquet":
        yield from _parquet_rows(file)
    else:
        raise ValueError(
            f"{file}: cannot read {''.join(file.suffixes)!r} files. Use .jsonl, .csv (also with "
            ".gz) or .parquet."
        )


def _text(file: Path) -> str:
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not a whole gzip file ({error}).") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file}:{line}: not UTF-8 (byte {data[error.start]:#04x}). Save the file as UTF-8."
        ) from error


def _jsonl_rows(
    file: Path, bad_row: Callable[[str, str], None]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # Only \n ends a line: JSON strings may hold U+2028 and its like, at which splitlines() splits.
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            bad_row(
                "broken JSON",
                f"{where}: broken JSON ({error.msg}, column {error.colno}). A .jsonl file has one "
                "whole JSON object per line.",
            )
            continue
        if isinstance(row, dict):
            yield where, row
        else:
            bad_row("wrong type", f"{where}: expected an object, got {type(row).__name__}.")


def _csv_rows(
    file: Path, bad_row: Callable[[str, str], None]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # A cell may hold a whole dialog; the csv module's own limit is 131,072 characters.
    csv.field_size_limit(1 << 30)
    header: list[str] = []
    with io.StringIO(_text(file), newline="") as lines:
        # Lenient, an unclosed quote would take the rest of the file for its cell.
        reader = csv.reader(lines, strict=True)
        line = 1
        try:
            for cells in reader:
                where = f"{file}:{line}"
                line = reader.line_num + 1
                if not cells:
                    continue
                if not header:
                    header = _header(cells, where)
                elif len(cells) == len(header):
                    yield where, dict(zip(header, cells, strict=True))
                else:
                    bad_row(
                        "wrong number of cells",
                        f"{where}: the row does not have the header's {len(header)} cells. Quote "
                        "cells that hold commas.",
                    )
        except csv.Error as error:
            raise ValueError(
                f"{file}:{line}: broken CSV ({error}) in the row that begins here. Close its quotes, "
                'and write a quote inside a quoted cell twice: "".'
            ) from error


def _header(cells: list[str], where: str) -> list[str]:
    # Spreadsheets leave columns without a name, as many as they like.
    twice = sorted(name for name, count in Counter(cells).items() if name and count > 1)
    if twice:
        raise ValueError(f"{where}: the header names {twice} more than once. Rename the columns.")
    return cells


def _parquet_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        table = pyarrow.parquet.read_table(str(file))
    # An OSError: pages that cannot be decompressed.
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a Parquet file ({error}).") from error
    for number, single in enumerate(table.to_batches(max_chunksize=1), start=1):
        where = f"{file}:{number}"
        try:
            (row,) = single.to_pylist()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error}).") from error
        yield where, row
