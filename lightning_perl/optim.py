"""AdamW whose moments rest in the host's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

AT_ONCE = 2**25
"""Weights whose moments are on the device together (256 MiB of moments in fp32), or one tensor that is larger."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class HostAdamW(Optimizer):
    """AdamW whose moments rest in the host's memory and visit the device a few at a time, in the step.

    They are needed in the step only, when activations and the rollout's cache are gone, but stand
    beside these in every phase: 8 bytes for each trained weight, of all roles. Here they cross the bus
    twice a step instead (``16 bytes x weights / bandwidth``), from and to pinned memory, of which the host
    must have 8 bytes a weight, or more: it is given in powers of two. Steps are those of
    `torch.optim.AdamW`, fused, bit for bit. bitsandbytes' paged optimizers leave weights of less than 100,000
    numbers on the device, which most of a LoRA adapter's are.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second.
        weight_decay: Decoupled.
    """

    host = torch.device("cpu")

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        given: Any = list(params)
        like = AdamW(given, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        super().__init__(like.param_groups, like.defaults)

    @cached_property
    def _adamw(self) -> AdamW:
        # Takes the steps, of some parameters at a time. Not pickled: made again where it is needed.
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
            for some in _pieces(group["params"]):
                homes = [self._visit(parameter) for parameter in some]
                self._adamw.param_groups = [{**group, "params": some}]
                self._adamw.step()
                for parameter, home in zip(some, homes, strict=True):
                    self._return(parameter, home)
        self._arrive()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer does, which takes moments to the device; then back to the host."""
        super().load_state_dict(state_dict)
        self.rest()

    def rest(self) -> None:
        """Take to the host what is not there; whoever restores a checkpoint may have moved it."""
        for group in self.param_groups:
            for parameter in group["params"]:
                moments = self._moments(parameter)
                if any(moment.device != self.host for moment in moments.values()):
                    self._return(parameter, {})
        self._arrive()

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state.get(parameter, {})
        return {name: state[name] for name in MOMENTS if name in state}

    def _visit(self, parameter: Tensor) -> dict[str, Tensor]:
        """Copy moments to the device; where they rest."""
        homes = self._moments(parameter)
        for name, home in homes.items():
            visitor = torch.empty_like(home, device=parameter.device)
            self.state[parameter][name] = visitor.copy_(home, non_blocking=True)
        return homes

    def _return(self, parameter: Tensor, homes: dict[str, Tensor]) -> None:
        """Copy moments back to where they rest; those that have no place yet get one."""
        for name, visitor in self._moments(parameter).items():
            home = homes.get(name)
            if home is None:
                pinned = parameter.is_cuda
                home = torch.empty_like(visitor, device=self.host, pin_memory=pinned)
            self.state[parameter][name] = home.copy_(visitor, non_blocking=True)

    def _arrive(self) -> None:
        """Wait for copies: a checkpoint may read them next."""
        if any(parameter.is_cuda for group in self.param_groups for parameter in group["params"]):
            torch.cuda.synchronize()


def _pieces(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Those that have a gradient, so many at once as their moments may be."""
    some: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if some and sum(one.numel() for one in some) + parameter.numel() > AT_ONCE:
            yield some
            some = []
        some.append(parameter)
    if some:
        yield some
