from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_perl.batches import PromptBatch, RatedBatch
from lightning_perl.data.coffee_orders import (
    PLEASING,
    WEIGHTS,
    CoffeeOrdersDataModule,
    Order,
    answer,
    conversation,
    faults,
    order,
    parse_order,
    parts,
    quality,
    split_of,
    thumb,
    write_corpus,
)
from lightning_perl.data.rows import Item, Row, Turn
from lightning_perl.data.taskmaster import TaskmasterDataModule

PLAIN = Order(2, "large", True, "latte", "oat", "an extra shot")
ROWS = [order(0, row) for row in range(2000)]
ANSWERS = [answer(wanted, faults(wanted)) for wanted in ROWS]
QUALITIES = [quality(wanted, text) for wanted, text in zip(ROWS, ANSWERS, strict=True)]


@pytest.fixture(scope="module")
def small_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 512 tokens, made for the corpus as the shipped trunk's is."""
    lines = []
    for wanted, text in zip(ROWS, ANSWERS, strict=True):
        greeting, said = conversation(wanted)
        lines += [f"Agent: {greeting.text}", f"User: {said.text}\n", f"Agent: {text}"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    folder = tmp_path_factory.mktemp("coffee_tokenizer")
    tokenizer.save_pretrained(str(folder))
    return folder


def asked(items: list[Item]) -> set[Order]:
    orders = set()
    for item in items:
        assert isinstance(item, Row)
        wanted = parse_order(item.context[-1].text)
        assert wanted is not None
        orders.add(wanted)
    return orders


def everything_about(row: int) -> str:
    wanted = order(3, row)
    text = answer(wanted, faults(wanted))
    return json.dumps([conversation(wanted), sorted(faults(wanted)), text, thumb(wanted, text)])


def test_a_row_is_the_same_in_another_process_and_order() -> None:
    rows = [40, 7, 0]
    script = (
        "import json\n"
        "from lightning_perl.data.coffee_orders import *\n"
        f"for row in {rows[::-1]}:\n"
        "    wanted = order(3, row); text = answer(wanted, faults(wanted))\n"
        "    print(json.dumps([conversation(wanted), sorted(faults(wanted)), text,"
        " thumb(wanted, text)]))\n"
    )
    other = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
    )
    assert other.stdout.splitlines() == [everything_about(row) for row in rows[::-1]]


def test_rows_and_seeds_differ() -> None:
    texts = {json.dumps(conversation(order(seed, row))) for seed in (0, 1) for row in range(50)}
    assert len(texts) > 90


def test_every_wording_is_read_back() -> None:
    for row in range(5000):
        wanted = order(1, row)
        assert parse_order(conversation(wanted)[1].text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello, are you open?",
        "a large latte and a small mocha",
        "two large small lattes",
        "a latte",
        "large lattes",
        "a large latte with vanilla and caramel",
    ],
)
def test_what_is_not_one_order_is_not_read(text: str) -> None:
    assert parse_order(text) is None


def test_a_conversation_in_its_own_words() -> None:
    # Hand-worded, so that the generator and the reader cannot drift together.
    assert parse_order("Hi, can I get TWO large iced lattes with oat milk and an extra shot?") == (
        PLAIN
    )
    assert parse_order("i'd like one hot chai, small please") == (
        Order(1, "small", False, "chai", None, None)
    )


def test_weights_sum_to_one() -> None:
    assert sum(WEIGHTS.values()) == pytest.approx(1)


def test_a_perfect_answer_has_the_maximum() -> None:
    for wanted in ROWS:
        assert quality(wanted, answer(wanted)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "spoiled"),
    [
        ("Sure thing, two large iced oat lattes with an extra shot. Anything else?", {}),
        (
            "Of course, two lattes, large and iced, with oat milk and an extra shot. Is that all?",
            {},
        ),
        ("Ugh, two large iced oat lattes with an extra shot. Is that all?", {"tone": 0}),
        ("Two large iced oat lattes with an extra shot. Anything else?", {"tone": 0.5}),
        ("Sure thing, two large iced oat lattes with an extra shot.", {"closing": 0}),
        ("Sure thing, two iced oat lattes with an extra shot. Anything else?", {"size": 0}),
        ("Sure thing, a large iced oat latte with an extra shot. Anything else?", {"quantity": 0}),
        ("Sure thing, two large oat lattes with an extra shot. Anything else?", {"temperature": 0}),
        ("Sure thing, two large iced soy lattes with an extra shot. Anything else?", {"milk": 0}),
        ("Sure thing, two large iced oat lattes. Anything else?", {"extra": 0}),
        ("Sure thing, two large iced oat mochas with an extra shot. Anything else?", {"drink": 0}),
        # Said twice is not said right.
        (
            "Sure thing, two large large iced oat lattes with an extra shot. Is that all?",
            {"size": 0},
        ),
        # Seven words beside the order: two too many of four.
        (
            "Sure thing, two large iced oat lattes with an extra shot. So very busy. Is that all?",
            {"length": 0.25},
        ),
    ],
)
def test_parts_of_hand_written_answers(text: str, spoiled: dict[str, float]) -> None:
    assert parts(PLAIN, text) == dict.fromkeys(WEIGHTS, 1.0) | spoiled


