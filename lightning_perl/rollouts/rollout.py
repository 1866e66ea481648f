"""What came out of one collection. Immutable: nothing written later can change what was sampled.

Shapes: ``B`` rollouts, ``P`` prompt tokens, ``R`` response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_perl.functional.sequences import Sequences


class Rollout(NamedTuple):
    """Prompts and their sampled responses.

    Attributes:
        prompt_ids: Padded on the left. Shape: ``(B, P)``, int64.
        prompt_mask: Shape: ``(B, P)``, bool.
        response_ids: Padded on the right. Shape: ``(B, R)``, int64.
        response_mask: True up to and including the stop token. Shape: ``(B, R)``, bool.
        stopped: False where the length limit cut the response. Shape: ``(B,)``, bool.
        row: The prompts' numbers in their corpus. Shape: ``(B,)``, int64.
        logprobs: Of the response tokens, in the distribution they were drawn from; None where nobody
            kept them. Shape: ``(B, R)``.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    stopped: Tensor
    row: Tensor
    logprobs: Tensor | None = None

    def rows(self, rows: Tensor) -> Rollout:
        """The named rows only."""
        return Rollout(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]

    def sequences(self) -> Sequences:
        """Prompt and response as whole rows."""
        return Sequences(
            ids=torch.cat([self.prompt_ids, self.response_ids], dim=1),
            attention_mask=torch.cat([self.prompt_mask, self.response_mask], dim=1),
            response_mask=self.response_mask,
        )

    def widened(self, response_tokens: int, pad_id: int) -> Rollout:
        """The same with so many response columns, the new ones masked out."""
        missing = (0, response_tokens - self.response_ids.shape[1])
        logprobs = None if self.logprobs is None else F.pad(self.logprobs, missing)
        return self._replace(
            response_ids=F.pad(self.response_ids, missing, value=pad_id),
            response_mask=F.pad(self.response_mask, missing, value=False),
            logprobs=logprobs,
        )

    def response_tokens(self) -> Tensor:
        """Length of each response, the stop token included. Shape: ``(B,)``, int64."""
        return self.response_mask.sum(1)


def joined(parts: Sequence[Rollout], pad_id: int) -> Rollout:
    """Rollouts of prompts with the same columns as one; shorter responses are padded on the right."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.response_ids.shape[1] for part in parts)
    widened = [part.widened(width, pad_id) for part in parts]
    columns = zip(*widened, strict=True)
    return Rollout(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def split_at(ids: list[int], stop_ids: tuple[int, ...]) -> list[list[int]]:
    """The runs of ids between stop ids, without them; empty runs are left out, but for a lone one."""
    runs: list[list[int]] = [[]]
    for token in ids:
        if token in stop_ids:
            runs.append([])
        else:
            runs[-1].append(token)
    return [run for run in runs if run] or [[]]
