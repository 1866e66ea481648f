"""A linear layer and its low-rank adapter, multiplied in the trunk's dtype.

PEFT's own forward casts the input to the adapter's fp32 and keeps that copy for backward: 15-20% of time and
memory on a bf16 trunk. Here the products run in the input's dtype; the adapter's weights stay fp32.

Shapes: ``N`` tokens, ``I`` inputs, ``O`` outputs, ``r`` rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Factors(NamedTuple):
    """An adapter's two matrices on one layer, in the input's dtype.

    Attributes:
        down: ``A``. Shape: ``(r, I)``.
        up: ``B`` times the adapter's scale. Shape: ``(O, r)``.
        fusible: Whether `FrozenLinearWithAdapter` may compute the layer.
    """

    down: Tensor
    up: Tensor
    fusible: bool


def fusible(base: nn.Module, dropout: nn.Module, x: Tensor) -> bool:
    """Whether the layer under an adapter is a plain, frozen ``nn.Linear`` without dropout on its input."""
    # Hooks and an exchanged forward (offloading) run only where the layer itself is called.
    called = bool(base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base))
    return (
        type(base) is nn.Linear
        and not called
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and base.weight.dtype == x.dtype
        # Autocast would cast some of the products and not the one that is added in place.
        and not torch.is_autocast_enabled(x.device.type)
        and not (isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0)
    )


def lean_linear(
    base: nn.Module, dropout: nn.Module, factors: Factors, fused: bool, x: Tensor
) -> Tensor:
    """The layer's output plus the adapter's. Shape: ``(..., I)`` to ``(..., O)``."""
    down, up, may_fuse = factors
    if not (fused and may_fuse):
        output: Tensor = base(x)
        return output + F.linear(F.linear(dropout(x), down), up)
    linear = cast(nn.Linear, base)
    if not torch.is_grad_enabled():
        summed, _ = fused_product(x.reshape(-1, x.shape[-1]), linear.weight, linear.bias, down, up)
        return summed.view(*x.shape[:-1], -1)
    y: Tensor = FrozenLinearWithAdapter.apply(x, linear.weight, linear.bias, down, up)  # type: ignore[no-untyped-call]
    return y


def fused_product(
    rows: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    """``x W^T + bias + x A^T B^T``, the low-rank part added in place; and ``x A^T``.

    Shapes: rows ``(N, I)``, weight ``(O, I)``, bias ``(O,)``, down ``(r, I)``, up ``(O, r)``; the
    results ``(N, O)`` and ``(N, r)``.
    """
    inner = rows @ down.T
    return F.linear(rows, weight, bias).addmm_(inner, up.T), inner


class FrozenLinearWithAdapter(torch.autograd.Function):
    """``x W^T + bias + x A^T B^T`` with W and bias frozen, the low-rank part added in place.

    As separate operations autograd would keep both summands and add them, forward and backward: one more
    pass over the activations per adapter. Only ``x`` and ``x A^T`` are kept for backward.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (autograd's context)
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
    ) -> Tensor:
        """Shapes: x ``(..., I)``, weight ``(O, I)``, bias ``(O,)``, down ``(r, I)``, up ``(O, r)``."""
        rows = x.reshape(-1, x.shape[-1])
        y, inner = fused_product(rows, weight, bias, down, up)
        ctx.save_for_backward(rows, weight, down, up, inner)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Gradients of x, down and up."""
        rows, weight, down, up, inner = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1])
        d_inner = flat @ up
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (flat @ weight).addmm_(d_inner, down).view(*dy.shape[:-1], -1)
        return dx, None, None, d_inner.T @ rows, flat.T @ inner
