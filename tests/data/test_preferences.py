from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lightning_perl.batches import PromptBatch, RatedBatch
from lightning_perl.data import PreferenceDataModule
from lightning_perl.data.reading import Sources
from lightning_perl.data.rows import Item, Pair, Row, Turn
from tests.data.counts import check_counts

Build = Callable[..., PreferenceDataModule]
ROWS = [
    {"prompt": f"question {n % 20}", "chosen": f"good {n}", "rejected": f"bad {n}"}
    for n in range(40)
]


@pytest.fixture
def build(tokenizer_dir: Path) -> Build:
    def make(train: Sources, **arguments: Any) -> PreferenceDataModule:
        return PreferenceDataModule(tokenizer=str(tokenizer_dir), train=train, **arguments)

    return make


@pytest.fixture
def ready(build: Build) -> Build:
    """Builds a datamodule and sets it up."""

    def make(train: Sources, **arguments: Any) -> PreferenceDataModule:
        module = build(train, **arguments)
        module.setup()
        return module

    return make


def jsonl(folder: Path, rows: Sequence[object], name: str = "rows.jsonl") -> Path:
    file = folder / name
    data = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return file


def write_csv(file: Path, rows: Sequence[Sequence[str]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows(rows)
    return file


def items(build: Build, train: Sources, **arguments: Any) -> list[Item]:
    return build(train, val_fraction=0.0, **arguments).read().train


def row_of(build: Build, row: object, **arguments: Any) -> Row:
    (item,) = items(build, [row], **arguments)
    assert isinstance(item, Row)
    return item


def pair_of(build: Build, row: object, **arguments: Any) -> Pair:
    (item,) = items(build, [row], **arguments)
    assert isinstance(item, Pair)
    return item


def words(turns: Sequence[Turn]) -> list[str]:
    return [turn.text for turn in turns]


def thumb(number: int, **changes: object) -> dict[str, object]:
    return {"prompt": f"question {number}", "response": f"answer {number}", "label": 1} | changes


def talk(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def two(chosen: object, rejected: object, **more: object) -> dict[str, object]:
    return {"chosen": chosen, "rejected": rejected, **more}


def table(folder: Path, kind: str) -> Path:
    file = folder / f"rows.{kind}"
    if kind.startswith("jsonl"):
        return jsonl(folder, ROWS, file.name)
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), str(file))
        return file
    write_csv(file, [list(ROWS[0]), *(list(row.values()) for row in ROWS)])
    if kind == "csv.gz":
        file.write_bytes(gzip.compress(file.read_bytes()))
    return file


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "csv.gz", "parquet"])
def test_every_format_gives_the_same_pairs(build: Build, tmp_path: Path, kind: str) -> None:
    file = table(tmp_path, kind)
    pairs = [item for item in items(build, file) if isinstance(item, Pair)]
    texts = [(pair.chosen.response[0].text, pair.rejected.response[0].text) for pair in pairs]
    assert texts == [(row["chosen"], row["rejected"]) for row in ROWS]
    assert pairs[0].chosen.where == f"{file}:{2 if 'csv' in kind else 1}"
    assert (pairs[0].chosen.imitate, pairs[0].rejected.imitate) == (True, False)


def test_splits_by_prompt(build: Build) -> None:
    splits = build(ROWS).read()
    prompts = [{item.context for item in split} for split in splits[:2]]
    assert [len(part) for part in prompts] == [18, 2]
    assert not prompts[0] & prompts[1]
    assert len(splits.train) == 36
    assert splits.test == splits.val


def test_own_validation_and_test_files(build: Build, tmp_path: Path) -> None:
    other = jsonl(tmp_path, [ROWS[0], {**ROWS[0], "prompt": "new"}])
    module = build(ROWS, val=other, test=other)
    assert [len(split) for split in module.read()] == [40, 2, 2]
    assert module.report.notes == {
        "validation rows whose prompt is a training prompt": 1,
        "test rows whose prompt is a training prompt": 1,
    }


