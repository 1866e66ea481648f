"""A made-up coffee bar: seeded orders, a sloppy barista's answers, thumbs, and the true quality.

The default world of the quickstart: small enough for two CPU cores, in Taskmaster's turns, and,
unlike a real corpus, with a known gold quality beside the thumbs. Everything about row ``i`` is
drawn from streams named by (seed, row), so it is the same in every process and for any number of
rows. No text is Taskmaster's.

An answer repeats the order and asks what else the customer wants::

    User: can i get two large iced oat lattes with an extra shot please
    Agent: Sure thing, two large iced oat lattes with an extra shot. Anything else?

Its quality is the weighted sum of nine parts, each from 0 to 1 (:data:`WEIGHTS`): six say whether
the order was repeated right, three how it was said. A fault spoils one part, so faults are named by
the part.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from lightning_perl.data.base import ConversationDataModule
from lightning_perl.data.folds import stable_hash
from lightning_perl.data.rows import Item, Row, Splits, Turn

_T = TypeVar("_T")

QUANTITIES = {1: "one", 2: "two", 3: "three"}
SIZES = ("small", "medium", "large")
DRINKS = ("latte", "mocha", "cappuccino", "americano", "macchiato", "chai")
MILKS = ("oat", "almond", "soy")
EXTRAS = ("an extra shot", "vanilla", "caramel", "cinnamon", "whipped cream")

#: The parts of the quality and what each weighs; the weights add up to 1.
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

_GREETINGS = (
    "Hi, what can I get you?",
    "Welcome! What can I get you?",
    "Hello, what would you like?",
    "Good morning! What would you like?",
)
_ASKS = ("can i get", "could i have", "i'd like", "i'll have", "hi, can i get", "give me", "")
_THANKS = ("please", "thanks", "to go", "")
_WARM = ("Sure thing,", "Of course,", "Coming up,", "Great choice,")
_CURT = ("OK,", "So")
_RUDE = ("Ugh,", "Fine,", "Whatever,")
_CLOSINGS = ("Anything else?", "Anything else today?", "Is that all?")
_RAMBLES = (
    "I am so tired today, you know.",
    "The machine is so slow today.",
    "It is so busy here today, you know.",
    "I like the rain, you know.",
)


def _either(words: Collection[str]) -> str:
    return "|".join(re.escape(word) for word in words)


def _short(extra: str) -> str:
    return extra.removeprefix("an ")


_MENU = _either([*SIZES, "iced", "hot", *MILKS, *DRINKS])
_MENTIONS = {
    "drink": re.compile(rf"\b({_either(DRINKS)})s?\b"),
    "size": re.compile(rf"\b({_either(SIZES)})\b"),
    # "a" and "one" are numbers only before something on the menu.
    "quantity": re.compile(rf"\b(an?|one|two|three)\s+(?=(?:{_MENU})s?\b)"),
    "temperature": re.compile(r"\b(iced|hot)\b"),
    "milk": re.compile(rf"\b({_either(MILKS)})\b"),
    "extra": re.compile(rf"\b({_either([_short(extra) for extra in EXTRAS])})\b"),
}
_NUMBERS = {"a": 1, "an": 1} | {word: number for number, word in QUANTITIES.items()}
_WARM_WORDS = re.compile(rf"\b({_either([tone.lower().rstrip(',') for tone in _WARM])})\b")
_RUDE_WORDS = re.compile(rf"\b({_either([tone.lower().rstrip(',') for tone in _RUDE])})\b")
_CLOSING_WORDS = re.compile(r"\b(anything else( today)?|is that all) ?\?")
_JOINING_WORDS = {"a", "an", "and", "with", "milk"}
# The longest opening and the longest closing.
_FREE_WORDS = 5
_WORDS_TOO_MANY = 4


def _mentioned(said: str) -> dict[str, list[str]]:
    return {part: pattern.findall(said) for part, pattern in _MENTIONS.items()}


@dataclass(frozen=True)
class Order:
    """What a customer wants.

    Attributes:
        quantity: From 1 to 3.
        size: One of :data:`SIZES`.
        iced: Iced or hot.
        drink: One of :data:`DRINKS`.
        milk: One of :data:`MILKS`, or None for the house's.
        extra: One of :data:`EXTRAS`, or None.
        seed: The stream that the wording is drawn from; no part of what is wanted, not compared.
        row: The row of that stream; not compared.
    """

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


def order(seed: int, row: int) -> Order:
    """Returns the order of a row.

    Args:
        seed: Names the stream of rows.
        row: The row's number, at least 0.
    """
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


def conversation(order: Order) -> tuple[Turn, Turn]:
    """Returns the turns before the answer: the agent's greeting and the customer's order.

    The order is worded in one of many ways; :func:`parse_order` reads every one of them.
    """
    draw = order.stream("conversation")
    greeting = draw.choice(_GREETINGS)
    ask, thanks = draw.choice(_ASKS), draw.choice(_THANKS)
    wording = draw.randrange(3)
    temperature = "iced" if order.iced else "hot" if draw.random() < 0.3 else ""
    before, after = order.milk or "", [order.extra] if order.extra else []
    if wording == 1 and order.milk:
        before, after = "", [f"{order.milk} milk", *after]
    words = [temperature, before, order.drink]
    if wording == 2:
        item = f"{_counted(order.quantity, words, draw)}, {order.size}"
    else:
        item = _counted(order.quantity, [order.size, *words], draw)
    if after:
        item += f" with {' and '.join(after)}"
    return Turn("agent", greeting), Turn("user", " ".join(f"{ask} {item} {thanks}".split()))


def _counted(quantity: int, words: list[str], draw: Random | None = None) -> str:
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
    """Returns the barista's answer to an order.

    Args:
        order: The order, which also fixes the wording and how a part is spoiled (forgotten, swapped
            or invented; curt or rude).
        faults: The parts to spoil.

    Raises:
        ValueError: A fault is none of the parts.
    """
    unknown = sorted(set(faults) - set(WEIGHTS))
    if unknown:
        raise ValueError(f"faults must be some of {sorted(WEIGHTS)}, got {unknown}.")
    draw = order.stream("answer")
    # Drawn whether used or not, so that a fault changes its own part of the text only.
    warm, closing, ramble = draw.choice(_WARM), draw.choice(_CLOSINGS), draw.choice(_RAMBLES)
    opening = order.stream("tone").choice((*_CURT, *_RUDE)) if "tone" in faults else warm
    heard = _misheard(order, faults)
    temperature = "iced" if heard.iced else ""
    item = _counted(heard.quantity, [heard.size, temperature, heard.milk or "", heard.drink])
    sentences = [f"{opening} {item}{f' with {heard.extra}' if heard.extra else ''}."]
    if "length" in faults:
        sentences.append(ramble)
    if "closing" not in faults:
        sentences.append(closing)
    return " ".join(sentences)


def _misheard(order: Order, faults: Collection[str]) -> Order:
    """Returns the order with the faulty parts forgotten (empty), swapped or invented."""
    spoiled: dict[str, Callable[[Random], object]] = {
        "quantity": lambda draw: _other(tuple(QUANTITIES), order.quantity, draw),
        "size": lambda draw: _spoiled(SIZES, order.size, draw),
        "temperature": lambda draw: not order.iced,
        "drink": lambda draw: _other(DRINKS, order.drink, draw),
        "milk": lambda draw: _spoiled(MILKS, order.milk, draw),
        "extra": lambda draw: _spoiled(EXTRAS, order.extra, draw),
    }
    changes = {
        "iced" if part == "temperature" else part: spoil(order.stream(part))
        for part, spoil in spoiled.items()
        if part in faults
    }
    return replace(order, **changes)  # type: ignore[arg-type]


def _other(choices: tuple[_T, ...], right: _T, draw: Random) -> _T:
    return draw.choice([choice for choice in choices if choice != right])


def _spoiled(choices: tuple[str, ...], right: str | None, draw: Random) -> str:
    """Invents what nobody asked for; forgets what was asked for, or takes it for another."""
    if right and draw.random() < 0.6:
        return ""
    return _other(choices, right or "", draw)


def parts(order: Order, text: str) -> dict[str, float]:
    """Returns the parts of an answer's quality, each from 0 to 1, by the names of :data:`WEIGHTS`.

    - ``drink``, ``size``, ``quantity``, ``temperature``, ``milk``, ``extra``: 1 where the answer
      names exactly what was ordered, once; nothing where nothing was ordered. Not saying hot of a
      hot drink is right.
    - ``tone``: 1 for a friendly opening, 0.5 without, 0 for a rude word.
    - ``closing``: 1 where the answer asks whether that was all.
    - ``length``: 1 up to five words beside the order, 0 from nine.

    A text that names no drink at all is no answer to an order: every part is 0.

    Args:
        order: The order.
        text: Any text.
    """
    said = text.lower()
    mentions = _mentioned(said)
    if not mentions["drink"]:
        return dict.fromkeys(WEIGHTS, 0.0)
    hot = [[], ["hot"]]
    right = {
        "drink": mentions["drink"] == [order.drink],
        "size": mentions["size"] == [order.size],
        "quantity": [_NUMBERS[word] for word in mentions["quantity"]] == [order.quantity],
        "temperature": mentions["temperature"] in ([["iced"]] if order.iced else hot),
        "milk": mentions["milk"] == ([order.milk] if order.milk else []),
        "extra": mentions["extra"] == ([_short(order.extra)] if order.extra else []),
        "closing": _CLOSING_WORDS.search(said) is not None,
    }
    for part, pattern in _MENTIONS.items():
        if part != "quantity":
            said = pattern.sub(" ", said)
    beside = [word for word in re.findall(r"[\w']+", said) if word not in _JOINING_WORDS]
    beside = [word for word in beside if word not in QUANTITIES.values()]
    too_many = max(0, len(beside) - _FREE_WORDS)
    tone = 0.0 if _RUDE_WORDS.search(said) else 1.0 if _WARM_WORDS.search(said) else 0.5
    return {part: float(is_right) for part, is_right in right.items()} | {
        "tone": tone,
        "length": max(0.0, 1 - too_many / _WORDS_TOO_MANY),
    }


def quality(order: Order, text: str) -> float:
    """Returns the true quality of an answer, from 0 to 1: the weighted sum of :func:`parts`.

    Args:
        order: The order.
        text: Any text; garbage has 0.
    """
    graded = parts(order, text)
    return sum(weight * graded[part] for part, weight in WEIGHTS.items())


def thumb(order: Order, text: str) -> float:
    """Returns the customer's thumb on an answer: 1.0 up, 0.0 down.

    Up where the quality passes what pleases this customer (logistic around :data:`PLEASING` with
    scale :data:`STRICTNESS`); one in twenty then presses the other thumb (:data:`SLIPS`).
    """
    draw = order.stream("thumb")
    level = draw.uniform(1e-9, 1 - 1e-9)
    expected = PLEASING + STRICTNESS * math.log(level / (1 - level))
    up = quality(order, text) >= expected
    return float(up != (draw.random() < SLIPS))


def parse_order(text: str) -> Order | None:
    """Returns the order in a customer's words, or None where there is not exactly one.

    Args:
        text: What the customer said, as :func:`conversation` words it.
    """
    said = _mentioned(text.lower())
    needed = ("drink", "size", "quantity")
    if not all(said[part] for part in needed) or any(len(found) > 1 for found in said.values()):
        return None
    extras = {_short(extra): extra for extra in EXTRAS}
    return Order(
        quantity=_NUMBERS[said["quantity"][0]],
        size=said["size"][0],
        iced=said["temperature"] == ["iced"],
        drink=said["drink"][0],
        milk=said["milk"][0] if said["milk"] else None,
        extra=extras[said["extra"][0]] if said["extra"] else None,
    )


def split_of(order: Order) -> Literal["train", "val", "test"]:
    """Returns the split an order belongs to, whatever its wording, row and seed.

    One order in ten is held out for validation and one for test, so that a held-out prompt asks for
    something that no training row of any run ever asked for.
    """
    wanted = [order.quantity, order.size, order.iced, order.drink, order.milk, order.extra]
    bucket = int(stable_hash(json.dumps(wanted))[:8], 16) % 10
    return "val" if bucket == 0 else "test" if bucket == 1 else "train"


# Every purpose has rows of its own, so that no number of rows of one moves another's.
_MOST_ROWS = 100_000
_FIRST_ROW = {
    "demonstrations": 0,
    "thumbs": 10_000_000,
    "prompts": 20_000_000,
    "val": 30_000_000,
    "test": 40_000_000,
}


def _orders(
    purpose: str, split: str, count: int, seed: int, distinct: bool = False
) -> Iterator[Order]:
    """Yields a purpose's first ``count`` orders of a split; ``distinct`` ones by their wording."""
    row = _FIRST_ROW[purpose]
    seen: set[str] = set()
    while count:
        found = order(seed, row)
        row += 1
        if split_of(found) != split:
            continue
        wording = conversation(found)[1].text
        if distinct and wording in seen:
            continue
        seen.add(wording)
        count -= 1
        yield found


