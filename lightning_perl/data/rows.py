"""What a corpus is read into (turns, rows, pairs, splits), its rows as tokens, and batches of these.

Splits are by group and depend on the rows alone: they are the same on every machine, whatever the seed.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import attrgetter
from typing import Literal, NamedTuple, TypeAlias
from unicodedata import category

import torch

from lightning_perl.batches import PairBatch, PromptBatch, RatedBatch
from lightning_perl.functional.packing import packed_tokens, plan
from lightning_perl.functional.sequences import pad_left, pad_right

EMPTY_PROMPT = "empty prompt. Remove the row, or set on_bad_row: reject."
# A padded position is False in every mask, so the id does not matter.
_PAD = 0


class BadRow(ValueError):
    """A row that cannot be used; the message begins with a few words to count by, and ends with how to mend it."""

    @property
    def reason(self) -> str:
        """The words before the first mark of punctuation."""
        return re.split(r"[:,;.(]", str(self), maxsplit=1)[0].strip()


class LeftOut(BadRow):
    """A row with nothing to learn, and nothing wrong: it is counted, and never stops a run."""


class Tie(LeftOut):
    """A row whose judge preferred neither answer."""

    def __init__(self) -> None:
        super().__init__("ties: neither answer was preferred")


BadRowHook: TypeAlias = Callable[[str, str], None]
"""Takes where a bad row is, ``file:row``, and its message. May raise."""


class Turn(NamedTuple):
    """One turn of a conversation, as plain text without any speaker tag.

    A call of an API is an ``agent`` turn, the API's answer an ``api`` turn.
    """

    role: Literal["system", "user", "agent", "api"]
    text: str


@dataclass(frozen=True)
class Row:
    """One answer in its context, or one demonstrated dialog.

    Attributes:
        context: The turns before the response; may be empty.
        response: One agent turn; or, of a demonstrated dialog, all turns from its first agent turn
            on, of which only the agent turns count. Empty for a row that is only a prompt.
        label: 1.0 thumbs up, 0.0 thumbs down, between them for a rating, None without a label.
        imitate: Whether the response enters the language-modelling loss.
        dialog: The group of rows that is never divided between splits.
        where: ``file:row``, for error messages.
        source: Number of the source that the row comes from, where sources are weighted.
    """

    context: tuple[Turn, ...]
    response: tuple[Turn, ...]
    label: float | None
    imitate: bool
    dialog: str
    where: str
    source: int = 0

    @property
    def rows(self) -> tuple[Row, ...]:
        """Itself, its only row."""
        return (self,)


@dataclass(frozen=True)
class Pair:
    """Two answers to one context, of which a judge preferred ``chosen``, by a ``margin`` where one is known."""

    chosen: Row
    rejected: Row
    margin: float = 0.0

    @property
    def rows(self) -> tuple[Row, ...]:
        """Both answers, the chosen one first."""
        return (self.chosen, self.rejected)

    # Those of both answers.
    context = property(attrgetter("chosen.context"))
    dialog = property(attrgetter("chosen.dialog"))
    where = property(attrgetter("chosen.where"))
    source = property(attrgetter("chosen.source"))


Item: TypeAlias = Row | Pair


class Splits(NamedTuple):
    """The rows of a corpus, divided by dialog: to learn from, to choose by, to report on."""

    train: list[Item]
    val: list[Item]
    test: list[Item]


def judgement(item: Item) -> tuple[object, object]:
    """Returns what a judge was shown, an answer or two in either order, and the verdict on it."""
    if isinstance(item, Pair):
        chosen, rejected = same(item.chosen.response), same(item.rejected.response)
        return (same(item.context), frozenset((chosen, rejected))), chosen
    return (same(item.context), same(item.response)), item.label


def same(turns: tuple[Turn, ...]) -> tuple[tuple[str, str], ...]:
    """Returns what tells turns apart once they are encoded: outer white space does not."""
    return tuple((turn.role, turn.text.strip()) for turn in turns)


def blank(text: str) -> bool:
    """Whether a text shows nothing: separators, controls and formats, such as a byte order mark."""
    return all(category(letter) in ("Zs", "Zl", "Zp", "Cc", "Cf") for letter in text)


def conflicting(verdicts: Iterable[object]) -> bool:
    """Whether verdicts on one thing contradict each other: both thumbs, or a pair in both orders.

    Ratings contradict each other where one is above the middle and one below.
    """
    sides = {
        verdict > 0.5 if isinstance(verdict, float) else verdict
        for verdict in verdicts
        if verdict is not None and verdict != 0.5
    }
    return len(sides) > 1


def stable_hash(text: str) -> str:
    """Returns a hash that is the same on every machine and in every run."""
    # The encoder refuses half a surrogate pair later, naming file and line.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def assign_folds(groups: Iterable[str], folds: int) -> dict[str, int]:
    """Assigns every group a fold; all folds get about as many rows.

    The largest group goes first, to the fold with the fewest rows so far; ties go by a stable hash.

    Args:
        groups: One group name per row.
        folds: How many folds, at least 2.
    """
    sizes = Counter(groups)
    rows = [0] * folds
    assigned = {}
    for group in sorted(sizes, key=lambda name: (-sizes[name], stable_hash(name))):
        fold = rows.index(min(rows))
        assigned[group] = fold
        rows[fold] += sizes[group]
    return assigned


def hold_out(groups: Iterable[str], fraction: float) -> set[str]:
    """Returns a stable choice of ``round(fraction * groups)`` groups; repeated names count once.

    At least one, where one can be spared: a checkpoint callback that watches a validation loss
    stops a run without any. A fraction of 0 chooses none.
    """
    ordered = sorted(set(groups), key=stable_hash)
    least = int(fraction > 0 and len(ordered) > 1)
    return set(ordered[: max(least, round(fraction * len(ordered)))])


def held_out(items: Sequence[Item], fraction: float) -> tuple[list[Item], list[Item]]:
    """Returns the items that stay, and those of the dialogs that :func:`hold_out` chooses."""
    held = hold_out((item.dialog for item in items), fraction)
    return (
        [item for item in items if item.dialog not in held],
        [item for item in items if item.dialog in held],
    )


class RatedRow(NamedTuple):
    """A :class:`Row` as tokens.

    ``response_mask`` is True on the response tokens that count, ``row`` the row's number in its
    split, and ``turns`` are the turns of the prompt.
    """

    ids: list[int]
    response_mask: list[bool]
    imitate: bool
    label: float | None
    row: int
    turns: int = 1

    @property
    def prompt(self) -> list[int]:
        """The tokens before the first one that counts."""
        return self.ids[: self.response_mask.index(True)]


class RatedExample(NamedTuple):
    """One row, or the chosen and the rejected row of a pair; ``cut_turns`` did not fit the window."""

    rows: tuple[RatedRow, ...]
    cut_turns: int = 0
    margin: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens that a trunk reads: of a pair the prompt once, and both answers."""
        return packed_tokens([row.ids for row in self.rows])


