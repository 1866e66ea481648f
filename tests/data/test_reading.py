"""Tests of the one reader: what is a row, and what is a bad row."""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lightning_perl.data.reading import (
    Source,
    csv_rows,
    json_rows,
    jsonl_rows,
    parquet_rows,
    tsv_rows,
)
from lightning_perl.data.rows import BadRow

PAGE = b"\n <!DOCTYPE html>\n<html><body>404</body></html>\n"
Reader = Callable[..., Iterator[tuple[str, Any]]]
READERS: list[Reader] = [jsonl_rows, json_rows, csv_rows, tsv_rows, parquet_rows]


class Bad(list[tuple[str, str]]):
    """Bad rows as reason and message."""

    def __call__(self, where: str, message: str) -> None:
        self.append((BadRow(message).reason, f"{where}: {message}"))


def only(reader: Reader, file: Path, reason: str, words: str, rows: int = 0) -> None:
    """The file is one bad row after ``rows`` good ones, and reading stops where the hook raises."""
    bad = Bad()
    assert len(list(reader(file, bad))) == rows
    ((counted, message),) = bad
    assert counted == reason
    assert re.match(rf"{re.escape(str(file))}:{words}", message), message
    assert message.count(".") >= 2  # says what to do
    found: list[object] = []
    with pytest.raises(BadRow, match=words):
        found.extend(reader(file, stop))
    assert len(found) == rows


def stop(where: str, message: str) -> None:
    raise BadRow(f"{where}: {message}")


def save(file: Path, data: bytes) -> Path:
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


@pytest.fixture(params=["", ".gz"])
def ending(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_json_lines(tmp_path: Path, ending: str) -> None:
    lines = [b'{"a": "x\xe2\x80\xa8y"}', b"", b"[1]", b'{"a": ', b'{"a": "\xe9"}', b'{"a": 2}\r']
    file = save(tmp_path / f"rows.jsonl{ending}", b"\xef\xbb\xbf" + b"\n".join(lines))
    bad = Bad()
    assert list(jsonl_rows(file, bad)) == [
        (f"{file}:1", {"a": "x\u2028y"}),
        (f"{file}:6", {"a": 2}),
    ]
    assert [reason for reason, _ in bad] == ["wrong type", "broken JSON", "not UTF-8"]
    for number, (_, message) in zip((3, 4, 5), bad, strict=True):
        assert message.startswith(f"{file}:{number}: ")
    assert "(byte 0xe9)" in bad[2][1]


def test_a_json_array(tmp_path: Path, ending: str) -> None:
    file = save(tmp_path / f"rows.json{ending}", '[{"a": "é"},\n 3, {"a": 2}]'.encode())
    bad = Bad()
    assert list(json_rows(file, bad)) == [(f"{file}:1", {"a": "é"}), (f"{file}:3", {"a": 2})]
    assert bad == [("wrong type", f"{file}:2: wrong type: expected an object, got int.")]
    for data, reason, words in (
        (b'{"a": 1}', "wrong type", "1: wrong type: expected an array of rows, got dict. Write"),
        (b"[\n{", "broken JSON", r"2: broken JSON \(.*column 2\). Download"),
        (b'[\n"\xff"]', "not UTF-8", r"2: not UTF-8 \(byte 0xff\). Save"),
    ):
        only(json_rows, save(file, data), reason, words)


ROW = {"a": "b"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.json", '{"a": "b"}\n\n{"a": "b"}\n'),
        ("rows.json", '{"version": 1, "data": [{"a": "b"},\n{"a": "b"}]}'),
        ("rows.JSON.GZ", '[{"a": "b"}, {"a": "b"}]'),
        ("rows.jsonl", '[{"a": "b"},\n{"a": "b"}]'),
        ("rows.ndjson", '{"a": "b"}\n{"a": "b"}'),
        ("rows.TSV", "a\nb\nb\n"),
    ],
)
def test_rows_under_another_ending_are_read(tmp_path: Path, name: str, text: str) -> None:
    data = text.encode()
    file = tmp_path / name
    file.write_bytes(gzip.compress(data) if name.endswith("GZ") else data)
    assert [row for _, row in Source("data.train", str(file)).rows(Bad())] == [ROW, ROW]


