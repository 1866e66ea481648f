"""Leave-one-out baselines (RLOO, 2402.14740, Eq. 7).

Shapes: ``B`` prompts, ``k`` responses to each, those to one prompt next to each other.
"""

from __future__ import annotations

from torch import Tensor


def leave_one_out(rewards: Tensor, samples: int) -> Tensor:
    """Each reward minus the mean reward of the other ``k - 1`` responses to its prompt.

    Args:
        rewards: Shape: ``(B k,)``.
        samples: ``k``, at least 2.

    Returns:
        Shape: ``(B k,)``.
    """
    groups = rewards.view(-1, samples)
    others = (groups.sum(1, keepdim=True) - groups) / (samples - 1)
    return (groups - others).flatten()
