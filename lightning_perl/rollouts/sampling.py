"""How responses are drawn from a trunk, token by token, here or elsewhere; its generation config is never read.

Each token is drawn by inverse CDF from one uniform number, and a row's uniforms come from (seed,
rollout, row, sample) alone: its text depends on no batch mate, no rank and no early exit.

Shapes: ``B`` rows, ``P`` prompt tokens, ``R`` response tokens, ``V`` vocabulary; ``k`` responses to each prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lightning_perl.arguments import (
    Count,
    CountOrZero,
    FractionAboveZero,
    NonNegative,
    Text,
    require_allowed,
)
from lightning_perl.batches import PromptBatch
from lightning_perl.functional.sequences import until_stop
from lightning_perl.models.lean_layers import keep_rows
from lightning_perl.models.recording import GrowingRows, Recorder, Step, recorder_of
from lightning_perl.models.trunk import Trunk
from lightning_perl.ranks import largest
from lightning_perl.rollouts.rollout import Rollout, Scored, joined

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
Phase = Callable[[str], AbstractContextManager[None]]
"""Makes a context that tells callbacks of a phase of that name."""


@dataclass(frozen=True)
class SamplingSpec:
    """How responses are drawn.

    Args:
        max_new_tokens: Longest response, the stop token included.
        temperature: Divides the logits, here and when the tokens are scored. 0 takes the likeliest
            token (evaluation only).
        top_p: Keep the smallest set of tokens with this much probability. Below 1 in evaluation
            only: the scored distribution would not be the sampled one.
        top_k: Keep this many tokens; 0 keeps all. Evaluation only.
        stop: Strings that end a response, besides the trunk's EOS.
        batch_size: Responses drawn at once: less memory for keys and values, the same texts. None: all
            of a batch.
    """

    max_new_tokens: Count = 128
    temperature: NonNegative = 1.0
    top_p: FractionAboveZero = 1.0
    top_k: CountOrZero = 0
    stop: tuple[Text, ...] = ()
    batch_size: Count | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot mean anything; a list, as YAML gives it, becomes a tuple, which can be hashed."""
        require_allowed(type(self), vars(self))
        object.__setattr__(self, "stop", tuple(self.stop))

    @property
    def scored_as_sampled(self) -> bool:
        """Whether the sampled distribution is the one that log-probabilities are taken of."""
        return self.temperature > 0 and self.top_p == 1 and self.top_k == 0

    def refuse_unscored(self) -> None:
        """Refuse what training cannot score."""
        if not self.scored_as_sampled:
            raise ValueError(
                f"sampling for training must be the distribution that is scored, got temperature "
                f"{self.temperature}, top_p {self.top_p}, top_k {self.top_k}. Use temperature > 0, "
                "top_p 1 and top_k 0; `validation_sampling` may warp as it likes."
            )


def row_uniforms(seed: int, rollout: int, row: Tensor, count: int, samples: int = 1) -> Tensor:
    """Uniform numbers in (0, 1) that depend on their own row and sample only.

    A counter-based generator (the finalizer of SplitMix64 over seed, rollout, row, sample and column), so
    that no generator state has to be kept, sharded or resumed.

    Args:
        seed: Seed of the run.
        rollout: Index of the rollout.
        row: Shape: ``(B,)``, int64.
        count: Numbers per response.
        samples: Responses per row, ``k``; those of one row stand together. The first has the numbers that
            it has alone.

    Returns:
        Shape: ``(B k, count)``, float32.
    """
    columns = torch.arange(count, device=row.device)
    bits = _mix(_states(seed, rollout, row, samples) + columns) & 0x7FFFFF
    # 23 bits, the middle of each step: exact in float32's 24, never 0 or 1.
    return (bits.to(torch.float32) + 0.5) / 2**23


def row_seeds(seed: int, rollout: int, row: Tensor, samples: int = 1) -> list[int]:
    """A seed of 62 bits for each response of `row_uniforms`, for a sampler with a generator of its own."""
    states: list[int] = (
        (_mix(_states(seed, rollout, row, samples) - 1) & (2**62 - 1)).view(-1).tolist()
    )
    return states


