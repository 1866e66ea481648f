"""Masked reductions, against numpy in float64 on the values that count and nothing else.

The checks of single functions run in `tests/losses/test_mutations.py`, on the functions and on their mutants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.testing import assert_close

GARBAGE = (1e4, -1e30, 1e30)


def random_values(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_mask(seed: int, *shape: int) -> Tensor:
    """About half True, the first value always counted."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask.view(-1)[0] = True
    return mask


def values_and_gradients(
    fn: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """What ``fn`` returns, and the gradients of the first of it in all inputs."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    outputs = fn(*leaves)
    gradients = torch.autograd.grad(
        outputs[0].sum(), leaves, allow_unused=True, materialize_grads=True
    )
    return [output.detach() for output in outputs], list(gradients)


def check_hidden(
    fn: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], mask: Tensor
) -> None:
    """Garbage where the mask is False changes no output and no gradient, and gets no gradient."""
    outputs, gradients = values_and_gradients(fn, inputs)
    for garbage in GARBAGE:
        spoiled = [
            torch.where(mask, tensor, (-1) ** i * garbage) for i, tensor in enumerate(inputs)
        ]
        spoiled_outputs, spoiled_gradients = values_and_gradients(fn, spoiled)
        assert_close(spoiled_outputs, outputs, rtol=0, atol=0)
        assert_close(spoiled_gradients, gradients, rtol=0, atol=0)
    for gradient in gradients:
        assert not gradient[~mask].any()


def check_masked_mean(fn: Callable[..., Tensor]) -> None:
    for seed in range(5):
        values, mask = random_values(seed, 4, 6), random_mask(seed, 4, 6)
        counted = values.numpy()[mask.numpy()]
        assert_close(fn(values, mask), torch.tensor(np.mean(counted)))
        assert_close(fn(values, mask, 37), torch.tensor(np.sum(counted) / 37))
        assert_close(fn(values, mask, torch.tensor(37)), torch.tensor(np.sum(counted) / 37))
        check_hidden(lambda x, mask=mask: (fn(x, mask),), [values], mask)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert fn(torch.ones(2, 3), nothing).item() == 0


def check_whiten(fn: Callable[..., Tensor]) -> None:
    for seed in range(5):
        values, mask = 3 + 5 * random_values(seed, 4, 6), random_mask(seed, 4, 6)
        counted = values.numpy()[mask.numpy()]
        whitened = fn(values, mask)
        expected = (counted - np.mean(counted)) / np.sqrt(np.var(counted, ddof=0) + 1e-8)
        assert_close(whitened[mask], torch.from_numpy(expected))
        assert not whitened[~mask].any()
        # of whitened values the plain sum has no gradient: weigh them, where they count
        weights = random_values(seed + 100, 4, 6)
        check_hidden(lambda x, mask=mask, w=weights: (fn(x, mask) * w,), [values], mask)
    for counting in (0, 1):  # of almost nothing
        mask = torch.arange(6).view(2, 3) < counting
        assert not fn(torch.full((2, 3), 8.0), mask).any()


def check_masked_row_sums(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    values, mask = random_values(0, 4, 6), random_mask(0, 4, 6)
    expected = [
        sum(v for v, m in zip(*row, strict=True) if m)
        for row in zip(values.tolist(), mask.tolist(), strict=True)
    ]
    assert_close(fn(values, mask), torch.tensor(expected, dtype=values.dtype))
    assert torch.isfinite(fn(torch.where(mask, values, torch.inf), mask)).all()
