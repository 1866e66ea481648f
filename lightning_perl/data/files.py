"""Rows of files, plain or gzip-compressed: the one reader of every corpus.

Each function yields ``(where, row)``; ``where`` is ``file:line`` (``file:row`` for arrays and
Parquet). A row that is broken goes to ``bad_row(reason, message)`` and is left out; so does, as one
row, a file that cannot be read, or the rest of one that cannot be read to its end: a gzip that
breaks off, a table with an open quote, a web page in place of data, an empty file. JSON lines and
tables are read line by line, so a file may be larger than memory.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias, TypeVar

import pyarrow
import pyarrow.parquet

BadRowHook: TypeAlias = Callable[[str, str], None]
"""Takes a few words to count by, and the whole message; may raise."""

_Row = TypeVar("_Row")
_Reader: TypeAlias = Callable[[Path, BadRowHook], Iterator[tuple[str, _Row]]]
_HTML = re.compile(rb"\s*<(?:!doctype\s+html|html)\b", re.IGNORECASE)


class UnreadableFile(ValueError):
    """A file that cannot be read, or not to its end.

    Args:
        reason: A few words to count by.
        message: What, where, got and fix.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _counts_unreadable(reader: _Reader[_Row]) -> _Reader[_Row]:
    """Lets ``bad_row`` take what makes a file, or the rest of it, unreadable."""

    @wraps(reader)
    def rows(file: Path, bad_row: BadRowHook) -> Iterator[tuple[str, _Row]]:
        try:
            yield from reader(file, bad_row)
        except UnreadableFile as error:
            bad_row(error.reason, str(error))

    return rows


def parse_json(text: str) -> object:
    """Returns the value of a JSON text.

    Raises:
        json.JSONDecodeError: Broken JSON, and what Python alone refuses, each in other words:
            nesting deeper than its stack, integers of more digits than it converts.
    """
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, _deepest(text)) from None
    except ValueError:
        longest = max(re.finditer(r"\d+", text), key=lambda digits: len(digits[0]))
        raise json.JSONDecodeError("too long an integer", text, longest.start()) from None
    return value


def _deepest(text: str) -> int:
    """Returns the position of the innermost bracket of a JSON text."""
    depth = deepest = position = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[][{}]', text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth > deepest:
            deepest, position = depth, token.start()
    return position


