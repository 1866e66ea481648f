"""Where rows come from: files (plain or gzip-compressed), data sets of the hub, lists, several of them.

Readers of files yield ``(where, row)``, with ``where`` as ``file:line`` (``file:row`` in a JSON array or Parquet).
A broken row goes to ``bad_row(reason, message)`` and is skipped. So does, as one row, what cannot be read of a
file: a gzip that breaks off, an open quote, a web page saved in place of data, an empty file.

``datasets`` does not read the files: it gives up a whole JSONL file for one broken line, its CSV reader turns the
text ``NA`` into null, fills short rows with nulls and renames columns that the header names twice.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import pickle
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import pyarrow
import pyarrow.parquet

from lightning_perl.data.rows import BadRow, BadRowHook
from lightning_perl.packaged import unpackaged

Rows: TypeAlias = Iterator[tuple[str, Mapping[str, Any]]]
Sources: TypeAlias = list[Any] | dict[str, float] | str | Path
"""A file (``packaged:NAME`` for one of this package), a name of the hub, a list of rows, a list of files
and names, or a mapping from files and names to weights."""

T = TypeVar("T")
_Reader: TypeAlias = Callable[[Path, BadRowHook], Iterator[tuple[str, T]]]
_HTML = re.compile(rb"\s*<(?:!doctype\s+html|html)\b", re.IGNORECASE)
_HUB = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:/([\w.-]+))?(?::([^/]+))?")


class UnreadableFile(BadRow):
    """A file that cannot be read, or not to its end."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(message)
        self.where = where


def _unreadable(where: str, message: str) -> None:
    raise UnreadableFile(where, message)


def _counts_unreadable(reader: _Reader[T]) -> _Reader[T]:
    """Lets ``bad_row`` take what makes a file, or the rest of it, unreadable."""

    @wraps(reader)
    def rows(file: Path, bad_row: BadRowHook) -> Iterator[tuple[str, T]]:
        try:
            yield from reader(file, bad_row)
        except UnreadableFile as error:
            bad_row(error.where, str(error))

    return rows


def parse_json(text: str) -> Any:  # noqa: ANN401
    """Returns the value of a JSON text; what only Python refuses is a JSONDecodeError, too."""

    def longest(pattern: str) -> re.Match[str]:
        return max(re.finditer(pattern, text), key=lambda match: len(match[0]))

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # Python would take the last one.
        value = dict(pairs)
        if len(value) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            place = max(0, text.rfind(json.dumps(twice, ensure_ascii=False)))
            raise json.JSONDecodeError(f"the key {twice!r} is there twice", text, place)
        return value

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        problem, place = "nested too deeply", longest(r"[\[{]+").end() - 1
    except ValueError:
        problem, place = "too long an integer", longest(r"\d+").start()
    raise json.JSONDecodeError(problem, text, place)


