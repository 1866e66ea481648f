"""What a decoder block computes and keeps, with less memory and time.

*Linear layers.* PEFT's own forward casts the input to the adapter's fp32 and keeps that copy for backward: 15-20%
of time and memory on a bf16 trunk. Here the products run in the input's dtype; the adapter's weights stay fp32.

*Norms and gated MLPs.* A norm written out in fp32 keeps twice the bytes of its input, and a gated MLP keeps the
activation beside gate and up. With a frozen trunk nothing else needs them. Recomputing them saves a fifth to a
quarter of a block's activations; the results are equal bit for bit.

*Keys and values.* Their memory is allocated once. transformers' own cache is copied whole for each sampled token.

Shapes: ``N`` tokens, ``I`` inputs, ``O`` outputs, ``r`` rank.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

Elementwise = Callable[..., Tensor]
OFF = "off"
"""Name of no adapter: the trunk alone."""
GATED_MLP = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
"""The forward of most families' MLP; some clamp or sparsify on the way."""
FUSED_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
"""torch's own norms, which keep their input and two numbers a row already."""


class NoRoleError(RuntimeError):
    """A trunk was run outside ``with roles(...)`` (or ``with trunk.switch.use(...)``)."""


class AdapterSwitch:
    """Which adapter the trunk's LoRA layers apply now. Re-entrant and exception-safe.

    Attributes:
        rested: Inside `at_rest`, adapters that were cast to the trunk's dtype, by layer and name.
    """

    def __init__(self) -> None:
        self._current: str | None = None
        self.rested: dict[tuple[int, str], Factors] | None = None

    @property
    def current(self) -> str:
        """Name of the adapter in use, or `OFF`; outside any role an error."""
        if self._current is None:
            raise NoRoleError(
                "The trunk was run outside any role, so it is undefined which adapter should "
                "answer. Run it inside `with roles('policy'):` (or 'value', 'reference', 'reward')."
            )
        return self._current

    @contextmanager
    def use(self, adapter: str) -> Iterator[None]:
        """Apply ``adapter`` (or none: `OFF`) inside the block."""
        before, self._current = self._current, adapter
        try:
            yield
        finally:
            self._current = before

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Inside the block no weight changes: passes without a gradient cast each adapter only once."""
        before = self.rested
        self.rested = {} if before is None else before
        try:
            yield
        finally:
            self.rested = before

    def pinned(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a checkpointed block's forward and recomputation: both run with the present adapter.

        Backward runs after the role's ``with`` block was left, perhaps inside another role's.
        """
        return nullcontext(), self.use(self.current)


class Factors(NamedTuple):
    """An adapter on one layer, in the input's dtype: ``A``, shape ``(r, I)``; ``B`` times its scale, ``(O, r)``.

    ``fusible``: whether `FrozenLinearWithAdapter` may compute the layer.
    """

    down: Tensor
    up: Tensor
    fusible: bool


def adapted_linear(layer: Any, switch: AdapterSwitch, fused: bool, x: Tensor) -> Tensor:  # noqa: ANN401
    """The forward of a PEFT ``LoraLayer``, instead of its own. Shape: ``(..., I)`` to ``(..., O)``.

    If ``fused``, layer and adapter are one operation of autograd where that is possible.
    """
    adapter = switch.current
    base = layer.base_layer
    if adapter == OFF or adapter not in layer.lora_A:
        bare: Tensor = base(x)
        return bare
    down, up, may_fuse = _factors(layer, switch, adapter, x)
    if not (fused and may_fuse):
        output: Tensor = base(x)
        return output + F.linear(F.linear(layer.lora_dropout[adapter](x), down), up)
    if not torch.is_grad_enabled():
        summed, _ = fused_product(x.reshape(-1, x.shape[-1]), base.weight, base.bias, down, up)
        return summed.view(*x.shape[:-1], -1)
    y: Tensor = FrozenLinearWithAdapter.apply(x, base.weight, base.bias, down, up)  # type: ignore[no-untyped-call]
    return y


