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
from lightning_perl.models.lean_layers import keep_rows
from lightning_perl.models.recording import GrowingRows, Recorder, Step, recorder_of
from lightning_perl.models.trunk import Trunk
from lightning_perl.ranks import largest
from lightning_perl.rollouts.rollout import Rollout
from lightning_perl.rollouts.sampling import SamplingSpec, draw

Ended = Callable[[Tensor, int, Tensor], Tensor]
"""``(numbers of rows (b,), tokens so far, last tokens (b,)) -> whether the last token ends the row (b,)``."""
RECORDING = {"cuda"}
"""Types of devices that can record a step."""
POLL = 8
"""Replayed steps between two looks at which rows have ended; a look waits for the GPU."""
LEAST_SHOWN = 256
"""Smallest number of key and value columns that a recorded step attends to."""
WORTH = 4
"""Smallest number of steps left for which a step is recorded: recording costs as much as a step in Python."""


Watch = Callable[[Tensor, Tensor], None]
"""``(numbers of rows (b,), last tokens (b,))``."""


def ends_of(
    trunk: Trunk, responses: Responses, strings: tuple[str, ...], watch: Watch | None = None
) -> Ended:
    """What tells the rows that end: by a stop token, or by a token that completes one of ``strings``."""
    stop_ids = trunk.stop_ids

    def ended(rows: Tensor, length: int, tokens: Tensor) -> Tensor:
        if watch is not None:
            watch(rows, tokens)
        by_token = until_stop(tokens.unsqueeze(-1), stop_ids)[1]
        if not strings:
            return by_token
        ids = responses.ids[rows, :length]
        # A stop string may be a special token, or hold one.
        texts = trunk.tokenizer.batch_decode(ids, skip_special_tokens=False)
        hit = [any(string in text for string in strings) for text in texts]
        return by_token | torch.tensor(hit, device=ids.device)

    return ended


class Responses:
    """The responses of a batch while they are drawn.

    Args:
        trunk: The trunk that answers.
        uniforms: A uniform number for each token. Shape: ``(B, R)``.
        spec: How tokens are drawn.

    Attributes:
        ids: Tokens drawn so far. Shape: ``(B, R)``, int64.
        logprobs: Log-probabilities of the tokens, at least fp32. Shape: ``(B, R)``.
        mask: True on tokens that count. Shape: ``(B, R)``, bool.
        stopped: True where a response has ended by a stop token or string. Shape: ``(B,)``, bool.
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
        """Draw a token for each of some rows. Shape: ``(b, V)`` to ``(b,)``.

        The value of a ``column`` that is a tensor, shape ``(1,)``, is not read.
        """
        tokens, chosen = draw(logits, self.uniforms[rows, column], self.spec)
        self.ids[rows, column] = tokens
        self.logprobs[rows, column] = chosen
        return tokens

    def end(self, rows: Tensor, length: int) -> None:
        """Mark rows as ended, with ``length`` tokens each."""
        self.mask[rows, length:] = False
        self.stopped[rows] = True

    def end_by(self, stop_ids: tuple[int, ...]) -> None:
        """End every row at its first stop token and mask what was drawn after it."""
        self.mask, self.stopped = until_stop(self.ids, stop_ids)

    def rollout(self, prompts: PromptBatch, pad_id: int, longest: int) -> Rollout:
        """The rollout, with the first ``longest`` response columns."""
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
    watch: Watch | None = None,
) -> Rollout:
    """Sample a response to every prompt, with the adapter that is switched on.

    Args:
        trunk: The trunk, inside a role.
        prompts: ``B`` prompts.
        spec: How tokens are drawn.
        uniforms: Shape: ``(B, spec.max_new_tokens)``.
        early_exit: Finished rows leave the batch, and the loop ends with the last of them. False: the loop
            reads no tensor's value, as fake tensors need it; the responses are the same, padded to
            ``max_new_tokens``. Stop strings need early exit.
        watch: Called with the numbers of the running rows and the tokens that they have just drawn, for those
            who read along. It needs early exit.
    """
    if spec.stop and not early_exit:
        raise ValueError("stop strings are found by decoding text, which needs early_exit=True.")
    responses = Responses(trunk, uniforms, spec)
    mask = torch.cat([prompts.mask, torch.ones_like(responses.mask)], 1)
    cache = trunk.empty_cache(mask.shape[1])
    # Stop strings are looked for in decoded text, after every token.
    plain = bool(spec.stop) or watch is not None or trunk.sharding is not None
    recorded = trunk.model.device.type in RECORDING and early_exit and not plain
    record = recorder_of(trunk, mask.shape[1]) if recorded else None
    logits = _read_prompts(trunk, cache, prompts, early_exit and trunk.shortcuts.shared_prompts)
    everybody = torch.arange(len(mask), device=mask.device)
    tokens = responses.draw(logits, everybody, 0)
    if record is not None:
        _play(trunk, cache, mask, tokens, responses, record)
    else:
        ends = ends_of(trunk, responses, spec.stop, watch) if early_exit else None
        _step(trunk, cache, mask, tokens, responses, ends)
    if not spec.stop:
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
    """The rows that stand first among their equals, shape ``(b,)``; and each row's equal among them, ``(B,)``."""
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
    """Decode token by token behind the first ``tokens``. With ``ends``, rows leave the batch as they end.

    Ranks that share a trunk's blocks decode until the rows of all of them have ended.
    """
    running = torch.arange(len(tokens), device=tokens.device)
    longest = responses.ids.shape[1]
    prompt_tokens = mask.shape[1] - longest
    alive = True
    for column in range(1, longest + 1):
        ended = None if ends is None or not alive else ends(running, column, tokens)
        if ended is not None and bool(ended.any()):
            responses.end(running[ended], column)
            stay = (~ended).nonzero().squeeze(-1)
            alive = stay.numel() > 0
            # Other ranks may need this one's pieces of the blocks: a row that has ended keeps them company.
            stay = stay if alive else torch.zeros_like(running[:1])
            running, tokens, mask = running[stay], tokens[stay], mask[stay]
            keep_rows(cache, stay)
        together = trunk.sharding is not None
        if column == longest or not (any(largest([alive])) if together else alive):
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
    """Decode like `_step`, by replaying recorded steps.

    A recording is used until half of its rows have ended or its key and value columns are full. Rows that have
    ended go on until then; `Responses.end_by` masks what they draw.
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
    """The step that is recorded: draws one token for every row and marks the rows that end with it."""
    tokens = responses.draw(rows.logits(), running, rows.place - before)
    ended.logical_or_((tokens.unsqueeze(-1) == stops).any(-1))
    rows.grow(tokens)