def is_html(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a web page, such as a server's error page."""
    return bool(_HTML.match(head.removeprefix(b"\xef\xbb\xbf")))


@_counts_unreadable
def jsonl_rows(file: Path, bad_row: BadRowHook) -> Rows:
    r"""Yields the objects of a file of JSON lines.

    Only ``\n`` ends a line: JSON strings may hold U+2028 and other line separators.
    """
    for number, line in _lines(file, "\n"):
        where = f"{file}:{number}"
        if number == 1 and line.startswith("["):
            yield from json_rows(file, bad_row)
            return
        if not line.strip() or not _is_utf8(line, where, bad_row):
            continue
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            fix = "A .jsonl file has one whole JSON object per line."
            bad_row(where, f"broken JSON ({error.msg}, column {error.colno}). {fix}")
            continue
        yield from _objects([(where, row)], bad_row)


@_counts_unreadable
def json_rows(file: Path, bad_row: BadRowHook) -> Rows:
    """Yields the objects of a file that is one JSON array, or has one; ``where`` counts them from 1."""
    lines = _lines(file, "\n")
    text = "".join(line for n, line in lines if _is_utf8(line, f"{file}:{n}", _unreadable))
    try:
        rows = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            # JSON lines under the name of an array, as on the hub.
            yield from jsonl_rows(file, bad_row)
            return
        raise UnreadableFile(
            f"{file}:{error.lineno}",
            f"broken JSON ({error.msg}, column {error.colno}). Download the file again.",
        ) from error
    if isinstance(rows, dict):
        arrays = [value for value in rows.values() if isinstance(value, list)]
        rows = arrays[0] if len(arrays) == 1 else rows
    if not isinstance(rows, list):
        raise UnreadableFile(
            f"{file}:1",
            f"wrong type: expected an array of rows, got {type(rows).__name__}. Write an array, or one object "
            "per line into a .jsonl file.",
        )
    yield from _objects(_numbered(str(file), rows), bad_row)


@_counts_unreadable
def csv_rows(file: Path, bad_row: BadRowHook) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the rows of a comma- or (``.tsv``) tab-separated file under the names of its header."""
    tabs = _suffix(file) == ".tsv"
    table = _table(file, "excel-tab" if tabs else "excel", "TSV" if tabs else "CSV")
    where, header = next(table)
    _is_utf8("".join(header), where, _unreadable)
    _refuse_twice(where, header)
    for where, cells in table:
        if not _is_utf8("".join(cells), where, bad_row):
            continue
        if len(cells) == len(header):
            yield where, dict(zip(header, cells, strict=True))
        else:
            fix = "Quote cells that hold commas."
            bad_row(where, f"wrong number of cells: not the header's {len(header)}. {fix}")


def _refuse_twice(where: str, columns: Iterable[str]) -> None:
    # Spreadsheets leave columns without a name, as many as they like.
    twice = sorted(name for name, count in Counter(columns).items() if name and count > 1)
    if twice:
        raise UnreadableFile(where, f"header: it names {twice} more than once. Rename the columns.")


@_counts_unreadable
def tsv_rows(file: Path, bad_row: BadRowHook) -> Iterator[tuple[str, list[str]]]:
    """Yields the cells of an Excel-style tab-separated file without a header."""
    for where, cells in _table(file, "excel-tab", "table"):
        if _is_utf8("".join(cells), where, bad_row):
            yield where, cells


@_counts_unreadable
def parquet_rows(file: Path, bad_row: BadRowHook) -> Rows:
    """Yields the rows of a Parquet file, a part of it in memory at a time."""
    _refuse_stand_ins(file)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(str(file)) as table:
            _refuse_twice(f"{file}:1", table.schema_arrow.names)
            for number, row in arrow_rows(table.iter_batches(1024), str(file), bad_row):
                yield f"{file}:{number}", row
    # An OSError: pages that cannot be decompressed.
    except (pyarrow.ArrowException, OSError) as error:
        raise UnreadableFile(
            f"{file}:{number + 1}",
            f"not a Parquet file, or a damaged one ({error}). Download it again.",
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
                bad_row(f"{name}:{number}", f"not UTF-8 ({error}).")
                continue
            except (ValueError, OverflowError) as error:  # a date that Python has none for
                bad_row(f"{name}:{number}", f"unreadable value: {error}. Leave its column out.")
                continue
            yield number, row


def _lines(file: Path, newline: Literal["", "\n"]) -> Iterator[tuple[int, str]]:
    """Yields the lines of a file with their numbers, bytes that are not UTF-8 as surrogates."""
    _refuse_stand_ins(file)
    number, blank = 0, True
    data = gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb")  # noqa: SIM115
    try:
        for number, line in enumerate(
            TextIOWrapper(data, "utf-8-sig", "surrogateescape", newline), start=1
        ):
            if blank and line.strip():
                blank = False
                _refuse_stand_ins(file, line.encode(errors="replace"))
            yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UnreadableFile(
            f"{file}:{number + 1}",
            f"truncated gzip: not a whole file ({error}); it breaks off after line {number}. Download it again.",
        ) from error
    finally:
        data.close()
    if blank:
        raise UnreadableFile(f"{file}:1", "empty file. Download it again, or write its rows.")


def _refuse_stand_ins(file: Path, head: bytes | None = None) -> None:
    """Refuses a web page and a pointer of Git LFS: both are plain text, whatever the file's name says."""
    if head is None:
        with file.open("rb") as data:
            head = data.read(512)
    if is_html(head):
        raise UnreadableFile(
            f"{file}:1",
            "web page: it came in place of data, as a server sends when it has no such file. Delete it and "
            "download the file itself.",
        )
    if head.startswith(b"version https://git-lfs.github.com/"):
        raise UnreadableFile(
            f"{file}:1",
            "LFS pointer: it stands in place of data. Fetch the file itself with `git lfs pull`, or download it "
            "from the repository's page.",
        )


def _is_utf8(text: str, where: str, bad_row: BadRowHook) -> bool:
    """Whether a text of :func:`_lines` was UTF-8 in the file; a bad row where it was not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        fix = "Save the file as UTF-8, or download it again."
        bad_row(where, f"not UTF-8 (byte {byte:#04x}). {fix}")
        return False
    return True


def _objects(
    rows: Iterable[tuple[str, object]], bad_row: BadRowHook, kind: str = "an object"
) -> Rows:
    """Yields the rows that are mappings; the others are bad rows."""
    for where, row in rows:
        if isinstance(row, Mapping):
            yield where, row
        else:
            bad_row(where, f"wrong type: expected {kind}, got {type(row).__name__}.")


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
            f"{file}:{line}",
            f"broken table: no {name} ({error}) in the row that begins here. Close its quotes, and write a quote "
            'inside a quoted cell twice: "".',
        ) from error


@dataclass(frozen=True)
class Source:
    """One place that rows come from: a path, a name of the hub, or the rows themselves.

    ``argument`` is the one that named it, for error messages; ``weight`` its share in a mixture.
    """

    argument: str
    place: str | Sequence[Mapping[str, Any]]
    weight: float | None = None
    number: int = 0

    @property
    def name(self) -> str:
        """What tells it from others: the argument, where it is no path or name."""
        return self.place if isinstance(self.place, str) else self.argument

    def rows(self, bad_row: BadRowHook, streaming: bool = False) -> Rows:
        """Yields ``(where, row)``; ``streaming`` reads a data set of the hub while it is fetched."""
        if not isinstance(self.place, str):
            return _objects(_numbered(self.argument, self.place), bad_row, "a mapping")
        if self.hub is not None:
            name = f"{self.hub[0]}:{self.hub[2]}"
            table = self._load(*self.hub, streaming).with_format("arrow")
            rows = arrow_rows(table.iter(batch_size=1024), name, bad_row)
            return ((f"{name}:{number}", row) for number, row in rows)
        file = Path(self.place).expanduser()
        if not os.path.isfile(file):  # noqa: PTH113 (the other raises for a long text)
            raise FileNotFoundError(
                f"No file {str(file)[:200]!r} ({self.argument}; looked from {Path.cwd()}). Give the path of a "
                ".jsonl, .json, .csv or .parquet file, or owner/name of a data set of the hub."
            )
        suffix = _suffix(file)
        if suffix not in _READERS or file.name.lower().endswith(".parquet.gz"):
            raise ValueError(
                f"{file}: cannot read {''.join(file.suffixes)!r} files. Use .jsonl, .json, .csv, .tsv (also with "
                ".gz) or .parquet."
            )
        return _READERS[suffix](file, bad_row)

    @property
    def hub(self) -> tuple[str, str | None, str] | None:
        """Name, config and split of a data set of the hub; None where it is a file, or should be one."""
        if not isinstance(self.place, str):
            return None
        path = Path(self.place).expanduser()
        name = _HUB.fullmatch(self.place)
        # As with models: where OWNER is a folder here, or the end says so, a path was meant.
        if name is None or path.exists() or path.parent.is_dir() or _suffix(path) in _READERS:
            return None
        return name[1], name[2], name[3] or "train"

    def fetch(self) -> None:
        """Fetches a data set of the hub into its cache; does nothing for files and lists."""
        if self.hub is not None:
            self._load(*self.hub, streaming=False)

    # ANN401: datasets has no types.
    def _load(self, name: str, config: str | None, split: str, streaming: bool) -> Any:  # noqa: ANN401
        # Imported where it is needed: it takes seconds, and most runs read files.
        import datasets

        try:
            return datasets.load_dataset(name, config, split=split, streaming=streaming)
        # An OSError: no network, offline mode, no such data set; a ValueError: no such config, split.
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise FileNotFoundError(
                f"{self.argument}: {self.place!r} is no file here (looked from {Path.cwd()}), and the hub did "
                f"not give it: {reason}. With a network, check the name, config and split at "
                f"https://huggingface.co/datasets/{name}. Without one, download its .parquet, .jsonl or .csv "
                f"files from there elsewhere, copy them here, and set {self.argument} to their path."
            ) from error


def sources_of(value: Sources, argument: str) -> list[Source]:
    """Returns the sources that an argument names; see :data:`Sources`."""
    if isinstance(value, str | Path):
        value = [value]
    elif hasattr(value, "to_list"):  # a Dataset of `datasets`
        value = value.to_list()
    # An element that is no row is a bad row, with its number.
    if isinstance(value, list) and value and not any(isinstance(p, str | Path) for p in value):
        return [Source(argument, value)]
    weights = value if isinstance(value, dict) else {}
    if weights and argument != "data.train":
        raise ValueError(
            f"{argument}: rows to measure on are read as they are, so weights mean nothing. Give a list."
        )
    for place, weight in weights.items():
        if not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(
                f"{argument}: the weight of {place!r} must be a number above 0, got {str(weight)[:40]!r}. Leave "
                "out what is not wanted; rows are given in a list."
            )
    places = list(value) if isinstance(value, list | dict) else []
    if not places or not all(isinstance(place, str | Path) for place in places):
        raise ValueError(
            f"{argument} must be a file, a name of the hub, a list of rows (mappings), a list of files and "
            f"names, or a mapping from files and names to weights; got {str(value)[:80]!r}."
        )
    return [
        Source(argument, unpackaged(str(place)), weights.get(place), number)
        for number, place in enumerate(places)
    ]


def shuffled_stream(
    read: Sequence[Callable[[], Iterator[T]]],
    weights: Sequence[float] | None,
    buffer: int,
    seed: int,
    epoch: int,
) -> Iterator[T]:
    """Yields from several streams, shuffled by ``datasets``: a function of (seed, epoch).

    ``read`` opens each stream at its start; none is empty. With ``weights`` the streams are drawn from in these
    proportions until each was read through, and one that is through before begins again; without, each is read
    once. ``buffer`` elements are in memory to be shuffled.
    """
    if not read:
        return
    import datasets
    from datasets.iterable_dataset import ExamplesIterable

    def examples(number: int) -> Iterator[tuple[object, dict[str, bytes]]]:
        # Pickled: datasets would cast all rows to the columns and types of the first one.
        for place, element in enumerate(read[number]()):
            yield (0, place), {"element": pickle.dumps(element)}

    info = datasets.DatasetInfo(features=datasets.Features({"element": datasets.Value("binary")}))
    streams = [
        datasets.IterableDataset(ExamplesIterable(examples, {"number": number}), info=info)
        for number in range(len(read))
    ]
    if weights is None:
        mixture = datasets.concatenate_datasets(streams)
    else:
        shares = [weight / sum(weights) for weight in weights]
        mixture = datasets.interleave_datasets(
            streams, shares, seed=seed, stopping_strategy="all_exhausted"
        )
    mixture = mixture.shuffle(seed=seed, buffer_size=buffer)
    mixture.set_epoch(epoch)
    for example in mixture:
        yield pickle.loads(example["element"])


_READERS: dict[str, Callable[[Path, BadRowHook], Rows]] = {
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".ndjson": jsonl_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
}


def _suffix(file: Path) -> str:
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _numbered(name: str, rows: Iterable[object]) -> Iterator[tuple[str, object]]:
    return ((f"{name}:{number}", row) for number, row in enumerate(rows, start=1))
