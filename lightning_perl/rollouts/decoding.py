"""Sampling responses from a trunk, token by token.

Shapes: ``B`` rows, ``P`` prompt tokens, ``R`` response tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lightning_perl.batches import PromptBatch
from lightning_perl.functional.sequences import until_stop
from lightning_perl.models.cache import keep_rows
from lightning_perl.models.recording import GrowingRows, Recorder, Step, recorder_of
from lightning_perl.models.trunk import Trunk
from lightning_perl.rollouts.rollout import Rollout
from lightning_perl.rollouts.sampling import SamplingSpec, draw

Ended = Callable[[Tensor, int, Tensor], Tensor]
"""``(numbers of rows (b,), tokens so far, the last of them (b,)) -> whether that ends the row (b,)``."""
POLL = 8
"""Recorded steps after which it is asked who has ended; asking waits for the GPU."""
LEAST_SHOWN = 256
"""Columns of keys and values that a recorded step looks at, at least."""
WORTH = 4
"""Steps that must be left for a recording to be made: Python goes through it once, as through a step."""


def ends_of(trunk: Trunk, responses: Responses, strings: tuple[str, ...]) -> Ended:
    """A row ends with a stop token, or with the one that completes one of ``strings`` in its text."""

    def ended(rows: Tensor, length: int, tokens: Tensor) -> Tensor:
        by_token = until_stop(tokens.unsqueeze(-1), trunk.stop_ids)[1]
        if not strings:
            return by_token
        ids = responses.ids[rows, :length]
        texts = trunk.tokenizer.batch_decode(ids, skip_special_tokens=True)
        hit = [any(string in text for string in strings) for text in texts]
        return by_token | torch.tensor(hit, device=ids.device)

    return ended


class Responses:
    """What was drawn so far.

    Args:
        trunk: Who answers.
        uniforms: One number for each token. Shape: ``(B, R)``.
        spec: How tokens are drawn.

    Attributes:
        ids: Shape: ``(B, R)``, int64.
        logprobs: Of the tokens, at least fp32. Shape: ``(B, R)``.
        mask: Tokens that count. Shape: ``(B, R)``, bool.
        stopped: Rows that have ended by themselves. Shape: ``(B,)``, bool.
    """

    def __init__(self, trunk: Trunk, uniforms: Tensor, spec: SamplingSpec) -> None:
        self.uniforms = uniforms
        self.spec = spec
        self.ids = torch.full_like(uniforms, trunk.pad_id, dtype=torch.int64)
        at_least = torch.promote_types(trunk.dtype, torch.float32)
        self.logprobs = torch.zeros_like(uniforms, dtype=at_least)
        self.mask = torch.ones_like(uniforms, dtype=torch.bool)
        self.stopped = torch.zeros_like(self.mask[:, 0])

    def draw(self, logits: Tensor, rows: Tensor, column: int | Tensor) -> Tensor:
        """Draw a token for each of some rows.

        Args:
            logits: Shape: ``(b, V)``.
            rows: Their numbers. Shape: ``(b,)``.
            column: Of the token; as a tensor of shape ``(1,)`` its value is not read.

        Returns:
            Shape: ``(b,)``.
        """
        tokens, chosen = draw(logits, self.uniforms[rows, column], self.spec)
        self.ids[rows, column] = tokens
        self.logprobs[rows, column] = chosen
        return tokens

    def end(self, rows: Tensor, length: int) -> None:
        """These have ended with that many tokens."""
        self.mask[rows, length:] = False
        self.stopped[rows] = True

    def end_by(self, stop_ids: tuple[int, ...]) -> None:
        """Every row ends with its first stop token; what was drawn after it is forgotten."""
        self.mask, self.stopped = until_stop(self.ids, stop_ids)

    def rollout(self, prompts: PromptBatch, pad_id: int, longest: int) -> Rollout:
        """With the first ``longest`` columns."""
        mask = self.mask[:, :longest]
        return Rollout(
            prompts.ids,
            prompts.mask,
            self.ids[:, :longest].masked_fill(~mask, pad_id),
            mask,
            self.stopped,
            prompts.row,
            self.logprobs[:, :longest].masked_fill(~mask, 0.0),
        )


@torch.no_grad()
def sample(
    trunk: Trunk,
    prompts: PromptBatch,
    spec: SamplingSpec,
    uniforms: Tensor,
    early_exit: bool = True,
) -> Rollout:
    """Answer every prompt, with the adapter that is switched on now.

    Args:
        trunk: Inside a role.
        prompts: ``B`` of them.
        spec: How tokens are drawn.
        uniforms: Shape: ``(B, spec.max_new_tokens)``.
        early_exit: Finished rows leave the batch, and the loop ends with the last of them. Off, the
            loop reads no tensor's value (fake tensors); the responses are the same. Stop strings
            need it.

    Returns:
        The rollout with its log-probabilities; ``R`` is the longest response, or ``max_new_tokens``
        without early exit.
    """
    if spec.stop and not early_exit:
        raise ValueError("stop strings are found by decoding text, which needs early_exit=True.")
    responses = Responses(trunk, uniforms, spec)
    mask = torch.cat([prompts.mask, torch.ones_like(responses.mask)], 1)
    cache = trunk.empty_cache(mask.shape[1])
    # Stop strings are looked for in decoded text, after every token.
    record = recorder_of(trunk, mask.shape[1]) if early_exit and not spec.stop else None
    logits = _read_prompts(trunk, cache, prompts, early_exit and trunk.shortcuts.shared_prompts)
    everybody = torch.arange(len(mask), device=mask.device)
    tokens = responses.draw(logits, everybody, 0)
    if record is not None:
        _play(trunk, cache, mask, tokens, responses, record)
        responses.end_by(trunk.stop_ids)
    elif early_exit:
        _step(trunk, cache, mask, tokens, responses, ends_of(trunk, responses, spec.stop))
    else:
        _step(trunk, cache, mask, tokens, responses, None)
        responses.end_by(trunk.stop_ids)
    longest = int(responses.mask.sum(1).max()) if early_exit else spec.max_new_tokens
    return responses.rollout(prompts, trunk.pad_id, longest)


def _read_prompts(trunk: Trunk, cache: Cache, prompts: PromptBatch, share: bool) -> Tensor:
    """Logits of the first tokens. Shape: ``(B, V)``."""
    if share:
        first, which = distinct_rows(prompts.ids.masked_fill(~prompts.mask, -1))
        if len(first) < len(which):
            hidden = trunk(prompts.ids[first], prompts.mask[first], cache)
            keep_rows(cache, which)
            return trunk.project(hidden[:, -1])[which]
    return trunk.project(trunk(prompts.ids, prompts.mask, cache)[:, -1])


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where each different row stands first, and for every row which of those it is.

    Args:
        rows: Shape: ``(B, N)``.

    Returns:
        Numbers of rows. Shape: ``(b,)``; and places in that. Shape: ``(B,)``.
    """
    distinct, which = torch.unique(rows, dim=0, return_inverse=True)
    numbers = torch.arange(len(rows), device=rows.device)
    first = torch.full_like(distinct[:, 0], len(rows)).scatter_reduce_(0, which, numbers, "amin")
    return first, which


