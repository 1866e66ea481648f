"""Cross-entropy of chosen tokens, against a loop over Python floats and torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.testing import assert_close

from tests.functional.test_masked import check_hidden, random_mask, random_values


def check_cross_entropy(fn: Callable[..., Tensor]) -> None:
    for seed in range(3):
        logprobs, mask = -random_values(seed, 4, 6).abs(), random_mask(seed, 4, 6)
        tokens = mask.nonzero().tolist()
        total = -math.fsum(logprobs[row, column].item() for row, column in tokens)
        assert_close(fn(logprobs, mask).item(), total / len(tokens), rtol=1e-12, atol=0)
        assert_close(fn(logprobs, mask, 50).item(), total / 50, rtol=1e-12, atol=0)
        leaf = logprobs.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(fn(leaf, mask), leaf)
        assert_close(gradient, torch.where(mask, -1 / len(tokens), 0.0).double())
        check_hidden(lambda x, mask=mask: (fn(x, mask),), [logprobs], mask)
    assert fn(torch.full((2, 3), -5.0), torch.zeros(2, 3, dtype=torch.bool)).item() == 0
