"""How a token is drawn. The model's own generation config is never read.

Each token is drawn by inverse CDF from one uniform number, and a row's uniforms come from (seed,
rollout, row, sample) alone: its text depends on no batch mate, no rank and no early exit.

Shapes: ``B`` rows, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_perl.arguments import (
    Count,
    CountOrZero,
    FractionAboveZero,
    NonNegative,
    Text,
    require_allowed,
)
from lightning_perl.functional.logprobs import at_least_fp32


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
