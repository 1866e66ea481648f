"""Tests of the summarization corpora, made up in their true layouts, and real."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_perl.data import SummarizationDataModule, corpus
from lightning_perl.data.corpus import Remote
from lightning_perl.data.rows import Item, Pair, Row, Splits, Turn
from tests.data.corpus_files import (
    comparison,
    dialogue,
    human,
    judged,
    post,
    write_csv,
    write_lines,
)
from tests.data.golden import assert_golden

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
PROMPT = "SUBREDDIT: r/tea\n\nTITLE: Cup 1\n\nPOST: I drank cup 1.\n\nIt was hot.\n\nTL;DR:"
Build = Callable[..., SummarizationDataModule]


@pytest.fixture
def build(tmp_path: Path, tokenizer_dir: Path) -> Build:
    def make(corpus: str, **arguments: Any) -> SummarizationDataModule:
        defaults: dict[str, Any] = {"tokenizer": str(tokenizer_dir), "data_dir": tmp_path}
        return SummarizationDataModule(**defaults | {"corpus": corpus} | arguments)

    return make


def items(splits: Splits) -> list[Item]:
    found = [item for split in splits for item in split]
    return sorted(found, key=lambda item: int(item.where.rpartition(":")[2]))


def pairs(splits: Splits) -> list[Pair]:
    return [item for item in items(splits) if isinstance(item, Pair)]


def rows(splits: Splits) -> list[Row]:
    return [item for item in items(splits) if isinstance(item, Row)]


def test_posts_in_both_layouts_are_the_same_demonstrations(build: Build, tmp_path: Path) -> None:
    write_lines(tmp_path / "tldr/oai1b_judged.jsonl.gz", [judged(n) for n in range(8)])
    local = rows(build("tldr").read())
    for place, name in enumerate(("train", "valid", "test")):
        file = tmp_path / f"tldr_3_filtered/{name}.jsonl"
        write_lines(file, [post(place * 8 + n) for n in range(8)])
    splits = build("tldr").read()
    assert [len(split) for split in splits] == [8, 8, 8]
    upstream = [row for row in splits.train if isinstance(row, Row)]
    assert local[1].context == upstream[1].context == (Turn("user", PROMPT),)
    assert local[1].response == upstream[1].response == (Turn("agent", "Cup 1 was hot."),)
    assert all(row.imitate and row.label is None for row in (*local, *upstream))


@pytest.mark.parametrize("name", ["oai1b_judged.jsonl.gz", "oai1b.csv_judged.csv"])
def test_the_judge_prefers_or_is_silent(build: Build, tmp_path: Path, name: str) -> None:
    table = [judged(0, "ours"), judged(1, "reference"), judged(2, ""), judged(3)]
    write = write_csv if name.endswith(".csv") else write_lines
    write(tmp_path / "tldr" / name, table)
    module = build("tldr_judged", max_tokens=256)
    module.setup()
    assert module.splits is not None
    first, second, third = pairs(module.splits)
    assert first.chosen.response == third.chosen.response == (Turn("agent", "I drank."),)
    assert second.chosen.response == (Turn("agent", "Cup 1 was hot."),)
    assert second.chosen.context == second.rejected.context == (Turn("user", PROMPT),)
    assert module.report.left_out == {"posts that were not judged": 1}
    assert module.report.rows == 4
    write(tmp_path / "tldr" / name, [*table, judged(4, "both")])
    with pytest.raises(ValueError, match=r"preferred must be ours, reference or empty, got str"):
        build("tldr_judged", on_bad_row="raise").read()


def test_flattened_comparisons_are_pooled_and_divided_by_post(build: Build, tmp_path: Path) -> None:
    write_lines(tmp_path / "tldr-human/sample_train.jsonl.gz", [human(n) for n in range(20)])
    swapped = human(3)
    swapped["preferred_summary"], swapped["rejected_summary"] = (
        swapped["rejected_summary"],
        swapped["preferred_summary"],
    )
    other = {**human(4), "preferred_summary": "Hot."}
    write_lines(tmp_path / "tldr-human/sample_test.jsonl.gz", [human(2), swapped, other])
    module = build("tldr_human")
    splits = module.read()
    assert (module.report.duplicates, module.report.conflicts) == (1, 1)
    assert sum(map(len, splits)) == 22
    groups = [{item.dialog for item in split} for split in splits]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 20
    prompt = PROMPT.partition("\n\n")[2]
    found = next(pair for pair in pairs(splits) if pair.chosen.dialog == "t3_1")
    assert found.chosen.context == (Turn("user", prompt),)
    assert found.chosen.response == (Turn("agent", "Cup 1 was hot."),)


def test_original_comparisons_keep_their_splits_and_the_choice_decides(
    build: Build, tmp_path: Path
) -> None:
    write_lines(tmp_path / "comparisons/batch3.json", [comparison(n, n % 2) for n in range(6)])
    table = [comparison(6, 0, "valid1"), comparison(7, 0, "valid2"), comparison(8, 0, "valid2")]
    write_lines(tmp_path / "comparisons/batch11.json.gz", table)
    # Another task's file, that the release has too.
    write_lines(tmp_path / "comparisons/batch0_cnndm.json", [{"info": {"article": "x"}}])
    splits = build("comparisons").read()
    assert [len(split) for split in splits] == [6, 1, 2]
    for place, pair in enumerate(pairs(Splits(splits.train, [], []))):
        better, worse = f"Cup {place} was hot.", "I drank."
        if place % 2:
            better, worse = worse, better
        assert pair.chosen.response == (Turn("agent", better),)
        assert pair.rejected.response == (Turn("agent", worse),)
        assert pair.chosen.dialog == f"t3_{place}"
    assert splits.train[1].context == (Turn("user", PROMPT),)


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"choice": 2}, "unclear preference", r"\['choice'\] must say 0 or 1"),
        ({"choice": None}, "broken row", "looks like a row of 'openai_comparisons'"),
        ({"split": "test"}, "wrong type", "split must be one of .*'test'"),
        ({"summaries": [{"text": "x"}]}, "broken row", "looks like a row of"),
        ({"info": {"id": "t3_1"}}, "empty prompt", "empty prompt"),
        ({"info": {**comparison(1)["info"], "post": ""}}, "empty prompt", "empty prompt"),
        ({"summaries": [{"text": "x"}, {"text": " x"}]}, "identical pair", "identical pair"),
    ],
)
def test_bad_comparisons(
    build: Build, tmp_path: Path, change: dict[str, Any], reason: str, words: str
) -> None:
    table = [*(comparison(n) for n in range(4)), {**comparison(9), **change}]
    write_lines(tmp_path / "comparisons/batch22.json", table)
    module = build("comparisons")
    assert len(pairs(module.read())) == 4
    assert module.report.rejected == {reason: 1}
    with pytest.raises(ValueError, match=f"batch22.json:5: .*{words}"):
        build("comparisons", on_bad_row="raise").read()


@pytest.mark.parametrize("folder", ["dialogsum", "DialogSum_Data"])
def test_dialogs_keep_their_test_split_and_its_first_summary(
    build: Build, tmp_path: Path, folder: str
) -> None:
    dev = [dialogue(n) for n in range(20)]
    test = [{**dialogue(20 + n, several=True), "summary2": "no"} for n in range(5)]
    write_lines(tmp_path / folder / "dialogsum.dev.jsonl", dev)
    write_lines(tmp_path / folder / "dialogsum.test.jsonl", test)
    module = build("dialogsum")
    splits = module.read()
    assert [len(split) for split in splits] == [18, 2, 5]
    assert module.report.notes == {
        "rows of the upstream validation split, divided here: not the upstream validation score": 20,
        "dialogs with three summaries, the first one read": 5,
    }
    row = splits.test[0].rows[0]
    prompt = "CONVERSATION:\n#Person1#: Tea 20?\n#Person2#: Please.\n\nTL;DR:"
    assert row.context == (Turn("user", prompt),)
    assert row.response == (Turn("agent", "#Person2# wants tea 20."),)
    write_lines(tmp_path / folder / "dialogsum.train.jsonl", [dialogue(n) for n in range(30, 40)])
    module = build("dialogsum")
    assert [len(split) for split in module.read()] == [10, 20, 5]
    assert "rows of the upstream" not in str(module.report)


def test_what_is_missing_is_fetched_or_named(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[Remote] = []
    monkeypatch.setattr(corpus, "fetch_all", lambda remotes, _: wanted.extend(remotes))
    numbers = {"tldr": 3, "tldr_judged": 1, "comparisons": 19, "dialogsum": 3}
    for name, number in numbers.items():
        wanted.clear()
        build(name).prepare_data()
        assert len(wanted) == number
        assert all(remote.url.startswith("https://") for remote in wanted)
        # What is fetched is what is read.
        layouts = build(name).corpus_files.layouts
        files = {file for layout in layouts for files in layout.values() for file in files.split()}
        assert {remote.path for remote in wanted} <= files
        with pytest.raises(FileNotFoundError, match=r"No .*\. Download .*https://"):
            build(name).read()
    wanted.clear()
    module = build("tldr_human")
    for act in (module.prepare_data, module.read):
        with pytest.raises(FileNotFoundError, match="no official"):
            act()
    assert not wanted


def real_rows(name: str) -> list[dict[str, Any]]:
    if not (SHARED / name).is_file():
        pytest.skip("needs ../shared/data")
    lines = gzip.decompress((SHARED / name).read_bytes()).decode().split("\n")
    return [json.loads(line) for line in lines if line]


def test_real_judged_posts(build: Build) -> None:
    raw = real_rows("tldr/oai1b_judged.jsonl.gz")
    posts = build("tldr", data_dir=SHARED)
    assert len(rows(posts.read())) == len(raw) == 1_945
    assert not posts.report.rejected
    assert posts.report.duplicates == 0
    module = build("tldr_judged", data_dir=SHARED)
    found = pairs(module.read())
    assert len(found) == 1_000
    assert module.report.left_out == {"posts that were not judged": 945}
    authors = {row["query"].strip(): row["reference_responses"].strip() for row in raw}
    chosen = [pair.chosen.response[0].text == authors[pair.chosen.dialog] for pair in found]
    assert (chosen.count(False), chosen.count(True)) == (640, 360)
    by_place = {row.where: row for row in rows(posts.read())}
    for number in (1, 2, 3):
        row = by_place[f"{SHARED}/tldr/oai1b_judged.jsonl.gz:{number}"]
        assert row.context[0].text == raw[number - 1]["query"]
        assert f"  {row.response[0].text}" == raw[number - 1]["reference_responses"]
        assert_golden(posts, row, posts.encoder.encode(row, 4_000, 1_000))


def test_real_human_comparisons(build: Build) -> None:
    names = ["Summary_AI_labelling", "sample_test", "sample_train", "sample_val"]
    raw = {name: real_rows(f"tldr-human/{name}.jsonl.gz") for name in names}
    assert sum(map(len, raw.values())) == 770
    module = build("tldr_human", data_dir=SHARED)
    splits = module.read()
    found = pairs(splits)
    assert len(found) + module.report.duplicates == 770
    assert module.report.conflicts == 14
    assert not module.report.rejected
    # Both orders of a conflict are kept.
    assert len(found) - module.report.conflicts == 702
    groups = [{item.dialog for item in split} for split in splits]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 589
    by_place = {pair.chosen.where: pair for pair in found}
    for number in (1, 2, 3):
        row = raw["Summary_AI_labelling"][number - 1]
        pair = by_place[f"{SHARED}/tldr-human/Summary_AI_labelling.jsonl.gz:{number}"]
        (turn,) = pair.chosen.context
        assert turn.text.startswith(f"TITLE: {row['title'].strip()}\n\nPOST: ")
        for side, key in ((pair.chosen, "preferred"), (pair.rejected, "rejected")):
            assert side.response[0].text == row[f"{key}_summary"].strip()
            assert_golden(module, side, module.encoder.encode(side, 4_000, 1_000))


def test_real_dialogs(build: Build) -> None:
    raw = real_rows("dialogsum/dialogsum.dev.jsonl.gz")
    module = build("dialogsum", data_dir=SHARED)
    splits = module.read()
    assert len(splits.train) + len(splits.val) == len(splits.test) == 500
    assert not module.report.rejected
    assert module.report.duplicates == 0
    by_place = {row.where: row for row in rows(splits) if "dev" in row.where}
    for number in (1, 2, 3):
        row = by_place[f"{SHARED}/dialogsum/dialogsum.dev.jsonl.gz:{number}"]
        assert raw[number - 1]["dialogue"].strip() in row.context[0].text
        assert row.response[0].text == raw[number - 1]["summary"].strip()
        assert_golden(module, row, module.encoder.encode(row, 6_000, 1_000))
