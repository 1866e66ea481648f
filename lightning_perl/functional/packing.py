"""Rows that begin alike, packed into one line so that what they share is computed once.

A preference pair is ``prompt + chosen`` and ``prompt + rejected``; packed it is ``prompt | chosen | rejected``.
So are several responses to one prompt. Short pairs share a line, so that little of it is padding. Positions
restart at each pair and answer, and a mask keeps them apart, so that every token attends to exactly the tokens
that it attends to in a row of its own.

Shapes: ``B`` rows, ``T`` tokens of the longest row, ``L`` lines, ``C`` columns of the longest line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_perl.functional.sequences import position_ids

SHARED = 0
"""Owner of the tokens that all rows of a group share."""
NOBODY = -1
"""Owner of padding."""


class Packing(NamedTuple):
    """Where rows' tokens go: token ``t`` to column ``first + t``, from ``shared`` on to ``start + t - shared``.

    Attributes:
        line: Shape: ``(B,)``, int64, like ``first``, ``shared`` and ``start``.
        first: Column of the first token that the row shares with the others of its group.
        shared: Number of tokens that it shares with them.
        start: Column of the row's first own token.
        lines: ``L``.
        columns: ``C``.
    """

    line: Tensor
    first: Tensor
    shared: Tensor
    start: Tensor
    lines: int
    columns: int

    def rows(self, rows: slice | Tensor) -> Packing:
        """The plan of some rows, all of their lines."""
        if isinstance(rows, slice) and rows == slice(0, len(self.line)):
            return self
        lines, line = torch.unique(self.line[rows], return_inverse=True)
        first, shared, start = (part[rows] for part in self[1:4])
        return Packing(line, first, shared, start, len(lines), self.columns)


class Lines(NamedTuple):
    """Packed rows: ids, positions of tokens in their own rows, groups and owners. Shape: ``(L, C)`` each, int64.

    Tokens of rows that share something have the same group; padding's is `NOBODY`. The owner of a token is
    `SHARED`, `NOBODY`, or 1 + the row that it belongs to.
    """

    ids: Tensor
    position_ids: Tensor
    group: Tensor
    owner: Tensor


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows have in common at their start; the last token of each is not shared."""
    most = min(len(row) for row in rows) - 1
    for column in range(most):
        if any(row[column] != rows[0][column] for row in rows):
            return column
    return most


def packed_tokens(rows: Sequence[Sequence[int]]) -> int:
    """Tokens of the line that holds these rows."""
    return sum(len(row) for row in rows) - (len(rows) - 1) * common_prefix(rows)


def plan(groups: Sequence[Sequence[Sequence[int]]], device: torch.device | None = None) -> Packing:
    """Lines for groups of rows of token ids; rows are numbered in the order given, and padded on the right.

    A line is as long as the longest group. The longest groups are placed first, each on the first line that has
    room for it.
    """
    sizes = [packed_tokens(rows) for rows in groups]
    columns, ends = max(sizes, default=1), list[int]()
    begins: dict[int, tuple[int, int]] = {}
    for group in sorted(range(len(groups)), key=lambda group: -sizes[group]):
        fits = (line for line, end in enumerate(ends) if end + sizes[group] <= columns)
        line = next(fits, len(ends))
        ends += [0] * (line == len(ends))
        begins[group] = line, ends[line]
        ends[line] += sizes[group]
    places: list[tuple[int, ...]] = []
    for group, rows in enumerate(groups):
        (line, first), shared = begins[group], common_prefix(rows)
        start = first + shared
        for row in rows:
            places.append((line, first, shared, start))
            start += len(row) - shared
    line_of, first_of, shared_of, start_of = torch.tensor(places, device=device).unbind(1)
    return Packing(line_of, first_of, shared_of, start_of, len(ends), columns)


