from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from transformers import AutoTokenizer

from lightning_perl.data.coffee_orders import answer, conversation, faults, order, quality
from lightning_perl.data.tokenization import encode_prompt
from lightning_perl.rewards import RewardFunction
from lightning_perl.rewards.coffee_orders import CoffeeOrderQuality

ORDERS = [order(0, row) for row in range(200)]


def test_gold_from_decoded_prompts_equals_the_true_quality(tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    prompts = [
        str(
            tokenizer.decode(
                encode_prompt(tokenizer, conversation(wanted), 200), skip_special_tokens=True
            )
        )
        for wanted in ORDERS
    ]
    texts = [answer(wanted, faults(wanted)) for wanted in ORDERS]
    scores = CoffeeOrderQuality()(prompts, [f" {text}" for text in texts], range(len(ORDERS)))
    assert scores == [quality(wanted, text) for wanted, text in zip(ORDERS, texts, strict=True)]
    assert len(set(scores)) > 20


def test_the_last_order_of_a_longer_dialog_counts() -> None:
    prompt = "Agent: Hi!User: a small mocha\nAgent: Ugh.User: two large iced chais please\nAgent:"
    texts = ["Of course, two large iced chais. Anything else?", "Of course, a small mocha.", ""]
    right, wrong, nothing = CoffeeOrderQuality(scale=10)([prompt] * 3, texts, [0, 0, 0])
    assert right == pytest.approx(10)
    assert 0 < wrong < 6
    assert nothing == 0


def test_a_prompt_without_an_order_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no single coffee order in prompt 7, which ends.*movie"):
        CoffeeOrderQuality()(["User: two movie tickets\nAgent:"], ["Sure thing"], [7])


def test_a_scale_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"CoffeeOrderQuality\.scale must be above 0, got 0"):
        CoffeeOrderQuality(scale=0)


def test_it_is_built_from_a_class_path() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--gold", type=RewardFunction | None)
    path = "lightning_perl.rewards.coffee_orders.CoffeeOrderQuality"
    config = parser.parse_object({"gold": {"class_path": path, "init_args": {"scale": 2.0}}})
    gold = parser.instantiate(config).gold
    assert isinstance(gold, CoffeeOrderQuality)
    assert gold.scale == 2.0
