"""What a CUDA graph does, on a CPU: the same operations on the same memory with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from tests.refusing import Refusing

Step = Callable[[], None]
_aten = torch.ops.aten
WAITS = (
    _aten._local_scalar_dense,
    _aten.nonzero,
    _aten.equal,
    _aten.masked_select,
    _aten._unique2,
    _aten.unique_dim,
    # A tensor of Python's numbers: a copy from memory that is not pinned.
    _aten.lift_fresh,
)
"""On CUDA these wait until a value is known, or until a copy has arrived."""


def refuse_waits(func: OpOverload[Any, Any], args: tuple[Any, ...]) -> None:
    """What PyTorch's sync debug mode does on CUDA."""
    masks = func.overloadpacket in (_aten.index, _aten.index_put_, _aten.index_put) and any(
        isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1]
    )
    if masks or func.overloadpacket in WAITS:
        raise RuntimeError(f"{func} waits")


class _Capture(Refusing):  # type: ignore[no-untyped-call]
    """Notes operations; what they write into is put back at the end, since a capture runs nothing."""

    def __init__(self) -> None:
        super().__init__(refuse_waits)
        self.notes: list[tuple[OpOverload[Any, Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def run(
        self, func: OpOverload[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> object:
        for value in written(func, args, kwargs):
            self.before.append((value, value.clone()))
        result = func(*args, **kwargs)
        self.notes.append((func, args, kwargs, result))
        return result


def written(
    func: OpOverload[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """Tensors that an operation writes into."""
    found = []
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += [one for one in tree_leaves(value) if isinstance(one, Tensor)]
    return found


def tape(step: Step) -> Step:
    """A recorder: notes what ``step`` does."""
    with _Capture() as capture, torch.no_grad():
        step()
    for value, kept in reversed(capture.before):
        value.copy_(kept)

    def play() -> None:
        for func, args, kwargs, result in capture.notes:
            again = func(*args, **kwargs)
            views = any(one.alias_info is not None for one in func._schema.returns)
            if views:
                continue
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)

    return play