def test_every_fault_lowers_the_quality_whatever_else_is_wrong() -> None:
    names = sorted(WEIGHTS)
    sets = [frozenset(chosen) for size in range(4) for chosen in combinations(names, size)]
    for wanted in ROWS[:40]:
        for before in [*sets, frozenset(names[1:]), frozenset(names[:-1])]:
            start = quality(wanted, answer(wanted, before))
            for fault in set(names) - before:
                text = answer(wanted, before | {fault})
                assert quality(wanted, text) < start - 0.01, (text, fault)


def test_a_fault_spoils_its_own_part_alone() -> None:
    for wanted in ROWS[:200]:
        for fault in WEIGHTS:
            graded = parts(wanted, answer(wanted, {fault}))
            assert {part for part, credit in graded.items() if credit < 1} == {fault}


def test_an_unknown_fault_is_refused() -> None:
    with pytest.raises(ValueError, match=r"faults must be some of .*'closing'.*got \['spilled'\]"):
        answer(PLAIN, {"spilled"})


@pytest.mark.parametrize(
    "text",
    ["", " ", "<eos>", "ĠĠ@@ 77", "Sure thing. Anything else?", "\x00\ufffd" * 50, "a large"],
)
def test_garbage_has_no_quality(text: str) -> None:
    assert quality(PLAIN, text) == 0


def test_the_whole_menu_is_no_answer() -> None:
    everything = (
        "small medium large iced hot oat almond soy latte mocha cappuccino americano macchiato chai"
    )
    assert quality(PLAIN, everything) <= 0.3 < statistics.mean(QUALITIES)


def test_the_barista_leaves_room_to_improve() -> None:
    # The quickstart must be able to gain half a standard deviation.
    mean, spread = statistics.mean(QUALITIES), statistics.stdev(QUALITIES)
    assert 0.5 < mean < 0.65
    assert 0.12 < spread < 0.25
    assert (1 - mean) / spread > 2


def test_thumbs_follow_the_quality_with_noise() -> None:
    thumbs = [thumb(wanted, text) for wanted, text in zip(ROWS, ANSWERS, strict=True)]
    # Of 2,000 rows one standard error is 1.1%.
    assert 0.5 < statistics.mean(thumbs) < 0.62
    agreement = statistics.mean(
        (true >= PLEASING) == bool(given) for true, given in zip(QUALITIES, thumbs, strict=True)
    )
    assert agreement == pytest.approx(0.87, abs=0.03)
    perfect = [thumb(wanted, answer(wanted)) for wanted in ROWS]
    garbage = [thumb(wanted, "") for wanted in ROWS]
    assert statistics.mean(perfect) == pytest.approx(0.95, abs=0.02)
    assert statistics.mean(garbage) == pytest.approx(0.05, abs=0.02)


def test_lengths_with_a_vocabulary_of_512(small_vocabulary: Path) -> None:
    data = CoffeeOrdersDataModule(str(small_vocabulary), 1000, 1000, val_prompts=64)
    data.setup()
    assert data.splits is not None
    words = 0
    longest = {"prompt": 0, "response": 0}
    for batch in data.train_dataloader():
        assert isinstance(batch, RatedBatch)
        response = batch.response_mask.sum(1)
        prompt = batch.attention_mask.sum(1) - response
        longest["prompt"] = max(longest["prompt"], int(prompt.max()))
        longest["response"] = max(longest["response"], int(response.max()))
        words += len(response)
    assert words == 2000
    assert 20 < longest["prompt"] <= 48
    assert 16 < longest["response"] <= 32


