"""Cheap parts of a decoder block, computed again in backward instead of kept.

What autograd keeps of a block is mostly what costs least to make again: a norm written out in fp32 keeps
twice the bytes of its input, and a gated MLP keeps the activation beside gate and up. With a frozen trunk
nothing else needs them. A fifth to a quarter of a block's activations goes; the result is bit for bit the
same.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Elementwise = Callable[..., Tensor]
GATED_MLP = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
"""What most families' MLP says, whatever it calls ``x``; some clamp or thin out on the way."""
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
    @once_differentiable
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


def _norm(module: nn.Module, forward: Elementwise, *inputs: Tensor, **named: Tensor) -> Tensor:
    # A trained weight needs its gradient, which only the graph outside gives.
    if (
        not torch.is_grad_enabled()
        or named
        or any(parameter.requires_grad for parameter in module.parameters())
    ):
        return forward(*inputs, **named)
    return recomputed(forward, *inputs)


def _gated(act: Elementwise, gate: Tensor, up: Tensor) -> Tensor:
    return act(gate) * up


def _gated_mlp(module: Any, x: Tensor) -> Tensor:  # noqa: ANN401 (a family's own class)
    inner = recomputed(partial(_gated, module.act_fn), module.gate_proj(x), module.up_proj(x))
    result: Tensor = module.down_proj(inner)
    return result


def _is_written_out_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of one tensor and nothing else; some that end so hold half a block."""
    return (
        type(module).__name__.endswith("Norm")
        and not isinstance(module, FUSED_NORMS)
        and not any(True for _ in module.children())
        and len(inspect.signature(module.forward).parameters) == 1
    )


def _says_gated_mlp(kind: type[nn.Module]) -> bool:
    """Whether a class's forward is `GATED_MLP` word for word: numbers tried out may miss a clamp."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(kind.forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) != 2:
        return False
    called = function.args.args[1].arg
    said = [ast.unparse(line) for line in function.body if not _is_docstring(line)]
    wanted = GATED_MLP.replace("(x)", f"({called})")
    return said in ([f"return {wanted}"], [f"down_proj = {wanted}", "return down_proj"])


def _is_docstring(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


def make_lean(model: nn.Module) -> None:
    """Exchange the forward of written-out norms and of gated MLPs.

    Args:
        model: The bare trunk, before any adapter is added.
    """
    gated: dict[type[nn.Module], bool] = {}
    for module in model.modules():
        kind = type(module)
        if "forward" in vars(module):
            # Somebody else exchanged it (offloading, a kernel).
            continue
        if _is_written_out_norm(module):
            module.forward = partial(_norm, module, module.forward)
            continue
        if kind not in gated:
            gated[kind] = _says_gated_mlp(kind)
        # An activation with weights of its own could be trained.
        if gated[kind] and not any(True for _ in module.get_submodule("act_fn").parameters()):
            module.forward = partial(_gated_mlp, module)
