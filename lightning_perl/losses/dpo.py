"""Direct preference optimization and its closest relatives (DPO 2305.18290, IPO 2310.12036, R-DPO 2403.19159).

Shapes: ``K`` pairs. A log-ratio is ``log pi(y|x) - log ref(y|x)``, summed over the response's tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    smoothing: float = 0.0,
    offset: float | Tensor = 0.0,
) -> Tensor:
    """``-log sigmoid(beta (chosen - rejected) + offset)``, Eq. 7, a mean over pairs.

    Args:
        chosen: Log-ratios of the better responses. Shape: ``(K,)``.
        rejected: Log-ratios of the worse responses. Shape: ``(K,)``.
        beta: Weight of the KL to the reference that is implied.
        smoothing: Share of the pairs that are labelled the wrong way round (conservative DPO): their loss is
            mixed in with this weight.
        offset: Added to the margin; R-DPO's is ``alpha (|y_w| - |y_l|)``. Shape: ``()`` or ``(K,)``.

    Returns:
        Shape: ``()``; 0 without pairs.
    """
    margins = beta * (chosen - rejected) + offset
    losses = (1 - smoothing) * F.logsigmoid(margins) + smoothing * F.logsigmoid(-margins)
    return -losses.sum() / max(len(margins), 1)


def ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """``(chosen - rejected - 1 / (2 beta))^2``, Eq. 17, a mean over pairs; arguments as `dpo`."""
    return ((chosen - rejected - 1 / (2 * beta)) ** 2).sum() / max(len(chosen), 1)