def test_pairs_become_two_rows_of_a_batch(ready: Build) -> None:
    module = ready(ROWS, batch_size=4)
    batch = next(iter(module.train_dataloader()))
    assert isinstance(batch, RatedBatch)
    assert batch.pairs.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert not batch.labelled.any()
    assert batch.imitate.tolist() == [True, False] * 4
    decode = module.tokenizer.decode
    for chosen, rejected in batch.pairs.tolist():
        assert batch.row[rejected] == batch.row[chosen] + 1
        starts, texts = [], []
        for row in (chosen, rejected):
            texts.append(str(decode(batch.ids[row][batch.response_mask[row]])))
            starts.append(batch.ids[row][: int(batch.response_mask[row].int().argmax())].tolist())
        assert texts[0].replace("good", "bad") == texts[1]
        assert starts[0] == starts[1]
    assert module.report.splits["test"] is module.report.splits["val"]
    assert "train: 36 rows, 36 kept; pairs 36; chosen is the longer in 100.0%" in str(module.report)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"label": 1}, (1.0, True)),
        ({"label": False}, (0.0, False)),
        ({"label": "0"}, (0.0, False)),
        ({}, (None, True)),
        ({"response": [{"role": "assistant", "content": "a"}]}, (None, True)),
        ({"note": None}, (None, True)),
    ],
)
def test_kinds_are_recognised_by_their_columns(
    build: Build, row: dict[str, object], expected: tuple[float | None, bool]
) -> None:
    item = row_of(build, {"prompt": "q", "response": "a"} | row)
    assert (item.context, item.response) == ((Turn("user", "q"),), (Turn("agent", "a"),))
    assert (item.label, item.imitate) == expected


def test_messages_are_a_demonstrated_dialog(build: Build) -> None:
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    row = {"messages": [{"role": role, "content": f"{role}{n}"} for n, role in enumerate(roles)]}
    item = row_of(build, row)
    assert item.context == (Turn("system", "system0"), Turn("user", "user1"))
    assert words(item.response) == ["assistant2", "user3", "assistant4"]


def test_columns_map_our_names_to_the_files(build: Build) -> None:
    row = {"question": "q", "better": "a", "worse": "b"}
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    assert pair_of(build, row, columns=columns).rejected.response == (Turn("agent", "b"),)
    with pytest.raises(ValueError, match=r"data.columns: unknown \['better'\]"):
        build([row], columns={"better": "chosen"})


def test_prompts_of_any_kind_can_be_sampled_from(ready: Build) -> None:
    module = ready([*ROWS, {"prompt": "alone"}], rows="prompts", val_fraction=0.0)
    batches = list(module.train_dataloader())
    assert all(isinstance(batch, PromptBatch) for batch in batches)
    assert sorted(n for batch in batches for n in batch.row.tolist()) == list(range(21))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_batch_of_prompts_is_a_mixture_of_lengths(ready: Build, streaming: bool) -> None:
    rows = [{"prompt": f"{n} " + "long " * (n % 2) * 20, "response": "a"} for n in range(64)]
    settings: dict[str, Any] = {"val_fraction": 0.0, "streaming": streaming, "batch_size": 8}
    mixed, bucketed = (ready(rows, rows=kind, **settings) for kind in ("prompts", "rated"))
    long = [(batch.mask.sum(1) > 20).tolist() for batch in mixed.train_dataloader()]
    assert all(0 < sum(rows) < 8 for rows in long)
    long = [(batch.attention_mask.sum(1) > 20).tolist() for batch in bucketed.train_dataloader()]
    assert all(sum(rows) in (0, 8) for rows in long)


