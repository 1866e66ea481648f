"""Chunked log-probabilities, against a whole log-softmax in float64; how much they hold at once.

The checks of single functions run in `tests/losses/test_mutations.py`, on the functions and on their mutants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_perl.functional import logprobs as room
from lightning_perl.functional.logprobs import (
    chunk_divergence,
    chunked_logprobs,
    frozen_head_logprobs,
)

ROWS, COLUMNS, HIDDEN, VOCABULARY = 3, 5, 4, 11

Pair = tuple[Tensor, Any]


class Head:
    """A linear LM head with a soft cap, which counts the rows of every projection."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.rows: list[int] = []

    def __call__(self, hidden: Tensor) -> Tensor:
        self.rows.append(hidden.shape[0])
        return 3 * torch.tanh(hidden @ self.weight.T / 3)


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the size of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


def hidden_targets_weight(
    dtype: torch.dtype = torch.float64, rows: int = ROWS, vocabulary: int = VOCABULARY
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, COLUMNS, HIDDEN, dtype=torch.float64, generator=generator)
    targets = torch.randint(vocabulary, (rows, COLUMNS), generator=generator)
    weight = 2 * torch.randn(vocabulary, HIDDEN, dtype=torch.float64, generator=generator)
    return hidden.to(dtype).requires_grad_(), targets, weight.to(dtype).requires_grad_()


