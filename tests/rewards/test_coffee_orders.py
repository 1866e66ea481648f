from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from lightning_perl.data.rows import Turn
from lightning_perl.data.tokenization import TurnEncoder
from lightning_perl.packaged import unpackaged
from lightning_perl.rewards.coffee_orders import (
    WEIGHTS,
    CoffeeOrderQuality,
    Mentions,
    parse_order,
    parts,
    quality,
)
from tests.data.orders import orders


def read(text: str) -> Mentions:
    order = parse_order(text)
    assert order is not None
    return order


PLAIN = read("can i get two large iced oat lattes with an extra shot please")


def test_an_order_in_its_own_words() -> None:
    assert PLAIN == {
        "drink": ["latte"], "size": ["large"], "quantity": ["two"], "temperature": ["iced"],
        "milk": ["oat"], "extra": ["extra shot"],
    }  # fmt: skip
    assert read("Hi, can I get TWO large iced lattes with oat milk and an extra shot?") == PLAIN
    hot = {"drink": ["chai"], "size": ["small"], "quantity": ["one"], "temperature": ["hot"]}
    for text in ("i'd like one hot chai, small please", "a small chai"):
        assert read(text) == {**hot, "milk": [], "extra": []}


def test_what_is_not_one_order_is_not_read() -> None:
    none = ("", "hello, are you open?", "a latte", "large lattes")
    several = ("a large latte and a small mocha", "two large small lattes")
    for text in (*none, *several, "a large latte with vanilla and caramel"):
        assert parse_order(text) is None, text


@pytest.mark.parametrize(
    ("text", "spoiled"),
    [
        ("Sure thing, two large iced oat lattes with an extra shot. Anything else?", {}),
        ("Of course, two lattes, large, iced, with oat milk and an extra shot. Is that all?", {}),
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
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    assert parts(PLAIN, text) == dict.fromkeys(WEIGHTS, 1.0) | spoiled
    lost = sum(WEIGHTS[part] * (1 - credit) for part, credit in spoiled.items())
    assert quality(PLAIN, text) == pytest.approx(1 - lost)


def test_garbage_has_no_quality() -> None:
    for text in (
        "",
        " ",
        "<eos>",
        "ĠĠ@@ 77",
        "Sure thing. Anything else?",
        "\x00\ufffd" * 50,
        "a large",
    ):
        assert quality(PLAIN, text) == 0, text


def test_gold_from_decoded_prompts_equals_the_true_quality() -> None:
    tokenizer = AutoTokenizer.from_pretrained(unpackaged("packaged:quickstart/trunk"))
    rows = orders("rated_val", 200)
    prompts = []
    for row in rows:
        greeting, request = (message["content"] for message in row["prompt"])
        turns = (Turn("agent", greeting), Turn("user", request))
        ids = TurnEncoder(tokenizer).encode_prompt(turns, 200).ids
        prompts.append(str(tokenizer.decode(ids, skip_special_tokens=True)))
    scores = CoffeeOrderQuality()(prompts, [f" {row['response']}" for row in rows], range(200))
    requests = [row["prompt"][-1]["content"] for row in rows]
    assert scores == [
        quality(read(request), row["response"]) for request, row in zip(requests, rows, strict=True)
    ]
    assert len(set(scores)) > 20


def test_the_last_order_of_a_longer_dialog_counts() -> None:
    prompt = "Agent: Hi!User: a small mocha\nAgent: Ugh.User: two large iced chais please\nAgent:"
    texts = ["Of course, two large iced chais. Anything else?", "Of course, a small mocha.", ""]
    right, wrong, nothing = CoffeeOrderQuality(scale=10)([prompt] * 3, texts, [0, 0, 0])
    assert right == pytest.approx(10)
    assert 0 < wrong < 6
    assert nothing == 0


def test_what_it_cannot_judge_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no single coffee order in prompt 7, which ends.*movie"):
        CoffeeOrderQuality()(["User: two movie tickets\nAgent:"], ["Sure thing"], [7])
