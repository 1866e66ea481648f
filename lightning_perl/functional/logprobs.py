"""Log-probabilities of chosen tokens without ever holding batch x length x vocabulary; estimators of KL.

Shapes: ``B`` rows, ``R`` scored positions, ``H`` hidden size, ``V`` vocabulary, ``C`` positions of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
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
    hidden: Tensor, targets: Tensor, project: Project, temperature: float, entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and entropy of its distribution, all positions at once.

    Args:
        hidden: Shape: ``(C, H)``.
        targets: Shape: ``(C,)``, int64.
        project: The LM head with its family's logit transform.
        temperature: Divides the logits, as it did when the tokens were sampled.
        entropy: False: entropies are not computed.

    Returns:
        Log-probabilities and entropies (or None) in nats, at least fp32. Shape: ``(C,)`` each.
    """
    logits = at_least_fp32(project(hidden)) / temperature
    # The entropy is taken from log-probabilities: at GPT-2's logits near -100 the formula for logits cancels.
    logprobs = logits - logits.logsumexp(-1, keepdim=True)
    chosen = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen, -(logprobs.exp() * logprobs).sum(-1) if entropy else None


def chunked_logprobs(
    hidden: Tensor,
    targets: Tensor,
    project: Project,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`chosen_logprobs` for a batch, in chunks of ``chunk_tokens`` whose logits are recomputed in backward.

    At most ``chunk_tokens x V`` logits exist at a time, in forward and in backward. For a head that is
    trained; under a frozen one `frozen_head_logprobs` does less work.

    ``hidden`` *predicts* the targets. Shape: ``(B, R, H)`` and ``(B, R)`` to ``(B, R)`` each.
    """
    logprobs, entropies = [], []
    chunks = torch.split(hidden.flatten(0, 1), chunk_tokens)
    for chunk in zip(chunks, torch.split(targets.flatten(), chunk_tokens), strict=True):
        inputs = (*chunk, project, temperature, entropy)
        if torch.is_grad_enabled():
            results = checkpoint(chosen_logprobs, *inputs, use_reentrant=False)
        else:
            results = chosen_logprobs(*inputs)
        logprobs.append(results[0])
        entropies.append(results[1])
    return (
        torch.cat(logprobs).view_as(targets),
        torch.cat(entropies).view_as(targets) if entropy else None,
    )


def logprobs_and_directions(
    hidden: Tensor,
    targets: Tensor,
    project: Project,
    temperature: float,
    directions: bool,
    entropy: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `chosen_logprobs` gives under a frozen LM head, and if ``directions``, ``d logprob / d hidden``."""
    hidden = hidden.detach().requires_grad_(directions)
    with torch.set_grad_enabled(directions):
        logits = project(hidden)
    chosen, entropies = [], []
    d_logits = torch.empty_like(logits) if directions else None
    # On a CPU a few rows at a time, which stay in its cache through five passes over V numbers.
    rows = len(targets) if logits.device.type != "cpu" else max(1, CACHED // logits.shape[-1])
    with torch.no_grad():
        for start in range(0, len(targets), rows):
            part, index = logits[start : start + rows], targets[start : start + rows].unsqueeze(-1)
            # Promoted first, as in sampling: divided in bf16 it would be another distribution.
            scaled = part if temperature == 1 else at_least_fp32(part) / temperature
            dtype = torch.promote_types(part.dtype, torch.float32)
            logprobs = torch.log_softmax(scaled, -1, dtype=dtype)
            chosen.append(logprobs.gather(-1, index).squeeze(-1))
            probabilities = logprobs.exp() if entropy or directions else logprobs
            if entropy:
                entropies.append(-torch.linalg.vecdot(probabilities, logprobs))
            if d_logits is not None:
                # d log p(y) / d logits = onehot(y) - p, written over p
                ones = torch.ones_like(index, dtype=dtype)
                slope = probabilities.neg_().scatter_add_(-1, index, ones)
                d_logits[start : start + rows] = slope if temperature == 1 else slope / temperature
    gradients = torch.autograd.grad(logits, hidden, d_logits)[0] if directions else None
    return torch.cat(chosen), torch.cat(entropies) if entropy else None, gradients


def chunk_divergence(
    hidden: Tensor,
    other_hidden: Tensor,
    project: Project,
    other_project: Project,
    temperature: float,
) -> Tensor:
    """KL(other || own) of whole distributions, all positions at once. Shape: ``(C, H)`` each to ``(C,)``."""
    own, other = (
        torch.log_softmax(at_least_fp32(head(states)) / temperature, -1)
        for head, states in ((project, hidden), (other_project, other_hidden))
    )
    return (other.exp() * (other - own)).sum(-1)


def chunked_divergence(
    hidden: Tensor,
    other_hidden: Tensor,
    project: Project,
    other_project: Project,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> Tensor:
    """KL(other || own) over the whole vocabulary, in nats, at least fp32; logits as in `chunked_logprobs`.

    Each model has its own LM head. Shape: ``(B, R, H)`` each to ``(B, R)``.
    """
    chunks = (torch.split(states.flatten(0, 1), chunk_tokens) for states in (hidden, other_hidden))
    divergences = [
        checkpoint(
            chunk_divergence, *pair, project, other_project, temperature, use_reentrant=False
        )
        for pair in zip(*chunks, strict=True)
    ]
    return torch.cat(divergences).view(hidden.shape[:2])


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
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Shapes: hidden ``(N, H)``, targets ``(N,)``."""
        directions = ctx.needs_input_grad[0]
        parts = (torch.split(hidden, chunk_tokens), torch.split(targets, chunk_tokens))
        results = [
            logprobs_and_directions(*chunk, project, temperature, directions, entropy)
            for chunk in zip(*parts, strict=True)
        ]
        logprobs, entropies, gradients = zip(*results, strict=True)
        if directions:
            ctx.save_for_backward(torch.cat(gradients))
        if not entropy:
            return torch.cat(logprobs), None
        entropies_of_all = torch.cat(entropies)
        ctx.mark_non_differentiable(entropies_of_all)
        return torch.cat(logprobs), entropies_of_all

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """The directions, scaled."""
        (directions,) = ctx.saved_tensors
        scaled = directions * d_logprobs.unsqueeze(-1).to(directions.dtype)
        return scaled, None, None, None, None, None


def frozen_head_logprobs(
    hidden: Tensor,
    targets: Tensor,
    project: Project,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`chunked_logprobs` under a head that is not trained: its logits are computed once.

    ``d log p(y) / d h = W^T (onehot(y) - p)`` does not depend on what the loss does with the log-probability, so
    it is taken in forward, while the chunk's logits are there, and scaled in backward. Entropies have no gradient.
    """
    logprobs, entropies = _FrozenHeadLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, 1), targets.flatten(), project, temperature, chunk_tokens, entropy
    )
    return logprobs.view_as(targets), entropies.view_as(targets) if entropy else None


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """``d = log pi(y) - log ref(y)``, in nats: an estimate of KL(pi || ref) where ``y`` is sampled from ``pi``.

    Like `k3` (Schulman, "Approximating KL divergence") it is unbiased. As a reward, without a gradient, it is
    right; as a loss on the policy's own samples its gradient averages to zero, and that of k3 is KL(ref || pi)'s.
    """
    return logprobs - reference_logprobs


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """``exp(-d) - 1 + d``, never negative; ``expm1`` keeps the digits of small differences."""
    difference = logprobs - reference_logprobs
    return torch.expm1(-difference) + difference


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """``d^2 / 2``, never negative; biased, and close where policy and reference are."""
    return 0.5 * (logprobs - reference_logprobs) ** 2


def jensen_shannon(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Unbiased estimate of ``(KL(pi || m) + KL(ref || m)) / 2`` with ``m = (pi + ref) / 2``, never negative.

    LoRA-RLHF (2309.09055) puts it in the place of the KL; the divergence itself is at most log 2. Its code takes
    ``(max(log pi - log m, 0) + max(log ref - log m, 0)) / 2`` of the sampled token, which is biased.
    """
    difference = logprobs - reference_logprobs
    policy_part = math.log(2) - F.softplus(-difference)
    reference_part = torch.exp(-difference) * (math.log(2) - F.softplus(difference))
    # Never negative but for rounding.
    return (0.5 * (policy_part + reference_part)).clamp(min=0)