def _step(
    trunk: Trunk,
    cache: Cache,
    mask: Tensor,
    tokens: Tensor,
    responses: Responses,
    ends: Ended | None,
) -> None:
    """Read and draw, token by token, behind the first ``tokens``; rows leave as they end, if asked."""
    running = torch.arange(len(tokens), device=tokens.device)
    longest = responses.ids.shape[1]
    prompt_tokens = mask.shape[1] - longest
    for column in range(1, longest + 1):
        if ends is not None:
            ended = ends(running, column, tokens)
            if bool(ended.any()):
                responses.end(running[ended], column)
                stay = (~ended).nonzero().squeeze(-1)
                if stay.numel() == 0:
                    return
                running, tokens, mask = running[stay], tokens[stay], mask[stay]
                keep_rows(cache, stay)
        if column == longest:
            return
        hidden = trunk(tokens.unsqueeze(-1), mask[:, : prompt_tokens + column], cache)
        tokens = responses.draw(trunk.project(hidden[:, -1]), running, column)


def _play(
    trunk: Trunk,
    cache: Cache,
    mask: Tensor,
    tokens: Tensor,
    responses: Responses,
    record: Recorder,
) -> None:
    """The same by recorded steps: a recording holds until half of its rows have ended, or its columns.

    Rows that have ended go on until then, and draw what `Responses.end_by` forgets.
    """
    stops = torch.tensor(trunk.stop_ids, device=tokens.device, dtype=tokens.dtype)
    running = torch.arange(len(tokens), device=tokens.device)
    longest = responses.ids.shape[1]
    before = mask.shape[1] - longest - 1
    column, ended = 1, torch.isin(tokens, stops)
    while column < longest:
        stay = (~ended).nonzero().squeeze(-1)
        if stay.numel() == 0:
            return
        if len(stay) < len(running):
            running, tokens, mask = running[stay], tokens[stay], mask[stay]
            keep_rows(cache, stay)
        shown = min(max(LEAST_SHOWN, 2 * (before + column)), mask.shape[1])
        rows = GrowingRows(trunk, cache, mask, tokens, before + column, shown)
        ended = torch.zeros_like(tokens, dtype=torch.bool)
        step: Step = partial(_grow, rows, running, responses, before, stops, ended)
        play, until = step, min(longest, shown - before)
        for played in itertools.count(1):
            trunk.count_step(len(running), before + column + 1)
            play()
            column += 1
            if column == until or (played % POLL == 0 and 2 * int(ended.sum()) >= len(running)):
                break
            if played == 1 and until - column >= WORTH:
                play = record(step)
        tokens = rows.tokens
        rows.end(before + column)


def _grow(
    rows: GrowingRows,
    running: Tensor,
    responses: Responses,
    before: int,
    stops: Tensor,
    ended: Tensor,
) -> None:
    """What is recorded: one token more for every row, and a note of those that end with it."""
    tokens = responses.draw(rows.logits(), running, rows.place - before)
    ended.logical_or_((tokens.unsqueeze(-1) == stops).any(-1))
    rows.grow(tokens)
