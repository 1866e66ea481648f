from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lightning_perl.batches import PromptBatch, RatedBatch
from lightning_perl.data import PreferenceDataModule
from lightning_perl.data.rows import Pair, Row, Turn, first_row
from lightning_perl.data.sources import Sources
from tests.data.counts import check_counts

Build = Callable[..., PreferenceDataModule]
ROWS = [
    {"prompt": f"question {n % 20}", "chosen": f"good {n}", "rejected": f"bad {n}"}
    for n in range(40)
]
THUMB = {"prompt": "q", "response": "a", "label": 1}


@pytest.fixture
def build(tokenizer_dir: Path) -> Build:
    def make(train: Sources, **arguments: Any) -> PreferenceDataModule:
        return PreferenceDataModule(tokenizer=str(tokenizer_dir), train=train, **arguments)

    return make


def jsonl(folder: Path, rows: Sequence[object], name: str = "rows.jsonl") -> Path:
    file = folder / name
    data = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return file


def one(build: Build, file: Sources, **arguments: Any) -> Row | Pair:
    (item,) = build(file, val_fraction=0.0, **arguments).read().train
    return item


def table(folder: Path, kind: str) -> Path:
    if kind.startswith("jsonl"):
        return jsonl(folder, ROWS, f"rows.{kind}")
    file = folder / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), str(file))
        return file
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    if kind == "csv.gz":
        file.write_bytes(gzip.compress(file.read_bytes()))
    return file


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "csv.gz", "parquet"])
def test_every_format_gives_the_same_pairs(build: Build, tmp_path: Path, kind: str) -> None:
    file = table(tmp_path, kind)
    splits = build(file).read()
    pairs = [item for item in splits.train + splits.val if isinstance(item, Pair)]
    texts = {(p.chosen.response[0].text, p.rejected.response[0].text) for p in pairs}
    assert texts == {(row["chosen"], row["rejected"]) for row in ROWS}
    first = min(pairs, key=lambda pair: len(pair.chosen.where))
    assert first.chosen.where.startswith(f"{file}:")
    assert (first.chosen.imitate, first.rejected.imitate) == (True, False)


def test_splits_by_prompt(build: Build, tmp_path: Path) -> None:
    splits = build(jsonl(tmp_path, ROWS)).read()
    prompts = [
        {item.chosen.context for item in split if isinstance(item, Pair)} for split in splits[:2]
    ]
    assert [len(part) for part in prompts] == [18, 2]
    assert not prompts[0] & prompts[1]
    assert len(splits.train) == 36
    assert splits.test == splits.val


def test_own_validation_and_test_files(build: Build, tmp_path: Path) -> None:
    train = jsonl(tmp_path, ROWS)
    other = jsonl(tmp_path, [ROWS[0], {**ROWS[0], "prompt": "new"}], "val.jsonl")
    module = build(train, val=other, test=other)
    assert [len(split) for split in module.read()] == [40, 2, 2]
    assert module.report.notes == {
        "validation rows whose prompt is a training prompt": 1,
        "test rows whose prompt is a training prompt": 1,
    }


def test_pairs_become_two_rows_of_a_batch(build: Build, tmp_path: Path) -> None:
    module = build(jsonl(tmp_path, ROWS), batch_size=4)
    module.setup()
    batch = next(iter(module.train_dataloader()))
    assert isinstance(batch, RatedBatch)
    assert batch.pairs.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert not batch.labelled.any()
    assert batch.imitate.tolist() == [True, False] * 4
    for chosen, rejected in batch.pairs.tolist():
        assert batch.row[rejected] == batch.row[chosen] + 1
        texts = [
            str(module.tokenizer.decode(batch.ids[row][batch.response_mask[row]]))
            for row in (chosen, rejected)
        ]
        assert texts[0].replace("good", "bad") == texts[1]
        starts = [
            batch.ids[row][: int(batch.response_mask[row].int().argmax())].tolist()
            for row in (chosen, rejected)
        ]
        assert starts[0] == starts[1]
    assert "train: 36 rows, 36 kept; pairs 36; chosen is the longer in 100.0%" in str(module.report)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (THUMB, (1.0, True)),
        ({**THUMB, "label": False}, (0.0, False)),
        ({**THUMB, "label": "0"}, (0.0, False)),
        ({"prompt": "q", "response": "a"}, (None, True)),
        ({"prompt": "q", "response": [{"role": "assistant", "content": "a"}]}, (None, True)),
        ({"prompt": "q", "response": "a", "note": None}, (None, True)),
    ],
)
def test_kinds_are_recognised_by_their_columns(
    build: Build, tmp_path: Path, row: object, expected: tuple[float | None, bool]
) -> None:
    item = one(build, jsonl(tmp_path, [row]))
    assert isinstance(item, Row)
    assert item.context == (Turn("user", "q"),)
    assert item.response == (Turn("agent", "a"),)
    assert (item.label, item.imitate) == expected


