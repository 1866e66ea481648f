"""The quickstart's made-up coffee bar: seeded orders, a sloppy barista's answers, and customers' thumbs.

    python benchmarks/coffee_world.py --out lightning_perl/quickstart/orders   # writes the packaged files again

Small enough for two CPU cores and, unlike a real corpus, with a known gold quality beside the thumbs. An answer
repeats the order and asks what else the customer wants::

    User: can i get two large iced oat lattes with an extra shot please
    Agent: Sure thing, two large iced oat lattes with an extra shot. Anything else?

Its quality is the weighted sum of nine parts (`lightning_perl.rewards.coffee_orders`); a fault of the barista
spoils one part, so faults have the parts' names. Everything about row ``i`` is drawn from streams named by (seed,
row), so it is the same in every process and for any number of rows. Orders are divided by what is wanted: no
held-out order is ever in a training row. No text is Taskmaster's.

Files, for ``PreferenceDataModule``: ``rated_{train,val,test}.jsonl.gz``, demonstrations without a label and
answers with a thumb; ``prompts_{train,val,test}.jsonl.gz``, distinct prompts; ``pairs_train.jsonl.gz``, two
answers to each of some more, the better one chosen. The packaged trunk saw seed 0.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from lightning_perl.data.rows import stable_hash
from lightning_perl.rewards.coffee_orders import (
    DRINKS,
    EXTRAS,
    FRIENDLY,
    MILKS,
    QUANTITIES,
    RUDE,
    SIZES,
    Mentions,
    quality,
)

T = TypeVar("T")

#: How often the barista spoils each part: (where the customer asked for it, where not). Everybody
#: asks for a drink, a size and a number; nobody asks for a tone.
FAULT_RATES = {
    "drink": (0.15, 0.15),
    "size": (0.50, 0.50),
    "quantity": (0.25, 0.25),
    "temperature": (0.40, 0.15),
    "milk": (0.50, 0.15),
    "extra": (0.50, 0.15),
    "tone": (0.75, 0.75),
    "closing": (0.70, 0.70),
    "length": (0.45, 0.45),
}
#: An answer of this quality pleases half of the customers.
PLEASING = 0.55
#: Scale of the logistic spread of what pleases a customer, in units of quality.
STRICTNESS = 0.03
#: How often a customer presses the wrong thumb.
SLIPS = 0.05
#: Every purpose draws rows of its own, so that the number of rows of one does not change another's.
FIRST_ROW = {
    "demonstrations": 0,
    "thumbs": 10_000_000,
    "prompts": 20_000_000,
    "val": 30_000_000,
    "test": 40_000_000,
    "pairs": 50_000_000,
}

GREETINGS = (
    "Hi, what can I get you?",
    "Welcome! What can I get you?",
    "Hello, what would you like?",
    "Good morning! What would you like?",
)
ASKS = ("can i get", "could i have", "i'd like", "i'll have", "hi, can i get", "give me", "")
THANKS = ("please", "thanks", "to go", "")
CURT = ("OK,", "So")
CLOSINGS = ("Anything else?", "Anything else today?", "Is that all?")
RAMBLES = (
    "I am so tired today, you know.",
    "The machine is so slow today.",
    "It is so busy here today, you know.",
    "I like the rain, you know.",
)


@dataclass(frozen=True)
class Order:
    """What a customer wants; the row that it was drawn for is not compared."""

    quantity: int
    size: str
    iced: bool
    drink: str
    milk: str | None
    extra: str | None
    seed: int = field(default=0, compare=False)
    row: int = field(default=0, compare=False)

    def stream(self, name: str) -> Random:
        """Returns this row's random numbers for one purpose, independent of all others."""
        return Random(f"coffee/{self.seed}/{self.row}/{name}")

    def asked(self, part: str) -> bool:
        """Returns whether the customer said something about a part of the order."""
        return {"temperature": self.iced, "milk": bool(self.milk), "extra": bool(self.extra)}.get(
            part, True
        )

    @property
    def mentions(self) -> Mentions:
        """The order as the gold reward reads it."""
        return {
            "drink": [self.drink],
            "size": [self.size],
            "quantity": [QUANTITIES[self.quantity]],
            "temperature": ["iced" if self.iced else "hot"],
            "milk": [self.milk] if self.milk else [],
            "extra": [self.extra.removeprefix("an ")] if self.extra else [],
        }


def order(seed: int, row: int) -> Order:
    """Returns the order of a row of the stream that ``seed`` names."""
    draw = Random(f"coffee/{seed}/{row}")
    return Order(
        quantity=draw.choices((1, 2, 3), (6, 3, 2))[0],
        size=draw.choice(SIZES),
        iced=draw.random() < 0.5,
        drink=draw.choice(DRINKS),
        milk=draw.choice((None, *MILKS)) if draw.random() < 0.8 else None,
        extra=draw.choice(EXTRAS) if draw.random() < 0.6 else None,
        seed=seed,
        row=row,
    )


