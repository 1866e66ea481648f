from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from lightning_perl.batches import RatedBatch
from lightning_perl.data import PreferenceDataModule
from lightning_perl.data.reading import shuffled_stream, sources_of

Build = Callable[..., PreferenceDataModule]


@pytest.fixture
def build(tokenizer_dir: Path) -> Build:
    def make(**arguments: Any) -> PreferenceDataModule:
        defaults: dict[str, Any] = {"val_fraction": 0.0, "batch_size": 4}
        return PreferenceDataModule(tokenizer=str(tokenizer_dir), **defaults | arguments)

    return make


def rows(name: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{name} {number}", "response": name} for number in range(count)]


def write(file: Path, name: str, count: int) -> str:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows(name, count)))
    return str(file)


def answers(module: PreferenceDataModule, batches: list[RatedBatch]) -> list[str]:
    return [
        str(module.tokenizer.decode(ids[mask])).removesuffix("<eos>").strip()
        for batch in batches
        for ids, mask in zip(batch.ids, batch.response_mask, strict=True)
    ]


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_rows_may_be_a_list_or_in_several_files(
    build: Build, tmp_path: Path, kind: Callable[[list[Any]], Any]
) -> None:
    given = rows("a", 5)
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows("b", 2)))
    module = build(train=kind(given), val=[str(array), write(tmp_path / "c.jsonl", "c", 3)])
    module.setup()
    assert module.splits is not None
    assert [len(split) for split in module.splits] == [5, 5, 5]
    assert answers(module, list(module.val_dataloader())) == ["b", "b", "c", "c", "c"]
    with pytest.raises(ValueError, match=r"data.train:6: wrong type: expected a mapping, got int"):
        build(train=[*given, 3]).setup()


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ([], "data.train must be a file, a name of the hub, a list of rows"),
        ({}, "data.train must be a file"),
        ([{"prompt": "q"}, "a.jsonl"], "data.train must be a file"),
        ({"a.jsonl": 0.0}, "the weight of 'a.jsonl' must be a number above 0, got '0.0'"),
        ({"a.jsonl": float("nan")}, "the weight of 'a.jsonl' must be a number above 0, got 'nan'"),
        ({"prompt": "q", "response": "a"}, "weight of 'prompt' .*; rows are given in a list"),
        (torch.zeros(2), "data.train must be a file"),
    ],
)
def test_what_is_no_source_is_refused(build: Build, train: Any, words: str) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=words):
        build(train=train)


def test_weights_are_for_training_only(build: Build) -> None:
    with pytest.raises(ValueError, match=r"data.val: rows to measure on .* Give a list."):
        build(train=rows("a", 2), val={"b.jsonl": 1.0})


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_are_mixed_by_weight_until_every_row_was_drawn(
    build: Build, tmp_path: Path, streaming: bool
) -> None:
    few, many = (write(tmp_path / f"{n}.jsonl", n, c) for n, c in (("few", 20), ("many", 200)))
    module = build(train={few: 1.0, many: 3.0}, streaming=streaming)
    module.setup()
    loader = module.train_dataloader()
    passes = [answers(module, list(loader)) for _ in range(2)]
    for drawn in passes:
        counts = Counter(drawn)
        if streaming:
            assert counts["many"] >= 200
            assert counts["few"] / counts["many"] == pytest.approx(1 / 3, abs=0.1)
        else:
            assert counts == {"many": 200, "few": 67}
    assert passes[0] != passes[1]
    again = build(train={few: 1.0, many: 3.0}, streaming=streaming)
    again.setup()
    assert answers(again, list(again.train_dataloader())) == passes[0]


def test_an_epoch_of_a_mixture_draws_every_row(build: Build, tmp_path: Path) -> None:
    few, many = (write(tmp_path / f"{n}.jsonl", n, c) for n, c in (("few", 7), ("many", 30)))
    module = build(train={few: 1.0, many: 1.0})
    module.setup()
    loader = module.train_dataloader()
    more = set()
    for _ in range(3):
        drawn = Counter(number for batch in loader for number in batch.row.tolist())
        assert set(drawn) == set(range(37))
        assert {drawn[number] for number in range(7)} == {4, 5}
        assert {drawn[number] for number in range(7, 37)} == {1}
        more.add(tuple(number for number in range(7) if drawn[number] == 5))
    assert len(more) > 1
    half = module.train_dataloader()
    seen = [batch.row.tolist() for _, batch in zip(range(5), half, strict=False)]
    rest = module.train_dataloader()
    rest.load_state_dict(half.state_dict())
    whole = [batch.row.tolist() for batch in module.train_dataloader()]
    assert seen + [batch.row.tolist() for batch in rest] == whole


