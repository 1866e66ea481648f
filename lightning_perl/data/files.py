"""Readers of files, plain or gzip-compressed; every corpus is read through one of them.

Each reader yields ``(where, row)``, where ``where`` is ``file:line`` (``file:row`` in a JSON array or
Parquet). A broken row goes to ``bad_row(reason, message)`` and is skipped. So does, as one row, a file
that cannot be read, or the rest of a file that cannot be read to its end: a gzip that breaks off, an
open quote, a web page saved in place of data, an empty file.

JSON lines, tables and Parquet are read piece by piece, so a file may be larger than memory. They are
not read by ``datasets``: it gives up a whole JSONL file for one broken line, its CSV reader turns the
text ``NA`` into null, fills short rows with nulls and renames columns that the header names twice, and
it needs a cache folder that it can write even for a local Parquet file.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeGuard, TypeVar

import pyarrow
import pyarrow.parquet

from lightning_perl.data.rows import BadRow

BadRowHook: TypeAlias = Callable[[str, str], None]
"""Takes a few words to count by and the whole message of a bad row. May raise."""

_Row = TypeVar("_Row")
_Reader: TypeAlias = Callable[[Path, BadRowHook], Iterator[tuple[str, _Row]]]
_HTML = re.compile(rb"\s*<(?:!doctype\s+html|html)\b", re.IGNORECASE)


class UnreadableFile(BadRow):
    """A file that cannot be read, or not to its end."""


def _unreadable(reason: str, message: str) -> None:
    raise UnreadableFile(reason, message)


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
    """Returns the value of a JSON text; what only Python refuses is a JSONDecodeError, too."""
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        innermost = _longest(r"[\[{]+", text).end() - 1
        raise json.JSONDecodeError("nested too deeply", text, innermost) from None
    except ValueError:
        integer = _longest(r"\d+", text).start()
        raise json.JSONDecodeError("too long an integer", text, integer) from None
    return value


def _longest(pattern: str, text: str) -> re.Match[str]:
    return max(re.finditer(pattern, text), key=lambda match: len(match[0]))


def is_html(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a web page, such as a server's error page."""
    return bool(_HTML.match(head.removeprefix(b"\xef\xbb\xbf")))


def read_text(file: Path) -> str:
    """Returns the whole text of a file; raises :class:`UnreadableFile`."""
    lines = _lines(file, "\n")
    return "".join(
        line for number, line in lines if _is_utf8(line, f"{file}:{number}", _unreadable)
    )


@_counts_unreadable
def jsonl_rows(file: Path, bad_row: BadRowHook) -> Iterator[tuple[str, dict[str, Any]]]:
    r"""Yields the objects of a file of JSON lines.

    Only ``\n`` ends a line: JSON strings may hold U+2028 and other line separators.
    """
    for number, line in _lines(file, "\n"):
        where = f"{file}:{number}"
        if not line.strip() or not _is_utf8(line, where, bad_row):
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
        if _is_object(row, where, bad_row):
            yield where, row


@_counts_unreadable
def json_rows(file: Path, bad_row: BadRowHook) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of a file that is one JSON array; ``where`` counts them from 1."""
    try:
        rows = parse_json(read_text(file))
    except json.JSONDecodeError as error:
        raise UnreadableFile(
            "broken JSON",
            f"{file}:{error.lineno}: broken JSON ({error.msg}, column {error.colno}). Download the file again.",
        ) from error
    if not isinstance(rows, list):
        raise UnreadableFile(
            "wrong type",
            f"{file}:1: expected an array of rows, got {type(rows).__name__}. Write an array, or one "
            "object per line into a .jsonl file.",
        )
    for number, row in enumerate(rows, start=1):
        where = f"{file}:{number}"
        if _is_object(row, where, bad_row):
            yield where, row


@_counts_unreadable
def csv_rows(file: Path, bad_row: BadRowHook) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the rows of a comma-separated file under the names of its header."""
    table = _table(file, "excel", "CSV")
    where, header = next(table)
    _is_utf8("".join(header), where, _unreadable)
    # Spreadsheets leave columns without a name, as many as they like.
    twice = sorted(name for name, count in Counter(header).items() if name and count > 1)
    if twice:
        raise UnreadableFile(
            "header", f"{where}: the header names {twice} more than once. Rename the columns."
        )
    for where, cells in table:
        if not _is_utf8("".join(cells), where, bad_row):
            continue
        if len(cells) == len(header):
            yield where, dict(zip(header, cells, strict=True))
        else:
            bad_row(
                "wrong number of cells",
                f"{where}: the row does not have the header's {len(header)} cells. Quote cells that hold commas.",
            )


