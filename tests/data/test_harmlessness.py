"""Tests of transcripts, their pairs and harmless-base, made up and real."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_perl.batches import PromptBatch, RatedBatch
from lightning_perl.data import (
    CorpusDataModule,
    HarmlessnessDataModule,
    HelpfulnessDataModule,
    corpus,
)
from lightning_perl.data.corpus import Remote
from lightning_perl.data.hh_rlhf import dialogs
from lightning_perl.data.messages import turns_of
from lightning_perl.data.own_rows import RowReader
from lightning_perl.data.rows import BadRow, Item, Pair, Turn
from tests.data.corpus_files import hh, transcript, write_lines
from tests.data.counts import check_counts
from tests.data.golden import assert_golden, rejected_lines

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
Build = Callable[..., HarmlessnessDataModule]


@pytest.fixture
def build(tmp_path: Path, tokenizer_dir: Path) -> Build:
    def make(**arguments: Any) -> HarmlessnessDataModule:
        defaults: dict[str, Any] = {"tokenizer": str(tokenizer_dir), "data_dir": tmp_path}
        return HarmlessnessDataModule(**defaults | arguments)

    return make


def pairs(items: list[Item]) -> list[Pair]:
    assert all(isinstance(item, Pair) for item in items)
    return [item for item in items if isinstance(item, Pair)]


def transcript_pair(chosen: str, rejected: str) -> Pair:
    (pair,) = RowReader({}).read(dialogs(chosen, rejected), "f:1")
    assert isinstance(pair, Pair)
    return pair


def test_a_tag_counts_after_a_blank_line_only() -> None:
    text = (
        "\n\nHuman: say\nHuman: hi\n\nAssistant:  Human: hi Assistant: ok \n\nHuman:\n\nSystem: x"
    )
    assert turns_of(text, "chosen") == (
        Turn("user", "say\nHuman: hi"),
        Turn("agent", "Human: hi Assistant: ok"),
        Turn("user", "System: x"),
    )
    for text in ("", "hello\n\nHuman: hi"):
        with pytest.raises(BadRow, match="a transcript begins with Human:"):
            dialogs(text, transcript("a", "b"))


def test_a_pair_shares_all_turns_but_the_last() -> None:
    row = hh(1)
    pair = transcript_pair(row["chosen"], row["rejected"])
    assert pair.chosen.context == pair.rejected.context
    assert [turn.text for turn in pair.chosen.context] == ["can you bake bread 1", "Yes.", "How?"]
    assert pair.chosen.response == (Turn("agent", "Flour, water, heat."),)
    assert pair.rejected.response == (Turn("agent", "No idea."),)
    assert (pair.chosen.imitate, pair.rejected.imitate) == (True, False)
    # Another step of the dialog is in the same group, and so on the same side of a split.
    first = "can you bake bread 1"
    later = dialogs(transcript(first, "a"), transcript(first, "b"))
    assert later["group"] == dialogs(row["chosen"], row["rejected"])["group"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (transcript("a", "b"), transcript("a", "b"), "identical pair"),
        (transcript("a", "b "), transcript("a", "b"), "identical pair"),
        (transcript("a", "b"), transcript("a", "b", "c", "d"), "no common prompt"),
        (transcript("a", "b", "c", "x"), transcript("a", "b", "d", "x"), "no common prompt"),
        (transcript("a", "b", "c"), transcript("a", "b", "d"), "no answer"),
        (transcript("a", "b"), transcript("a", "b", "c"), "no common prompt"),
        ("\n\nAssistant: a", "\n\nAssistant: b", "no transcript"),
    ],
)
def test_pairs_that_are_no_two_replies_to_one_prompt(
    chosen: str, rejected: str, reason: str
) -> None:
    with pytest.raises(BadRow) as caught:
        transcript_pair(chosen, rejected)
    assert caught.value.reason.startswith(reason)


def test_a_reply_that_begins_the_other_is_a_pair() -> None:
    pair = transcript_pair(transcript("a", "b"), transcript("a", "b c"))
    assert (pair.chosen.response[0].text, pair.rejected.response[0].text) == ("b", "b c")


@pytest.mark.parametrize("folder", ["hh-harmless-base", "harmless-base"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_upstream_splits_are_kept(build: Build, tmp_path: Path, folder: str, ending: str) -> None:
    # Row 39 is a step of a dialog that the test split has, too.
    write_lines(tmp_path / folder / f"train.jsonl{ending}", [hh(n) for n in range(40)])
    write_lines(tmp_path / folder / f"test.jsonl{ending}", [hh(n) for n in range(39, 50)])
    module = build(max_tokens=256)
    module.setup()
    assert module.splits is not None
    assert [len(split) for split in module.splits] == [35, 4, 11]
    assert module.report.left_out == {"of a dialog that a later split has": 1}
    assert module.report.rows == 51
    assert not module.report.notes
    batch = next(iter(module.train_dataloader()))
    assert isinstance(batch, RatedBatch)
    assert batch.pairs.tolist() == [[2 * n, 2 * n + 1] for n in range(8)]


def test_a_lone_test_file_is_divided_and_the_report_says_so(build: Build, tmp_path: Path) -> None:
    write_lines(tmp_path / "harmless-base/test.jsonl", [hh(n) for n in range(40)])
    module = build(seed=1)
    splits = module.read()
    assert [len(split) for split in splits] == [32, 4, 4]
    assert splits == build(seed=2).read()
    assert module.report.notes == {
        "rows of the upstream test split, divided here: not the upstream test score": 40
    }
    assert build(val_fraction=0.2).read().test == splits.test


def test_a_train_file_alone_gives_up_a_test_split(build: Build, tmp_path: Path) -> None:
    write_lines(tmp_path / "harmless-base/train.jsonl", [hh(n) for n in range(40)])
    module = build(val_fraction=0.0, test_fraction=0.25)
    assert [len(split) for split in module.read()] == [30, 0, 10]
    assert not module.report.notes


def test_bad_rows_are_counted_or_raise_and_the_counts_add_up(build: Build, tmp_path: Path) -> None:
    again = hh(0)
    swapped = {"chosen": again["rejected"], "rejected": again["chosen"]}
    bad: list[tuple[object, str, str]] = [
        ({**hh(0), "chosen": "x"}, "no transcript", "a transcript begins"),
        ({"rejected": "x"}, "broken row", "KeyError: 'chosen'"),
        ({**hh(0), "chosen": 3}, "wrong type", "chosen must be a string, got int"),
        ([1], "wrong type", "expected an object, got list"),
        ({**hh(0), "chosen": transcript("a", "b", "c", " ")}, "no common", "differ before"),
        (
            {"chosen": transcript("a", ""), "rejected": transcript("a", "b")},
            "empty answer",
            "empty answer",
        ),
        (
            {"chosen": transcript("a", "b" * 200), "rejected": transcript("a", "b")},
            "answer longer",
            "the answer takes",
        ),
        (
            {"chosen": transcript("a" * 900, "b"), "rejected": transcript("a" * 900, "c")},
            "prompt longer",
            "prompt longer than the window",
        ),
        ({**hh(0), "chosen": hh(0)["rejected"]}, "identical pair", "identical pair"),
    ]
    good = [hh(n) for n in range(20)]
    file = tmp_path / "harmless-base/train.jsonl"
    write_lines(file, [*good, again, swapped, *(row for row, _, _ in bad)])
    module = build(val_fraction=0.0, test_fraction=0.0)
    module.setup()
    report = module.report
    assert (report.duplicates, report.conflicts) == (1, 1)
    assert report.rejected.total() == len(bad)
    assert report.rows == 22 + len(bad) == report.splits["train"].kept + 1 + len(bad)
    for row, reason, words in bad:
        assert any(counted.startswith(reason) for counted in report.rejected)
        write_lines(file, [*good, row])
        with pytest.raises(ValueError, match=rf"train.jsonl:21: .*{words}"):
            build(on_bad_row="raise").setup()
    write_lines(file, [*good, swapped])
    with pytest.raises(ValueError, match=r"train.jsonl:1: conflicting labels: .*train.jsonl:21"):
        build(on_bad_row="raise", keep_conflicts=False).setup()


@pytest.mark.parametrize("broken", ["train", "test"])
def test_files_that_cannot_be_read_stop_or_are_one_bad_row(
    build: Build, tmp_path: Path, broken: str
) -> None:
    for number, part in enumerate(("train", "test")):
        write_lines(
            tmp_path / f"harmless-base/{part}.jsonl.gz", [hh(9 * number + n) for n in range(9)]
        )
    file = tmp_path / f"harmless-base/{broken}.jsonl.gz"
    whole = gzip.compress(json.dumps(hh(0)).encode())
    for data, reason, words in (
        (whole[:-5], "truncated gzip", "truncated gzip"),
        (b"<html>Not found</html>", "web page", "web page"),
        (gzip.compress(b""), "empty file", "empty file"),
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{broken}.jsonl.gz:1: {words}"):
            build(on_bad_row="raise").setup()
        module = build()
        if broken == "train":
            # Not the test rows in their place.
            with pytest.raises(ValueError, match=rf"no training row(.|\n)*rejected: 1 {reason}"):
                module.setup()
        else:
            module.setup()
            note = "upstream test files without a usable row: not the upstream test score"
            assert module.report.notes == {note: 1}
        assert module.report.rejected == {reason: 1}
        check_counts(module.report, 10)


def test_prompts_need_no_replies(build: Build, tmp_path: Path) -> None:
    empty = {"chosen": transcript("a", ""), "rejected": transcript("a", "b")}
    write_lines(tmp_path / "harmless-base/train.jsonl", [*(hh(n) for n in range(9)), empty])
    module = build(rows="prompts", val_fraction=0.0, test_fraction=0.0)
    module.setup()
    assert module.report.splits["train"].kept == 10
    assert isinstance(next(iter(module.train_dataloader())), PromptBatch)


def test_what_is_missing_is_fetched_or_named(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[Remote] = []
    monkeypatch.setattr(corpus, "fetch_all", lambda remotes, _: wanted.extend(remotes))
    build().prepare_data()
    names = ["harmless-base/train.jsonl.gz", "harmless-base/test.jsonl.gz"]
    assert [remote.path for remote in wanted] == names
    for remote in wanted:
        assert remote.url.startswith("https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/")
        assert remote.url.endswith(remote.path)
        assert remote.sha256 is not None
    words = r"No hh-harmless-base/train.jsonl, .*Download harmless-base/train.jsonl.gz .*Anthropic"
    with pytest.raises(FileNotFoundError, match=words):
        build().read()
    wanted.clear()
    write_lines(tmp_path / "hh-harmless-base/test.jsonl", [hh(0)])
    build().prepare_data()
    assert not wanted


Real = tuple[type[CorpusDataModule], Path, dict[str, list[int]], int]
REAL: list[Real] = [
    (
        HarmlessnessDataModule,
        SHARED / "hh-harmless-base/test.jsonl.gz",
        {
            "no common prompt": [1255, 1689, 1951, 1953, 2037],
            "empty answer": [87, 517, 926, 1104],
        },
        2_312,
    ),
    (
        HelpfulnessDataModule,
        SHARED / "hh-helpful-base/test.jsonl.gz",
        {
            "no common prompt": [
                *(169, 355, 568, 743, 960, 1011, 1166, 1307, 1450),
            ],
            "empty answer": [121, 740, 1214, 2063],
        },
        2_352,
    ),
]


@pytest.mark.parametrize(("kind", "file", "rejected", "rows"), REAL)
def test_real_counts_and_lines_and_three_rows_from_raw_text_to_tokens_and_back(
    tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[CorpusDataModule],
    file: Path,
    rejected: dict[str, list[int]],
    rows: int,
) -> None:
    if not file.is_file():
        pytest.skip("needs ../shared/data")
    module = kind(str(tokenizer_dir), SHARED, max_tokens=8_000, max_response_tokens=4_000)
    lines = rejected_lines(module, monkeypatch)
    module.setup()
    report, splits = module.report, module.splits
    assert lines == rejected
    assert (report.duplicates, report.conflicts) == (0, 0)
    bad = sum(map(len, rejected.values()))
    assert report.rows == rows == sum(split.kept for split in report.splits.values()) + bad
    assert splits is not None
    groups = [{item.dialog for item in split} for split in splits]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert all(len(split) > 200 for split in splits)
    raw = [json.loads(line) for line in gzip.decompress(file.read_bytes()).split(b"\n")[:3]]
    by_place = {item.chosen.where: item for split in splits for item in pairs(split)}
    for number, row in enumerate(raw, start=1):
        pair = by_place[f"{file}:{number}"]
        texts = row["text"] if "text" in row else (row["chosen"], row["rejected"])
        for side, text in zip((pair.chosen, pair.rejected), texts, strict=True):
            assert_golden(module, side, module.encoder.encode(side, 4_000, 2_000))
            assert side.response[0].text == text.rpartition("\n\nAssistant:")[2].strip()
            tags = {"user": "Human", "agent": "Assistant"}
            turns = (*side.context, *side.response)
            again = "".join(f"\n\n{tags[turn.role]}: {turn.text}" for turn in turns)
            assert again.split() == text.split()