def conversation(order: Order) -> tuple[str, str]:
    """Returns the agent's greeting and the customer's order, worded in one of many ways."""
    draw = order.stream("conversation")
    greeting = draw.choice(GREETINGS)
    ask, thanks = draw.choice(ASKS), draw.choice(THANKS)
    wording = draw.randrange(3)
    temperature = "iced" if order.iced else "hot" if draw.random() < 0.3 else ""
    before, after = order.milk or "", [order.extra] if order.extra else []
    if wording == 1 and order.milk:
        before, after = "", [f"{order.milk} milk", *after]
    words = [temperature, before, order.drink]
    if wording == 2:
        item = f"{counted(order.quantity, words, draw)}, {order.size}"
    else:
        item = counted(order.quantity, [order.size, *words], draw)
    if after:
        item += f" with {' and '.join(after)}"
    return greeting, " ".join(f"{ask} {item} {thanks}".split())


def counted(quantity: int, words: list[str], draw: Random | None = None) -> str:
    """Returns words with their number and plural; without ``draw`` one is always "a" or "an"."""
    text = " ".join(word for word in words if word)
    if quantity > 1:
        return f"{QUANTITIES[quantity]} {text}s"
    if draw is not None and draw.random() < 0.5:
        return f"one {text}"
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def faults(order: Order) -> frozenset[str]:
    """Returns what the barista gets wrong in this row: names of parts, see :data:`FAULT_RATES`."""
    draw = order.stream("faults")
    # Good and bad days: half of the answers have 0.75 of the faults, the others 1.25.
    day = 0.75 if draw.random() < 0.5 else 1.25
    return frozenset(
        part
        for part, (asked, unasked) in FAULT_RATES.items()
        if draw.random() < day * (asked if order.asked(part) else unasked)
    )


def answer(order: Order, faults: Collection[str] = ()) -> str:
    """Returns the barista's answer to an order, with the parts in ``faults`` spoiled.

    The order's row also fixes the wording, and how a part is spoiled: forgotten, swapped or invented; curt, rude.
    """
    draw = order.stream("answer")
    # Drawn whether used or not, so that a fault changes its own part of the text only.
    friendly, closing, ramble = draw.choice(FRIENDLY), draw.choice(CLOSINGS), draw.choice(RAMBLES)
    opening = order.stream("tone").choice((*CURT, *RUDE)) if "tone" in faults else friendly
    heard = misheard(order, faults)
    temperature = "iced" if heard.iced else ""
    item = counted(heard.quantity, [heard.size, temperature, heard.milk or "", heard.drink])
    sentences = [f"{opening} {item}{f' with {heard.extra}' if heard.extra else ''}."]
    if "length" in faults:
        sentences.append(ramble)
    if "closing" not in faults:
        sentences.append(closing)
    return " ".join(sentences)


def misheard(order: Order, faults: Collection[str]) -> Order:
    """Returns the order with the faulty parts forgotten (empty), swapped or invented."""
    spoilers: dict[str, Callable[[Random], object]] = {
        "quantity": lambda draw: other(tuple(QUANTITIES), order.quantity, draw),
        "size": lambda draw: spoiled(SIZES, order.size, draw),
        "temperature": lambda draw: not order.iced,
        "drink": lambda draw: other(DRINKS, order.drink, draw),
        "milk": lambda draw: spoiled(MILKS, order.milk, draw),
        "extra": lambda draw: spoiled(EXTRAS, order.extra, draw),
    }
    changes: dict[str, Any] = {
        "iced" if part == "temperature" else part: spoil(order.stream(part))
        for part, spoil in spoilers.items()
        if part in faults
    }
    return replace(order, **changes)


def other(choices: tuple[T, ...], right: T, draw: Random) -> T:
    """Returns one of the choices that is not the right one."""
    return draw.choice([choice for choice in choices if choice != right])


def spoiled(choices: tuple[str, ...], right: str | None, draw: Random) -> str:
    """Invents what nobody asked for; forgets what was asked for, or takes it for another."""
    if right and draw.random() < 0.6:
        return ""
    return other(choices, right or "", draw)


