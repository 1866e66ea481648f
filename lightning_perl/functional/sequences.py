"""The one file that knows padding: positions, stops and the columns where responses live.

Shapes: ``B`` rows, ``P`` prompt tokens, ``R`` response tokens, ``T = P + R``. Every mask is boolean and
True means *this token counts*; nothing below this file knows pad ids, EOS or prompt lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """Whole rows, and which of their tokens are responses.

    All response tokens are in the last ``R`` columns; whatever else stands there is masked out.

    Attributes:
        ids: Shape: ``(B, T)``, int64.
        attention_mask: True on real tokens, padding may be on either side. Shape: ``(B, T)``, bool.
        response_mask: True on the response tokens that count. Shape: ``(B, R)``, bool.
        samples: Neighbouring rows that have one prompt.
    """

    ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    samples: int = 1

    @property
    def prompt_tokens(self) -> int:
        """``P = T - R``."""
        return self.ids.shape[1] - self.response_mask.shape[1]

    @property
    def response_ids(self) -> Tensor:
        """The last ``R`` columns. Shape: ``(B, R)``."""
        return self.ids[:, self.prompt_tokens :]

    def rows(self, rows: Tensor | slice) -> Sequences:
        """The named rows only; all that have one prompt, or ``samples`` is no longer right."""
        ids, attention_mask, response_mask, samples = self
        return Sequences(ids[rows], attention_mask[rows], response_mask[rows], samples)

    def cut(self, cut: Cut) -> Sequences:
        """Some rows without the columns that none of them uses."""
        columns = slice(cut.unused, self.prompt_tokens + cut.responses)
        return Sequences(
            self.ids[cut.rows, columns],
            self.attention_mask[cut.rows, columns],
            self.response_mask[cut.rows, : cut.responses],
            self.samples,
        )


class Cut(NamedTuple):
    """Rows that are read together, and the columns they need.

    Attributes:
        rows: Their numbers. Shape: ``(b,)``, int64.
        unused: Columns at the left that hold padding in all of them.
        responses: Response columns that one of them uses, at least 1.
    """

    rows: Tensor
    unused: int
    responses: int


def cuts(sequences: Sequences, size: int, by_length: bool = True) -> Iterator[Cut]:
    """Micro-batches of up to ``size`` rows.

    Each holds all rows of one or more prompts, or, where ``size`` is below ``sequences.samples``, a part of
    the rows of one prompt.

    Args:
        sequences: ``B`` rows.
        size: Most rows of a micro-batch.
        by_length: Rows of similar length go together, the longest first, without the columns that none
            of them uses. This reads tensors' values, once. Off: rows as they come, all columns.
    """
    samples = sequences.samples
    count, responses = sequences.response_mask.shape
    order, spans = torch.arange(count, device=sequences.ids.device), [(0, responses)] * count
    if by_length:
        longest = sequences.attention_mask.sum(1).view(-1, samples).amax(1)
        groups = longest.argsort(descending=True, stable=True)
        order = order.view(-1, samples)[groups].flatten()
        # At least one prompt column stays, and one of the response.
        first = sequences.attention_mask.long().argmax(1).clamp(max=sequences.prompt_tokens - 1)
        last = last_true(sequences.response_mask) + 1
        spans = torch.stack([first, last], 1)[order].tolist()
    whole = max(samples, size // samples * samples)
    starts = [
        at
        for group in range(0, count, whole)
        for at in range(group, min(group + whole, count), size)
    ]
    for start, end in zip(starts, [*starts[1:], count], strict=True):
        together = spans[start:end]
        yield Cut(
            order[start:end],
            min(unused for unused, _ in together),
            max(used for _, used in together),
        )


def mismatched(rows: Sequences) -> Sequences:
    """Every prompt with the response of the next row, the last one with the first row's.

    A response that does not fit into the ``T`` columns behind its new prompt loses its end. No tensor's value is
    read.

    Args:
        rows: Padded on the right, each response the end of its row. ``response_mask`` covers all ``T`` columns.
    """
    ids, mask, response_mask, _ = rows
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    starts = response_mask.long().argmax(1, keepdim=True)
    # Where each column's token comes from: the row itself, or behind the start of the next row's response.
    shifted = (columns - starts + starts.roll(-1, 0)).clamp(0, ids.shape[1] - 1)
    inside = columns - starts + starts.roll(-1, 0) < mask.sum(1, keepdim=True).roll(-1, 0)
    is_prompt = columns < starts
    answer = ids.roll(-1, 0).gather(1, shifted)
    return Sequences(
        torch.where(is_prompt, ids, torch.where(inside, answer, torch.zeros_like(ids))),
        is_prompt | inside,
        ~is_prompt & inside,
    )


def predicting(hidden: Tensor, response_tokens: int) -> Tensor:
    """Hidden states that predict the last ``R`` columns; only here is shifted by one. Shape: ``(B, R, H)``."""
    return hidden[:, -response_tokens - 1 : -1]


def at_last_response(hidden: Tensor, response_mask: Tensor) -> Tensor:
    """Hidden state at each row's last response token (EOS if any), where the score is read. Shape: ``(B, H)``."""
    prompt_tokens = hidden.shape[1] - response_mask.shape[1]
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, last_true(response_mask) + prompt_tokens]


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions counted from each row's first real token; at padding those of the last one before, or 0. int64."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def last_true(mask: Tensor) -> Tensor:
    """Column of the last True of every row; 0 in a row without any. Shape: ``(B, N)`` to ``(B,)``, int64."""
    columns = torch.arange(mask.shape[-1], device=mask.device)
    return (mask * columns).amax(-1)


def until_stop(response_ids: Tensor, stop_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The tokens up to and including the first of ``stop_ids``, and whether there was one.

    Returns:
        ``response_mask``, True on the tokens that count, shape ``(B, R)``; and ``stopped``, False where the
        response was cut by the length limit, shape ``(B,)``.
    """
    stops = torch.tensor(list(stop_ids), device=response_ids.device, dtype=response_ids.dtype)
    is_stop = (response_ids.unsqueeze(-1) == stops).any(-1)
    stops_before = is_stop.long().cumsum(-1) - is_stop.long()
    return stops_before == 0, is_stop.any(-1)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of rows padded on the left, int64 and True on real tokens. Shape: ``(B, N)`` each."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    counted = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
    return ids.long(), torch.tensor(counted, dtype=torch.bool)


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of rows padded on the right, int64 and True on real tokens. Shape: ``(B, N)`` each."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([list(row) + [pad_id] * (width - len(row)) for row in rows])
    counted = [[True] * len(row) + [False] * (width - len(row)) for row in rows]
    return ids.long(), torch.tensor(counted, dtype=torch.bool)