def is_html(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a web page, as a server's error is."""
    return bool(_HTML.match(head.removeprefix(b"\xef\xbb\xbf")))


def read_text(file: Path) -> str:
    """Returns the whole text of a UTF-8 file, plain or ``.gz``, without its byte order mark.

    Raises:
        UnreadableFile: Not UTF-8 (with the line), a broken gzip, a web page, or an empty file.
        FileNotFoundError: No such file.
    """
    text = []
    for number, line in _lines(file, "\n"):
        broken = _not_utf8(line)
        if broken:
            raise UnreadableFile("not UTF-8", f"{file}:{number}: {broken}")
        text.append(line)
    return "".join(text)


@_counts_unreadable
def jsonl_rows(file: Path, bad_row: BadRowHook) -> Iterator[tuple[str, dict[str, Any]]]:
    r"""Yields the objects of a file of JSON lines.

    Only ``\n`` ends a line: JSON strings may hold U+2028 and its like.
    """
    for number, line in _lines(file, "\n"):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        broken = _not_utf8(line)
        if broken:
            bad_row("not UTF-8", f"{where}: {broken}")
            continue
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


@_counts_unreadable
def json_rows(file: Path, bad_row: BadRowHook) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of a file that is one JSON array; ``where`` counts them from 1."""
    try:
        rows = parse_json(read_text(file))
    except json.JSONDecodeError as error:
        raise UnreadableFile(
            "broken JSON",
            f"{file}:{error.lineno}: broken JSON ({error.msg}, column {error.colno}). Download the "
            "file again.",
        ) from error
    if not isinstance(rows, list):
        raise UnreadableFile(
            "wrong type",
            f"{file}:1: expected an array of rows, got {type(rows).__name__}. Write an array, or one "
            "object per line into a .jsonl file.",
        )
    for number, row in enumerate(rows, start=1):
        where = f"{file}:{number}"
        if isinstance(row, dict):
            yield where, row
        else:
            bad_row("wrong type", f"{where}: expected an object, got {type(row).__name__}.")


@_counts_unreadable
def csv_rows(file: Path, bad_row: BadRowHook) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the rows of a comma-separated file under the names of its header."""
    header: list[str] = []

    def refuse(reason: str, message: str) -> None:
        if not header:
            raise UnreadableFile(reason, message)
        bad_row(reason, message)

    for where, cells in _table(file, "excel", "CSV", refuse):
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


@_counts_unreadable
def tsv_rows(file: Path, bad_row: BadRowHook) -> Iterator[tuple[str, list[str]]]:
    """Yields the cells of an Excel-style tab-separated file without a header."""
    yield from _table(file, "excel-tab", "table", bad_row)


@_counts_unreadable
def parquet_rows(file: Path, bad_row: BadRowHook) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of a Parquet file, a part of it in memory at a time."""
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(str(file)) as table:
            for batch in table.iter_batches(batch_size=1024):
                for place in range(batch.num_rows):
                    number += 1
                    where = f"{file}:{number}"
                    try:
                        (row,) = batch.slice(place, 1).to_pylist()
                    except UnicodeDecodeError as error:
                        bad_row("not UTF-8", f"{where}: not UTF-8 ({error}).")
                        continue
                    yield where, row
    except FileNotFoundError:
        raise
    # An OSError: pages that cannot be decompressed.
    except (pyarrow.ArrowException, OSError) as error:
        _refuse_html(file)
        raise UnreadableFile(
            "not Parquet",
            f"{file}:{number + 1}: not a Parquet file, or a damaged one ({error}). Download it again.",
        ) from error


def _lines(file: Path, newline: Literal["", "\n"]) -> Iterator[tuple[int, str]]:
    """Yields the lines of a file with their numbers; bytes that are no UTF-8 as surrogates."""
    _refuse_html(file)
    number, empty = 0, True
    try:
        with _open(file, newline) as lines:
            for number, line in enumerate(lines, start=1):
                if empty and line.strip():
                    empty = False
                    if is_html(line.encode(errors="replace")):
                        raise _html(file)
                yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UnreadableFile(
            "truncated gzip",
            f"{file}:{number + 1}: not a whole gzip file ({error}); it breaks off after line "
            f"{number}. Download it again.",
        ) from error
    if empty:
        raise UnreadableFile(
            "empty file", f"{file}:1: empty file. Download it again, or write its rows."
        )


def _open(file: Path, newline: Literal["", "\n"]) -> IO[str]:
    if file.suffix == ".gz":
        return gzip.open(
            file, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline
        )
    return file.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _refuse_html(file: Path) -> None:
    # A server's error page is plain text, whatever the name it is saved under.
    with file.open("rb") as data:
        if is_html(data.read(512)):
            raise _html(file)


def _html(file: Path) -> UnreadableFile:
    return UnreadableFile(
        "web page",
        f"{file}:1: a web page in place of data, as a server sends when it has no such file. "
        "Delete it and download the file itself.",
    )


def _not_utf8(line: str) -> str:
    """Returns what is wrong with a line that was no UTF-8, else nothing."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        byte = ord(line[error.start]) - 0xDC00
        return f"not UTF-8 (byte {byte:#04x}). Save the file as UTF-8, or download it again."
    return ""


def _table(
    file: Path, dialect: str, name: str, bad_row: BadRowHook
) -> Iterator[tuple[str, list[str]]]:
    """Yields the rows of a table; ``where`` is the line that a row begins in."""
    # A cell may hold a whole dialog; the csv module's own limit is 131,072 characters.
    csv.field_size_limit(1 << 30)
    # Lenient, an unclosed quote would take the rest of the file for its cell.
    reader = csv.reader((line for _, line in _lines(file, "")), dialect, strict=True)
    line = 1
    try:
        for cells in reader:
            where = f"{file}:{line}"
            line = reader.line_num + 1
            broken = _not_utf8("".join(cells))
            if broken:
                bad_row("not UTF-8", f"{where}: {broken}")
            elif cells:
                yield where, cells
    except csv.Error as error:
        raise UnreadableFile(
            "broken table",
            f"{file}:{line}: broken {name} ({error}) in the row that begins here. Close its quotes, "
            'and write a quote inside a quoted cell twice: "".',
        ) from error


def _header(cells: list[str], where: str) -> list[str]:
    # Spreadsheets leave columns without a name, as many as they like.
    twice = sorted(name for name, count in Counter(cells).items() if name and count > 1)
    if twice:
        raise UnreadableFile(
            "header", f"{where}: the header names {twice} more than once. Rename the columns."
        )
    return cells
