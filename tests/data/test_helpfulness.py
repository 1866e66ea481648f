"""Tests of helpful-base in both forms and of SHP, made up and real."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lightning_perl.data import HelpfulnessDataModule, corpus
from lightning_perl.data.corpus import Remote
from lightning_perl.data.rows import Item, Pair, Splits, Turn
from tests.data.corpus_files import hh, scored, shp, write_lines

Build = Callable[..., HelpfulnessDataModule]


@pytest.fixture
def build(tmp_path: Path, tokenizer_dir: Path) -> Build:
    def make(**arguments: Any) -> HelpfulnessDataModule:
        defaults: dict[str, Any] = {"tokenizer": str(tokenizer_dir), "data_dir": tmp_path}
        return HelpfulnessDataModule(**defaults | arguments)

    return make


def pairs(splits: Splits) -> list[Pair]:
    items: list[Item] = [item for split in splits for item in split]
    return sorted(
        (item for item in items if isinstance(item, Pair)),
        key=lambda pair: int(pair.chosen.where.rpartition(":")[2]),
    )


def test_both_forms_are_the_same_pairs_and_the_score_decides(build: Build, tmp_path: Path) -> None:
    write_lines(tmp_path / "helpful-base/train.jsonl", [hh(n) for n in range(8)])
    upstream = pairs(build().read())
    write_lines(tmp_path / "hh-helpful-base/train.jsonl", [scored(n) for n in range(8)])
    local = pairs(build().read())
    for one, other in zip(upstream, local, strict=True):
        assert one.chosen.context == other.chosen.context
        assert (
            one.chosen.response == other.chosen.response == (Turn("agent", "Flour, water, heat."),)
        )
        assert one.rejected.response == other.rejected.response


@pytest.mark.parametrize(
    "change",
    [
        {"score": [1.0, 1.0]},
        {"score": [1.0]},
        {"score": ["1.0", "0.0"]},
        {"score": None},
        {"text": [hh(0)["chosen"]]},
        {"text": "x"},
    ],
)
def test_scores_that_prefer_nothing_are_bad_rows(
    build: Build, tmp_path: Path, change: dict[str, Any]
) -> None:
    rows = [*(scored(n) for n in range(1, 9)), {**scored(0), **change}]
    write_lines(tmp_path / "hh-helpful-base/train.jsonl", rows)
    module = build()
    assert len(pairs(module.read())) == 8
    assert module.report.rejected == {"wrong type": 1}
    with pytest.raises(
        ValueError, match=r"train.jsonl:9: .*'text' and 'score' must be two transcripts and"
    ):
        build(on_bad_row="raise").read()


def test_shp_keeps_its_splits_and_the_label_decides(build: Build, tmp_path: Path) -> None:
    for place, name in enumerate(("train", "validation", "test")):
        rows = [shp(place * 10 + n, comment) for n in range(10) for comment in (0, 1)]
        write_lines(tmp_path / f"shp/askbaking/{name}.json", rows)
    write_lines(tmp_path / "shp/askvet/train.json", [shp(n) for n in range(40, 50)])
    module = build(corpus="shp")
    splits = module.read()
    assert [len(split) for split in splits] == [30, 20, 20]
    for pair in pairs(splits):
        number = pair.chosen.dialog.removeprefix("p")
        assert pair.chosen.context == (Turn("user", f"Why did loaf {number} burn?"),)
        assert pair.chosen.response[0].text.startswith("Too hot")
        assert pair.rejected.response == (Turn("agent", "Eh."),)
    clear = build(corpus="shp", min_score_ratio=2.0, max_tokens=256)
    clear.setup()
    assert clear.splits is not None
    assert [len(split) for split in clear.splits] == [10, 10, 10]
    assert clear.report.left_out == {"below data.min_score_ratio": 40}
    assert clear.report.rows == 70


def test_shp_labels_point_at_the_better_comment(build: Build, tmp_path: Path) -> None:
    rows = [{**shp(n), "human_ref_A": "first", "human_ref_B": "second"} for n in range(8)]
    write_lines(tmp_path / "shp/askbaking/train.json", rows)
    for pair in pairs(build(corpus="shp").read()):
        first = int(pair.chosen.dialog.removeprefix("p")) % 2 == 1
        assert pair.chosen.response[0].text == ("first" if first else "second")


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"labels": 2}, "wrong type", "labels must be 0 or 1, got int .'2'"),
        ({"labels": None}, "wrong type", "labels must be 0 or 1, got None"),
        ({"score_ratio": "3"}, "wrong type", "score_ratio must be a number, got str"),
        ({"history": " "}, "empty prompt", "empty prompt"),
        ({"human_ref_A": None}, "wrong type", "human_ref_A must be a string, got None"),
        ({"human_ref_B": "Eh.", "human_ref_A": "Eh. "}, "identical pair", "identical pair"),
    ],
)
def test_shp_bad_rows(
    build: Build, tmp_path: Path, change: dict[str, Any], reason: str, words: str
) -> None:
    rows = [*(shp(n) for n in range(1, 9)), {**shp(0), **change}]
    write_lines(tmp_path / "shp/askbaking/train.json", rows)
    module = build(corpus="shp")
    assert len(pairs(module.read())) == 8
    assert module.report.rejected == {reason: 1}
    with pytest.raises(ValueError, match=f"train.json:9: .*{words}"):
        build(corpus="shp", on_bad_row="raise").read()


def test_what_is_missing_is_fetched_or_named(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[Remote] = []
    monkeypatch.setattr(corpus, "fetch_all", lambda remotes, _: wanted.extend(remotes))
    build(corpus="shp").prepare_data()
    assert len(wanted) == 18 * 3
    assert wanted[0].path == "shp/askacademia/train.json"
    assert wanted[0].url.endswith("stanfordnlp/SHP/resolve/main/askacademia/train.json")
    wanted.clear()
    build().prepare_data()
    assert [remote.path for remote in wanted] == [
        "helpful-base/train.jsonl.gz",
        "helpful-base/test.jsonl.gz",
    ]
    assert all(remote.sha256 for remote in wanted)
    for name, words in (("hh", "Download helpful-base/train"), ("shp", "the subreddits' folders")):
        with pytest.raises(FileNotFoundError, match=words):
            build(corpus=name).read()


@pytest.mark.parametrize(("given", "chats"), [(None, True), (True, True), (False, False)])
def test_a_tokenizers_chat_template_is_the_default(
    build: Build, tmp_path: Path, tokenizer_dir: Path, given: bool | None, chats: bool
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}={{ m.content }}{% endfor %}"
    write_lines(tmp_path / "helpful-base/train.jsonl", [hh(n) for n in range(8)])
    module = build(tokenizer=tokenizer, chat_template=given)
    module.setup()
    start = "user=can you bake" if chats else "<bos>User: can you bake"
    first = module._examples["train"][0].rows[0]
    assert str(tokenizer.decode(first.ids)).startswith(start)
    assert module.template.startswith("chat-" if chats else "plain-1")
    # A base model's tokenizer has none.
    assert build().template == "plain-1"
    assert f"template: {module.template}, an answer ends with '<eos>'" in str(module.report)
