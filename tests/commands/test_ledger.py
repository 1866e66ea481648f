"""The ledger against programs whose bytes are counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_perl.commands.ledger import CUDA_BLOCK, Ledger

FLOAT = 4


def numbers(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.float32)


@pytest.mark.parametrize("fake", [True, False])
def test_a_program_by_hand(fake: bool) -> None:
    with FakeTensorMode() if fake else torch.no_grad(), Ledger(block=1) as ledger:
        with ledger.phase("first"):
            a = numbers(100)
            b = a + 1
            # 300 numbers at once; b is gone before the next are made.
            c = b * b
            del b
            d = c[:50]
            c.add_(1)
        assert ledger.total == 200 * FLOAT
        assert ledger.peaks["first"].total == 300 * FLOAT
        # A view keeps the whole storage.
        del c
        assert ledger.total == 200 * FLOAT
        del d
        assert ledger.total == 100 * FLOAT
        # A phase begins with what is there; it may come again, and lie in another.
        for size in (5, 30, 10):
            with ledger.phase("outer"):
                held = numbers(size)
                with ledger.phase("inner"):
                    numbers(1)
                numbers(2)
                with ledger.unwatched():
                    numbers(1000)
                del held
        peaks = [ledger.peaks[name].total for name in ("outer", "inner")]
        assert peaks == [132 * FLOAT, 131 * FLOAT]
        del a
        assert ledger.total == 0
    with FakeTensorMode(), Ledger() as ledger:
        blocks = [numbers(1), numbers(128), numbers(129)]
        assert ledger.total == (1 + 1 + 2) * CUDA_BLOCK
        del blocks


def test_kinds_add_up_at_the_peak() -> None:
    with FakeTensorMode(), Ledger(vocabulary_size=7, block=1) as ledger:
        weight = numbers(20)
        ledger.mark([weight], "trunk")
        with ledger.phase("one"):
            logits = torch.empty(3, 7)
            hidden = torch.empty(5)
            del logits
            ledger.mark([hidden], "cache")
    peak = ledger.peaks["one"]
    assert {kind: size for kind, size in peak.kinds.items() if size} == {
        "trunk": 80,
        "logits": 84,
        "activations": 20,
    }
    assert peak.total == sum(peak.kinds.values()) == 184
    # What is called something else later counts there from then on.
    assert ledger.live["cache"] == 20
    assert ledger.live["activations"] == 0


def test_backward_of_a_linear_layer_by_hand() -> None:
    rows, inputs, outputs = 8, 16, 32
    with FakeTensorMode(), Ledger(block=1) as ledger:
        layer = nn.Linear(inputs, outputs, bias=False)
        x = torch.empty(rows, inputs)
        with ledger.phase("step"):
            loss = layer(x).sum()
            loss.backward()
        weights, states = inputs * outputs, rows * inputs
        # Weight, its gradient, x, the loss and its gradient (an expanded one is no tensor of its own).
        assert ledger.total == FLOAT * (2 * weights + states + 1)
        peak = ledger.peaks["step"].total
        # The outputs are gone once the sum is taken; the gradient is a product of x and the loss's.
        assert peak <= FLOAT * (2 * weights + states + 2 * rows * outputs + 2)
        assert peak >= FLOAT * (2 * weights + states + 2)


def test_attention_on_cuda_sums_queries_in_fp32() -> None:
    peaks = {}
    for block in (1, CUDA_BLOCK):
        with FakeTensorMode(), Ledger(block=block) as ledger:
            q, k, v = (
                torch.empty(2, 4, 64, 32, dtype=torch.bfloat16, requires_grad=True)
                for _ in range(3)
            )
            with ledger.phase("step"):
                out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                torch.autograd.backward(out.sum())
        peaks[block] = ledger.peaks["step"]
    assert peaks[CUDA_BLOCK].kinds["workspace"] == FLOAT * 2 * 4 * 64 * 32
    assert peaks[1].kinds["workspace"] == 0
