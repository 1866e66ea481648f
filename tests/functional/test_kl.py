"""KL estimators, by summing over every outcome of a small categorical: nothing is sampled.

The policy is ``softmax(logits)`` over ``V`` tokens. An estimator's expectation is the sum over the
tokens of ``pi(y) k(y)``; as a loss, its expected gradient is that sum's with ``pi(y)`` held still,
because the samples do not move when the policy does.

The checks of single functions run in `tests/losses/test_mutations.py`, on the functions and on their mutants.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

Estimator = Callable[[Tensor, Tensor], Tensor]


def policy_and_reference(seed: int) -> tuple[Tensor, Tensor]:
    """Logits of two distributions over 7 tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits, reference = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    return logits.requires_grad_(), reference


def expectation(fn: Estimator, logits: Tensor, reference: Tensor) -> Tensor:
    logprobs = logits.log_softmax(-1)
    return (logprobs.exp().detach() * fn(logprobs, reference.log_softmax(-1))).sum()


def gradient_of(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits)[0]


def kl_of(logits: Tensor, other: Tensor) -> Tensor:
    divergence: Tensor = kl_divergence(Categorical(logits=logits), Categorical(logits=other))
    return divergence


def check_formula(fn: Estimator, formula: Callable[[float], float]) -> None:
    """Token by token against the ``math`` module, the order of the arguments included."""
    logprobs, reference = [-0.3, -2.0, -1.5, -4.0], [-1.1, -0.5, -1.5, -7.0]
    expected = [formula(p - q) for p, q in zip(logprobs, reference, strict=True)]
    result = fn(torch.tensor([logprobs]).double(), torch.tensor([reference]).double())
    assert_close(result, torch.tensor([expected]).double(), rtol=1e-6, atol=1e-6)


def check_k1(fn: Estimator) -> None:
    check_formula(fn, lambda d: d)
    for seed in range(5):
        logits, reference = policy_and_reference(seed)
        expected = expectation(fn, logits, reference)
        assert_close(expected, kl_of(logits, reference))
        assert_close(gradient_of(expected, logits), torch.zeros_like(logits))


def check_k2(fn: Estimator) -> None:
    check_formula(fn, lambda d: d * d / 2)


def check_jensen_shannon(fn: Estimator) -> None:
    for seed in range(5):
        logits, reference = policy_and_reference(seed)
        middle = (0.5 * (logits.softmax(-1) + reference.softmax(-1))).log()
        expected = 0.5 * (kl_of(logits, middle) + kl_of(reference, middle))
        assert_close(expectation(fn, logits, reference), expected)
        each = fn(logits.log_softmax(-1), reference.log_softmax(-1))
        assert (each >= 0).all()
    far = fn(torch.tensor([0.0, -60.0]), torch.tensor([-300.0, -0.5]))
    assert far.isfinite().all()


def check_k3(fn: Estimator) -> None:
    check_formula(fn, lambda d: math.exp(-d) - 1 + d)
    for seed in range(5):
        logits, reference = policy_and_reference(seed)
        expected = expectation(fn, logits, reference)
        assert_close(expected, kl_of(logits, reference))
        assert_close(gradient_of(expected, logits), gradient_of(kl_of(reference, logits), logits))
    # d^2/2 - d^3/6 = 4.998e-7 at d = 1e-3; exp(-d) - 1 + d in float32 is 12% off there
    small = fn(torch.tensor(1e-3), torch.tensor(0.0))
    assert_close(small, torch.tensor(4.998333e-7), rtol=1e-3, atol=0)