def plan_samples(
    rows: int, tokens: int, prompt_tokens: int, samples: int, device: torch.device | None = None
) -> Packing:
    """A plan for several responses to each prompt, from shapes alone: no tensor's value is read.

    Rows of a prompt are adjacent. Prompts are padded on the left to ``prompt_tokens`` columns, responses on the
    right to ``tokens`` columns in all.
    """
    row, response_tokens = torch.arange(rows, device=device), tokens - prompt_tokens
    return Packing(
        row // samples,
        torch.zeros_like(row),
        torch.full_like(row, prompt_tokens),
        prompt_tokens + row % samples * response_tokens,
        rows // samples,
        prompt_tokens + samples * response_tokens,
    )


def saves_work(packing: Packing, rows: int, tokens: int, hidden_size: int) -> bool:
    """Whether lines cost a decoder less than rows: there are fewer tokens, but each attends to more columns.

    Per token a block costs about ``24 H^2`` FLOPs in its linear layers and ``4 H`` per column in attention.
    """
    packed = packing.lines * packing.columns * (6 * hidden_size + packing.columns)
    return packed < rows * tokens * (6 * hidden_size + tokens)


def places(packing: Packing, tokens: int) -> Tensor:
    """Where each token of ``T`` goes, ``line * C + column``; padding anywhere. Shape: ``(B, T)``, int64."""
    column = torch.arange(tokens, device=packing.line.device).expand(len(packing.line), tokens)
    own = column - packing.shared[:, None] + packing.start[:, None]
    together = column + packing.first[:, None]
    inside = torch.where(column < packing.shared[:, None], together, own)
    return packing.line[:, None] * packing.columns + inside.clamp(max=packing.columns - 1)


def pack(ids: Tensor, attention_mask: Tensor, packing: Packing) -> Lines:
    """Copy rows to their lines. Shape of ids and mask: ``(B, T)``."""
    tokens = ids.shape[1]
    size = packing.lines * packing.columns
    # Padding goes to one place behind the last line, which is cut off again.
    where = torch.where(attention_mask, places(packing, tokens), size).flatten()
    column = torch.arange(tokens, device=ids.device).expand_as(ids)
    row = torch.arange(1, len(ids) + 1, device=ids.device)[:, None].expand_as(ids)
    group = (packing.line * packing.columns + packing.first)[:, None].expand_as(ids)
    owner = torch.where(column < packing.shared[:, None], SHARED, row)

    def laid(values: Tensor, padding: int) -> Tensor:
        flat = torch.full((size + 1,), padding, dtype=torch.int64, device=ids.device)
        return flat.scatter(0, where, values.flatten())[:size].view(packing.lines, packing.columns)

    positions = laid(position_ids(attention_mask), 0)
    return Lines(laid(ids, 0), positions, laid(group, NOBODY), laid(owner, NOBODY))


def attention_bias(group: Tensor, owner: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores: 0 where a token may look, the dtype's least number elsewhere.

    A token attends to the shared tokens of its group and to those of its own row, never to later ones; padding
    attends to itself, so that no softmax is empty. Additive and not boolean: transformers' eager attention adds a
    boolean mask as 0 and 1. Shape: `Lines.group` and `Lines.owner` to ``(L, 1, C, C)``, queries by keys.
    """
    query, key = owner[:, :, None], owner[:, None, :]
    columns = torch.arange(owner.shape[1], device=owner.device)
    later = columns[None, :] > columns[:, None]
    itself = columns[None, :] == columns[:, None]
    shared = (key == SHARED) & (group[:, :, None] == group[:, None, :])
    visible = (shared | ((key == query) & (key > SHARED))) & ~later | itself
    zero = torch.zeros((), dtype=dtype, device=owner.device)
    return torch.where(visible, zero, torch.finfo(dtype).min).unsqueeze(1)


def unpack(values: Tensor, packing: Packing, tokens: int) -> Tensor:
    """From lines back to rows; their padding means nothing. Shape: ``(L, C, H)`` to ``(B, T, H)``."""
    where = places(packing, tokens)
    return values.flatten(0, 1).index_select(0, where.flatten()).view(*where.shape, -1)
