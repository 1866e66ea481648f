"""Supervised fine-tuning.

Shapes: ``B`` rows, ``R`` scored positions.
"""

from __future__ import annotations

from torch import Tensor

from lightning_perl.functional.masked import masked_mean


def cross_entropy(
    logprobs: Tensor, mask: Tensor, denominator: Tensor | float | None = None
) -> Tensor:
    """Mean negative log-likelihood of the tokens that count, in nats per token.

    Args:
        logprobs: Log-probabilities of the text's own tokens. Shape: ``(B, R)``.
        mask: True on the tokens to imitate. Shape: ``(B, R)``, bool.
        denominator: Divides the sum instead of the number of tokens (see `masked_mean`).

    Returns:
        Shape: ``()``; 0 where no token counts.
    """
    return masked_mean(-logprobs, mask, denominator)
