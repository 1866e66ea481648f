"""Group-relative advantages (GRPO, 2402.03300).

Shapes: ``B`` prompts, ``k`` responses to each, those to one prompt next to each other; ``R`` response tokens.
"""

from __future__ import annotations

from torch import Tensor


def group_advantages(rewards: Tensor, samples: int, scale: bool = True) -> Tensor:
    """Each reward minus the mean of its prompt's ``k`` rewards, over their standard deviation.

    Args:
        rewards: Shape: ``(B k,)``.
        samples: ``k``, at least 2.
        scale: Divide by the (unbiased) standard deviation plus 1e-4, as TRL does. False: Dr. GRPO
            (2503.20783), which gives prompts whose rewards differ little no more weight than others.

    Returns:
        Shape: ``(B k,)``; 0 where all rewards of a prompt are equal.
    """
    groups = rewards.view(-1, samples)
    centred = groups - groups.mean(1, keepdim=True)
    if scale:
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    return centred.flatten()


def response_weighted(
    values: Tensor, response_mask: Tensor, tokens: Tensor | float, episodes: Tensor | float
) -> Tensor:
    """Values weighted so that their mean over a minibatch's tokens is the mean of its responses' own token means.

    Args:
        values: Of a micro-batch. Shape: ``(B k, R)``.
        response_mask: Shape: ``(B k, R)``, bool.
        tokens: Response tokens of the whole minibatch.
        episodes: Responses of the whole minibatch.
    """
    # Multiplied first: a quotient of two integers would be float32 whatever the values are.
    return values * tokens / (episodes * response_mask.sum(1, keepdim=True).clamp(min=1))