DEEP = f'{{"prompt": {"[" * 9000}{"]" * 9000}, "response": "a"}}'
PARTED = "there is no prompt column, and chosen and rejected differ before their last messages"
ANSWERS = {"prompt": "q", "answers": ["a", "b"]}
# Each kind of bad row: reason, words behind `rows.jsonl:2: `, and the row, or the lines of rows.
BAD: list[tuple[str, str, object]] = [
    ("empty answer", "empty answer. Remove the row", thumb(1, response=" ")),
    ("empty answer", "empty answer. Remove", two(talk("q", "a"), talk("q", " "))),
    ("identical pair", "identical pair: chosen and rejected", two("a", "a ", prompt="q")),
    ("identical pair", "identical pair", two(talk("q", "a"), talk("q", "a"))),
    ("empty prompt", "empty prompt", thumb(1, prompt="")),
    ("empty prompt", "empty prompt", {"messages": talk(" ", "a")}),
    ("empty answer", "empty answer", thumb(1, response="\ufeff\x00 ")),
    ("wrong type", r"prompt must be a string or a list .*int \('3'\)", thumb(1, prompt=3)),
    ("wrong type", "prompt must be a list of .*cook", thumb(1, prompt=[{"role": "cook"}])),
    ("wrong type", "prompt must be a list of", thumb(1, prompt=[])),
    ("wrong type", "response must be a string .*got dict", thumb(1, response={"a": 1})),
    ("wrong type", "response must be one assistant message", thumb(1, response=talk("x"))),
    ("wrong type", r"label must be 1, 0, .*got str \('fine'\)", thumb(1, label="fine")),
    ("wrong type", "messages must be a list of .*got str", {"messages": "hello"}),
    ("missing column", r"missing column: got .*prompt \+ chosen \+ rejected", two("a", "b")),
    ("missing column", "missing column: .*Did you mean 'promt'", {"promt": "x", **two("a", "b")}),
    ("wrong type", "expected an object, got list", [[1]]),
    ("no answer", "messages hold no assistant message", {"messages": talk("x")}),
    ("no answer", "chosen or .* end with", two(talk("q", "a", "r"), talk("q", "a", "s"))),
    ("no common prompt", PARTED, two(talk("q", "a", "r", "b"), talk("q", "c", "r", "d"))),
    ("no common prompt", PARTED, two(talk("q", "a"), talk("q", "a", "r", "d"))),
    ("no common prompt", PARTED, two(talk("q", "a")[1:], talk("q", "b")[1:])),
    (
        "missing column",
        r"missing column: got \['prompt', 'said'\], expected one of: prompt \+ chosen \+ "
        r"rejected; .*Map your names with data.columns",
        {"prompt": "q", "said": "a"},
    ),
    ("missing column", r"missing column: got \['chosen'", {"prompt": "q", "chosen": "a"}),
    (
        "missing column",
        r"missing column: got .* \(null: \['chosen'\]\)",
        two(None, "b", prompt="q"),
    ),
    ("label is null", "label is null, so whether the answer is good", thumb(1, label=None)),
    ("rating out of range", "rating out of range: 6 ", {**thumb(1), "label": None, "rating": 6}),
    ("conflicting labels", "conflicting labels: .*:3 says", [thumb(1), thumb(1, label=0)]),
    ("prompt longer than the window", "prompt longer .* is 32 ", thumb(1, prompt="long " * 99)),
    ("answer longer than the window", "the answer takes", thumb(1, response="long " * 99)),
    ("not UTF-8", r"not UTF-8 \(byte 0xe9\)", [b'{"prompt": "caf\xe9", "response": "a"}']),
    ("broken JSON", r"broken JSON \(.*, column \d+\)", [b'{"prompt": "q"']),
    ("broken JSON", r"broken JSON \(nested too deeply, column 9011\)", [DEEP.encode()]),
    ("broken JSON", r"broken .*too long an integer, column 12\)", [b'{"prompt": ' + b"1" * 9000]),
    ("broken JSON", r"the key 'a' is there twice, column 21\)", [b'{"prompt": {"a": 1, "a": 2}}']),
    ("wrong type", "system must be a string, got int", thumb(1, system=5)),
    ("wrong type", "input must be a string, got int", thumb(1, input=5, history=talk("x"))),
    ("wrong type", "scores must be a list of numbers, got str", {**ANSWERS, "scores": "12"}),
    (
        "half a surrogate pair",
        r"half a surrogate pair, '\\ud800', at character 2 of the agent turn",
        [rb'{"prompt": "q", "response": "ab\ud800"}'],
    ),
    (
        "half a surrogate pair",
        r"half a surrogate pair, '\\udc00', at character 0 of the user turn",
        [rb'{"prompt": "\udc00", "response": "a"}'],
    ),
]