def thumb(order: Order, text: str) -> int:
    """Returns the customer's thumb on an answer: 1 up, 0 down.

    Up where the quality passes what pleases this customer (logistic around :data:`PLEASING` with scale
    :data:`STRICTNESS`); one customer in twenty then presses the other thumb (:data:`SLIPS`).
    """
    draw = order.stream("thumb")
    level = draw.uniform(1e-9, 1 - 1e-9)
    expected = PLEASING + STRICTNESS * math.log(level / (1 - level))
    up = quality(order.mentions, text) >= expected
    return int(up != (draw.random() < SLIPS))


def split_of(order: Order) -> str:
    """Returns the split of an order, whatever its wording, row and seed: one in ten is val, one in ten test."""
    wanted = [order.quantity, order.size, order.iced, order.drink, order.milk, order.extra]
    bucket = int(stable_hash(json.dumps(wanted))[:8], 16) % 10
    return "val" if bucket == 0 else "test" if bucket == 1 else "train"


def orders(
    purpose: str, split: str, count: int, seed: int, distinct: bool = False
) -> Iterator[Order]:
    """Yields a purpose's first ``count`` orders of a split; ``distinct`` ones by their wording."""
    row = FIRST_ROW[purpose]
    wordings: set[str] = set()
    while count:
        drawn = order(seed, row)
        row += 1
        if split_of(drawn) != split:
            continue
        wording = conversation(drawn)[1]
        if distinct and wording in wordings:
            continue
        wordings.add(wording)
        count -= 1
        yield drawn


def prompt_row(order: Order) -> dict[str, Any]:
    """Returns a prompt as a row of ``PreferenceDataModule``."""
    greeting, request = conversation(order)
    messages = [("assistant", greeting), ("user", request)]
    return {"prompt": [{"role": role, "content": text} for role, text in messages]}


def answer_row(order: Order, labelled: bool) -> dict[str, Any]:
    """Returns a demonstration, or an answer with its thumb, as a row of ``PreferenceDataModule``."""
    text = answer(order, faults(order))
    label = {"label": thumb(order, text)} if labelled else {}
    return {**prompt_row(order), "response": text, **label}


def pair_row(order: Order) -> dict[str, Any]:
    """Returns two answers of the barista as a pair, the one of higher quality chosen."""
    again = replace(order, row=order.row + 5_000_000)
    texts = [answer(order, faults(drawn)) for drawn in (order, again)]
    worse, better = sorted(texts, key=lambda text: quality(order.mentions, text))
    return {**prompt_row(order), "chosen": better, "rejected": worse}


def world(
    demonstrations: int = 8000,
    thumbs: int = 8000,
    prompts: int = 8000,
    held_out: int = 256,
    pairs: int = 1024,
    seed: int = 0,
) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of every file.

    Args:
        demonstrations: Training answers to imitate, good and bad.
        thumbs: Training answers with a thumb.
        prompts: Distinct training prompts.
        held_out: Held-out prompts, thumbs and demonstrations, each, of validation and test.
        pairs: Training prompts with two answers, where these differ.
        seed: Names the world.
    """
    files = {
        "rated_train": [
            *(
                answer_row(o, False)
                for o in orders("demonstrations", "train", demonstrations, seed)
            ),
            *(answer_row(o, True) for o in orders("thumbs", "train", thumbs, seed)),
        ],
        "prompts_train": [
            prompt_row(o) for o in orders("prompts", "train", prompts, seed, distinct=True)
        ],
        "pairs_train": [
            row
            for row in map(pair_row, orders("pairs", "train", pairs, seed, distinct=True))
            if row["chosen"] != row["rejected"]
        ],
    }
    for split in ("val", "test"):
        drawn = list(orders(split, split, 2 * held_out, seed, distinct=True))
        files[f"rated_{split}"] = [answer_row(o, n < held_out) for n, o in enumerate(drawn)]
        files[f"prompts_{split}"] = [prompt_row(o) for o in drawn[:held_out]]
    return files


def main(flags: Sequence[str] | None = None) -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="Folder of the files; made if need be."
    )
    parser.add_argument(
        "--demonstrations", type=int, default=8000, help="Training answers to imitate."
    )
    parser.add_argument("--thumbs", type=int, default=8000, help="Training answers with a thumb.")
    parser.add_argument("--prompts", type=int, default=8000, help="Distinct training prompts.")
    parser.add_argument(
        "--held_out", type=int, default=256, help="Rows of a kind to validate and test on."
    )
    parser.add_argument("--pairs", type=int, default=1024, help="Training pairs.")
    parser.add_argument(
        "--seed", type=int, default=0, help="Names the world; another seed, other rows."
    )
    args = vars(parser.parse_args(flags))
    out: Path = args.pop("out")
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in world(**args).items():
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        # Without a time stamp, so that the same rows are the same file.
        (out / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
        print(f"{out / name}.jsonl.gz: {len(rows)} rows")


if __name__ == "__main__":
    main()
