"""Linear layers kept in 4 or 8 bits by bitsandbytes, for trunks that stay frozen (QLoRA, 2305.14314).

transformers quantizes while it loads. The products are computed here, from the dense values, in forward and again
in backward. In RL a row's result must not depend on its batch mates, nor on train or eval mode, or the first ratio
is not 1. The products of bitsandbytes depend on them, but for ``nf4`` on a GPU, where they are used:

- ``int8``: LLM.int8() (2208.07339) rounds activations to 8 bits too, except in columns where *any* row of the
  batch has an outlier, and on a CPU in eval mode only.
- ``nf4`` on a CPU with AVX512-BF16 rounds scales and activations to bfloat16, in eval mode only; with AVX512 it
  uses other blocks' scales where the inputs are a multiple of 16 but not of 64 (0.50).

Shapes: ``I`` inputs, ``O`` outputs.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

Quantization = Literal["nf4", "int8"]
KINDS: dict[str, Quantization] = {"Params4bit": "nf4", "Int8Params": "int8"}
"""Quantization by the class of the weight; needs no bitsandbytes."""
NEEDS = ("bitsandbytes", "accelerate")
NO_QUANTIZED_TUNING = (
    "A trunk that is tuned whole cannot be quantized: weights of 4 or 8 bits have no gradient. Give `lora` (in "
    "RL any layout but full), or leave `quantization` out."
)


def require_quantizable(quantization: Quantization, dtype: str) -> None:
    """Refuse what bitsandbytes cannot do, and its absence, before weights are read."""
    if dtype == "float64":
        raise ValueError(
            "quantization with trunk_dtype float64 is refused: bitsandbytes has no such products. Use "
            "bfloat16 or float32."
        )
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"quantization {quantization} needs {' and '.join(missing)}: pip install "
            "'lightning-perl[quantization]'."
        )


def loading_config(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The options for transformers, which quantizes neither LM head nor embeddings, tied or not."""
    if quantization == "nf4":
        return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]


def quantization_of(layer: nn.Module) -> Quantization | None:
    """How a layer is quantized; None where it is not."""
    weight = layer._parameters.get("weight")
    return KINDS.get(type(weight).__name__)


def stored_transposed(layer: nn.Module) -> bool:
    """Whether files hold the layer's weight as ``(I, O)``, as GPT-2's do; quantized it is ``(O, I)``."""
    return isinstance(layer, Conv1D) or getattr(layer, "source_cls", None) is Conv1D


def prepare(model: nn.Module, dtype: torch.dtype) -> int:
    """Give the quantized layers of a loaded model the products of this file. Returns their number."""
    quantized: list[Any] = [layer for layer in model.modules() if quantization_of(layer)]
    for layer in quantized:
        layer.compute_dtype = dtype
        layer.forward = partial(_product, layer)
        if quantization_of(layer) == "int8":
            # A copy of the weights for the unused products, which would not move with the module.
            layer.weight.CB = None
    return len(quantized)


def dense(layer: nn.Module) -> Tensor:
    """The dense values of a quantized layer's weight. Shape: ``(O, I)``, in the trunk's dtype."""
    weight, dtype = cast(Any, layer).weight, cast(Any, layer).compute_dtype
    if quantization_of(layer) == "int8":
        # Moving a module moves its parameters, not their attributes.
        weight.SCB = weight.SCB.to(weight.device)
        scaled: Tensor = weight.data.to(dtype).mul_(weight.SCB.unsqueeze(1) / 127)
        return scaled
    state = weight.quant_state
    nested, ops = state.state2, torch.ops.bitsandbytes
    scales = state.offset + ops.dequantize_blockwise(
        state.absmax, nested.absmax, nested.code, nested.blocksize, torch.float32
    )
    # As one long row: blocks continue across rows, which the kernel for CPUs ignores.
    size = [state.shape.numel()]
    values: Tensor = ops.dequantize_4bit(
        weight.data, scales, state.blocksize, state.quant_type, size, dtype
    )
    return values.view(state.shape)


def _product(layer: nn.Linear, x: Tensor) -> Tensor:
    if x.is_cuda and quantization_of(layer) == "nf4":
        own: Tensor = type(layer).forward(layer, x)
        return own
    y: Tensor = FrozenQuantizedProduct.apply(layer, x)  # type: ignore[no-untyped-call]
    return y


class FrozenQuantizedProduct(torch.autograd.Function):
    """``x W^T + bias`` with W made dense in forward and again in backward; nothing is kept."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Linear, x: Tensor) -> Tensor:  # noqa: ANN401 (autograd's context)
        """Shape: ``(..., I)`` to ``(..., O)``."""
        ctx.layer = layer
        return F.linear(x, dense(layer), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:  # noqa: ANN401
        """The gradient of x."""
        return None, dy @ dense(ctx.layer)
