"""A rollout is what was sampled, and stays it."""

from __future__ import annotations

import pytest
import torch

from lightning_perl.rollouts.rollout import Rollout


def small() -> Rollout:
    return Rollout(
        prompt_ids=torch.tensor([[0, 5, 6], [7, 8, 9]]),
        prompt_mask=torch.tensor([[False, True, True], [True, True, True]]),
        response_ids=torch.tensor([[3, 2], [4, 0]]),
        response_mask=torch.tensor([[True, True], [True, False]]),
        stopped=torch.tensor([True, False]),
        row=torch.tensor([11, 3]),
    )


def test_sequences_are_prompt_and_response_side_by_side() -> None:
    sequences = small().sequences()
    assert sequences.ids.tolist() == [[0, 5, 6, 3, 2], [7, 8, 9, 4, 0]]
    assert sequences.attention_mask.tolist() == [
        [False, True, True, True, True],
        [True, True, True, True, False],
    ]
    assert sequences.prompt_tokens == 3
    assert torch.equal(sequences.response_mask, small().response_mask)
    assert torch.equal(sequences.response_ids, small().response_ids)


def test_lengths_count_the_stop_token() -> None:
    assert small().response_tokens().tolist() == [2, 1]


def test_fields_cannot_be_replaced() -> None:
    with pytest.raises(AttributeError):
        small().row = torch.zeros(2)  # type: ignore[misc]
