"""Leave-one-out baselines: by hand, and unbiased by enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_perl.losses.reinforce import policy_gradient
from lightning_perl.losses.rloo import leave_one_out


def check_leave_one_out(fn: Callable[[Tensor, int], Tensor]) -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    expected = torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5, 0, 0, 0], dtype=torch.float64)
    assert_close(fn(rewards, 3), expected)
    assert_close(fn(rewards, 2), torch.tensor([-1.0, 1, 1, -1, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("samples", [2, 3])
def test_the_gradient_is_unbiased(samples: int) -> None:
    """Over all k-tuples of one-token responses the expected estimate is the gradient of ``E[r] - beta KL``."""
    beta = 0.3
    reward = torch.tensor([1.0, -0.5, 2.0, 0.25], dtype=torch.float64)
    reference = torch.tensor([0.1, 0.4, -0.2, 0.3], dtype=torch.float64).log_softmax(0)
    logits = torch.tensor([0.3, -0.7, 0.2, 0.5], dtype=torch.float64, requires_grad=True)

    logprobs = logits.log_softmax(0)
    objective = (logprobs.exp() * (reward - beta * (logprobs - reference))).sum()
    (exact,) = torch.autograd.grad(objective, logits, retain_graph=True)

    paid = (reward - beta * (logprobs - reference)).detach()
    expected = torch.zeros_like(logits)
    for drawn in itertools.product(range(4), repeat=samples):
        tokens = torch.tensor(drawn)
        probability = logprobs[tokens].sum().exp().detach()
        advantages = leave_one_out(paid[tokens], samples).unsqueeze(1)
        mask = torch.ones(samples, 1, dtype=torch.bool)
        loss = policy_gradient(logprobs[tokens].unsqueeze(1), advantages, mask, samples)
        (estimate,) = torch.autograd.grad(loss, logits, retain_graph=True)
        expected -= probability * estimate
    assert_close(expected, exact, rtol=1e-12, atol=1e-12)
