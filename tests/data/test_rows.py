from __future__ import annotations

import torch

from lightning_perl.data.rows import (
    PromptExample,
    RatedExample,
    RatedRow,
    collate_prompts,
    collate_rated,
)

UP = RatedRow([1, 5, 6, 7, 2], [False, False, False, True, True], True, 1.0, 4)
DOWN = RatedRow([1, 5, 2], [False, False, True], False, 0.0, 5)
DEMONSTRATION = RatedRow([1, 5, 6, 2], [False, True, False, True], True, None, 9)


def test_rated_rows_are_padded_on_the_right_by_hand() -> None:
    batch = collate_rated([RatedExample((UP,)), RatedExample((DOWN,))])
    assert batch.ids.tolist() == [[1, 5, 6, 7, 2], [1, 5, 2, 0, 0]]
    assert batch.attention_mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert batch.response_mask.tolist() == [
        [False, False, False, True, True],
        [False, False, True, False, False],
    ]
    assert batch.prompt_tokens == 2
    assert batch.imitate.tolist() == [True, False]
    assert batch.label.tolist() == [1.0, 0.0]
    assert batch.labelled.tolist() == [True, True]
    assert batch.pairs.shape == (0, 2)
    assert batch.row.tolist() == [4, 5]
    assert (batch.ids.dtype, batch.label.dtype) == (torch.int64, torch.float32)
    assert batch.pairs.dtype == torch.int64


def test_pairs_are_two_rows_and_name_them() -> None:
    pair = RatedExample((DEMONSTRATION, DOWN._replace(label=None)))
    batch = collate_rated([RatedExample((UP,)), pair, pair])
    assert batch.pairs.tolist() == [[1, 2], [3, 4]]
    assert batch.labelled.tolist() == [True, False, False, False, False]
    assert batch.prompt_tokens == 1


def test_a_rows_own_columns_do_not_depend_on_its_batch_mates() -> None:
    alone = collate_rated([RatedExample((DOWN,))])
    beside = collate_rated([RatedExample((UP,)), RatedExample((DOWN,))])
    mask = beside.attention_mask[1]
    assert beside.ids[1][mask].tolist() == alone.ids[0].tolist()
    assert beside.response_mask[1][mask].tolist() == alone.response_mask[0].tolist()
    assert not beside.response_mask[1][~mask].any()


def test_no_column_before_prompt_tokens_holds_a_response_token() -> None:
    batch = collate_rated([RatedExample((row,)) for row in (UP, DOWN, DEMONSTRATION)])
    assert not batch.response_mask[:, : batch.prompt_tokens].any()
    assert batch.response_mask[:, batch.prompt_tokens].any()
    assert batch.response_places is not None
    nowhere = torch.zeros(batch.ids.numel(), dtype=torch.bool)
    places = nowhere.index_fill(0, batch.response_places, True)
    assert torch.equal(places.view_as(batch.ids), batch.response_mask)
    # One column is always a prompt's.
    bare = collate_rated([RatedExample((RatedRow([5, 2], [True, True], True, None, 0),))])
    assert bare.prompt_tokens == 1
    assert bare.response_places is not None
    assert bare.response_places.tolist() == [1]


def test_prompts_are_padded_on_the_left_and_end_together() -> None:
    batch = collate_prompts([PromptExample([1, 5, 6], 0), PromptExample([7], 3)])
    assert batch.ids.tolist() == [[1, 5, 6], [0, 0, 7]]
    assert batch.mask.tolist() == [[True, True, True], [False, False, True]]
    assert batch.row.tolist() == [0, 3]
