"""AdamW whose moments rest in the host's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

AT_ONCE = 2**25
"""Weights whose moments are on the device together: 256 MiB of moments in fp32."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class HostAdamW(Optimizer):
    """AdamW whose moments rest in the host's memory and visit the device a few at a time, in the step.

    They are needed in the step only, when activations and the rollout's cache are gone, but stand
    beside these in every phase: 8 bytes for each trained weight, of all roles. Here they cross the bus
    twice a step instead (``16 bytes x weights / bandwidth``), out of pinned memory. Steps are those of
    `torch.optim.AdamW`, fused, bit for bit. bitsandbytes' paged optimizers leave weights of less than 100,000
    numbers on the device, which most of a LoRA adapter's are.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second.
        weight_decay: Decoupled.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        given = list(params)
        self._adamw = AdamW(
            given,  # type: ignore[arg-type]
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=True,
        )
        # Its groups are ours: what a scheduler sets here, it reads.
        super().__init__(self._adamw.param_groups, self._adamw.defaults)
        self.host = torch.device("cpu")

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
                for parameter in some:
                    self._move(parameter, parameter.device)
                self._adamw.param_groups = [{**group, "params": some}]
                self._adamw.step()
                for parameter in some:
                    self._move(parameter, self.host)
        self._arrive()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer does, which takes moments to the device; then back to the host."""
        super().load_state_dict(state_dict)
        self.rest()

    def rest(self) -> None:
        """Take all moments to the host; whoever restores a checkpoint may have moved them."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._move(parameter, self.host)
        self._arrive()

    def _move(self, parameter: Tensor, device: torch.device) -> None:
        state = self.state.get(parameter, {})
        for name in MOMENTS:
            if name in state:
                pinned = device == self.host and parameter.is_cuda
                room = torch.empty_like(state[name], device=device, pin_memory=pinned)
                state[name] = room.copy_(state[name], non_blocking=True)

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