def test_no_held_out_order_is_in_any_training_row(small_vocabulary: Path) -> None:
    tokenizer = str(small_vocabulary)
    rated = CoffeeOrdersDataModule(tokenizer, 300, 300, val_prompts=100).read()
    prompts = CoffeeOrdersDataModule(
        tokenizer, prompts=300, val_prompts=100, corpus_seed=5, rows="prompts"
    ).read()
    trained = asked(rated.train) | asked(prompts.train)
    val = asked(rated.val) | asked(prompts.val)
    test = asked(rated.test) | asked(prompts.test)
    assert len(trained) > 300
    assert not trained & val
    assert not trained & test
    assert not val & test
    assert {split_of(wanted) for wanted in val} == {"val"}


def test_the_rows_of_one_purpose_do_not_move_with_the_others(small_vocabulary: Path) -> None:
    small = CoffeeOrdersDataModule(str(small_vocabulary), 10, 20, val_prompts=8).read()
    large = CoffeeOrdersDataModule(str(small_vocabulary), 30, 40, val_prompts=9).read()
    assert small.train[:10] == large.train[:10]
    assert small.train[10:] == large.train[30:50]
    assert small.val[:8] == large.val[:8]
    dialogs = [item.dialog for item in large.train if isinstance(item, Row)]
    assert len(set(dialogs)) == 70


def test_demonstrations_are_imitated_and_thumbs_up_too(small_vocabulary: Path) -> None:
    splits = CoffeeOrdersDataModule(str(small_vocabulary), 50, 60, val_prompts=8).read()
    rows = [item for item in splits.train if isinstance(item, Row)]
    assert [row.label for row in rows[:50]] == [None] * 50
    assert all(row.imitate for row in rows[:50])
    assert {row.label for row in rows[50:]} == {0.0, 1.0}
    assert [row.imitate for row in rows[50:]] == [row.label == 1.0 for row in rows[50:]]
    assert len(splits.val) == len(splits.test) == 16


def test_held_out_prompts_are_as_many_as_asked_for(small_vocabulary: Path) -> None:
    data = CoffeeOrdersDataModule(
        str(small_vocabulary), prompts=40, rows="prompts", val_batch_size=256
    )
    data.setup()
    (batch,) = data.val_dataloader()
    assert isinstance(batch, PromptBatch)
    assert batch.row.tolist() == list(range(256))
    assert data.report.splits["train"].kept == 40


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((-1, 9, 9, 9), r"data\.demonstrations must be from 0 to 100000, got -1"),
        ((9, 100_001, 9, 9), r"data\.thumbs must be from 0 to 100000, got 100001"),
        ((9, 9, -2, 9), r"data\.prompts must be from 0 to 100000, got -2"),
        ((9, 9, 9, 0), r"data\.val_prompts must be from 1 to 100000, got 0"),
        ((0, 0, 9, 9), r"demonstrations and data\.thumbs are both 0"),
    ],
)
def test_counts_out_of_range_are_refused(counts: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoffeeOrdersDataModule("unused", *counts)


def test_no_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.prompts is 0: nothing to answer"):
        CoffeeOrdersDataModule("unused", prompts=0, rows="prompts")


def test_the_written_corpus_is_read_as_taskmaster(tokenizer_dir: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path, demonstrations=5, thumbs=23, seed=2, rows_per_file=10)
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.json")) == [
        "data/data_00.json",
        "reward/reward_00.json",
        "reward/reward_01.json",
        "reward/reward_02.json",
    ]
    read = TaskmasterDataModule(str(tokenizer_dir), tmp_path, folds=2, val_fraction=0).read()
    read_rows = [item for part in read for item in part if isinstance(item, Row)]
    ours = CoffeeOrdersDataModule(str(tokenizer_dir), 5, 23, val_prompts=1, corpus_seed=2).read()
    expected = [item for item in ours.train if isinstance(item, Row)]

    def content(row: Row, greeted: bool = True) -> tuple[object, ...]:
        return row.context if greeted else row.context[1:], row.response, row.label, row.imitate

    assert sorted(map(str, (content(row) for row in read_rows))) == sorted(
        str(content(row, greeted=row.label is not None)) for row in expected
    )
    assert expected[0].context[0].role == "agent"
    assert isinstance(expected[0].context[1], Turn)