def test_messages_are_a_demonstrated_dialog(build: Build, tmp_path: Path) -> None:
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    messages = [{"role": role, "content": f"{role}{n}"} for n, role in enumerate(roles)]
    file = jsonl(tmp_path, [{"messages": messages}])
    item = one(build, file)
    assert isinstance(item, Row)
    assert item.context == (Turn("system", "system0"), Turn("user", "user1"))
    assert [turn.text for turn in item.response] == ["assistant2", "user3", "assistant4"]
    last = one(build, file, chat_template=True)
    assert isinstance(last, Row)
    assert [turn.text for turn in last.response] == ["assistant4"]
    assert len(last.context) == 4


def test_a_prompt_may_be_messages_also_in_csv(build: Build, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "[1, 2]?"}]
    cells = [json.dumps(messages), "[{brackets}]", "[1]"]
    file = tmp_path / "rows.csv"
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows([["prompt", "response"], *[[cell, "a"] for cell in cells]])
    rows = [item for item in build(file, val_fraction=0.0).read().train if isinstance(item, Row)]
    assert [row.context[0].text for row in rows] == ["[1, 2]?", "[{brackets}]", "[1]"]


def test_columns_map_our_names_to_the_files(build: Build, tmp_path: Path) -> None:
    file = jsonl(tmp_path, [{"question": "q", "better": "a", "worse": "b"}])
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    pair = one(build, file, columns=columns)
    assert isinstance(pair, Pair)
    assert pair.rejected.response == (Turn("agent", "b"),)
    with pytest.raises(ValueError, match=r"data.columns: unknown \['better'\]"):
        build(file, columns={"better": "chosen"})


def test_prompts_of_any_kind_can_be_sampled_from(build: Build, tmp_path: Path) -> None:
    module = build(jsonl(tmp_path, [*ROWS, {"prompt": "alone"}]), rows="prompts", val_fraction=0.0)
    module.setup()
    batches = list(module.train_dataloader())
    assert all(isinstance(batch, PromptBatch) for batch in batches)
    assert sorted(n for batch in batches for n in batch.row.tolist()) == list(range(21))


def test_lines_end_at_line_feeds_only(build: Build, tmp_path: Path) -> None:
    text = "a\u2028b\x85c"
    item = one(build, jsonl(tmp_path, [{**THUMB, "response": text}]))
    assert isinstance(item, Row)
    assert item.response[0].text == text