class PromptExample(NamedTuple):
    """A prompt as tokens and its number in its split; ``cut_turns`` did not fit the window."""

    ids: list[int]
    row: int
    cut_turns: int = 0

    @property
    def rows(self) -> tuple[PromptExample]:
        """Itself, its only row."""
        return (self,)

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.ids)


def digest_of(examples: Iterable[RatedExample | PromptExample]) -> str:
    """Returns a hash of examples as a model reads them, the same on every machine."""
    digest = hashlib.sha256()
    for example in examples:
        for row in example.rows:
            digest.update(array("q", row.ids).tobytes())
            digest.update(repr((row[2:], example[1:])).encode())
    return digest.hexdigest()[:16]


def collate_rated(examples: Sequence[RatedExample]) -> RatedBatch:
    """Pads rows on the right; a pair becomes two consecutive rows that ``pairs`` names."""
    rows: list[RatedRow] = []
    pairs: list[tuple[int, int]] = []
    margins = [example.margin for example in examples if len(example.rows) == 2]
    for example in examples:
        if len(example.rows) == 2:
            pairs.append((len(rows), len(rows) + 1))
        rows.extend(example.rows)
    ids, attention_mask = pad_right([row.ids for row in rows], _PAD)
    counted, _ = pad_right([row.response_mask for row in rows], _PAD)
    return RatedBatch(
        ids=ids,
        attention_mask=attention_mask,
        response_mask=counted.bool(),
        prompt_tokens=max(1, min(row.response_mask.index(True) for row in rows)),
        imitate=torch.tensor([row.imitate for row in rows]),
        label=torch.tensor([row.label or 0.0 for row in rows], dtype=torch.float32),
        labelled=torch.tensor([row.label is not None for row in rows]),
        pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        row=torch.tensor([row.row for row in rows]),
        turns=torch.tensor([row.turns for row in rows]),
        packing=plan([[row.ids for row in example.rows] for example in examples])
        if pairs
        else None,
        margins=torch.tensor(margins, dtype=torch.float32) if any(margins) else None,
        response_places=torch.tensor(_places([row.response_mask for row in rows], ids.shape[1])),
    )


def _places(masks: Sequence[Sequence[bool]], tokens: int) -> list[int]:
    """``row * T + column`` of what is True, without column 0. No tensor's value is read, for `estimate`."""
    return [
        place
        for row, mask in enumerate(masks)
        for place in compress(range(row * tokens + 1, (row + 1) * tokens), mask[1:])
    ]


def collate_pairs(examples: Sequence[RatedExample]) -> PairBatch:
    """Pads prompts on the left and answers, which have no holes, on the right."""
    rows = [row for example in examples for row in example.rows]
    prompt_ids, prompt_mask = pad_left([row.prompt for row in rows], _PAD)
    answers = [list(compress(row.ids, row.response_mask)) for row in rows]
    response_ids, response_mask = pad_right(answers, _PAD)
    numbers = torch.tensor([row.row for row in rows])
    return PairBatch(prompt_ids, prompt_mask, response_ids, response_mask, numbers)


def collate_prompts(examples: Sequence[PromptExample]) -> PromptBatch:
    """Pads prompts on the left, so that every row ends at the last column."""
    ids, mask = pad_left([example.ids for example in examples], _PAD)
    return PromptBatch(ids, mask, torch.tensor([example.row for example in examples]))