@pytest.mark.parametrize(("reason", "words", "bad"), BAD)
def test_every_kind_of_bad_row_stops_or_is_counted(
    build: Build, tmp_path: Path, reason: str, words: str, bad: object
) -> None:
    good = [thumb(number) for number in range(10, 20)]
    rows = bad if isinstance(bad, list) else [bad]
    lines = [
        row if isinstance(row, bytes) else json.dumps(row).encode()
        for row in (good[0], *rows, *good[1:])
    ]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(lines))
    arguments = {"rating_range": (1, 5), "max_tokens": 64, "max_response_tokens": 32}
    with pytest.raises(ValueError, match=f"rows.jsonl:2: .*{words}"):
        build(file, **arguments).setup()
    module = build(file, on_bad_row="reject", **arguments)
    module.setup()
    module.setup("test")
    report = module.report
    assert report.rejected == {reason: len(rows)}
    kept = report.splits["train"].kept + report.splits["val"].kept
    assert report.rows == len(lines) == kept + report.rejected.total()
    assert kept == 10


def test_bad_rows_of_mapped_columns(build: Build) -> None:
    columns = {"label": "thumb"}
    with pytest.raises(ValueError, match=r"data.train:1: missing column"):
        build([{"prompt": "q", "response": "a"}], columns=columns).read()
    with pytest.raises(ValueError, match=r"data.train:1: thumb is null, so whether"):
        build([{"prompt": "q", "response": "a", "thumb": None}], columns=columns).read()
    # One table of several kinds has to fill the columns of the others with null.
    assert pair_of(build, {**ROWS[0], "label": None})


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("margin", thumb(1)),
        ("response", two("a", "b", prompt="q")),
        ("input", {"messages": talk("q", "a")}),
        ("prompt", {"messages": talk("q", "a")}),
    ],
)
def test_a_mapped_column_that_a_row_has_no_use_for_is_refused(
    build: Build, name: str, row: dict[str, Any]
) -> None:
    columns = {name: "own"}
    with pytest.raises(
        ValueError, match=rf"data.train:1: mapped column .*\['{name}'\], which a row"
    ):
        build([{**row, "own": "2"}], columns=columns).read()
    build([{**row, "own": None}], columns=columns).read()
    module = build([{**row, name: "2"}])
    module.read()
    assert module.report.unread == {name: 1}


def test_a_mapped_column_that_is_not_there_is_a_slip(build: Build) -> None:
    row = two("a", "b", prompt="q")
    with pytest.raises(ValueError, match=r"data.train:1: missing column: got .*prompt; messages"):
        build([row], columns={"system": "rules"}, rows="prompts").read()
    build([row], columns={"label": "thumb"}, rows="prompts").read()  # not looked at
    parts = {"rating": {"help": 0.5, "truth": 0.5}}
    with pytest.raises(ValueError, match=r"data.train:1: missing column: .*null: \['truth'\]"):
        build([{**thumb(1), "help": 1, "truth": None}], columns=parts, rating_range=(0, 5)).read()


def test_rows_that_a_function_leaves_out_are_counted(build: Build) -> None:
    module = build([thumb(1), thumb(2)], read_row=lambda row: row if row == thumb(1) else None)
    assert len(module.read().train) == 1
    assert module.report.left_out == {"by read_row": 1}


def test_rows_as_pandas_gives_them(build: Build) -> None:
    talked = np.array(talk("q", "a"), dtype=object)
    (row,) = items(build, [{"messages": talked, 0: 1}])
    assert row.context[0].text == "q"
    (row,) = items(build, [{**thumb(1), "system": float("nan")}])
    assert [turn.role for turn in row.context] == ["user"]
    with pytest.raises(ValueError, match=r"data.train:1: missing column: got \['0', '1'\]"):
        build([{0: "q", 1: "a"}]).read()