def _states(seed: int, rollout: int, row: Tensor, samples: int) -> Tensor:
    """Where each response's numbers begin. Shape: ``(B k, 1)``."""
    # Each is mixed before the next is added: seed 3, rollout 9 is not seed 9, rollout 3.
    state = _mix(_mix(torch.full_like(row, seed)) + rollout)
    state = _mix(state + row).unsqueeze(-1)
    sample = torch.arange(samples, device=row.device)
    return torch.where(sample == 0, state, _mix(state + sample)).view(-1, 1)


def _mix(state: Tensor) -> Tensor:
    # int64 products wrap, as SplitMix64 wants; shifts are arithmetic, so high bits are cleared.
    state = state + -7046029254386353131
    state = (state ^ ((state >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    state = (state ^ ((state >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return state ^ ((state >> 31) & 0x1FFFFFFFF)


def draw(logits: Tensor, uniforms: Tensor, spec: SamplingSpec) -> tuple[Tensor, Tensor]:
    """One token per row by inverse CDF.

    Args:
        logits: Shape: ``(B, V)``.
        uniforms: Shape: ``(B,)``, in (0, 1).
        spec: Temperature, top-p and top-k.

    Returns:
        Tokens, and their log-probabilities in the distribution drawn from, at least fp32. Shape: ``(B,)`` each.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if spec.temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits))
    logits = _kept(logits if spec.temperature == 1 else logits / spec.temperature, spec)
    relative = logits - logits.amax(-1, keepdim=True)
    cumulative = relative.exp().cumsum(-1)
    # What has no end of 1 need not be divided by it: the draw is scaled instead.
    total = cumulative[:, -1:]
    points = uniforms.to(cumulative.dtype).unsqueeze(-1) * total
    tokens = torch.searchsorted(cumulative, points, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens.squeeze(-1), (relative.gather(-1, tokens) - total.log()).squeeze(-1)


def _kept(logits: Tensor, spec: SamplingSpec) -> Tensor:
    if spec.top_k > 0:
        kept = logits.topk(min(spec.top_k, logits.shape[-1]), -1).indices
        allowed = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, kept, True)
        logits = logits.masked_fill(~allowed, -torch.inf)
    if spec.top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probabilities = torch.softmax(ordered, -1)
        # A token stays while the tokens before it have not reached top_p: at least one always does.
        stays = probabilities.cumsum(-1) - probabilities < spec.top_p
        allowed = torch.zeros_like(stays).scatter(-1, order, stays)
        logits = logits.masked_fill(~allowed, -torch.inf)
    return logits


def ends_of(
    trunk: Trunk, responses: Responses, strings: tuple[str, ...], watch: Watch | None = None
) -> Ended:
    """What tells the rows that end: by a stop token, or by a token that completes one of ``strings``."""
    stops = torch.tensor(responses.stop_ids, device=responses.ids.device, dtype=torch.int64)

    def ended(rows: Tensor, length: int, tokens: Tensor) -> Tensor:
        if watch is not None:
            watch(rows, tokens)
        by_token = torch.isin(tokens, stops)
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
        self.pad_id, self.stop_ids = trunk.pad_id, trunk.stop_ids
        self.ids = torch.full_like(uniforms, self.pad_id, dtype=torch.int64)
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

    def end_by_stop_ids(self) -> None:
        """End every row at its first stop token and mask what was drawn after it."""
        self.mask, self.stopped = until_stop(self.ids, self.stop_ids)

    def rollout(self, prompts: PromptBatch, longest: int) -> Rollout:
        """The rollout, with the first ``longest`` response columns."""
        mask = self.mask[:, :longest]
        return Rollout(
            prompts.ids,
            prompts.mask,
            self.ids[:, :longest].masked_fill(~mask, self.pad_id),
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
        responses.end_by_stop_ids()
    longest = int(responses.mask.sum(1).max()) if early_exit else spec.max_new_tokens
    return responses.rollout(prompts, longest)


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
    ended go on until then; `Responses.end_by_stop_ids` masks what they draw.
    """
    stops = torch.tensor(responses.stop_ids, device=tokens.device, dtype=tokens.dtype)
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


def untold(phase: str) -> AbstractContextManager[None]:
    """A phase that nobody hears of."""
    return nullcontext()


class Asked(NamedTuple):
    """What is to be sampled. The noise of a response comes from (seed, rollout, row, sample) and nothing else.

    Attributes:
        prompts: This rank's share of the prompts, ``B`` of them.
        spec: How tokens are drawn.
        seed: Seed of the run.
        rollout: Number of the rollout.
        samples: Responses per prompt, ``k``.
        early_exit: See `sample`, as for ``watch``, which servers leave out.
    """

    prompts: PromptBatch
    spec: SamplingSpec
    seed: int
    rollout: int
    samples: int = 1
    early_exit: bool = True
    watch: Watch | None = None

    def repeated(self) -> PromptBatch:
        """A prompt per response, those of one prompt next to each other."""
        return PromptBatch(*(part.repeat_interleave(self.samples, 0) for part in self.prompts))


class RolloutEngine:
    """Samples the responses of a rollout, with the trainer's own trunk unless a subclass does it elsewhere.

    Attributes:
        elsewhere: Whether log-probabilities of a rollout are another program's, so that the trainer reads its rows
            again.
        overlap: How many rollouts are sampled while an earlier one is learned from, 0 or 1.
    """

    elsewhere = False
    overlap = 0

    def sample(self, trunk: Trunk, adapter: str, asked: Asked, phase: Phase = untold) -> Rollout:
        """``B k`` responses with their log-probabilities.

        Args:
            trunk: The trunk that answers.
            adapter: Which of its adapters answers, or `OFF`.
            asked: What is to be sampled.
            phase: Tells callbacks of a phase inside the rollout.
        """
        spec, repeated = asked.spec, asked.repeated()
        uniforms = row_uniforms(
            asked.seed, asked.rollout, asked.prompts.row, spec.max_new_tokens, asked.samples
        )
        size = spec.batch_size or len(repeated.row)
        slices = [slice(start, start + size) for start in range(0, len(repeated.row), size)]
        # Ranks may share the trunk's blocks, so each draws as often as the one with the most rows.
        (rounds,) = largest([len(slices)])
        with trunk.switch.use(adapter), trunk.switch.at_rest():
            parts = [
                sample(
                    trunk,
                    PromptBatch(*(part[rows] for part in repeated)),
                    spec,
                    uniforms[rows],
                    asked.early_exit,
                    asked.watch,
                )
                for rows in (slices * rounds)[:rounds]
            ]
            rollout = joined(parts[: len(slices)], trunk.pad_id)
        return rollout._replace(samples=asked.samples)

    def start(
        self, trunk: Trunk, adapter: str, asked: Asked, phase: Phase = untold
    ) -> Callable[[], Rollout]:
        """Start to `sample`, if the engine can while something else happens; else the returned function samples.

        Returns:
            Gives the rollout; all ranks call it.
        """
        return partial(self.sample, trunk, adapter, asked, phase)

    def require_served(self, trained_trunk: bool, quantization: str | None) -> None:
        """Refuse a policy that it cannot sample from, before weights are loaded."""

    def begin(self, trunk: Trunk, longest: int) -> None:
        """Refuse what can be seen before the first step; rows have up to ``longest`` tokens."""

    def mismatch(self, rollout: Rollout, logprobs: Tensor) -> dict[str, Tensor]:
        """Refuse a rollout that was sampled with other log-probabilities than the policy's own.

        Returns:
            What to log of their difference.
        """
        return {}

    def weighted(self, rollout: Rollout, scored: Scored) -> Scored:
        """The scores, with the weights of tokens that another policy sampled than the one that learns."""
        return scored

    def close(self) -> None:
        """Leave nothing behind."""
