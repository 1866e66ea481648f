"""Moments that rest on the host: AdamW's steps, and nothing on the device between them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from lightning_perl import optim
from lightning_perl.commands.ledger import HOST, Ledger
from lightning_perl.optim import HostAdamW

SIZES = ((7, 5), (40,), (3,), (9, 2))
SETTINGS: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-5, "weight_decay": 0.1}


def parameters() -> list[nn.Parameter]:
    drawn = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=drawn)) for size in SIZES]


def trained(
    make: Callable[..., Optimizer], steps: int = 5, resumed: int | None = None
) -> tuple[list[nn.Parameter], Optimizer]:
    """Parameters after some steps, in two groups, one parameter without a gradient now and then."""
    weights = parameters()

    def made() -> Optimizer:
        groups = [{"params": weights[:3]}, {"params": weights[3:], "lr": 0.2}]
        return make(groups, **SETTINGS)

    optimizer = made()
    scheduler = StepLR(optimizer, 2, gamma=0.5)
    drawn = torch.Generator().manual_seed(1)
    for step in range(steps):
        if step == resumed:
            stored = optimizer.state_dict()
            optimizer = made()
            optimizer.load_state_dict(stored)
            later = StepLR(optimizer, 2, gamma=0.5)
            later.load_state_dict(scheduler.state_dict())
            scheduler = later
        for number, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape, generator=drawn)
            if number == 1 and step % 2:
                weight.grad = None
        optimizer.step()
        scheduler.step()
    return weights, optimizer


@pytest.mark.parametrize("resumed", [None, 3])
@pytest.mark.parametrize("at_once", [1, 44, 2**20])
def test_steps_are_adamw_s_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, at_once: int, resumed: int | None
) -> None:
    monkeypatch.setattr(optim, "AT_ONCE", at_once)
    expected, theirs = trained(partial(AdamW, fused=True), resumed=resumed)
    found, ours = trained(HostAdamW, resumed=resumed)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not torch.equal(found[0], parameters()[0])
    # A run may go on with the other.
    mine, others = ours.state_dict(), theirs.state_dict()
    assert mine["state"].keys() == others["state"].keys()
    for key, state in mine["state"].items():
        for name, value in state.items():
            assert torch.equal(value, others["state"][key][name])


def test_a_few_moments_visit_the_device_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "AT_ONCE", 44)
    with FakeTensorMode(), Ledger(block=1) as ledger:
        weights = [nn.Parameter(torch.zeros(size)) for size in SIZES]
        optimizer = HostAdamW(weights)
        optimizer.host = HOST
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            before = ledger.total
            with ledger.phase("step"):
                optimizer.step()
            after, ledger.peaks["after"] = ledger.total, ledger.peaks.pop("step")
    # A count of steps per tensor stays from the first on.
    assert after == before
    # Both moments of 40 + 3 weights, not of 35 + 40 + 3 + 18.
    assert ledger.peaks["after"].total - before == 4 * 2 * 43


def test_what_somebody_took_to_the_device_goes_back() -> None:
    with FakeTensorMode(), Ledger(block=1) as ledger:
        weights = [nn.Parameter(torch.zeros(size)) for size in SIZES]
        optimizer = HostAdamW(weights)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        # As Lightning does when it resumes.
        there = ledger.total
        optimizer.host = HOST
        optimizer.rest()
        assert there - ledger.total == 4 * 2 * (35 + 40 + 3 + 18)
        stored = optimizer.state_dict()
        assert stored["state"][1]["exp_avg"].device == HOST
        resting = ledger.total
        optimizer.load_state_dict(stored)
        assert optimizer.state_dict()["state"][1]["exp_avg"].device == HOST
        # Counts of steps only.
        assert ledger.total <= resting + 4 * len(SIZES)


def test_a_copy_goes_on() -> None:
    weights, optimizer = trained(HostAdamW)
    again_weights, again = copy.deepcopy((weights, optimizer))
    for group, of_weights in ((optimizer, weights), (again, again_weights)):
        for weight in of_weights:
            weight.grad = torch.ones_like(weight)
        group.step()
    assert all(torch.equal(one, other) for one, other in zip(weights, again_weights, strict=True))


def test_a_closure_is_called_with_gradients() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = HostAdamW([weight], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert float(weight.detach().max()) < 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_moments_rest_in_pinned_memory() -> None:
    weights = [nn.Parameter(one.detach().cuda()) for one in parameters()]
    copies = [nn.Parameter(one.detach().clone()) for one in weights]
    ours, theirs = HostAdamW(weights, **SETTINGS), AdamW(copies, fused=True, **SETTINGS)
    for _ in range(3):
        for one, other in zip(weights, copies, strict=True):
            one.grad = torch.ones_like(one)
            other.grad = torch.ones_like(other)
        ours.step()
        theirs.step()
    assert all(torch.equal(one, other) for one, other in zip(weights, copies, strict=True))
    for state in ours.state.values():
        assert state["exp_avg"].is_pinned()
        assert state["exp_avg_sq"].is_pinned()
