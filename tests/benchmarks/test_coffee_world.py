"""The made-up coffee bar, and that the packaged files are what the script writes."""

from __future__ import annotations

import gzip
import statistics
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightning_perl.data import PreferenceDataModule
from lightning_perl.rewards.coffee_orders import WEIGHTS, parse_order, parts, quality
from tests.benchmarks.conftest import BENCHMARKS, Script
from tests.data.orders import orders

PACKAGED = BENCHMARKS.parent / "lightning_perl" / "quickstart" / "orders"


@pytest.fixture
def world(script: Script) -> ModuleType:
    return script("coffee_world")


@pytest.fixture
def rows(world: ModuleType) -> list[Any]:
    return [world.order(0, row) for row in range(2000)]


def test_the_packaged_files_are_what_the_script_writes(world: ModuleType, tmp_path: Path) -> None:
    world.main(["--out", str(tmp_path)])
    # Without the compression, which depends on zlib's version.
    packaged, written = (
        {file.name: gzip.decompress(file.read_bytes()) for file in folder.iterdir()}
        for folder in (PACKAGED, tmp_path)
    )
    assert packaged.keys() == {f"{kind}_{split}.jsonl.gz" for kind in ("rated", "prompts")
                               for split in ("train", "val", "test")} | {"pairs_train.jsonl.gz"}  # fmt: skip
    assert [name for name in packaged if packaged[name] != written[name]] == []
    assert sum(file.stat().st_size for file in PACKAGED.iterdir()) < 400_000


def test_no_held_out_order_is_in_any_training_row() -> None:
    def wanted(split: str) -> set[str]:
        rows = [row for kind in ("rated", "prompts") for row in orders(f"{kind}_{split}", 20_000)]
        return {str(parse_order(row["prompt"][-1]["content"])) for row in rows}

    train, val, test = (wanted(split) for split in ("train", "val", "test"))
    assert len(train) > 1000
    assert "None" not in train | val | test
    assert len(train) + len(val) + len(test) == len(train | val | test)
    prompts = [str(row) for row in orders("prompts_train", 20_000)]
    assert len(set(prompts)) == len(prompts) == 8000


def test_rows_fit_the_packaged_tokenizer() -> None:
    data = PreferenceDataModule(
        "packaged:quickstart/trunk",
        train="packaged:quickstart/orders/rated_test.jsonl.gz",
        val="packaged:quickstart/orders/rated_val.jsonl.gz",
        max_tokens=80,
        max_response_tokens=32,
    )
    data.setup()
    counts = data.report.splits["train"]
    assert (counts.rows, counts.kept) == (512, 512)
    assert 20 < max(counts.prompt_tokens) <= 48
    assert 16 < max(counts.response_tokens) <= 32


def test_every_wording_is_read_back(world: ModuleType) -> None:
    for row in range(5000):
        order = world.order(1, row)
        assert parse_order(world.conversation(order)[1]) == order.mentions


def test_a_fault_spoils_its_own_part_and_lowers_the_quality_whatever_else_is_wrong(
    world: ModuleType, rows: list[Any]
) -> None:
    for order in rows[:200]:
        assert quality(order.mentions, world.answer(order)) == pytest.approx(1)
        for fault in WEIGHTS:
            graded = parts(order.mentions, world.answer(order, {fault}))
            assert {part for part, credit in graded.items() if credit < 1} == {fault}
    names = sorted(WEIGHTS)
    sets = [frozenset(chosen) for size in range(4) for chosen in combinations(names, size)]
    for order in rows[:20]:
        for before in [*sets, frozenset(names[1:]), frozenset(names[:-1])]:
            start = quality(order.mentions, world.answer(order, before))
            for fault in set(names) - before:
                text = world.answer(order, before | {fault})
                assert quality(order.mentions, text) < start - 0.01, (text, fault)


def test_the_barista_leaves_room_and_thumbs_follow_the_quality(
    world: ModuleType, rows: list[Any]
) -> None:
    answers = [world.answer(order, world.faults(order)) for order in rows]
    mentions: list[Mapping[str, list[str]]] = [order.mentions for order in rows]
    qualities = list(map(quality, mentions, answers))
    # The quickstart must be able to gain half a standard deviation.
    mean, spread = statistics.mean(qualities), statistics.stdev(qualities)
    assert 0.5 < mean < 0.65
    assert 0.12 < spread < 0.25
    assert (1 - mean) / spread > 2
    menu = "small medium large iced hot oat almond soy latte mocha cappuccino americano chai"
    assert quality(mentions[0], menu) <= 0.3
    thumbs = list(map(world.thumb, rows, answers))
    # Of 2,000 rows one standard error is 1.1%.
    assert 0.5 < statistics.mean(thumbs) < 0.62
    pleasing = [true >= world.PLEASING for true in qualities]
    agreement = statistics.mean(map(int.__eq__, map(int, pleasing), thumbs))
    assert agreement == pytest.approx(0.87, abs=0.03)
    perfect = statistics.mean(world.thumb(order, world.answer(order)) for order in rows)
    garbage = statistics.mean(world.thumb(order, "") for order in rows)
    assert (perfect, garbage) == (pytest.approx(0.95, abs=0.02), pytest.approx(0.05, abs=0.02))