BAD: list[tuple[object, str, str]] = [
    ({**THUMB, "response": " "}, "empty answer", "empty answer in response. Remove the row"),
    ({**ROWS[0], "rejected": "good 0 "}, "identical pair", "identical pair: chosen and rejected"),
    ({**THUMB, "prompt": ""}, "empty prompt", "empty prompt"),
    ({**THUMB, "prompt": 3}, "wrong type", r"prompt must be a string or a list .*got int \('3'\)"),
    ({**THUMB, "response": {"a": 1}}, "wrong type", "response must be a string .*got dict"),
    ({**THUMB, "label": "good"}, "wrong type", r"label must be 1, 0, .*got str \('good'\)"),
    ({**THUMB, "prompt": [{"role": "cook"}]}, "wrong type", "prompt must be a list of .*cook"),
    ({**THUMB, "prompt": []}, "wrong type", "prompt must be a list of"),
    (
        {**THUMB, "response": [{"role": "user", "content": "x"}]},
        "wrong type",
        "response must be one assistant message",
    ),
    ({"messages": "hello"}, "wrong type", "messages must be a list of .*got str"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no answer", "hold no assistant message"),
    (
        {"prompt": "q", "answer": "a"},
        "missing column",
        r"missing column: got \['answer', 'prompt'\], expected one of: prompt \+ chosen \+ "
        r"rejected; .*Map your names with data.columns",
    ),
    ({"prompt": "q", "chosen": "a"}, "missing column", r"missing column: got \['chosen'"),
    ([1], "wrong type", "expected an object, got list"),
    ({**THUMB, "label": None}, "label is null", "label is null, so whether the answer is good"),
    ({**ROWS[0], "chosen": None}, "missing column", r"got \['chosen', .*\] \(null: \['chosen'\]\)"),
]


@pytest.mark.parametrize(("row", "reason", "words"), BAD)
def test_a_bad_row_names_file_and_line_or_is_counted(
    build: Build, tmp_path: Path, row: object, reason: str, words: str
) -> None:
    file = jsonl(tmp_path, [THUMB, row, {**THUMB, "prompt": "z"}])
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: .*{words}"):
        build(file).setup()
    module = build(file, on_bad_row="reject", val_fraction=0.0)
    module.setup()
    assert module.report.rejected == {reason: 1}
    assert module.report.splits["train"].kept == 2


def test_broken_json_names_file_and_line(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{json.dumps(THUMB)}\n\n{{"prompt": "q", \n')
    with pytest.raises(ValueError, match=r"rows.jsonl:3: broken JSON \(.*, column \d+\)"):
        build(file).setup()
    module = build(file, on_bad_row="reject", val_fraction=0.0)
    module.setup()
    assert module.report.rejected == {"broken JSON": 1}


@pytest.mark.parametrize(
    ("line", "reason", "words"),
    [
        (
            r'{"prompt": "q", "response": "ab\ud800"}',
            "half a surrogate pair",
            r"half a surrogate pair, '\\ud800', at character 2 of the agent turn",
        ),
        (
            r'{"prompt": "\udc00", "response": "a"}',
            "half a surrogate pair",
            r"half a surrogate pair, '\\udc00', at character 0 of the user turn",
        ),
        (
            f'{{"prompt": {"[" * 9000}{"]" * 9000}, "response": "a"}}',
            "broken JSON",
            r"broken JSON \(nested too deeply, column 9011\)",
        ),
        (
            f'{{"prompt": {"1" * 9000}, "response": "a"}}',
            "broken JSON",
            r"broken JSON \(too long an integer, column 12\)",
        ),
    ],
)
def test_odd_text_names_file_and_line_or_is_counted(
    build: Build, tmp_path: Path, line: str, reason: str, words: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(THUMB)}\n{line}\n")
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: {words}"):
        build(file).setup()
    prompts = build(file, on_bad_row="reject", val_fraction=0.0, rows="prompts")
    rated = build(file, on_bad_row="reject", val_fraction=0.0)
    rated.setup()
    assert rated.report.rejected == {reason: 1}
    prompts.setup()
    # Of a prompt nobody reads the answer.
    assert prompts.report.rejected == ({} if "agent" in words else {reason: 1})


def test_deep_messages_in_a_cell_are_no_messages(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    cell = f"[{{{'[' * 9000}"
    file.write_text(f"messages\n{cell}\n")
    with pytest.raises(ValueError, match=r"rows.csv:2: messages must be a list of .*got str"):
        build(file).read()
    file.write_text(f"prompt,response\n{cell},a\n")
    item = one(build, file)
    assert isinstance(item, Row)
    assert item.context[0].text == cell


def test_an_unclosed_quote_does_not_swallow_the_file(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('prompt,response\nq,a\n\nr,"b\ns,c\nt,d\n')
    words = r"rows.csv:4: broken CSV \(unexpected end of data\) in the row that begins here. Close"
    with pytest.raises(ValueError, match=words):
        build(file).read()
    module = build(file, on_bad_row="reject", val_fraction=0.0)
    module.setup()
    assert module.report.rejected == {"broken table": 1}
    check_counts(module.report, 2)
    file.write_text('prompt,response\nr,"say "b"\ns,c\n')
    with pytest.raises(ValueError, match=r"rows.csv:2: broken CSV \(.*expected after"):
        build(file).read()


def test_csv_rows_are_named_by_their_first_line(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('prompt,response\n"q\nq",a\n\n"x\ny\nz",b\n"u\nv",c,d\n')
    module = build(file, on_bad_row="reject", val_fraction=0.0)
    rows = [item for item in module.read().train if isinstance(item, Row)]
    assert [row.where for row in rows] == [f"{file}:2", f"{file}:5"]
    with pytest.raises(ValueError, match=r"rows.csv:8: the row does not have"):
        build(file).read()


def test_a_csv_header_names_a_column_once(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,response,response\nq,a,b\n")
    with pytest.raises(ValueError, match=r"rows.csv:1: the header names \['response'\] more than"):
        build(file).read()
    with pytest.raises(ValueError, match=r"no training row is left(.|\n)*rejected: 1 header"):
        build(file, on_bad_row="reject").setup()
    file.write_text("prompt,response,,\nq,a,,\n")
    assert one(build, file)


def test_csv_rows_with_too_few_cells(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,response\nq,a\nalone\nq,a,b\n")
    with pytest.raises(ValueError, match=r"rows.csv:3: the row does not have the header's 2 cells"):
        build(file).read()


def test_a_mapped_column_that_is_missing_is_not_forgiven(build: Build, tmp_path: Path) -> None:
    file = jsonl(tmp_path, [{"prompt": "q", "response": "a"}])
    with pytest.raises(ValueError, match="missing column"):
        build(file, columns={"label": "thumb"}).read()


def test_files_that_are_missing_or_of_another_format_always_stop(
    build: Build, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"No file '.*no.jsonl' \(data.train; looked"):
        build(tmp_path / "no.jsonl", on_bad_row="reject").read()
    excel = tmp_path / "rows.xlsx"
    excel.touch()
    with pytest.raises(ValueError, match=r"rows.xlsx: cannot read '.xlsx' files. Use .jsonl"):
        build(excel, on_bad_row="reject").read()


def test_parquet_pages_that_are_damaged_or_not_utf8(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    texts = pyarrow.array([b"q", b"caf\xe9"]).view(pyarrow.utf8())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": texts, "response": texts}), str(file))
    with pytest.raises(ValueError, match=r"rows.parquet:2: not UTF-8 \(.*0xe9"):
        build(file).read()
    rows = [{"prompt": f"question {n}", "response": "an answer"} for n in range(500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), str(file))
    data = bytearray(file.read_bytes())
    data[40:400] = bytes(255 - byte for byte in data[40:400])
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"rows.parquet:1: not a Parquet file, .*\(.*orrupt"):
        build(file).read()


def thumb(number: int, **changes: object) -> dict[str, object]:
    return {"prompt": f"question {number}", "response": f"answer {number}", "label": 1} | changes


# Each kind of bad row: reason, words after the file's name, and the lines that say it.
KINDS: list[tuple[str, str, list[object]]] = [
    ("missing column", ":2: missing column: got", [{"prompt": "q", "label": 1}]),
    ("wrong type", ":2: prompt must be a string or a list", [thumb(1, prompt=3)]),
    ("empty answer", ":2: empty answer in response", [thumb(1, response=" ")]),
    ("identical pair", ":2: identical pair", [{"prompt": "q", "chosen": "a", "rejected": "a "}]),
    ("conflicting labels", ":2: conflicting labels: .*:3 says", [thumb(1), thumb(1, label=0)]),
    ("prompt longer than the window", ":2: prompt longer", [thumb(1, prompt="long " * 99)]),
    ("answer longer than the window", ":2: the answer takes", [thumb(1, response="long " * 99)]),
    (
        "rating out of range",
        ":2: rating out of range: 6 ",
        [{**thumb(1), "label": None, "rating": 6}],
    ),
    ("label is null", ":2: label is null", [thumb(1, label=None)]),
    ("not UTF-8", r":2: not UTF-8 \(byte 0xe9\)", [b'{"prompt": "caf\xe9", "response": "a"}']),
    ("broken JSON", ":2: broken JSON", [b'{"prompt": "q"']),
]


@pytest.mark.parametrize(("reason", "words", "bad"), KINDS, ids=[kind[0] for kind in KINDS])
def test_every_kind_of_bad_row_stops_or_is_counted(
    build: Build, tmp_path: Path, reason: str, words: str, bad: list[object]
) -> None:
    good = [thumb(number) for number in range(10, 20)]
    lines = [
        line if isinstance(line, bytes) else json.dumps(line).encode()
        for line in (good[0], *bad, *good[1:])
    ]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(lines))
    arguments = {"rating_range": (1, 5), "max_tokens": 64, "max_response_tokens": 32}
    with pytest.raises(ValueError, match=f"rows.jsonl{words}"):
        build(file, **arguments).setup()
    module = build(file, on_bad_row="reject", **arguments)
    module.setup()
    report = module.report
    assert report.rejected == {reason: len(bad)}
    kept = report.splits["train"].kept + report.splits["val"].kept
    assert report.rows == len(lines) == kept + report.rejected.total()
    assert kept == 10


def read_all(module: PreferenceDataModule) -> list[RatedBatch]:
    module.setup()
    return list(module.train_dataloader())


WHOLE = gzip.compress("".join(f"{json.dumps(thumb(n))}\n" for n in range(999)).encode())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "data", "reason", "words"),
    [
        ("rows.jsonl.gz", b"{}", "truncated gzip", "1: not a whole gzip file"),
        ("rows.jsonl", b"<html>404</html>", "web page", "1: a web page in place of data"),
        ("rows.csv", b"<!DOCTYPE html><html>", "web page", "1: a web page in place of data"),
        ("rows.parquet", b"<html>404</html>", "web page", "1: a web page in place of data"),
        ("rows.parquet", b"PAR", "not Parquet", "1: not a Parquet file"),
        ("rows.json", b"[{", "broken JSON", "1: broken JSON"),
        ("rows.csv", b"prompt,prompt\nq,q\n", "header", "1: the header names"),
        ("rows.jsonl", b"", "empty file", "1: empty file"),
    ],
)
def test_a_file_that_is_no_data_stops_or_is_one_bad_row(
    build: Build, tmp_path: Path, name: str, data: bytes, reason: str, words: str, streaming: bool
) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}:{words}"):
        build(file, streaming=streaming).setup()
    arguments: dict[str, Any] = {"on_bad_row": "reject", "streaming": streaming}
    alone = build(file, **arguments)
    with pytest.raises(ValueError, match=rf"no training row is left(.|\n)*rejected: 1 {reason}"):
        read_all(alone)
    good = jsonl(tmp_path, [thumb(number) for number in range(9)], "good.jsonl")
    module = build([str(file), str(good)], val_fraction=0.0, **arguments)
    for _ in range(2):
        assert sum(len(batch.ids) for batch in read_all(module)) == 9
    assert module.report.rejected == {reason: 1}
    check_counts(module.report, 10)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_before_the_break_are_used(build: Build, tmp_path: Path, streaming: bool) -> None:
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(WHOLE[:-1000])
    with pytest.raises(ValueError, match=r"rows.jsonl.gz:\d+: not a whole gzip file .*after line"):
        read_all(build(file, streaming=streaming))
    module = build(file, on_bad_row="reject", streaming=streaming, val_fraction=0.0)
    used = sum(len(batch.ids) for batch in read_all(module))
    assert 100 < used < 999
    assert module.report.rejected == {"truncated gzip": 1}
    check_counts(module.report, used + 1)


def test_a_validation_file_that_is_no_data(build: Build, tmp_path: Path) -> None:
    page = tmp_path / "val.jsonl"
    page.write_text("<html>404</html>")
    train = jsonl(tmp_path, [thumb(number) for number in range(9)])
    with pytest.raises(ValueError, match=r"val.jsonl:1: a web page"):
        build(train, val=page).setup()
    module = build(train, val=page, on_bad_row="reject")
    module.setup()
    check_counts(module.report, 10)
    assert module.report.rejected == {"web page": 1}
    assert not module.report.splits["val"].rows


def test_duplicates_are_dropped_before_the_split(build: Build, tmp_path: Path) -> None:
    rows = [thumb(number) for number in range(20)]
    pairs = [{**row, "chosen": "a", "rejected": "b"} for row in ROWS[:20]]
    module = build(jsonl(tmp_path, [*rows, *pairs, *rows, *pairs[:5]]), batch_size=4)
    module.setup()
    assert module.splits is not None
    assert module.report.duplicates == 25
    assert (module.report.conflicts, module.report.rows) == (0, 65)
    assert sum(len(split) for split in module.splits[:2]) == 40
    assert str(module.report).startswith("65 rows read, 25 duplicates dropped\n")


@pytest.mark.parametrize(
    ("rows", "conflicts", "bad"),
    [
        ([thumb(0), thumb(0, label=0)], 1, 2),
        ([thumb(0), thumb(0, label=0), thumb(0)], 1, 2),
        # The other answer to the prompt, and a demonstration, contradict nobody.
        ([thumb(0), thumb(0, label=0, response="other")], 0, 0),
        ([thumb(0, label=0), {"prompt": "question 0", "response": "answer 0"}], 0, 0),
        (
            [
                {"prompt": "q", "chosen": "a", "rejected": "b"},
                {"prompt": "q", "chosen": "b", "rejected": "a"},
                {"prompt": "q", "chosen": "b", "rejected": "c"},
            ],
            1,
            2,
        ),
        ([{"prompt": "q", "response": "a", "rating": rating} for rating in (1, 3, 4)], 1, 3),
        ([{"prompt": "q", "response": "a", "rating": rating} for rating in (3, 4, 5)], 0, 0),
    ],
)
def test_conflicting_labels(
    build: Build, tmp_path: Path, rows: list[object], conflicts: int, bad: int
) -> None:
    file = jsonl(tmp_path, [*rows, thumb(7)])
    arguments: dict[str, Any] = {"rating_range": (1, 5), "val_fraction": 0.0}
    module = build(file, on_bad_row="reject", **arguments)
    module.setup()
    assert module.report.conflicts == conflicts
    assert module.report.rejected.total() == bad
    kept = build(file, keep_conflicts=True, **arguments)
    kept.setup()
    assert kept.report.conflicts == conflicts
    assert not kept.report.rejected
    assert kept.report.splits["train"].kept == module.report.splits["train"].kept + bad
    if conflicts:
        with pytest.raises(
            ValueError, match=r"rows.jsonl:1: conflicting labels: .*rows.jsonl:[23]"
        ):
            build(file, **arguments).setup()


@pytest.mark.parametrize(
    ("rating", "label"), [(1, 0.0), (2, 0.25), ("3.0", 0.5), (4.5, 0.875), (5, 1.0)]
)
def test_ratings_are_soft_labels(build: Build, rating: object, label: float) -> None:
    rows = [{"prompt": "q", "response": "a", "rating": rating}]
    item = one(build, rows, rating_range=(1, 5))
    assert isinstance(item, Row)
    assert (item.label, item.imitate) == (label, label > 0.5)
    module = build(rows, rating_range=(1, 5), val_fraction=0.0)
    module.setup()
    (batch,) = module.train_dataloader()
    assert batch.label.tolist() == [label]
    assert batch.labelled.all()
    split = module.report.splits["train"]
    assert (split.up, split.even, split.down) == (label > 0.5, label == 0.5, label < 0.5)


def test_ratings_need_a_range(build: Build) -> None:
    rows = [{"prompt": "q", "response": "a", "score": 3}]
    columns = {"rating": "score"}
    with pytest.raises(ValueError, match=r"data.train:1: has a score, and data.rating_range does"):
        build(rows, columns=columns, on_bad_row="reject").read()
    for wrong in ((5, 1), (1, 1), (0, float("inf"))):
        with pytest.raises(
            ValueError, match=r"data.rating_range must be the lowest and the highest"
        ):
            build(rows, rating_range=wrong)
    for rating in ("good", True, [3], float("nan")):
        row = {"prompt": "q", "response": "a", "rating": rating}
        with pytest.raises(ValueError, match=r"data.train:1: rating must be a number, got"):
            build([row], rating_range=(1, 5)).read()


def talk(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def test_pairs_of_whole_dialogs_share_their_prompt(build: Build) -> None:
    row = {"chosen": talk("q", "a", "r", "good"), "rejected": talk("q", "a", "r", "bad")}
    pair = one(build, [row])
    assert isinstance(pair, Pair)
    assert [turn.text for turn in pair.chosen.context] == ["q", "a", "r"]
    assert pair.chosen.context == pair.rejected.context
    assert (pair.chosen.response, pair.rejected.response) == (
        (Turn("agent", "good"),),
        (Turn("agent", "bad"),),
    )
    prompt = one(build, [row], rows="prompts")
    assert isinstance(prompt, Row)
    assert prompt.context == pair.chosen.context
    # With a prompt column beside them, as some data sets have it.
    assert one(build, [{"prompt": talk("q", "a", "r"), **row}]) == pair


@pytest.mark.parametrize(
    ("chosen", "rejected", "words"),
    [
        (talk("q", "a", "r", "b"), talk("q", "c", "r", "d"), "differ before their last messages"),
        (talk("q", "a"), talk("q", "a", "r", "d"), "differ before their last messages"),
        (talk("q", "a")[1:], talk("q", "b")[1:], "differ before their last messages"),
        (talk("q", "a", "r"), talk("q", "a", "s"), "does not end with the assistant"),
        (talk("q", "a"), talk("q", " "), "empty answer in rejected"),
        (talk("q", "a"), talk("q", "a"), "identical pair"),
        ("a", "b", "chosen must be a list of"),
    ],
)
def test_pairs_without_a_common_prompt(
    build: Build, chosen: object, rejected: object, words: str
) -> None:
    with pytest.raises(ValueError, match=f"data.train:1: .*{words}"):
        build([{"chosen": chosen, "rejected": rejected}]).read()


def test_dialogs_are_grouped_by_their_opening(build: Build) -> None:
    system = {"role": "system", "content": "Be kind."}
    rows: list[dict[str, object]] = [
        {"messages": [system, *talk(f"q{number}", "a", "r", "b")[: 2 * length]]}
        for number in range(20)
        for length in (1, 2)
    ]
    rows += [{"prompt": [system, *talk(f"q{n}", "a", "s")], "response": "b"} for n in range(20)]
    splits = build(rows, val_fraction=0.25).read()
    assert [len(split) for split in splits[:2]] == [45, 15]
    groups = [{first_row(item).dialog for item in split} for split in splits[:2]]
    assert not groups[0] & groups[1]


def test_no_row_left_and_no_tokenizer_stop_in_setup(build: Build, tmp_path: Path) -> None:
    file = jsonl(tmp_path, [{**THUMB, "response": ""}])
    with pytest.raises(ValueError, match=r"no training row is left(.|\n)*rejected: 1 empty answer"):
        build(file, on_bad_row="reject").setup()
    module = PreferenceDataModule(tokenizer=tmp_path / "nowhere", train=file)
    with pytest.raises(
        ValueError, match=r"data.tokenizer: no tokenizer could be loaded from '.*no"
    ):
        module.setup()
    with pytest.raises(ValueError, match=r"data.val_fraction must be at least 0 and below 1"):
        build(file, val_fraction=1.0)


def test_too_long_prompts_name_file_and_line(build: Build, tmp_path: Path) -> None:
    file = jsonl(tmp_path, [THUMB, {**THUMB, "prompt": "why " * 100}])
    arguments = {"max_tokens": 64, "max_response_tokens": 16, "val_fraction": 0.0}
    with pytest.raises(ValueError, match=r"rows.jsonl:2: prompt longer than the window.*is 48"):
        build(file, **arguments).setup()
    module = build(file, on_bad_row="reject", **arguments)
    module.setup()
    module.setup("test")
    assert module.report.rejected == {"prompt longer than the window": 1}
    assert module.report.splits["train"].up == 1


def test_a_null_label_of_a_mapped_column_and_of_a_pair(build: Build, tmp_path: Path) -> None:
    file = jsonl(tmp_path, [{"prompt": "q", "response": "a", "thumb": None}])
    with pytest.raises(ValueError, match=r"rows.jsonl:1: thumb is null, so whether"):
        build(file, columns={"label": "thumb"}).read()
    # One table of several kinds has to fill the columns of the others with null.
    assert isinstance(one(build, jsonl(tmp_path, [{**ROWS[0], "label": None}])), Pair)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "q", "response": "", "label": None}, ["q"]),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, ["q"]),
        ({"prompt": "q", "chosen": "a"}, ["q"]),
        ({"messages": [{"role": "user", "content": "q"}]}, ["q"]),
        (
            {
                "messages": [
                    {"role": role, "content": text}
                    for role, text in (("user", "q"), ("assistant", "a"), ("user", "r"))
                ]
            },
            ["q", "a", "r"],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a"},
                ]
            },
            ["q"],
        ),
    ],
)
def test_a_prompt_needs_no_answer(
    build: Build, tmp_path: Path, row: object, words: list[str]
) -> None:
    file = jsonl(tmp_path, [row])
    item = one(build, file, rows="prompts", columns={"rejected": "worse"})
    assert isinstance(item, Row)
    assert [turn.text for turn in item.context] == words
    module = build(file, rows="prompts")
    module.setup()
    assert module.report.splits["train"].kept == 1


