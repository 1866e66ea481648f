"""Cheap parts of a decoder block, computed again in backward instead of kept.

What autograd keeps of a block is mostly what costs least to make again: a norm written out in fp32 keeps
twice the bytes of its input, and a gated MLP keeps the activation beside gate and up. With a frozen trunk
nothing else needs them. A fifth to a quarter of a block's activations goes; the result is bit for bit the
same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Elementwise = Callable[..., Tensor]
GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
"""Layers of a gated MLP as most families name them."""
FUSED_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
"""torch's own keep their input and two numbers a row already."""


class Recomputed(torch.autograd.Function):
    """A function of tensors that keeps nothing but these tensors. It must draw nothing at random."""

    @staticmethod
    def forward(ctx: Any, function: Elementwise, *inputs: Tensor) -> Tensor:  # noqa: ANN401
        """The function's value; called without a graph."""
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Call it again, with a graph, and go back through that."""
        inputs = [
            one.detach().requires_grad_(needed)
            for one, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        ]
        with torch.enable_grad():
            output = ctx.function(*inputs)
        wanted = [one for one in inputs if one.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, d_output))
        return None, *(next(found) if one.requires_grad else None for one in inputs)


def recomputed(function: Elementwise, *inputs: Tensor) -> Tensor:
    """``function(*inputs)``; in a training pass nothing of its inside is kept."""
    if torch.is_grad_enabled() and any(one.requires_grad for one in inputs):
        output: Tensor = Recomputed.apply(function, *inputs)  # type: ignore[no-untyped-call]
        return output
    return function(*inputs)


def _norm(module: nn.Module, forward: Elementwise, *inputs: Tensor) -> Tensor:
    # A trained weight needs its gradient, which only the graph outside gives.
    if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        return forward(*inputs)
    return recomputed(forward, *inputs)


def _gated(act: Elementwise, gate: Tensor, up: Tensor) -> Tensor:
    return act(gate) * up


def _gated_mlp(module: Any, x: Tensor) -> Tensor:  # noqa: ANN401 (a family's own class)
    inner = recomputed(partial(_gated, module.act_fn), module.gate_proj(x), module.up_proj(x))
    result: Tensor = module.down_proj(inner)
    return result


def _is_gated_mlp(module: Any, dtype: torch.dtype) -> bool:  # noqa: ANN401
    """Whether ``down(act(gate(x)) * up(x))`` is all that this MLP does, tried out on a few numbers."""
    if any(True for _ in module.act_fn.parameters()):
        return False
    weight = module.gate_proj.weight
    if weight.is_meta:
        # Nothing to try out; the names say so.
        return True
    drawn = torch.randn(2, module.gate_proj.in_features, generator=torch.Generator().manual_seed(0))
    x = drawn.to(weight.device, dtype)
    with torch.no_grad():
        return torch.equal(module(x), _gated_mlp(module, x))


def make_lean(model: nn.Module, dtype: torch.dtype) -> None:
    """Exchange the forward of written-out norms and of gated MLPs.

    Args:
        model: The bare trunk, before any adapter is added.
        dtype: Of its hidden states.
    """
    gated: dict[type, bool] = {}
    for module in model.modules():
        kind = type(module)
        if kind.__name__.endswith("Norm") and not isinstance(module, FUSED_NORMS):
            module.forward = partial(_norm, module, module.forward)
        elif all(isinstance(getattr(module, name, None), nn.Module) for name in GATED):
            if kind not in gated:
                gated[kind] = _is_gated_mlp(module, dtype)
            if gated[kind]:
                module.forward = partial(_gated_mlp, module)
