"""Attention over short rows in half precision on a CPU: plain matrix products, a few rows at a time.

torch's fused kernel is made for long rows: at 128 tokens, two products and a softmax of scores that fit the
cache take half of its time in a training pass, and less than that for the one query of a decoding step.
Scores and their softmax are fp32 here as there, and nothing is kept for backward but queries, keys, values
and the mask.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_perl.functional.logprobs import CACHED, at_least_fp32

SHORT = 128
"""Keys of the longest row, but in decoding; beyond, the kernel's tiles win."""
COPIED = 2**22
"""Numbers of keys in fp32 at once: 16 MiB."""
FUSED_ONLY = ("position_bias", "softcap", "cache", "s_aux")
"""Arguments that only transformers' own function knows what to do with."""

_before: Callable[..., Any] = sdpa_attention_forward
"""What "sdpa" was: transformers' own, or what somebody else put there."""
_by_products: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def attend_by_products(model: nn.Module) -> None:
    """Let a model's attention take `attention_by_products` where that is quicker.

    It is transformers' ``sdpa`` that asks, so that the name in the configuration, and the masks that it
    implies, stay; models that were not given here get what they always got.

    Args:
        model: Any; families whose attention is not looked up by name are not touched.
    """
    global _before
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not _sdpa:
        _before = ALL_ATTENTION_FUNCTIONS["sdpa"]
        ALL_ATTENTION_FUNCTIONS.register("sdpa", _sdpa)
    _by_products.update(model.modules())


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Stands for transformers' ``sdpa``: the same arguments, the same result."""
    if (
        module in _by_products
        and dropout == 0
        and suits(query, key, attention_mask)
        and not any(more.get(name) is not None for name in FUSED_ONLY)
    ):
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if attention_mask is None and causal and query.shape[-2] > 1:
            attention_mask = _no_later_keys(query, key)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attention_by_products(query, key, value, attention_mask, scale), None
    output: tuple[Tensor, None] = _before(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, **more
    )
    return output


def suits(query: Tensor, key: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether products are quicker: half precision on a CPU, one query a row or short rows.

    Args:
        query: Shape: ``(B, heads, Q, D)``.
        key: Shape: ``(B, key heads, K, D)``.
        attention_mask: As in `attention_by_products`; one mask for all heads suits.
    """
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)
        and (query.shape[-2] == 1 or key.shape[-2] <= SHORT)
        and (attention_mask is None or attention_mask.shape[:2] == (query.shape[0], 1))
    )


def _no_later_keys(query: Tensor, key: Tensor) -> Tensor:
    """The first query sees the first key alone, as ``is_causal`` means it. Shape: ``(B, 1, Q, K)``."""
    seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    return seen.expand(query.shape[0], 1, *seen.shape)


def attention_by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """``softmax(scale Q K^T + mask) V`` for every row and head.

    Query heads beyond the number of key heads share keys in groups (GQA). Scores are at least fp32; the
    weights of more than one query are rounded to the dtype of the values before they meet them.

    Args:
        query: Shape: ``(B, heads, Q, D)``.
        key: Shape: ``(B, key heads, K, D)``.
        value: Shape: ``(B, key heads, K, D_v)``.
        mask: What may be seen (bool) or what is added to the scores, the same for all heads.
            Shape: ``(B, 1, Q, K)``. None: all is seen.
        scale: Of the scores.

    Returns:
        Shape: ``(B, Q, heads, D_v)``, contiguous.
    """
    output: Tensor = _Products.apply(query, key, value, mask, scale)  # type: ignore[no-untyped-call]
    return output


class _Products(torch.autograd.Function):
    """`attention_by_products`, a few rows at a time; the weights are computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (autograd's context)
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        batch, heads, queries, _ = query.shape
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        added = _added(mask, query.dtype)
        output = query.new_empty(batch, queries, heads, value.shape[-1])
        for rows in _cached(query, key):
            q, k, v = _flat(query[rows], key), _flat(key[rows], key), _flat(value[rows], key)
            weights = _weights(q, k, _some(added, rows), scale)
            # One query reads every value once: fp32 costs no more there.
            seen = weights @ v.to(weights.dtype) if queries == 1 else weights.to(v.dtype) @ v
            output[rows] = seen.view(-1, heads, queries, v.shape[-1]).transpose(1, 2)
        return output

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401
        d_output: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, mask = ctx.saved_tensors
        d_query, d_key, d_value = (torch.empty_like(one) for one in (query, key, value))
        added = _added(mask, query.dtype)
        d_heads = d_output.transpose(1, 2)
        for rows in _cached(query, key):
            q, k, v = _flat(query[rows], key), _flat(key[rows], key), _flat(value[rows], key)
            d_o = _flat(d_heads[rows], key)
            weights = _weights(q, k, _some(added, rows), ctx.scale).to(q.dtype)
            d_value[rows] = torch.bmm(weights.mT, d_o).view(d_value[rows].shape)
            d_weights = torch.bmm(d_o, v.mT)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_scores = d_scores.mul_(ctx.scale)
            d_query[rows] = torch.bmm(d_scores, k).view(d_query[rows].shape)
            d_key[rows] = torch.bmm(d_scores.mT, q).view(d_key[rows].shape)
        return d_query, d_key, d_value, None, None


def _cached(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Rows whose scores fit a core's cache together, at least one."""
    batch, heads, queries, width = query.shape
    if queries > 1:
        count = max(1, CACHED // (heads * queries * key.shape[-2]))
    else:
        # Few scores; but the keys are copied in fp32.
        count = max(1, COPIED // (key.shape[1] * key.shape[-2] * width))
    return (slice(start, start + count) for start in range(0, batch, count))


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What to add to fp32 scores; made anew in backward, since it is larger than a boolean mask."""
    if mask is None:
        return None
    at_least = torch.promote_types(dtype, torch.float32)
    if mask.dtype != torch.bool:
        return mask.to(at_least)
    # A low number, not -inf: a padded query that sees nothing must not turn into NaN.
    return torch.zeros_like(mask, dtype=at_least).masked_fill_(~mask, torch.finfo(dtype).min)


def _flat(some: Tensor, key: Tensor) -> Tensor:
    """``(n, heads, T, D)`` to ``(n x key heads, group x T, D)``: those that share keys in one matrix."""
    return some.reshape(len(some) * key.shape[1], -1, some.shape[-1])


def _some(mask: Tensor | None, rows: slice) -> Tensor | None:
    return None if mask is None else mask[rows]


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """At least fp32. Shapes: ``(n x key heads, group x Q, D)``, ``(n x key heads, K, D)``, ``(n, 1, Q, K)``."""
    query, key = at_least_fp32(query), at_least_fp32(key)
    if mask is None:
        return torch.softmax(torch.bmm(query, key.mT).mul_(scale), -1)
    rows, _, queries, keys = mask.shape
    heads = len(query) * query.shape[1] // (rows * queries)
    # Its own memory, also where there is nothing to repeat: it is written into.
    scores = mask.expand(rows, heads, queries, keys).clone(memory_format=torch.contiguous_format)
    scores = scores.view(len(query), -1, keys).baddbmm_(query, key.mT, alpha=scale)
    return torch.softmax(scores, -1)
