"""Estimators of KL(policy || reference) from the log-probabilities of sampled tokens.

With ``d = log pi(y) - log ref(y)`` and ``y`` sampled from ``pi`` (Schulman, "Approximating KL divergence"):
k1 and k3 are unbiased, k3 is never negative, k2 is biased and never negative. As a *reward* (no gradient)
k1 is right. As a differentiable loss on the policy's own samples k1's gradient averages to zero, k2's is
the gradient of KL(pi || ref) and k3's is that of KL(ref || pi).

Shapes: any, the same for both arguments; the result has it too. Unit: nats.
"""

from __future__ import annotations

import torch
from torch import Tensor


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """``d``."""
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """``d^2 / 2``."""
    return (logprobs - reference_logprobs) ** 2 / 2


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """``exp(-d) - 1 + d``, computed with ``expm1`` so that small differences keep their digits."""
    difference = logprobs - reference_logprobs
    return torch.expm1(-difference) + difference
