"""Sampling responses from a trunk. The model's own generation config is never read.

Each token is drawn by inverse CDF from one uniform number, and a row's uniforms come from (seed,
rollout, row) alone: its text depends on no batch mate, no rank and no early exit.

Shapes: ``B`` rows, ``P`` prompt tokens, ``R`` response tokens, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_perl.functional.logprobs import at_least_fp32
from lightning_perl.functional.sequences import until_stop
from lightning_perl.models.trunk import Trunk
from lightning_perl.rollouts.rollout import Rollout

Finished = Callable[[Tensor, Tensor], Tensor]
"""``(response_ids so far (b, t), ended (b,)) -> ended (b,)``: more reasons to end a row."""


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
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values that cannot mean anything."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}.")
        object.__setattr__(self, "stop", tuple(self.stop))

    @property
    def scored_as_sampled(self) -> bool:
        """Whether the sampled distribution is the one that log-probabilities are taken of."""
        return self.temperature > 0 and self.top_p == 1 and self.top_k == 0

    def refuse_unscored(self) -> None:
        """Refuse what training cannot score.

        Raises:
            ValueError: The sampled distribution would not be the scored one.
        """
        if not self.scored_as_sampled:
            raise ValueError(
                f"sampling for training must be the distribution that is scored, got temperature "
                f"{self.temperature}, top_p {self.top_p}, top_k {self.top_k}. Use temperature > 0, "
                "top_p 1 and top_k 0; `validation_sampling` may warp as it likes."
            )


def row_uniforms(seed: int, rollout: int, row: Tensor, count: int) -> Tensor:
    """Uniform numbers in (0, 1) that depend on their own row only.

    A counter-based generator (the finalizer of SplitMix64 over seed, rollout, row and column), so
    that no generator state has to be kept, sharded or resumed.

    Args:
        seed: Of the run.
        rollout: Index of the rollout.
        row: Shape: ``(B,)``, int64.
        count: Numbers per row.

    Returns:
        Shape: ``(B, count)``, float32.
    """
    columns = torch.arange(count, device=row.device)
    # Each is mixed before the next is added: seed 3, rollout 9 is not seed 9, rollout 3.
    state = _mix(_mix(torch.full_like(row, seed)) + rollout)
    state = _mix(state + row).unsqueeze(-1)
    bits = _mix(state + columns) & 0x7FFFFF
    # 23 bits, the middle of each step: exact in float32's 24, never 0 or 1.
    return (bits.to(torch.float32) + 0.5) / 2**23


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
        The tokens, int64, and their log-probabilities in the distribution that was drawn from, at
        least fp32. Shape: ``(B,)`` each.
    """
    logits = at_least_fp32(logits)
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


def stop_at(strings: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> Finished:
    """A row ends with the token that completes one of ``strings`` in its decoded response."""

    def finished(response_ids: Tensor, ended: Tensor) -> Tensor:
        texts = tokenizer.batch_decode(response_ids, skip_special_tokens=True)
        hit = [any(string in text for string in strings) for text in texts]
        return ended | torch.tensor(hit, device=ended.device)

    return finished


@torch.no_grad()
def sample(
    trunk: Trunk,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    row: Tensor,
    spec: SamplingSpec,
    uniforms: Tensor,
    early_exit: bool = True,
) -> Rollout:
    """Answer every prompt, with the adapter that is switched on now.

    Args:
        trunk: Inside a role.
        prompt_ids: Padded on the left. Shape: ``(B, P)``.
        prompt_mask: Shape: ``(B, P)``, bool.
        row: Shape: ``(B,)``.
        spec: How tokens are drawn.
        uniforms: Shape: ``(B, spec.max_new_tokens)``.
        early_exit: Finished rows leave the batch, and the loop ends with the last of them. Off, the
            loop reads no tensor's value (fake tensors, CUDA graphs); the responses are the same.
            Stop strings need it.

    Returns:
        The rollout with its log-probabilities; ``R`` is the longest response, or ``max_new_tokens``
        without early exit.
    """
    if spec.stop and not early_exit:
        raise ValueError("stop strings are found by decoding text, which needs early_exit=True.")
    finished = stop_at(spec.stop, trunk.tokenizer) if spec.stop else None
    batch, longest = prompt_ids.shape[0], spec.max_new_tokens
    prompt_tokens = prompt_ids.shape[1]
    response_ids = torch.full(
        (batch, longest), trunk.pad_id, dtype=torch.int64, device=prompt_ids.device
    )
    logprobs = torch.zeros(
        batch, longest, dtype=torch.promote_types(trunk.dtype, torch.float32), device=row.device
    )
    lengths = torch.full_like(row, longest)
    stopped = torch.zeros_like(row, dtype=torch.bool)
    running = torch.arange(batch, device=row.device)
    cache, step_ids = trunk.empty_cache(prompt_tokens + longest), prompt_ids
    mask = torch.cat([prompt_mask, torch.ones_like(response_ids, dtype=torch.bool)], 1)
    for column in range(longest):
        hidden = trunk(step_ids, mask[:, : prompt_tokens + column], cache)
        tokens, chosen = draw(trunk.project(hidden[:, -1]), uniforms[running, column], spec)
        response_ids[running, column] = tokens
        logprobs[running, column] = chosen
        step_ids = tokens.unsqueeze(-1)
        if not early_exit:
            continue
        ended = until_stop(step_ids, trunk.stop_ids)[1]
        if finished is not None:
            ended = finished(response_ids[running, : column + 1], ended)
        if not bool(ended.any()):
            continue
        lengths[running[ended]], stopped[running[ended]] = column + 1, True
        stay = (~ended).nonzero().squeeze(-1)
        if stay.numel() == 0:
            break
        running, step_ids, mask = running[stay], step_ids[stay], mask[stay]
        cache.batch_select_indices(stay)
    if early_exit:
        response_ids = response_ids[:, : int(lengths.max())]
        logprobs = logprobs[:, : response_ids.shape[1]]
        columns = torch.arange(response_ids.shape[1], device=row.device)
        response_mask = columns < lengths.unsqueeze(-1)
    else:
        response_mask, stopped = until_stop(response_ids, trunk.stop_ids)
    return Rollout(prompt_ids, prompt_mask, response_ids, response_mask, stopped, row, logprobs)