@_counts_unreadable
def tsv_rows(file: Path, bad_row: BadRowHook) -> Iterator[tuple[str, list[str]]]:
    """Yields the cells of an Excel-style tab-separated file without a header."""
    for where, cells in _table(file, "excel-tab", "table"):
        if _is_utf8("".join(cells), where, bad_row):
            yield where, cells


@_counts_unreadable
def parquet_rows(file: Path, bad_row: BadRowHook) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of a Parquet file, a part of it in memory at a time."""
    _refuse_html(file)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(str(file)) as table:
            for number, row in arrow_rows(table.iter_batches(1024), str(file), bad_row):
                yield f"{file}:{number}", row
    # An OSError: pages that cannot be decompressed.
    except (pyarrow.ArrowException, OSError) as error:
        raise UnreadableFile(
            "not Parquet",
            f"{file}:{number + 1}: not a Parquet file, or a damaged one ({error}). Download it again.",
        ) from error


def arrow_rows(
    batches: Iterable[pyarrow.RecordBatch], name: str, bad_row: BadRowHook
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the rows of Arrow's batches, of a file or a data set of this name, with their numbers."""
    number = 0
    for batch in batches:
        for place in range(batch.num_rows):
            number += 1
            try:
                (row,) = batch.slice(place, 1).to_pylist()
            except UnicodeDecodeError as error:
                bad_row("not UTF-8", f"{name}:{number}: not UTF-8 ({error}).")
                continue
            yield number, row


def _lines(file: Path, newline: Literal["", "\n"]) -> Iterator[tuple[int, str]]:
    """Yields the lines of a file with their numbers, bytes that are not UTF-8 as surrogates."""
    _refuse_html(file)
    number, blank = 0, True
    data = gzip.open(file) if file.suffix == ".gz" else file.open("rb")  # noqa: SIM115
    try:
        for number, line in enumerate(
            TextIOWrapper(data, "utf-8-sig", "surrogateescape", newline), start=1
        ):
            if blank and line.strip():
                blank = False
                _refuse_html(file, line.encode(errors="replace"))
            yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UnreadableFile(
            "truncated gzip",
            f"{file}:{number + 1}: not a whole gzip file ({error}); it breaks off after line "
            f"{number}. Download it again.",
        ) from error
    finally:
        data.close()
    if blank:
        raise UnreadableFile(
            "empty file", f"{file}:1: empty file. Download it again, or write its rows."
        )


def _refuse_html(file: Path, head: bytes | None = None) -> None:
    """Refuses a web page: a server's error page is plain text, whatever the file's name says."""
    if head is None:
        with file.open("rb") as data:
            head = data.read(512)
    if is_html(head):
        raise UnreadableFile(
            "web page",
            f"{file}:1: a web page in place of data, as a server sends when it has no such file. "
            "Delete it and download the file itself.",
        )


def _is_utf8(text: str, where: str, bad_row: BadRowHook) -> bool:
    """Whether a text of :func:`_lines` was UTF-8 in the file; a bad row where it was not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        bad_row(
            "not UTF-8",
            f"{where}: not UTF-8 (byte {byte:#04x}). Save the file as UTF-8, or download it again.",
        )
        return False
    return True


def _is_object(row: object, where: str, bad_row: BadRowHook) -> TypeGuard[dict[str, Any]]:
    if isinstance(row, dict):
        return True
    bad_row("wrong type", f"{where}: expected an object, got {type(row).__name__}.")
    return False


def _table(file: Path, dialect: str, name: str) -> Iterator[tuple[str, list[str]]]:
    """Yields the rows of a table; ``where`` is the line that a row begins in."""
    # A cell may hold a whole dialog; the csv module's own limit is 131,072 characters.
    csv.field_size_limit(1 << 30)
    # Not strict, the reader would take the rest of the file for the cell of an open quote.
    reader = csv.reader((line for _, line in _lines(file, "")), dialect, strict=True)
    line = 1
    try:
        for cells in reader:
            where, line = f"{file}:{line}", reader.line_num + 1
            if cells:
                yield where, cells
    except csv.Error as error:
        raise UnreadableFile(
            "broken table",
            f"{file}:{line}: broken {name} ({error}) in the row that begins here. Close its quotes, "
            'and write a quote inside a quoted cell twice: "".',
        ) from error