def test_messages_in_the_cells_of_csv(build: Build, tmp_path: Path) -> None:
    deep = f"[{{{'[' * 9000}"
    cells = [json.dumps(talk("[1, 2]?")), "[{brackets}]", "[1]", deep]
    file = write_csv(tmp_path / "rows.csv", [["prompt", "response"], *[[c, "a"] for c in cells]])
    texts = [item.context[0].text for item in items(build, file)]
    assert texts == ["[1, 2]?", *cells[1:]]
    answers = [json.dumps(talk("q", text)[1:]) for text in ("good", "bad")]
    write_csv(file, [["prompt", "chosen", "rejected"], ["Tea?", *answers]])
    (pair,) = items(build, file)
    assert isinstance(pair, Pair)
    assert words(pair.chosen.response + pair.rejected.response) == ["good", "bad"]
    write_csv(file, [["messages"], [deep]])
    with pytest.raises(ValueError, match=r"rows.csv:2: .*messages must be a list of .*got str"):
        build(file).read()


def test_files_that_are_missing_or_of_another_format_always_stop(
    build: Build, tmp_path: Path
) -> None:
    for name in ("no.jsonl", f"{'long ' * 99}no.jsonl"):
        with pytest.raises(FileNotFoundError, match=r"No file '.* \(data.train; looked"):
            build(tmp_path / name, on_bad_row="reject").read()
    excel = tmp_path / "rows.xlsx"
    excel.touch()
    with pytest.raises(ValueError, match=r"rows.xlsx: cannot read '.xlsx' files. Use .jsonl"):
        build(excel, on_bad_row="reject").read()


def read_all(module: PreferenceDataModule) -> list[RatedBatch]:
    module.setup()
    return list(module.train_dataloader())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "data", "reason", "words"),
    [
        ("rows.jsonl.gz", b"{}", "truncated gzip", "1: truncated gzip"),
        ("rows.jsonl", b"<html>404</html>", "web page", "1: web page"),
        ("rows.csv", b"<!DOCTYPE html><html>", "web page", "1: web page"),
        ("rows.parquet", b"<html>404</html>", "web page", "1: web page"),
        ("rows.parquet", b"PAR", "not a Parquet file", "1: not a Parquet file"),
        ("rows.json", b"[{", "broken JSON", "1: broken JSON"),
        ("rows.csv", b"prompt,prompt\nq,q\n", "header", "1: header: it names"),
        ("rows.jsonl", b"", "empty file", "1: empty file"),
    ],
)
def test_a_file_that_is_no_data_stops_or_is_one_bad_row(
    build: Build, tmp_path: Path, name: str, data: bytes, reason: str, words: str, streaming: bool
) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}:{words}"):
        build(file, val_fraction=0.0, streaming=streaming).setup()
    arguments: dict[str, Any] = {
        "on_bad_row": "reject",
        "streaming": streaming,
        "val_fraction": 0.0,
    }
    alone = build(file, **arguments)
    with pytest.raises(ValueError, match=rf"no training row is left(.|\n)*rejected: 1 {reason}"):
        read_all(alone)
    good = jsonl(tmp_path, [thumb(number) for number in range(9)], "good.jsonl")
    module = build([str(file), str(good)], **arguments)
    for _ in range(2):
        assert sum(len(batch.ids) for batch in read_all(module)) == 9
    assert module.report.rejected == {reason: 1}
    check_counts(module.report, 10)


def test_a_validation_file_that_is_no_data(ready: Build, tmp_path: Path) -> None:
    page = tmp_path / "val.jsonl"
    page.write_text("<html>404</html>")
    train = [thumb(number) for number in range(9)]
    with pytest.raises(ValueError, match=r"val.jsonl:1: web page"):
        ready(train, val=page)
    report = ready(train, val=page, on_bad_row="reject").report
    check_counts(report, 10)
    assert report.rejected == {"web page": 1}
    assert not report.splits["val"].rows


def test_duplicates_are_dropped_before_the_split(ready: Build) -> None:
    rows = [thumb(number) for number in range(20)]
    pairs = [{**row, "chosen": "a", "rejected": "b"} for row in ROWS[:20]]
    module = ready([*rows, *pairs, *rows, *pairs[:5]], batch_size=4)
    assert module.splits is not None
    report = module.report
    assert (report.duplicates, report.conflicts, report.rows) == (25, 0, 65)
    assert sum(len(split) for split in module.splits[:2]) == 40
    assert str(report).startswith("65 rows read, 25 duplicates dropped\n")