def test_a_source_without_rows_cannot_be_weighted(build: Build, tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", "a", 3)
    bad = tmp_path / "bad.jsonl"
    for text, reason in (('{"prompt": "q", "response": ""}\n', "empty answer"), ("", "empty file")):
        bad.write_text(text)
        module = build(train={good: 1.0, str(bad): 1.0}, on_bad_row="reject")
        module.setup()
        assert module.report.rejected == {reason: 1}
        with pytest.raises(ValueError, match=r"data.train: sources \[2\] .* no training row left"):
            module.train_dataloader()


def test_the_shorter_stream_begins_again_until_the_longer_is_through() -> None:
    opened: Counter[str] = Counter()

    def count(name: str, length: int) -> Callable[[], Iterator[tuple[str, int]]]:
        def read() -> Iterator[tuple[str, int]]:
            opened[name] += 1
            yield from ((name, number) for number in range(length))

        return read

    streams = [count("a", 5), count("b", 50)]
    drawn = list(shuffled_stream(streams, [1, 1], buffer=8, seed=0, epoch=0))
    longer = [number for name, number in drawn if name == "b"]
    assert set(longer) == set(range(50))
    shorter = [number for name, number in drawn if name == "a"]
    assert set(shorter) == set(range(5))
    assert len(shorter) > 20
    assert opened["a"] > 4


def test_a_stream_is_shuffled_by_seed_and_epoch() -> None:
    # Elements of unlike types, which a table could not hold.
    elements: list[object] = [*range(40), "a", None, {"b": 1}, {"c": ["d"]}, ("e", 2.5)]

    def drawn(seed: int, epoch: int, buffer: int = 16) -> list[object]:
        return list(shuffled_stream([lambda: iter(elements)], None, buffer, seed, epoch))

    assert drawn(0, 0) == drawn(0, 0)
    for other in (drawn(0, 1), drawn(1, 0), drawn(0, 0, buffer=4)):
        assert other != drawn(0, 0)
        assert sorted(other, key=repr) == sorted(elements, key=repr)
    assert not list(shuffled_stream([], None, 16, 0, 0))


@pytest.mark.parametrize(
    ("place", "hub"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:test", ("owner/name", None, "test")),
        ("owner/na.me/config:train[:9]", ("owner/na.me", "config", "train[:9]")),
        ("owner/name.jsonl", None),
        ("owner/name.csv.gz", None),
        ("./owner/name", None),
        ("here/name", None),
        ("name", None),
    ],
)
def test_names_of_the_hub_are_no_paths(
    place: str,
    hub: tuple[str, str | None, str] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    (source,) = sources_of(place, "data.train")
    assert source.hub == hub


def test_a_data_set_of_the_hub(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> object:
        asked.append((name, config, split, streaming))
        found = Dataset.from_list([*rows(split, 3), {"prompt": "q"}])
        return found.to_iterable_dataset() if streaming else found

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    arguments: dict[str, Any] = {"train": "owner/name", "val": "owner/name/main:test"}
    module = build(on_bad_row="reject", **arguments)
    module.prepare_data()
    module.setup()
    assert asked == 2 * [
        ("owner/name", None, "train", False),
        ("owner/name", "main", "test", False),
    ]
    assert module.report.rejected == {"missing column": 2}
    with pytest.raises(ValueError, match=r"owner/name:train:4: missing column"):
        build(**arguments).setup()
    asked.clear()
    stream = build(on_bad_row="reject", streaming=True, **arguments)
    stream.prepare_data()
    stream.setup()
    assert len(list(stream.train_dataloader())) == 1
    assert [name[2:] for name in asked] == [
        ("test", False),
        ("train", True),
        ("test", False),
        ("train", True),
    ]


@pytest.mark.parametrize(
    "error", [ConnectionError("offline"), FileNotFoundError("no such"), ValueError("no split")]
)
def test_without_network_the_error_says_what_to_fetch_and_where(
    build: Build, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load_dataset(*_: object, **__: object) -> object:
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    words = (
        rf"data.train: 'owner/name:test' is no file here .*hub did not give it: {error}. With a "
        r"network, .*https://huggingface.co/datasets/owner/name. .*set data.train to their path"
    )
    module = build(train="owner/name:test")
    with pytest.raises(FileNotFoundError, match=words):
        module.prepare_data()
    with pytest.raises(FileNotFoundError, match=words):
        module.setup()