def whole_logprobs(hidden: Tensor, targets: Tensor, weight: Tensor, temperature: float) -> Pair:
    """The straight way, holding every logit."""
    logprobs = (Head(weight)(hidden) / temperature).log_softmax(-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropies


def check_against_whole(
    fn: Callable[[Tensor, Tensor, Head, float], Pair], temperature: float
) -> None:
    """Values, and the gradients of weighted sums of them in hidden states and head weight."""
    hidden, targets, weight = hidden_targets_weight()
    weights = torch.linspace(-1, 2, 2 * targets.numel(), dtype=torch.float64).view(
        2, *targets.shape
    )
    expected = whole_logprobs(hidden, targets, weight, temperature)
    results = fn(hidden, targets, Head(weight), temperature)
    for result, reference in zip(results, expected, strict=True):
        assert_close(result, reference, rtol=1e-12, atol=1e-12)
    assert all(result.requires_grad for result in results)
    for outputs in ([0], [1], [0, 1]):
        losses = [
            sum((pair[i] * weights[i]).sum() for i in outputs) for pair in (results, expected)
        ]
        found, reference_gradients = (
            torch.autograd.grad(loss, [hidden, weight], retain_graph=True)  # type: ignore[arg-type]
            for loss in losses
        )
        assert_close(found, reference_gradients, rtol=1e-11, atol=1e-12)


def check_at_least_fp32(fn: Callable[[Tensor], Tensor]) -> None:
    expected = {
        torch.bfloat16: torch.float32,
        torch.float16: torch.float32,
        torch.float32: torch.float32,
        torch.float64: torch.float64,
    }
    assert {dtype: fn(torch.ones(2, dtype=dtype)).dtype for dtype in expected} == expected


def check_half_precision(fn: Callable[[Tensor, Tensor, Head, float], Pair]) -> None:
    """The head multiplies in bf16; from its logits on, temperature included, everything is fp32."""
    for temperature in (1.0, 0.7):
        hidden, targets, weight = hidden_targets_weight(torch.bfloat16)
        logprobs = (Head(weight)(hidden).double() / temperature).log_softmax(-1)
        results = fn(hidden, targets, Head(weight), temperature)
        assert [result.dtype for result in results] == [torch.float32, torch.float32]
        chosen = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        for result, expected in zip(results, (chosen, entropies), strict=True):
            assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


def check_chosen_logprobs(fn: Callable[..., Pair]) -> None:
    def in_batch(hidden: Tensor, targets: Tensor, head: Head, temperature: float) -> Pair:
        logprobs, entropies = fn(hidden.flatten(0, 1), targets.flatten(), head, temperature)
        return logprobs.view_as(targets), entropies.view_as(targets)

    for temperature in (1.0, 0.7, 2.5):
        check_against_whole(in_batch, temperature)
    check_half_precision(in_batch)


def check_chunked_logprobs(fn: Callable[..., Pair]) -> None:
    for chunk_tokens in (1, 4, 5, 15, 1000):  # 15 positions: 4 does not divide them
        for temperature in (1.0, 0.7):

            def in_chunks(
                hidden: Tensor, targets: Tensor, head: Head, t: float, chunk: int = chunk_tokens
            ) -> Pair:
                return fn(hidden, targets, head, t, chunk)

            check_against_whole(in_chunks, temperature)
        check_half_precision(in_chunks)
        check_projected_rows(fn, chunk_tokens)
    check_memory(fn, frozen=False)


def check_chunk_divergence(fn: Callable[..., Tensor]) -> None:
    hidden, _, weight = hidden_targets_weight()
    own, other = hidden.flatten(0, 1), (hidden.detach() ** 2 - 0.3).flatten(0, 1)
    heads = Head(weight), Head(weight.detach() * 1.5)
    for temperature in (1.0, 0.7):
        found = fn(own, other, *heads, temperature)
        log_own, log_other = (
            (head(part) / temperature).log_softmax(-1)
            for head, part in zip(heads, (own, other), strict=True)
        )
        expected = torch.nn.functional.kl_div(log_own, log_other, reduction="none", log_target=True)
        assert_close(found, expected.sum(-1), rtol=1e-12, atol=1e-12)
        assert found.min() >= 0


def check_chunked_divergence(fn: Callable[..., Tensor]) -> None:
    hidden, _, weight = hidden_targets_weight()
    other = hidden.detach() ** 2 - 0.3
    own = Head(weight), Head(weight.detach() * 1.5)
    for chunk_tokens in (1, 4, 1000):
        heads = Head(weight), Head(weight.detach() * 1.5)
        found = fn(hidden, other, *heads, 0.7, chunk_tokens)
        expected = chunk_divergence(hidden, other, *own, 0.7)
        assert_close(found, expected, rtol=1e-12, atol=1e-12)
        ours, whole = (torch.autograd.grad(part.sum(), hidden)[0] for part in (found, expected))
        assert_close(ours, whole, rtol=1e-11, atol=1e-12)
        # Projected again in backward, and never more than a chunk.
        assert max(heads[0].rows) <= chunk_tokens
        assert sum(heads[0].rows) == 2 * ROWS * COLUMNS


def check_projected_rows(fn: Callable[..., Pair], chunk_tokens: int) -> None:
    """No projection of more than a chunk; every position once in forward and once in backward."""
    hidden, targets, weight = hidden_targets_weight()
    head = Head(weight)
    logprobs, entropies = fn(hidden, targets, head, 1.0, chunk_tokens)
    forward_rows = list(head.rows)
    torch.autograd.grad((logprobs + entropies).sum(), [hidden, weight])
    backward_rows = head.rows[len(forward_rows) :]
    for rows in (forward_rows, backward_rows):
        assert sum(rows) == ROWS * COLUMNS
        assert max(rows) <= chunk_tokens


def check_memory(fn: Callable[..., Pair], frozen: bool) -> None:
    """No operation makes more than a chunk of logits; forward keeps its inputs, or directions in their place."""
    chunk_tokens, vocabulary = 2, 50
    hidden, targets, weight = hidden_targets_weight(rows=8, vocabulary=vocabulary)
    kept: list[int] = []

    def remember(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    head = Head(weight.detach() if frozen else weight)
    with LargestTensor() as forward, saved_tensors_hooks(remember, lambda tensor: tensor):
        logprobs, entropies = fn(hidden, targets, head, 1.0, chunk_tokens)
        loss = logprobs.sum() if frozen else (logprobs + entropies).sum()
    with LargestTensor() as backward:
        torch.autograd.grad(loss, [hidden] if frozen else [hidden, weight])
    allowed = max(chunk_tokens * vocabulary, weight.numel(), hidden.numel())
    assert forward.numel <= allowed
    assert backward.numel <= (hidden.numel() if frozen else allowed)
    if frozen:
        # The chunk's own graph is used up inside; only directions are left.
        assert kept.count(hidden.numel()) == 1
    else:
        assert sum(kept) <= hidden.numel() + targets.numel()


def check_logprobs_and_directions(fn: Callable[..., tuple[Tensor, Any, Tensor | None]]) -> None:
    """Values and directions against the whole log-softmax, one row at a time or all together."""
    cached = room.CACHED
    try:
        for temperature in (1.0, 0.7, 2.5):
            for numbers_at_once in (1, 3 * VOCABULARY, cached):
                room.CACHED = numbers_at_once
                hidden, targets, weight = hidden_targets_weight()
                logprobs, entropies = whole_logprobs(hidden, targets, weight, temperature)
                (way,) = torch.autograd.grad(logprobs.sum(), hidden)
                flat = (hidden.flatten(0, 1), targets.flatten(), Head(weight.detach()), temperature)
                found = fn(*flat, True)
                assert_close(found[0], logprobs.flatten(), rtol=1e-12, atol=1e-12)
                assert_close(found[1], entropies.flatten(), rtol=1e-12, atol=1e-12)
                assert_close(found[2], way.flatten(0, 1), rtol=1e-11, atol=1e-12)
                without = fn(*flat, False)
                assert without[2] is None
                assert_close(without[:2], found[:2], rtol=0, atol=0)
                assert not any(part.requires_grad for part in without[:2])
    finally:
        room.CACHED = cached

    def in_batch(hidden: Tensor, targets: Tensor, head: Head, temperature: float) -> Pair:
        found = fn(hidden.flatten(0, 1), targets.flatten(), head, temperature, True)
        assert found[2] is not None
        assert found[2].dtype == hidden.dtype
        return found[0].view_as(targets), found[1].view_as(targets)

    check_half_precision(in_batch)


def check_frozen_head_logprobs(fn: Callable[..., Pair]) -> None:
    for chunk_tokens in (1, 4, 5, 15, 1000):
        for temperature in (1.0, 0.7):
            hidden, targets, weight = hidden_targets_weight()
            weights = torch.linspace(-1, 2, targets.numel(), dtype=torch.float64).view_as(targets)
            expected = whole_logprobs(hidden, targets, weight, temperature)
            head = Head(weight.detach())
            results = fn(hidden, targets, head, temperature, chunk_tokens)
            assert_close(results, expected, rtol=1e-12, atol=1e-12)
            found, reference = (
                torch.autograd.grad((pair[0] * weights).sum(), hidden)[0]
                for pair in (results, expected)
            )
            assert_close(found, reference, rtol=1e-11, atol=1e-12)
            # Projected once, backward included, and never more than a chunk.
            assert sum(head.rows) == ROWS * COLUMNS
            assert max(head.rows) <= chunk_tokens
            assert not results[1].requires_grad
    check_memory(fn, frozen=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [chunked_logprobs, frozen_head_logprobs])
def test_without_entropies_the_rest_is_equal_bit_for_bit(
    function: Callable[..., Pair], dtype: torch.dtype
) -> None:
    hidden, targets, weight = hidden_targets_weight(dtype)
    found = []
    for entropy in (True, False):
        logprobs, entropies = function(hidden, targets, Head(weight.detach()), 0.7, 4, entropy)
        found.append((logprobs, *torch.autograd.grad(logprobs.pow(2).sum(), hidden)))
        assert (entropies is None) != entropy
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
def test_without_gradients_nothing_is_projected_twice(chunk_tokens: int) -> None:
    hidden, targets, weight = hidden_targets_weight()
    head = Head(weight)
    with torch.no_grad():
        results = chunked_logprobs(hidden, targets, head, 0.7, chunk_tokens)
    assert not any(result is None or result.requires_grad for result in results)
    assert max(head.rows) <= chunk_tokens
    assert sum(head.rows) == ROWS * COLUMNS
    assert_close(results, whole_logprobs(hidden, targets, weight, 0.7), rtol=1e-12, atol=1e-12)


def test_large_logits_stay_finite() -> None:
    # two tokens tie at +1e4, the third is at -1e4
    logits = torch.tensor([[[1e4, 1e4, -1e4]]], dtype=torch.float64)
    pair = chunked_logprobs(logits, torch.tensor([[1]]), lambda rows: rows)
    assert_close(
        pair, (torch.tensor([[-0.69314718]]).double(), torch.tensor([[0.69314718]]).double())
    )


def test_a_shift_of_all_logits_changes_nothing() -> None:
    # GPT-2's logits all lie near -100; float32 keeps 7.6e-6 of a nat there
    logits = 3 * torch.randn(1, 4, 1000, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, 2, 3]])
    here = chunked_logprobs(logits, targets, lambda rows: rows)
    there = chunked_logprobs(logits - 100, targets, lambda rows: rows)
    assert_close(there, here, rtol=0, atol=5e-5)