@pytest.mark.parametrize(
    ("rows", "conflicts", "bad"),
    [
        ([thumb(0), thumb(0, label=0)], 1, 2),
        ([thumb(0), thumb(0, label=0), thumb(0)], 1, 2),
        # The other answer to the prompt, and a demonstration, contradict nobody.
        ([thumb(0), thumb(0, label=0, response="other")], 0, 0),
        ([thumb(0, label=0), {"prompt": "question 0", "response": "answer 0"}], 0, 0),
        ([two(*answers, prompt="q") for answers in ("ab", "ba", "bc")], 1, 2),
        ([{"prompt": "q", "response": "a", "rating": rating} for rating in (1, 3, 4)], 1, 3),
        ([{"prompt": "q", "response": "a", "rating": rating} for rating in (3, 4, 5)], 0, 0),
    ],
)
def test_conflicting_labels(ready: Build, rows: list[object], conflicts: int, bad: int) -> None:
    rows = [*rows, thumb(7)]
    arguments: dict[str, Any] = {"rating_range": (1, 5), "val_fraction": 0.0}
    report = ready(rows, on_bad_row="reject", **arguments).report
    assert (report.conflicts, report.rejected.total()) == (conflicts, bad)
    kept = ready(rows, keep_conflicts=True, **arguments).report
    assert (kept.conflicts, kept.rejected.total()) == (conflicts, 0)
    assert kept.splits["train"].kept == report.splits["train"].kept + bad
    if conflicts:
        with pytest.raises(ValueError, match=r"n:1: conflicting labels: data.train:[23]"):
            ready(rows, **arguments)


@pytest.mark.parametrize(
    ("rating", "label"), [(1, 0.0), (2, 0.25), ("3.0", 0.5), (4.5, 0.875), (5, 1.0)]
)
def test_ratings_are_soft_labels(ready: Build, rating: object, label: float) -> None:
    row = {"prompt": "q", "response": "a", "rating": rating}
    module = ready([row], rating_range=(1, 5), val_fraction=0.0)
    (batch,) = module.train_dataloader()
    assert batch.label.tolist() == [label]
    assert batch.labelled.all()
    assert batch.imitate.tolist() == [label > 0.5]
    split = module.report.splits["train"]
    assert (split.up, split.even, split.down) == (label > 0.5, label == 0.5, label < 0.5)


def test_ratings_need_a_range(build: Build) -> None:
    rows = [{"prompt": "q", "response": "a", "score": 3}]
    columns = {"rating": "score"}
    with pytest.raises(ValueError, match=r"data.train:1: has a score, and data.rating_range does"):
        build(rows, columns=columns, on_bad_row="reject").read()
    for wrong in ((5, 1), (1, 1)):
        with pytest.raises(ValueError, match=r"data.rating_range must be the lowest and the high"):
            build(rows, rating_range=wrong)
    for rating in ("good", True, [3], float("nan")):
        row = {"prompt": "q", "response": "a", "rating": rating}
        with pytest.raises(ValueError, match=r"data.train:1: .*rating must be a number, got"):
            build([row], rating_range=(1, 5)).read()


def test_pairs_of_whole_dialogs_share_their_prompt(build: Build) -> None:
    row = two(talk("q", "a", "r", "good"), talk("q", "a", "r", "bad"))
    pair = pair_of(build, row)
    assert words(pair.chosen.context) == ["q", "a", "r"]
    assert pair.chosen.context == pair.rejected.context
    assert pair.chosen.response + pair.rejected.response == (
        Turn("agent", "good"),
        Turn("agent", "bad"),
    )
    assert row_of(build, row, rows="prompts").context == pair.chosen.context
    # With a prompt column beside them, as some data sets have it.
    assert pair_of(build, {"prompt": talk("q", "a", "r"), **row}) == pair


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
    groups = [{item.dialog for item in split} for split in splits[:2]]
    assert not groups[0] & groups[1]


