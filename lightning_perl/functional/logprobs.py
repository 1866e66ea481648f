"""Log-probabilities of chosen tokens without ever holding batch x length x vocabulary.

Shapes: ``B`` rows, ``R`` scored positions, ``H`` hidden size, ``V`` vocabulary, ``C`` positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CACHED = 2**19
"""Numbers that a CPU core's cache holds: 2 MiB in fp32."""
Project = Callable[[Tensor], Tensor]
"""Hidden states ``(C, H)`` to logits ``(C, V)``."""


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Half-precision numbers promoted to fp32; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def chosen_logprobs(
    hidden: Tensor, targets: Tensor, project: Project, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, all positions at once.

    Args:
        hidden: Shape: ``(C, H)``.
        targets: Shape: ``(C,)``, int64.
        project: The LM head with its family's logit transform.
        temperature: Divides the logits, as it did when the tokens were sampled.

    Returns:
        Log-probabilities and entropies in nats, at least fp32. Shape: ``(C,)`` each.
    """
    logits = at_least_fp32(project(hidden)) / temperature
    # the entropy from log-probabilities, not logits: at GPT-2's logits near -100 that cancels
    logprobs = logits - logits.logsumexp(-1, keepdim=True)
    chosen = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen, -(logprobs.exp() * logprobs).sum(-1)


def chunked_logprobs(
    hidden: Tensor,
    targets: Tensor,
    project: Project,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:
    """`chosen_logprobs` for a batch, in chunks whose logits are computed again in backward.

    For a head that is trained; under a frozen one `frozen_head_logprobs` does less.

    At any moment at most ``chunk_tokens x V`` logits exist, in forward and in backward.

    Args:
        hidden: Hidden states that *predict* the targets. Shape: ``(B, R, H)``.
        targets: Shape: ``(B, R)``, int64.
        project: The LM head with its family's logit transform, ``(C, H) -> (C, V)``.
        temperature: Divides the logits.
        chunk_tokens: Positions projected at once.

    Returns:
        Log-probabilities and entropies in nats, at least fp32. Shape: ``(B, R)`` each.
    """
    flat_hidden, flat_targets = hidden.flatten(0, 1), targets.flatten()
    logprobs, entropies = [], []
    for start in range(0, flat_targets.shape[0], chunk_tokens):
        chunk = (
            flat_hidden[start : start + chunk_tokens],
            flat_targets[start : start + chunk_tokens],
        )
        if torch.is_grad_enabled():
            one = checkpoint(chosen_logprobs, *chunk, project, temperature, use_reentrant=False)
        else:
            one = chosen_logprobs(*chunk, project, temperature)
        logprobs.append(one[0])
        entropies.append(one[1])
    return torch.cat(logprobs).view_as(targets), torch.cat(entropies).view_as(targets)


def logprobs_and_directions(
    hidden: Tensor, targets: Tensor, project: Project, temperature: float, directions: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `chosen_logprobs` gives, and which way the hidden states raise each log-probability.

    Args:
        hidden: Shape: ``(C, H)``.
        targets: Shape: ``(C,)``, int64.
        project: A frozen LM head with its family's logit transform.
        temperature: Divides the logits.
        directions: Whether they are asked for.

    Returns:
        Log-probabilities and entropies in nats, at least fp32, shape ``(C,)`` each; and
        ``d logprob / d hidden``, shape ``(C, H)``, in the dtype of ``hidden``.
    """
    hidden = hidden.detach().requires_grad_(directions)
    with torch.set_grad_enabled(directions):
        logits = project(hidden)
    chosen, entropies = [], []
    d_logits = torch.empty_like(logits) if directions else None
    # On a CPU a few rows at a time, which stay in its cache; they are five passes over V numbers.
    rows = len(targets) if logits.device.type != "cpu" else max(1, CACHED // logits.shape[-1])
    with torch.no_grad():
        for start in range(0, len(targets), rows):
            some, index = logits[start : start + rows], targets[start : start + rows].unsqueeze(-1)
            # Promoted first, as in sampling: divided in bf16 it would be another distribution.
            scaled = some if temperature == 1 else at_least_fp32(some) / temperature
            dtype = torch.promote_types(some.dtype, torch.float32)
            logprobs = torch.log_softmax(scaled, -1, dtype=dtype)
            chosen.append(logprobs.gather(-1, index).squeeze(-1))
            probabilities = logprobs.exp()
            entropies.append(-torch.linalg.vecdot(probabilities, logprobs))
            if d_logits is not None:
                # d log p(y) / d logits = onehot(y) - p, in the place of p
                ones = torch.ones_like(index, dtype=dtype)
                slope = probabilities.neg_().scatter_add_(-1, index, ones)
                d_logits[start : start + rows] = slope if temperature == 1 else slope / temperature
    way = torch.autograd.grad(logits, hidden, d_logits)[0] if directions else None
    return torch.cat(chosen), torch.cat(entropies), way


class _FrozenHeadLogprobs(torch.autograd.Function):
    """Chunks of `logprobs_and_directions`; what is kept for backward has the shape of ``hidden``."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (autograd's context)
        hidden: Tensor,
        targets: Tensor,
        project: Project,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        """Shapes: hidden ``(N, H)``, targets ``(N,)``."""
        directions = ctx.needs_input_grad[0]
        starts = range(0, len(targets), chunk_tokens)
        chunks = [slice(start, start + chunk_tokens) for start in starts]
        parts = [
            logprobs_and_directions(hidden[one], targets[one], project, temperature, directions)
            for one in chunks
        ]
        entropies = torch.cat([entropy for _, entropy, _ in parts])
        ctx.mark_non_differentiable(entropies)
        if directions:
            ctx.save_for_backward(torch.cat([way for _, _, way in parts if way is not None]))
        return torch.cat([logprobs for logprobs, _, _ in parts]), entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """The directions, each by its token's gradient."""
        (directions,) = ctx.saved_tensors
        return directions * d_logprobs.unsqueeze(-1).to(directions.dtype), None, None, None, None


def frozen_head_logprobs(
    hidden: Tensor,
    targets: Tensor,
    project: Project,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:
    """`chunked_logprobs` under a head that is not trained: its logits are made once.

    ``d log p(y) / d h = W^T (onehot(y) - p)`` depends on nothing that happens to the log-probability
    afterwards, so it is taken in forward, while the chunk's logits are there, and scaled in backward.

    Args:
        hidden: Hidden states that *predict* the targets. Shape: ``(B, R, H)``.
        targets: Shape: ``(B, R)``, int64.
        project: A frozen LM head with its family's logit transform, ``(C, H) -> (C, V)``.
        temperature: Divides the logits.
        chunk_tokens: Positions projected at once.

    Returns:
        Log-probabilities, and entropies without a gradient, in nats, at least fp32. Shape: ``(B, R)``
        each.
    """
    flat: tuple[Tensor, Tensor] = _FrozenHeadLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, 1), targets.flatten(), project, temperature, chunk_tokens
    )
    return flat[0].view_as(targets), flat[1].view_as(targets)