def _row(order: Order, labelled: bool) -> Row:
    text = answer(order, faults(order))
    label = thumb(order, text) if labelled else None
    return Row(
        context=conversation(order),
        response=(Turn("agent", text),),
        label=label,
        imitate=label != 0,
        dialog=f"coffee_orders:{order.seed}:{order.row}",
        where=f"coffee_orders seed {order.seed}:{order.row}",
    )


def _prompt(order: Order) -> Row:
    return replace(_row(order, False), response=(), imitate=False)


def _utterance(index: int, speaker: str, text: str) -> dict[str, object]:
    return {"index": index, "speaker": speaker, "text": text, "segments": [], "annotations": []}


def write_corpus(
    folder: str | Path,
    demonstrations: int = 500,
    thumbs: int = 500,
    seed: int = 0,
    rows_per_file: int = 500,
) -> None:
    """Writes training rows as files in the layout of Taskmaster's coffee corpus (TM-4).

    ``reward/reward_00.json`` and so on hold the answers with their thumbs, ``data/data_00.json``
    and so on the demonstrations as dialogs of two turns, without the greeting as there.
    :class:`~lightning_perl.data.taskmaster.TaskmasterDataModule` reads the folder as its
    ``data_dir``.

    Args:
        folder: Made where it does not exist; files of these names are overwritten.
        demonstrations: How many dialogs.
        thumbs: How many rated answers.
        seed: As the datamodule's ``corpus_seed``: the same rows.
        rows_per_file: Rows of a file.
    """
    rated = [
        {
            "conversation_id": f"dlg-{stable_hash(row.dialog)[:22]}",
            "context": json.dumps([turn._asdict() for turn in row.context]),
            "generation": json.dumps(row.response[0]._asdict()),
            "reward": row.label,
        }
        for row in (_row(found, True) for found in _orders("thumbs", "train", thumbs, seed))
    ]
    dialogs = [
        {
            "conversation_id": f"dlg-{stable_hash(row.dialog)[:22]}",
            "vertical": "Coffee",
            "scenario": "made-up order",
            "instructions": None,
            "utterances": [
                _utterance(0, "user", row.context[-1].text),
                _utterance(1, "assistant", row.response[0].text),
            ],
        }
        for row in (
            _row(found, False) for found in _orders("demonstrations", "train", demonstrations, seed)
        )
    ]
    for name, rows in (("reward", rated), ("data", dialogs)):
        place = Path(folder) / name
        place.mkdir(parents=True, exist_ok=True)
        for number, start in enumerate(range(0, len(rows), rows_per_file)):
            text = json.dumps(rows[start : start + rows_per_file], indent=4)
            (place / f"{name}_{number:02d}.json").write_text(f"{text}\n", encoding="utf-8")