def test_no_row_left_stops(ready: Build) -> None:
    with pytest.raises(ValueError, match=r"no training row is left(.|\n)*rejected: 1 empty answer"):
        ready([thumb(1, response="")], on_bad_row="reject")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "response": "", "label": None}, ["q"]),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, ["q"]),
        ({"prompt": "q", "chosen": "a"}, ["q"]),
        ({"messages": talk("q")}, ["q"]),
        ({"messages": talk("q", "a", "r")}, ["q", "a", "r"]),
        ({"messages": talk("q", "a")}, ["q"]),
    ],
)
def test_a_prompt_needs_no_answer(
    ready: Build, build: Build, row: object, expected: list[str]
) -> None:
    item = row_of(build, row, rows="prompts", columns={"rejected": "worse"})
    assert words(item.context) == expected
    assert ready([row], rows="prompts").report.splits["train"].kept == 1
    with pytest.raises(ValueError, match=r"got \['response'\], expected one of: prompt; messages."):
        build([row, {"response": "a"}], rows="prompts").read()


def test_conversations_of_another_corpus_are_prompts_by_a_mapping(build: Build) -> None:
    # As the documentation says of BOLT's conversations.
    row = {"file": "CHT_ENG_1", "conversation": "A: Tea?\nB: Please."}
    item = row_of(build, row, rows="prompts", columns={"prompt": "conversation"})
    assert words(item.context) == [row["conversation"]]
    assert not item.response


@pytest.mark.parametrize(("prompts", "val"), [(1, 0), (2, 1), (4, 1), (20, 2)])
def test_a_small_file_keeps_one_prompt_for_validation(build: Build, prompts: int, val: int) -> None:
    rows = [thumb(number) for number in range(prompts)]
    assert [len(split) for split in build(rows).read()] == [prompts - val, val, val]
    assert [len(split) for split in build(rows, val_fraction=0.0).read()] == [prompts, 0, 0]


def test_validation_rows_that_cannot_be_used_are_noted(ready: Build) -> None:
    long = [thumb(1, response="long " * 200)]
    notes = ready([thumb(0)], val=long, on_bad_row="reject").report.notes
    assert "validation rows, of which none could be used" in notes
    assert not ready(ROWS).report.notes


def test_the_tokenizer_is_a_folder_also_below_home(
    tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tokenizer_dir.parent))
    monkeypatch.setenv("USERPROFILE", str(tokenizer_dir.parent))
    module = PreferenceDataModule(tokenizer=f"~/{tokenizer_dir.name}", train=ROWS)
    assert module.tokenizer.eos_token == "<eos>"
    for nowhere in ("~no-such-user/trunk", str(tokenizer_dir / "nowhere")):
        module = PreferenceDataModule(tokenizer=nowhere, train=ROWS)
        words = f"data.tokenizer: no tokenizer could be loaded from '{nowhere}'. Give the trunk's"
        with pytest.raises(ValueError, match=words):
            module.setup()


def test_training_rows_are_known_by_their_content(ready: Build, tmp_path: Path) -> None:
    def known(name: str, table: Sequence[object] = ROWS, **arguments: Any) -> dict[str, str]:
        return ready(str(jsonl(tmp_path, table, name)), **arguments).trained_rows

    first = known("first.jsonl")
    assert first["sources"] == str(tmp_path / "first.jsonl")
    assert known("moved.jsonl")["rows"] == first["rows"]
    turned = [{**ROWS[0], "chosen": "bad 0", "rejected": "good 0"}, *ROWS[1:]]
    changes = [known("turned.jsonl", turned), known("one_less.jsonl", ROWS[1:])]
    changes += [known("more.jsonl", val_fraction=0.3), known("prompts.jsonl", rows="prompts")]
    stream: dict[str, Any] = {"streaming": True, "val_fraction": 0.0}
    streams = [known(f"{number}.jsonl", **stream) for number in range(2)]
    assert len({each["rows"] for each in [first, *changes, *streams]}) == 7
