"""The true quality of an answer to an order of the quickstart's made-up coffee bar.

``benchmarks/coffee_world.py`` wrote the orders and answers, and judges with this file too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

from lightning_perl.arguments import Positive
from lightning_perl.rewards.function import EachAlone

Mentions: TypeAlias = Mapping[str, Sequence[str]]
"""The words with which a text names each part of an order; ``temperature`` is hot unless the text says iced."""

QUANTITIES = {1: "one", 2: "two", 3: "three"}
SIZES = ("small", "medium", "large")
DRINKS = ("latte", "mocha", "cappuccino", "americano", "macchiato", "chai")
MILKS = ("oat", "almond", "soy")
EXTRAS = ("an extra shot", "vanilla", "caramel", "cinnamon", "whipped cream")
FRIENDLY = ("Sure thing,", "Of course,", "Coming up,", "Great choice,")
RUDE = ("Ugh,", "Fine,", "Whatever,")
#: The nine parts of the quality and their weights, which add up to 1.
WEIGHTS = {
    "drink": 0.15,
    "size": 0.12,
    "quantity": 0.09,
    "temperature": 0.08,
    "milk": 0.08,
    "extra": 0.08,
    "tone": 0.15,
    "closing": 0.15,
    "length": 0.10,
}


def _either(words: Collection[str]) -> str:
    return "|".join(re.escape(word.lower().removeprefix("an ").rstrip(",")) for word in words)


_MENU = _either([*SIZES, "iced", "hot", *MILKS, *DRINKS])
_MENTIONS = {
    "drink": re.compile(rf"\b({_either(DRINKS)})s?\b"),
    "size": re.compile(rf"\b({_either(SIZES)})\b"),
    # "a" and "one" are numbers only before something on the menu.
    "quantity": re.compile(rf"\b(an?|one|two|three)\s+(?=(?:{_MENU})s?\b)"),
    "temperature": re.compile(r"\b(iced|hot)\b"),
    "milk": re.compile(rf"\b({_either(MILKS)})\b"),
    "extra": re.compile(rf"\b({_either(EXTRAS)})\b"),
}
_FRIENDLY = re.compile(rf"\b({_either(FRIENDLY)})\b")
_RUDE = re.compile(rf"\b({_either(RUDE)})\b")
_CLOSING = re.compile(r"\b(anything else( today)?|is that all) ?\?")
_JOINING_WORDS = {"a", "an", "and", "with", "milk", *QUANTITIES.values()}
# The longest opening and the longest closing.
_FREE_WORDS = 5
_WORDS_TOO_MANY = 4


def mentions(text: str) -> dict[str, list[str]]:
    """Returns what a lower-case text says of each part of an order."""
    named = {part: pattern.findall(text) for part, pattern in _MENTIONS.items()}
    named["quantity"] = ["one" if word in ("a", "an") else word for word in named["quantity"]]
    return named | {"temperature": named["temperature"] or ["hot"]}


def parse_order(text: str) -> Mentions | None:
    """Returns the order in a customer's words, or None where there is not exactly one."""
    order = mentions(text.lower())
    complete = all(order[part] for part in ("drink", "size", "quantity"))
    return order if complete and all(len(words) <= 1 for words in order.values()) else None


def parts(order: Mentions, answer: str) -> dict[str, float]:
    """Returns the parts of an answer's quality, each from 0 to 1, by the names of :data:`WEIGHTS`.

    - ``drink``, ``size``, ``quantity``, ``temperature``, ``milk``, ``extra``: 1 where the answer names exactly
      what was ordered, once, and nothing where nothing was ordered. A hot drink need not be called hot.
    - ``tone``: 1 for a friendly opening, 0.5 without, 0 for a rude word.
    - ``closing``: 1 where the answer asks whether that was all.
    - ``length``: 1 up to five words beside the order, falling to 0 at nine.

    A text that names no drink is no answer to an order: every part is 0.

    Args:
        order: What :func:`parse_order` read.
        answer: Any text.
    """
    text = answer.lower()
    named = mentions(text)
    if not named["drink"]:
        return dict.fromkeys(WEIGHTS, 0.0)
    quality = {part: float(named[part] == order[part]) for part in _MENTIONS}
    quality["closing"] = float(_CLOSING.search(text) is not None)
    for part, pattern in _MENTIONS.items():
        if part != "quantity":
            text = pattern.sub(" ", text)
    quality["tone"] = 0.0 if _RUDE.search(text) else 1.0 if _FRIENDLY.search(text) else 0.5
    beside = [word for word in re.findall(r"[\w']+", text) if word not in _JOINING_WORDS]
    too_many = max(0, len(beside) - _FREE_WORDS)
    return quality | {"length": max(0.0, 1 - too_many / _WORDS_TOO_MANY)}


def quality(order: Mentions, answer: str) -> float:
    """Returns the true quality of an answer, from 0 (garbage) to 1: the weighted sum of its :func:`parts`."""
    graded = parts(order, answer)
    return sum(weight * graded[part] for part, weight in WEIGHTS.items())


class CoffeeOrderQuality(EachAlone):
    r"""The gold reward of the quickstart: the quality of an answer to a coffee order.

    The order is read out of the prompt's last user turn. See :func:`parts` for what is rewarded.

    Args:
        scale: Score of a perfect answer; garbage scores 0.

    Example:
        >>> gold = CoffeeOrderQuality()
        >>> prompt = "Agent: Hi!User: can i get a large oat latte\nAgent:"
        >>> gold([prompt], [" Sure thing, a large oat latte. Anything else?"], [0])
        [1.0]
    """

    def __init__(self, scale: Positive = 1.0) -> None:
        self.scale = scale

    def score(self, prompt: str, response: str, row: int) -> float:
        """Returns the response's quality times ``scale``; the prompt's last user turn must be an order."""
        request = prompt.rpartition("User:")[2].removesuffix("Agent:")
        order = parse_order(request)
        if order is None:
            raise ValueError(
                f"CoffeeOrderQuality: no single coffee order in prompt {row}, which ends {request[-80:]!r}. It "
                "judges answers to the quickstart's coffee orders alone: use their data, or leave out gold."
            )
        return self.scale * quality(order, response)
