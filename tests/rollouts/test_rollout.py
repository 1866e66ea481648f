"""A rollout's prompts and responses side by side."""

from __future__ import annotations

import torch

from lightning_perl.rollouts.rollout import Rollout


def test_sequences_are_prompt_and_response_side_by_side() -> None:
    rollout = Rollout(
        prompt_ids=torch.tensor([[0, 5, 6], [7, 8, 9]]),
        prompt_mask=torch.tensor([[False, True, True], [True, True, True]]),
        response_ids=torch.tensor([[3, 2], [4, 0]]),
        response_mask=torch.tensor([[True, True], [True, False]]),
        stopped=torch.tensor([True, False]),
        row=torch.tensor([11, 3]),
    )
    sequences = rollout.sequences()
    assert sequences.ids.tolist() == [[0, 5, 6, 3, 2], [7, 8, 9, 4, 0]]
    assert sequences.attention_mask.tolist() == [
        [False, True, True, True, True],
        [True, True, True, True, False],
    ]
    assert sequences.prompt_tokens == 3
    assert torch.equal(sequences.response_mask, rollout.response_mask)
    assert torch.equal(sequences.response_ids, rollout.response_ids)
    assert rollout.response_tokens().tolist() == [2, 1]  # the stop token counts
