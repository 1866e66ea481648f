"""Types of arguments that name a range. It is checked by the command line, and by `Checked` from Python.

For type checkers they are plain numbers and strings, and so is what a class receives.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    TypeAlias,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from jsonargparse.typing import register_type


def declared(name: str, kind: type, rule: str, holds: Callable[[Any], bool]) -> type:
    """Make a type of numbers or strings that the command line checks too.

    Args:
        name: Its name in ``--help``.
        kind: ``int``, ``float`` or ``str``, which its values are.
        rule: Ends the sentence "The value must be ...".
        holds: Whether a value of the kind, if a number a finite one, is allowed.
    """

    def allowed(value: Any) -> bool:  # noqa: ANN401 (what users write)
        kinds = (int, float) if kind is float else (kind,)
        if isinstance(value, bool) or not any(isinstance(value, each) for each in kinds):
            return False
        return (kind is str or math.isfinite(value)) and holds(value)

    def parse(value: object) -> object:
        parsed = value
        with suppress(ValueError):
            parsed = kind(value) if isinstance(value, str) else value
        if not allowed(parsed):
            raise ValueError(f"must be {rule}")
        return kind(parsed)

    made = type(name, (kind,), {"__doc__": rule, "allowed": staticmethod(allowed)})
    register_type(
        made,
        serializer=kind,
        deserializer=parse,
        type_check=lambda value, _: type(value) is kind and allowed(value),
    )
    return made


if TYPE_CHECKING:
    Finite: TypeAlias = float
    Positive: TypeAlias = float
    NonNegative: TypeAlias = float
    AtLeastOne: TypeAlias = float
    Fraction: TypeAlias = float
    FractionBelowOne: TypeAlias = float
    FractionBelowHalf: TypeAlias = float
    FractionAboveZero: TypeAlias = float
    Count: TypeAlias = int
    CountOrZero: TypeAlias = int
    TwoOrMore: TypeAlias = int
    Text: TypeAlias = str
else:
    Finite = declared("Finite", float, "a finite number", math.isfinite)
    Positive = declared("Positive", float, "above 0 and finite", lambda x: x > 0)
    NonNegative = declared("NonNegative", float, "at least 0 and finite", lambda x: x >= 0)
    AtLeastOne = declared("AtLeastOne", float, "at least 1 and finite", lambda x: x >= 1)
    Fraction = declared("Fraction", float, "from 0 to 1", lambda x: 0 <= x <= 1)
    FractionBelowOne = declared(
        "FractionBelowOne", float, "at least 0 and below 1", lambda x: 0 <= x < 1
    )
    FractionBelowHalf = declared(
        "FractionBelowHalf", float, "at least 0 and below 0.5", lambda x: 0 <= x < 0.5
    )
    FractionAboveZero = declared(
        "FractionAboveZero", float, "above 0 and at most 1", lambda x: 0 < x <= 1
    )
    Count = declared("Count", int, "at least 1", lambda x: x >= 1)
    CountOrZero = declared("CountOrZero", int, "at least 0", lambda x: x >= 0)
    TwoOrMore = declared("TwoOrMore", int, "at least 2", lambda x: x >= 2)
    Text = declared("Text", str, "a text that is not empty", bool)


def problem(value: object, hint: Any) -> str | None:  # noqa: ANN401 (any type)
    """What a value must be instead; None where it fits, or where its type names no range."""
    origin, parts = get_origin(hint), get_args(hint)
    rule: str | None = None
    if origin in (Union, UnionType):
        problems = [problem(value, part) for part in parts]
        return None if None in problems else " or ".join(map(str, problems))
    if origin is Literal:
        rule = None if value in parts else f"one of {list(parts)}"
    elif hint in (bool, NoneType):
        rule = None if isinstance(value, hint) else {bool: "True or False", NoneType: "None"}[hint]
    elif hasattr(hint, "allowed"):
        rule = None if hint.allowed(value) else hint.__doc__
    elif origin in (tuple, list, Sequence):
        if isinstance(value, str) or not isinstance(value, Sequence):
            return "a list"
        inner = parts if origin is tuple and parts[-1] is not Ellipsis else parts[:1] * len(value)
        rules = [problem(item, part) for item, part in zip(value, inner, strict=False)]
        rule = next((f"a list with each item {rule}" for rule in rules if rule), None)
    return rule


def require_allowed(kind: type, settings: Mapping[str, Any]) -> None:
    """Refuse what the types of a class's arguments rule out.

    A dataclass calls it in ``__post_init__``; with `Checked` as a base, jsonargparse would want a ``class_path``.

    Raises:
        ValueError: With the class, the argument, what it must be, and what it is.
    """
    hints = _hints(kind)
    for name, value in settings.items():
        if rule := problem(value, hints.get(name)):
            raise ValueError(f"{kind.__name__}.{name} must be {rule}, got {value!r}.")


class Checked:
    """Refuses what the types of arguments rule out, before ``__init__`` and those of the bases run."""

    def __new__(cls, *args: Any, **settings: Any) -> Any:  # noqa: ANN401
        """Look at what was given; defaults are trusted."""
        names = list(inspect.signature(cls).parameters)
        require_allowed(cls, {**dict(zip(names, args, strict=False)), **settings})
        return super().__new__(cls)


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Types of the arguments of a class and of its bases, which take what it passes on."""
    if is_dataclass(kind):
        return get_type_hints(kind)
    hints: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if "__init__" in vars(base) and issubclass(base, Checked):
            hints |= get_type_hints(vars(base)["__init__"])
    return hints
