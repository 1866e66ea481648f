"""Operations that must not happen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

Refuse = Callable[[OpOverload[Any, Any], tuple[Any, ...]], None]
"""Raises at an operation and its arguments that are not allowed."""


class Refusing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Asks ``refuse`` before every operation inside the block."""

    def __init__(self, refuse: Refuse) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.refuse = refuse

    def __torch_dispatch__(
        self,
        func: OpOverload[Any, Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        self.refuse(func, args)
        return self.run(func, args, kwargs or {})

    def run(
        self, func: OpOverload[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> object:
        """The operation; here something more may be done."""
        return func(*args, **kwargs)
