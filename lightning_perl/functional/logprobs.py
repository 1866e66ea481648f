"""Log-probabilities of chosen tokens without ever holding batch x length x vocabulary.

Shapes: ``B`` rows, ``R`` scored positions, ``H`` hidden size, ``V`` vocabulary, ``C`` positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
