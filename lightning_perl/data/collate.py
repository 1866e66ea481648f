"""From encoded rows to the batches of :mod:`lightning_perl.batches`.

A padded position is False in every mask, so the pad id never matters; 0 is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lightning_perl.batches import PromptBatch, RatedBatch
from lightning_perl.functional.packing import packed_tokens, plan
from lightning_perl.functional.sequences import pad_left, pad_right

_PAD = 0


class RatedRow(NamedTuple):
    """An encoded row; see :class:`~lightning_perl.data.rows.Row` for its label.

    ``response_mask`` is True on the response tokens that count, ``row`` the row's number in its
    split, and ``turns`` are the turns of the prompt.
    """

    ids: list[int]
    response_mask: list[bool]
    imitate: bool
    label: float | None
    row: int
    turns: int = 1


class RatedExample(NamedTuple):
    """One row, or the chosen and the rejected row of a pair, in this order."""

    rows: tuple[RatedRow, ...]

    @property
    def tokens(self) -> int:
        """Tokens that a trunk reads: of a pair the prompt once, and both answers."""
        return packed_tokens([row.ids for row in self.rows])


class PromptExample(NamedTuple):
    """An encoded prompt and its number in its split."""

    ids: list[int]
    row: int

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.ids)


def collate_rated(examples: Sequence[RatedExample]) -> RatedBatch:
    """Pads rows on the right; a pair becomes two consecutive rows that ``pairs`` names."""
    rows: list[RatedRow] = []
    pairs: list[tuple[int, int]] = []
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
    )


def collate_prompts(examples: Sequence[PromptExample]) -> PromptBatch:
    """Pads prompts on the left, so that every row ends at the last column."""
    ids, mask = pad_left([example.ids for example in examples], _PAD)
    return PromptBatch(ids, mask, torch.tensor([example.row for example in examples]))