def _factors(layer: Any, switch: AdapterSwitch, adapter: str, x: Tensor) -> Factors:  # noqa: ANN401
    key = (id(layer), adapter)
    rested = None if torch.is_grad_enabled() else switch.rested
    if rested is not None and key in rested:
        return rested[key]
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    up = up * layer.scaling[adapter]
    may_fuse = fusible(layer.base_layer, layer.lora_dropout[adapter], x)
    factors = Factors(down.to(x.dtype), up.to(x.dtype), may_fuse)
    if rested is not None:
        rested[key] = factors
    return factors


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


def fused_product(
    rows: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    """``x W^T + bias + x A^T B^T``, the low-rank part added in place, ``(N, O)``; and ``x A^T``, ``(N, r)``.

    Shapes: rows ``(N, I)``, weight ``(O, I)``, bias ``(O,)``, down ``(r, I)``, up ``(O, r)``.
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
        """Shape: ``(..., I)`` to ``(..., O)``; the others as in `fused_product`."""
        rows = x.reshape(-1, x.shape[-1])
        y, inner = fused_product(rows, weight, bias, down, up)
        ctx.save_for_backward(rows, weight, down, up, inner)
        # OLMo clamps it in place, which autograd refuses for a view.
        return cast(Tensor, torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])))

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


class Recomputed(torch.autograd.Function):
    """A function of tensors that keeps only its inputs for backward. It must not draw random numbers."""

    @staticmethod
    def forward(ctx: Any, function: Elementwise, *inputs: Tensor) -> Tensor:  # noqa: ANN401
        """The function's value, computed without a graph."""
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Compute it again with a graph, and go backward through that."""
        inputs = [tensor.detach() for tensor in ctx.saved_tensors]
        for tensor, needed in zip(inputs, ctx.needs_input_grad[1:], strict=True):
            tensor.requires_grad_(needed)
        with torch.enable_grad():
            output = ctx.function(*inputs)
        torch.autograd.backward(output, d_output)
        return None, *(tensor.grad for tensor in inputs)


def recomputed(function: Elementwise, *inputs: Tensor) -> Tensor:
    """``function(*inputs)``; in a training pass nothing but the inputs is kept."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        output: Tensor = Recomputed.apply(function, *inputs)  # type: ignore[no-untyped-call]
        return output
    return function(*inputs)


def _norm(module: nn.Module, forward: Elementwise, *inputs: Tensor, **named: Tensor) -> Tensor:
    # A trained weight gets its gradient only through the graph outside.
    trained = any(parameter.requires_grad for parameter in module.parameters())
    if not torch.is_grad_enabled() or named or trained:
        return forward(*inputs, **named)
    return recomputed(forward, *inputs)


def _gated_mlp(module: Any, x: Tensor) -> Tensor:  # noqa: ANN401 (a family's own class)
    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return cast(Tensor, module.act_fn(gate) * up)

    inner = recomputed(gated, module.gate_proj(x), module.up_proj(x))
    result: Tensor = module.down_proj(inner)
    return result


def make_lean(model: nn.Module) -> None:
    """Replace the forward of written-out norms and gated MLPs, before any adapter is added."""
    for module in model.modules():
        # A forward that was replaced before (by offloading or a kernel) stays.
        if "forward" in vars(module):
            continue
        if _is_written_out_norm(module):
            module.forward = partial(_norm, module, module.forward)
        # An activation with weights of its own could be trained.
        activation = getattr(module, "act_fn", None)
        weights = list(activation.parameters()) if isinstance(activation, nn.Module) else []
        if activation is not None and not weights and _is_gated_mlp(type(module)):
            module.forward = partial(_gated_mlp, module)


def _is_written_out_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of one tensor and nothing else; some such names hold half a block."""
    return (
        type(module).__name__.endswith("Norm")
        and not isinstance(module, FUSED_NORMS)
        and not list(module.children())
        and len(inspect.signature(module.forward).parameters) == 1
    )


def _is_gated_mlp(kind: type[nn.Module]) -> bool:
    """Whether a class's forward is `GATED_MLP` word for word. Trying numbers could miss a clamp."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(kind.forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) != 2:
        return False
    lines = function.body[ast.get_docstring(function) is not None :]
    code = [ast.unparse(line) for line in lines]
    product = GATED_MLP.replace("(x)", f"({function.args.args[1].arg})")
    return code in ([f"return {product}"], [f"down_proj = {product}", "return down_proj"])


class PreallocatedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer's keys and values in two buffers of their final length of ``tokens`` tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tokens = tokens
        self.length = 0
        self._place: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers, once the shapes are known."""
        super().lazy_initialization(key_states, value_states)
        self._buffers = [
            states.new_empty(*states.shape[:-2], self.tokens, states.shape[-1])
            for states in (key_states, value_states)
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens behind the others (or where `hold` said). Returns views of all tokens."""
        if self._place is not None:
            for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(-2, self._place, states)
            return self._views()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self.tokens:
            raise ValueError(f"The cache has room for {self.tokens} tokens, got {self.length}.")
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start : self.length, :] = states
        return self._views()

    def hold(self, place: Tensor, shown: int, filler: float = 0.0) -> None:
        """From now on write each token at ``place`` and return the same views every time.

        Every step then does the same work on the same memory, whatever ``place`` is: it can be recorded.

        Args:
            place: Column of the next token, advanced by the caller. Shape: ``(1,)``, int64.
            shown: Columns of the views. Those not written yet must be masked.
            filler: Their content: a finite number, since weight 0 times NaN is NaN.
        """
        for buffer in self._buffers:
            buffer[..., self.length : shown, :] = filler
        self._place, self.length = place, shown

    def let_go(self, length: int) -> None:
        """Grow again behind the first ``length`` tokens, which were written."""
        self._place, self.length = None, length
        self._views()

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Keep these rows in the same buffers; in larger ones only where there are more of them."""
        self._buffers = [self._moved(buffer, beam_idx) for buffer in self._buffers]
        self._views()

    def _moved(self, buffer: Tensor, indices: Tensor) -> Tensor:
        kept = buffer[: len(indices)]
        if len(indices) > len(buffer):
            kept = buffer.new_empty(len(indices), *buffer.shape[1:])
        kept[..., : self.length, :] = buffer[indices, ..., : self.length, :]
        return kept

    def _views(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[..., : self.length, :] for buffer in self._buffers)
        return self.keys, self.values


def preallocate(cache: Cache, tokens: int) -> None:
    """Let layers of an empty cache that only grow up to ``tokens`` tokens allocate their memory at once."""
    cache.layers = [
        PreallocatedLayer(tokens) if _window(layer) >= tokens else layer for layer in cache.layers
    ]


def _window(layer: object) -> float:
    """How far back a layer keeps keys and values; 0 where it keeps something else."""
    if type(layer) is DynamicSlidingWindowLayer:
        return layer.sliding_window
    return math.inf if type(layer) is DynamicLayer else 0


def keep_rows(cache: Cache, rows: Tensor) -> None:
    """Keep the rows with these numbers, in this order; a row may be named twice. Shape: ``(b,)``, int64.

    transformers' own ``batch_select_indices`` ignores recurrent and convolutional states.
    """
    for layer in cache.layers:
        layer.reorder_cache(cast(LongTensor, rows))


def all_preallocated(layers: list[Any]) -> TypeGuard[list[PreallocatedLayer]]:
    """Whether a cache has preallocated keys and values only."""
    return all(isinstance(layer, PreallocatedLayer) for layer in layers)


def reach_of_layers(config: PreTrainedConfig) -> float:
    """Tokens that every layer of a decoder sees: its shortest window, or 0 where a layer keeps states.

    Layers without keys and values of their own (`DummyLayer`) read those of others.
    """
    layers = DynamicCache(config=config).layers
    kept = [layer for layer in layers if type(layer).__name__ != "DummyLayer"]
    return min((_window(layer) for layer in kept), default=math.inf)