def test_a_pointer_of_git_lfs_is_no_data(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"
    for reader in READERS:
        file = save(tmp_path / "rows", pointer)
        only(reader, file, "LFS pointer", "1: LFS pointer: .*git lfs pull")


def test_comma_separated_rows(tmp_path: Path, ending: str) -> None:
    data = b'\xef\xbb\xbfa,b\r\n"x\r\ny",2\r\n\r\n3\r\n\xe9,5\r\n6,7\r\n'
    file = save(tmp_path / f"rows.csv{ending}", data)
    bad = Bad()
    assert list(csv_rows(file, bad)) == [
        (f"{file}:2", {"a": "x\r\ny", "b": "2"}),
        (f"{file}:7", {"a": "6", "b": "7"}),
    ]
    assert [(reason, message.split(": ")[0]) for reason, message in bad] == [
        ("wrong number of cells", f"{file}:5"),
        ("not UTF-8", f"{file}:6"),
    ]
    for data, reason, words, rows in (
        (
            b'a,b\n1,2\n"3,4\n5,6\n',
            "broken table",
            r"3: broken table: no CSV \(unexpected end .* Close",
            1,
        ),
        (b'a,b\n"say "b"\n1,2\n', "broken table", r"2: broken table: no CSV \(.*expected after", 0),
        (b"a,b,a\n1,2,3\n", "header", r"1: header: it names \['a'\] more than once. Rename", 0),
        # Not the next row in its place.
        (b"a,\xe9\n1,2\n3,4\n", "not UTF-8", r"1: not UTF-8 \(byte 0xe9\). Save", 0),
    ):
        only(csv_rows, save(file, data), reason, words, rows)


def test_a_header_may_leave_columns_without_a_name(tmp_path: Path) -> None:
    file = save(tmp_path / "rows.csv", b"a,,\nNA,,\n")
    assert list(csv_rows(file, Bad())) == [(f"{file}:2", {"a": "NA", "": ""})]


def test_tab_separated_rows(tmp_path: Path, ending: str) -> None:
    file = save(tmp_path / f"rows.tsv{ending}", b'a "b"\tc\r\n\xe9\tx\r\n"d ""e"""\tf\r\n')
    bad = Bad()
    assert list(tsv_rows(file, bad)) == [
        (f"{file}:1", ['a "b"', "c"]),
        (f"{file}:3", ['d "e"', "f"]),
    ]
    assert bad[0][1].startswith(f"{file}:2: not UTF-8 (byte 0xe9). Save")


def test_parquet_rows_beyond_one_batch(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    texts = pyarrow.array([str(number).encode() for number in range(2000)] + [b"\xe9", b"x"])
    table = pyarrow.table({"a": pyarrow.StringArray.from_buffers(2002, *texts.buffers()[1:])})
    pyarrow.parquet.write_table(table, str(file))
    bad = Bad()
    rows = list(parquet_rows(file, bad))
    assert rows[1500] == (f"{file}:1501", {"a": "1500"})
    assert rows[-1] == (f"{file}:2002", {"a": "x"})
    assert len(rows) == 2001
    assert [(reason, message.split(": ")[0]) for reason, message in bad] == [
        ("not UTF-8", f"{file}:2001")
    ]
    with pytest.raises(BadRow, match=rf"^{re.escape(str(file))}:2001: not UTF-8"):
        list(parquet_rows(file, stop))


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@pytest.mark.parametrize("name", ["rows", "rows.gz"])
def test_a_web_page_is_no_data(tmp_path: Path, name: str, reader: Reader) -> None:
    # Saved as it came, whatever the name says; a compressed page is no Parquet file either way.
    (tmp_path / name).write_bytes(PAGE)
    words = "1: web page: .* Delete it"
    only(reader, tmp_path / name, "web page", words)
    if reader is not parquet_rows:
        only(reader, save(tmp_path / name, PAGE), "web page", words)


@pytest.mark.parametrize("reader", READERS[:4], ids=lambda reader: reader.__name__)
def test_an_empty_file_is_no_data(tmp_path: Path, ending: str, reader: Reader) -> None:
    file = save(tmp_path / f"rows{ending}", b" \n\n")
    # Of a table without a header, a blank is a cell.
    rows = int(reader is tsv_rows)
    only(reader, file, "empty file", "1: empty file. Download it again", rows)


@pytest.mark.parametrize("reader", READERS[:4], ids=lambda reader: reader.__name__)
def test_a_gzip_that_breaks_off(tmp_path: Path, reader: Reader) -> None:
    file = tmp_path / "rows.gz"
    whole = gzip.compress(b"\n")
    for data in (whole[:-4], whole[:10] + b"\xff" + whole[11:], b"a\tb\n"):
        file.write_bytes(data)
        words = r"[12]: truncated gzip: not a whole file \(.*after line [01]. Download"
        only(reader, file, "truncated gzip", words)


def test_rows_before_the_break_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl.gz"
    lines = [json.dumps({"a": number}).encode() for number in range(50_000)]
    whole = gzip.compress(b"\n".join(lines))
    file.write_bytes(whole[: len(whole) // 2])
    bad = Bad()
    rows = [row["a"] for _, row in jsonl_rows(file, bad)]
    assert rows == list(range(len(rows)))
    assert len(rows) > 1000
    ((reason, message),) = bad
    assert reason == "truncated gzip"
    assert message.startswith(f"{file}:{len(rows) + 1}: truncated gzip: not a whole file (")
    assert f"it breaks off after line {len(rows)}. " in message
    with pytest.raises(BadRow, match="truncated gzip: not a whole file"):
        list(jsonl_rows(file, stop))


def test_columns_of_parquet_that_python_cannot_tell(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    table = pyarrow.table({"a": ["x"], "day": pyarrow.array([2**30], pyarrow.date32())})
    pyarrow.parquet.write_table(table, str(file))
    only(parquet_rows, file, "unreadable value", "1: unreadable value: .*Leave its column out")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 2, names=["a", "a"])
    pyarrow.parquet.write_table(twice, str(file))
    only(parquet_rows, file, "header", r"1: header: it names \['a'\] more than once. Rename")


def test_rows_before_a_damaged_page_of_parquet_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    table = pyarrow.table({"a": [f"{number} {number * 7919}" for number in range(4096)]})
    pyarrow.parquet.write_table(table, str(file), row_group_size=1024, use_dictionary=False)
    data = bytearray(file.read_bytes())
    middle = slice(len(data) // 2, len(data) // 2 + 400)
    data[middle] = bytes(255 - byte for byte in data[middle])
    file.write_bytes(data)
    bad = Bad()
    rows = list(parquet_rows(file, bad))
    assert len(rows) in (1024, 2048)
    ((reason, message),) = bad
    assert reason == "not a Parquet file"
    assert message.startswith(f"{file}:{len(rows) + 1}: not a Parquet file")


@pytest.mark.parametrize("reader", [jsonl_rows, csv_rows, tsv_rows])
def test_lines_are_read_one_by_one(tmp_path: Path, reader: Reader) -> None:
    # The second half of the file would raise if it were read before it is asked for.
    good = b'{"a":1}\n' if reader is jsonl_rows else b"a\n"
    file = save(tmp_path / "rows.gz", good * 200_000)
    file.write_bytes(file.read_bytes()[:-20])
    assert len(list(itertools.islice(reader(file, Bad()), 10))) == 10


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_a_missing_file_is_missing(tmp_path: Path, reader: Reader) -> None:
    with pytest.raises(FileNotFoundError):
        list(reader(tmp_path / "none", Bad()))
