"""Packed rows, against the rows themselves.

The checks of single functions run in `tests/losses/test_mutations.py`, on the functions and on their mutants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_perl.functional.packing import (
    NOBODY,
    SHARED,
    Lines,
    Packing,
    plan,
    plan_samples,
)
from lightning_perl.functional.sequences import pad_right

PAIR = [[5, 6, 7, 8], [5, 6, 9]]
ALONE = [[3, 4]]
THREE = [[1, 2, 3], [1, 4], [1, 2, 5, 6]]


def check_common_prefix(function: Callable[[Sequence[Sequence[int]]], int]) -> None:
    for rows, shared in ((PAIR, 2), (ALONE, 1), (THREE, 1), ([[1, 2, 3], [1, 2]], 1)):
        assert function(rows) == shared
    assert function([[1, 2], [1, 2]]) == 1
    assert function([[1, 2, 3, 4], [1, 2, 3, 4], [1, 9, 3, 4]]) == 1


def check_packed_tokens(function: Callable[[Sequence[Sequence[int]]], int]) -> None:
    for rows, tokens in ((PAIR, 5), (ALONE, 2), (THREE, 7)):
        assert function(rows) == tokens


def check_plan(function: Callable[[Sequence[Sequence[Sequence[int]]]], Packing]) -> None:
    # The longest group has the first line for itself; the shortest fills the second.
    packing = function([ALONE, PAIR, THREE])
    assert packing.line.tolist() == [1, 1, 1, 0, 0, 0]
    assert packing.first.tolist() == [5, 0, 0, 0, 0, 0]
    assert packing.shared.tolist() == [1, 2, 2, 1, 1, 1]
    assert packing.start.tolist() == [6, 2, 4, 1, 3, 4]
    assert (packing.lines, packing.columns) == (2, 7)
    assert function([PAIR, PAIR]).line.tolist() == [0, 0, 1, 1]


def check_plan_samples(function: Callable[[int, int, int, int], Packing]) -> None:
    packing = function(6, 9, 5, 3)
    assert packing.line.tolist() == [0, 0, 0, 1, 1, 1]
    assert packing.first.tolist() == [0] * 6
    assert packing.shared.tolist() == [5] * 6
    assert packing.start.tolist() == [5, 9, 13] * 2
    assert (packing.lines, packing.columns) == (2, 17)


def check_saves_work(function: Callable[[Packing, int, int, int], bool]) -> None:
    """Four answers of 64 tokens: a short prompt is worth sharing in a wide trunk only."""
    for prompt, hidden, saves in ((512, 64, True), (64, 512, True), (64, 8, False), (8, 8, False)):
        tokens = prompt + 64
        packing = plan_samples(8, tokens, prompt, 4)
        assert function(packing, 8, tokens, hidden) == saves
    # One row a line is the same work, and no gain.
    assert not function(plan_samples(8, 72, 8, 1), 8, 72, 64)


def check_places(function: Callable[[Packing, int], Tensor]) -> None:
    found = function(plan([ALONE, PAIR, THREE]), 4)
    assert found[0, :2].tolist() == [12, 13]
    assert found[1].tolist() == [7, 8, 9, 10]
    assert found[2, :3].tolist() == [7, 8, 11]
    assert found[5].tolist() == [0, 4, 5, 6]
    assert int(found.min()) >= 0
    assert int(found.max()) < 14


def check_pack(function: Callable[[Tensor, Tensor, Packing], Lines]) -> None:
    ids, mask = pad_right([*PAIR, *ALONE, *ALONE, *ALONE], 0)
    lines = function(ids, mask, plan([PAIR, ALONE, ALONE, ALONE]))
    assert lines.ids.tolist() == [[5, 6, 7, 8, 9], [3, 4, 3, 4, 0], [3, 4, 0, 0, 0]]
    assert lines.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 1, 0], [0, 1, 0, 0, 0]]
    assert lines.owner.tolist() == [
        [SHARED, SHARED, 1, 1, 2],
        [SHARED, 3, SHARED, 4, NOBODY],
        [SHARED, 5, NOBODY, NOBODY, NOBODY],
    ]
    assert lines.group.tolist() == [
        [0, 0, 0, 0, 0],
        [5, 5, 7, 7, NOBODY],
        [10, 10, NOBODY, NOBODY, NOBODY],
    ]


def check_attention_bias(function: Callable[[Tensor, Tensor, torch.dtype], Tensor]) -> None:
    owner = torch.tensor([[SHARED, 1, 1, 2, NOBODY, NOBODY], [SHARED, 1, SHARED, 2, SHARED, 3]])
    group = torch.tensor([[0, 0, 0, 0, NOBODY, NOBODY], [6, 6, 8, 8, 10, 10]])
    bias = function(group, owner, torch.float32)
    assert bias.shape == (2, 1, 6, 6)
    assert bias.dtype == torch.float32
    assert (bias[0, 0] == 0).tolist() == [
        [True, False, False, False, False, False],
        [True, True, False, False, False, False],
        [True, True, True, False, False, False],
        [True, False, False, True, False, False],
        [False, False, False, False, True, False],
        [False, False, False, False, False, True],
    ]
    pair_by_pair = torch.kron(torch.eye(3), torch.ones(2, 2).tril())
    assert torch.equal(bias[1, 0] == 0, pair_by_pair.bool())
    assert float(bias.min()) == torch.finfo(torch.float32).min


def check_unpack(function: Callable[[Tensor, Packing, int], Tensor]) -> None:
    packing = plan([ALONE, PAIR])
    values = torch.arange(20.0).view(2, 5, 2)
    back = function(values, packing, 4)
    assert back.shape == (3, 4, 2)
    assert back[0, :2, 0].tolist() == [10, 12]
    assert back[1, :, 0].tolist() == [0, 2, 4, 6]
    assert back[2, :3, 1].tolist() == [1, 3, 9]