class CoffeeOrdersDataModule(ConversationDataModule):
    """Made-up coffee orders, a sloppy barista's answers and customers' thumbs; needs no file.

    The barista's answers are of very mixed quality, and so are the answers of a model that imitates
    them; thumbs depend on the true quality, with noise. Orders are divided by what is wanted: no
    order of the validation or test split is ever in a training row, whatever the other arguments.

    Args:
        tokenizer: A folder or a name that transformers loads; from Python also a tokenizer.
        demonstrations: Training answers to imitate, good and bad (``rows: rated``).
        thumbs: Training answers with a thumb; those with a thumb up are also imitated
            (``rows: rated``).
        prompts: Distinct training prompts (``rows: prompts``).
        val_prompts: Validation rows, and as many test rows: distinct prompts, or answers with a
            thumb and as many demonstrations.
        corpus_seed: Names the corpus. The shipped trunk was trained on corpus 0.
        rows: ``rated`` for :class:`~lightning_perl.batches.RatedBatch`, ``prompts`` for
            :class:`~lightning_perl.batches.PromptBatch`.
        batch_size: Rows of a training batch.
        val_batch_size: Rows of a validation or test batch; None takes ``batch_size``.
        max_tokens: Tokens of a row; prompts have at most 48, with a vocabulary made for them.
        max_response_tokens: Tokens of an answer, EOS included; the barista's have at most 32.
        bucket: Batch rows of like length.
        seed: Seed of the order of rows.
        num_workers: Processes that collate.
        on_bad_row: ``raise`` stops at the first row that does not fit, ``reject`` counts it.

    Raises:
        ValueError: An argument out of its range.
    """

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase,
        demonstrations: int = 8000,
        thumbs: int = 8000,
        prompts: int = 8000,
        val_prompts: int = 256,
        corpus_seed: int = 0,
        rows: Literal["rated", "prompts"] = "rated",
        batch_size: int = 32,
        val_batch_size: int | None = None,
        max_tokens: int = 80,
        max_response_tokens: int = 32,
        bucket: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        on_bad_row: Literal["reject", "raise"] = "raise",
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            rows=rows,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            max_tokens=max_tokens,
            max_response_tokens=max_response_tokens,
            bucket=bucket,
            seed=seed,
            num_workers=num_workers,
            on_bad_row=on_bad_row,
        )
        counts = {"demonstrations": demonstrations, "thumbs": thumbs, "prompts": prompts}
        for name, count in (counts | {"val_prompts": val_prompts}).items():
            least = 1 if name == "val_prompts" else 0
            if not least <= count <= _MOST_ROWS:
                raise ValueError(f"data.{name} must be from {least} to {_MOST_ROWS}, got {count}.")
        if rows == "prompts" and not prompts:
            raise ValueError("data.rows is 'prompts' and data.prompts is 0: nothing to answer.")
        if rows == "rated" and not (demonstrations or thumbs):
            raise ValueError("data.demonstrations and data.thumbs are both 0: nothing to learn.")
        self.demonstrations = demonstrations
        self.thumbs = thumbs
        self.prompts = prompts
        self.val_prompts = val_prompts
        self.corpus_seed = corpus_seed

    def read(self) -> Splits:
        """Returns freshly drawn rows; held-out ones are distinct."""
        if self.rows == "prompts":
            return Splits(
                self._drawn("prompts", "train", self.prompts, prompts=True),
                self._drawn("val", "val", self.val_prompts, prompts=True),
                self._drawn("test", "test", self.val_prompts, prompts=True),
            )
        return Splits(
            [
                *self._drawn("demonstrations", "train", self.demonstrations),
                *self._drawn("thumbs", "train", self.thumbs, labelled=True),
            ],
            self._held_out("val"),
            self._held_out("test"),
        )

    def _drawn(
        self, purpose: str, split: str, count: int, labelled: bool = False, prompts: bool = False
    ) -> list[Item]:
        orders = _orders(purpose, split, count, self.corpus_seed, distinct=prompts)
        return [_prompt(found) if prompts else _row(found, labelled) for found in orders]

    def _held_out(self, split: str) -> list[Item]:
        thumbs = self.val_prompts if self.thumbs else 0
        demonstrations = self.val_prompts if self.demonstrations else 0
        orders = _orders(split, split, thumbs + demonstrations, self.corpus_seed, distinct=True)
        return [_row(found, number < thumbs) for number, found in enumerate(orders)]