def test_prompts_still_need_a_prompt(build: Build, tmp_path: Path) -> None:
    file = jsonl(tmp_path, [{"response": "a"}])
    with pytest.raises(
        ValueError, match=r"got \['response'\], expected one of: prompt; messages. "
    ):
        build(file, rows="prompts").read()


@pytest.mark.parametrize(("prompts", "val"), [(1, 0), (2, 1), (4, 1), (20, 2)])
def test_a_small_file_keeps_one_prompt_for_validation(
    build: Build, tmp_path: Path, prompts: int, val: int
) -> None:
    file = jsonl(tmp_path, [{**THUMB, "prompt": f"q{n}"} for n in range(prompts)])
    assert [len(split) for split in build(file).read()] == [prompts - val, val, val]
    assert [len(split) for split in build(file, val_fraction=0.0).read()] == [prompts, 0, 0]


def test_validation_rows_that_cannot_be_used_are_noted(build: Build, tmp_path: Path) -> None:
    long = jsonl(tmp_path, [{**THUMB, "response": "long " * 200}], "val.jsonl")
    module = build(jsonl(tmp_path, [THUMB]), val=long, on_bad_row="reject")
    module.setup()
    assert "validation rows, of which none could be used" in module.report.notes
    used = build(jsonl(tmp_path, ROWS))
    used.setup()
    assert not used.report.notes


def test_a_tokenizer_below_the_home_folder(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tokenizer_dir.parent))
    monkeypatch.setenv("USERPROFILE", str(tokenizer_dir.parent))
    file = jsonl(tmp_path, [THUMB])
    module = PreferenceDataModule(tokenizer=f"~/{tokenizer_dir.name}", train=file)
    assert module.tokenizer.eos_token == "<eos>"
    stranger = PreferenceDataModule(tokenizer="~no-such-user/trunk", train=file)
    with pytest.raises(ValueError, match=r"no tokenizer could be loaded from '~no-such-user/tr"):
        stranger.setup()


def test_a_tokenizer_without_eos_stops_in_setup(build: Build, tmp_path: Path) -> None:
    module = build(jsonl(tmp_path, [THUMB]))
    module.tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"has no EOS token, so no answer could end. Set one"):
        module.setup()


def test_an_answer_may_be_messages_also_in_csv(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    answers = [json.dumps([{"role": "assistant", "content": text}]) for text in ("good", "bad")]
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerow(["prompt", "chosen", "rejected"])
        writer.writerow(["Tea?", *answers])
    item = one(build, file)
    assert isinstance(item, Pair)
    assert (item.chosen.response[0].text, item.rejected.response[0].text) == ("good", "bad")
