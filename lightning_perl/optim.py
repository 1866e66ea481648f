"""AdamW whose moments are kept in the host's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from lightning_perl.arguments import Checked, FractionBelowOne, NonNegative, Positive
from lightning_perl.ranks import in_pieces

AT_ONCE = 2**25
"""Most weights whose moments are on the device together (256 MiB of moments in fp32); one tensor may be larger."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class HostAdamW(Checked, Optimizer):
    """AdamW that keeps its moments in the host's memory and copies a few at a time to the device in the step.

    Moments take 8 bytes for each trained weight in every phase, but are needed in the step only, when
    activations and the rollout's cache are gone. The copies take ``16 bytes x weights / bandwidth`` a step; the
    host needs 8 bytes a weight or more of pinned memory, allocated in powers of two. Steps equal those of
    `torch.optim.AdamW`, fused, bit for bit. bitsandbytes' paged optimizers leave weights of less than 100,000
    numbers on the device, which most of a LoRA adapter's are.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
    """

    host = torch.device("cpu")

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: Positive = 1e-3,
        betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.999),
        eps: Positive = 1e-8,
        weight_decay: NonNegative = 1e-2,
    ) -> None:
        given: Any = list(params)
        like = AdamW(given, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        super().__init__(like.param_groups, like.defaults)

    @cached_property
    def _adamw(self) -> AdamW:
        # Steps a few parameters at a time. It is not pickled, but made again when it is needed.
        return AdamW(self.param_groups, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401
        """One step of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._adamw.state = self.state
        for group in self.param_groups:
            moved = [weight for weight in group["params"] if weight.grad is not None]
            for piece in in_pieces(moved, AT_ONCE):
                host_moments = [self._to_device(parameter) for parameter in piece]
                self._adamw.param_groups = [{**group, "params": piece}]
                self._adamw.step()
                for parameter, moments in zip(piece, host_moments, strict=True):
                    self._to_host(parameter, moments)
        self._synchronize()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer does, which copies moments to the device; then back to the host."""
        super().load_state_dict(state_dict)
        self.rest()

    def rest(self) -> None:
        """Move moments to the host that are not there, as after restoring a checkpoint."""
        for parameter in list(self.state):
            if any(moment.device != self.host for moment in self._moments(parameter).values()):
                self._to_host(parameter, {})
        self._synchronize()

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state.get(parameter, {})
        return {name: state[name] for name in MOMENTS if name in state}

    def _to_device(self, parameter: Tensor) -> dict[str, Tensor]:
        """Copy moments to the device; returns those on the host, where they are copied back to."""
        host_moments = self._moments(parameter)
        for name, moment in host_moments.items():
            on_device = torch.empty_like(moment, device=parameter.device)
            self.state[parameter][name] = on_device.copy_(moment, non_blocking=True)
        return host_moments

    def _to_host(self, parameter: Tensor, host_moments: dict[str, Tensor]) -> None:
        """Copy moments back to the host; those that have no memory there get it."""
        pinned = parameter.is_cuda
        for name, moment in self._moments(parameter).items():
            on_host = host_moments.get(name)
            if on_host is None:
                on_host = torch.empty_like(moment, device=self.host, pin_memory=pinned)
            self.state[parameter][name] = on_host.copy_(moment, non_blocking=True)

    def _synchronize(self) -> None:
        """Wait for copies: a checkpoint may read them next."""
        if any(parameter.is_cuda for group in self.param_groups for parameter in group["params"]):
            torch.cuda.synchronize()


def room_for_moments(optimizer: Optimizer) -> list[Tensor]:
    """The memory that Adam's moments will take on the weights' device, where its first step has not made them."""
    made_later = isinstance(optimizer, Adam | AdamW) and not optimizer.state
    groups = optimizer.param_groups if made_later else []
    return [
        torch.empty_like(weight) for group in groups for weight in group["params"] for _ in MOMENTS
    ]
