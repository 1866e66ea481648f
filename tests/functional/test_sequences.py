"""Padding, stops and columns, against loops over every small case there is.

The checks of single functions run in `tests/losses/test_mutations.py`, on the functions and on their mutants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_perl.functional.sequences import (
    Cut,
    Sequences,
    cuts,
    pad_right,
)

Rows = Sequence[Sequence[int]]


def every_mask(columns: int) -> Tensor:
    """All boolean rows of a width, the one without any True among them."""
    return torch.tensor(list(product([False, True], repeat=columns)))


def check_cuts(fn: Callable[..., Iterator[Cut]]) -> None:
    """Every row once; nothing that counts is cut; what no row of a cut uses is gone."""
    drawn = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 6, (11,), generator=drawn)
    answers = torch.randint(0, 5, (11,), generator=drawn)
    columns = torch.arange(5)
    prompt_mask = columns >= 5 - prompts.unsqueeze(1)
    response_mask = columns < answers.unsqueeze(1)
    rows = Sequences(
        torch.arange(110).view(11, 10), torch.cat([prompt_mask, response_mask], 1), response_mask
    )
    for size in (1, 2, 4, 100):
        found = list(fn(rows, size))
        order = torch.cat([cut.rows for cut in found]).tolist()
        lengths = (prompts + answers).tolist()
        assert sorted(order) == list(range(11))
        assert [lengths[row] for row in order] == sorted(lengths, reverse=True)
        assert [len(cut.rows) for cut in found[:-1]] == [size] * (len(found) - 1)
        for cut in found:
            assert cut.unused == 5 - int(prompts[cut.rows].max())
            assert cut.responses == max(1, int(answers[cut.rows].max()))
            piece = rows.cut(cut)
            assert piece.prompt_tokens == int(prompts[cut.rows].max())
            for place, row in enumerate(cut.rows.tolist()):
                for ours, whole in (
                    (piece.ids[place][piece.attention_mask[place]], rows.ids[row]),
                    (piece.response_ids[place][piece.response_mask[place]], rows.response_ids[row]),
                ):
                    mask = rows.attention_mask if len(whole) == 10 else rows.response_mask
                    assert ours.tolist() == whole[mask[row]].tolist()
        plain = list(fn(rows, size, False))
        assert torch.cat([cut.rows for cut in plain]).tolist() == list(range(11))
        assert {(cut.unused, cut.responses) for cut in plain} == {(0, 5)}


def check_mismatched(fn: Callable[[Sequences], Sequences]) -> None:
    prompts, answers = ([1, 2], [3], [4, 5, 6]), ([11], [13, 14, 15], [16, 17])
    ids, mask = pad_right([[*pair[0], *pair[1]] for pair in zip(prompts, answers, strict=True)], 0)
    response_mask = mask & (ids > 10)
    rows = fn(Sequences(ids, mask, response_mask))
    assert rows.ids.shape == ids.shape
    for row, prompt in enumerate(prompts):
        # What does not fit behind the longer prompt is cut off.
        answer = answers[(row + 1) % 3][: ids.shape[1] - len(prompt)]
        assert rows.ids[row][rows.attention_mask[row]].tolist() == [*prompt, *answer]
        assert rows.ids[row][rows.response_mask[row]].tolist() == answer


def check_position_ids(fn: Callable[[Tensor], Tensor]) -> None:
    mask = every_mask(5)
    expected = [
        [max(sum(row[: column + 1]) - 1, 0) for column in range(5)] for row in mask.tolist()
    ]
    positions = fn(mask)
    assert positions.dtype == torch.int64
    assert positions.tolist() == expected


def check_last_true(fn: Callable[[Tensor], Tensor]) -> None:
    mask = every_mask(5)
    expected = [
        max((c for c, counts in enumerate(row) if counts), default=0) for row in mask.tolist()
    ]
    columns = fn(mask)
    assert columns.dtype == torch.int64
    assert columns.tolist() == expected


def check_predicting(fn: Callable[[Tensor, int], Tensor]) -> None:
    # T = 5; the state that predicts a token stands one column before it
    hidden = torch.arange(20.0).view(2, 5, 2)
    for response_tokens in (1, 2, 4):
        before = list(range(5))[5 - response_tokens - 1 : 4]
        assert fn(hidden, response_tokens).tolist() == hidden[:, before].tolist()


def check_at_last_response(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    mask = every_mask(3)[1:]  # each row has a response token
    hidden = torch.arange(7 * 5 * 2.0).view(7, 5, 2)  # P = 2 prompt columns
    expected = [
        hidden[row, 2 + max(c for c, counts in enumerate(response) if counts)].tolist()
        for row, response in enumerate(mask.tolist())
    ]
    assert fn(hidden, mask).tolist() == expected
    assert fn(hidden[:, 2:], mask).tolist() == expected


def up_to_first_stop(row: Sequence[int], stop_ids: Sequence[int]) -> tuple[list[bool], bool]:
    """The tokens that count, found by walking along the row as a sampler would."""
    counts, stopped = [], False
    for token in row:
        counts.append(not stopped)
        stopped = stopped or token in stop_ids
    return counts, stopped


def check_until_stop(fn: Callable[[Tensor, Sequence[int]], tuple[Tensor, Tensor]]) -> None:
    ids = torch.tensor(list(product(range(4), repeat=4)))
    for stop_ids in ([], [3], [0], [3, 2], [1, 7], [0, 1, 2, 3]):
        mask, stopped = fn(ids, stop_ids)
        assert mask.dtype == stopped.dtype == torch.bool
        # Row by row: where pytest finds itself in a CI it writes whole differences, for minutes.
        for row, counted, ended in zip(ids.tolist(), mask.tolist(), stopped.tolist(), strict=True):
            assert (counted, ended) == up_to_first_stop(row, stop_ids)


def check_padding(fn: Callable[[Rows, int], tuple[Tensor, Tensor]], ids: Rows, mask: Rows) -> None:
    # 9 is the pad id and a real token of the second row: the mask must not be read off the ids
    padded_ids, padded_mask = fn([[5], [9, 8, 9], [], [6, 7]], 9)
    assert padded_ids.dtype == torch.int64
    assert padded_mask.dtype == torch.bool
    assert padded_ids.tolist() == ids
    assert padded_mask.long().tolist() == mask


def check_pad_left(fn: Callable[[Rows, int], tuple[Tensor, Tensor]]) -> None:
    ids = [[9, 9, 5], [9, 8, 9], [9, 9, 9], [9, 6, 7]]
    check_padding(fn, ids, [[0, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 1]])


def check_pad_right(fn: Callable[[Rows, int], tuple[Tensor, Tensor]]) -> None:
    ids = [[5, 9, 9], [9, 8, 9], [9, 9, 9], [6, 7, 9]]
    check_padding(fn, ids, [[1, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 0]])


def test_sequences_know_where_their_responses_are() -> None:
    ids = torch.arange(15).view(3, 5)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    sequences = Sequences(ids, ids > 0, mask)
    assert sequences.prompt_tokens == 3
    assert sequences.response_ids.tolist() == [[3, 4], [8, 9], [13, 14]]
    for rows in (torch.tensor([2, 1]), torch.tensor([False, True, True]), slice(1, 3)):
        picked = sequences.rows(rows)
        for one, whole in zip(picked[:3], sequences[:3], strict=True):
            assert_close(one, whole[rows])


@pytest.mark.parametrize("by_length", [True, False])
def test_cuts_keep_the_responses_to_a_prompt_together(by_length: bool) -> None:
    lengths = torch.tensor([1, 4, 2, 6, 5, 3, 2, 2, 2, 6, 6, 6])
    mask = torch.arange(6) < lengths.unsqueeze(1)
    ids = torch.arange(12).unsqueeze(1).expand(12, 7)
    rows = Sequences(ids, torch.cat([torch.ones(12, 1, dtype=torch.bool), mask], 1), mask)
    for size, most in ((1, 1), (2, 2), (3, 3), (4, 3), (7, 6), (100, 12)):
        pieces = [cut.rows.tolist() for cut in cuts(rows._replace(samples=3), size, by_length)]
        assert sorted(row for piece in pieces for row in piece) == list(range(12))
        assert max(len(piece) for piece in pieces) == most
        for piece in pieces:
            groups = {row // 3 for row in piece}
            # A piece holds whole groups, or is a part of one.
            assert len(groups) == 1 or len(piece) == 3 * len(groups)
        if by_length:
            first = [piece[0] // 3 for piece in pieces]
            assert first == sorted(first, key=[1, 3, 0, 2].index)
