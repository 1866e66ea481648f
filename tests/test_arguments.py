"""Every module's and datamodule's arguments, wherever in its bases they are declared."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import OptimizerCallable

from lightning_perl import arguments, callbacks, data, modules, rewards
from lightning_perl.commands.estimate import LlamaSizes
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.weightless import weightless
from lightning_perl.optim import HostAdamW
from lightning_perl.rollouts.sampling import SamplingSpec

MODULES = [getattr(modules, name) for name in modules.__all__]
DATAMODULES = [
    kind
    for kind in (getattr(data, name) for name in data.__all__)
    if isinstance(kind, type)
    and issubclass(kind, LightningDataModule)
    and not inspect.isabstract(kind)
]
CLASSES = [*MODULES, *DATAMODULES]
OTHERS = [LoraSpec, SamplingSpec, HostAdamW] + [
    kind
    for room in (callbacks, rewards)
    for kind in map(vars(room).get, room.__all__)
    if isinstance(kind, type) and not inspect.isabstract(kind)
]
# What each type of argument leaves out, besides NaN and the infinities.
OUTSIDE: dict[str, tuple[Any, ...]] = {
    "Finite": (),
    "Positive": (0, -1e-9),
    "NonNegative": (-1e-9,),
    "AtLeastOne": (0.999, -2),
    "Fraction": (-1e-9, 1.001),
    "FractionBelowOne": (-1e-9, 1),
    "FractionBelowHalf": (-1e-9, 0.5),
    "FractionAboveZero": (0, 1.001),
    "Count": (0, -1, 1.5),
    "CountOrZero": (-1, 0.5),
    "TwoOrMore": (1, -2),
    "Text": ("",),
}
NOT_STORED = {"optimizer", "scheduler", "gold", "reward_function", "rollout_engine"}
"""Functions and objects, which a checkpoint could not be read back with."""
each_class = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)


def declared(kind: type) -> dict[str, str]:
    """Annotation of every argument that the class or one of its bases in this package declares."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("lightning_perl") and "__init__" in vars(base):
            arguments = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
            found |= {
                argument.name: str(argument.annotation)
                for argument in arguments
                if argument.kind is not argument.VAR_KEYWORD
            }
    return found


@cache
def parser_of(kind: type) -> ArgumentParser:
    """As the command line parses ``--x KIND --x.KEY VALUE``."""
    parser = ArgumentParser(exit_on_error=False)
    if kind in OTHERS:
        parser.add_class_arguments(kind, "x")
        return parser
    base = LightningModule if issubclass(kind, LightningModule) else LightningDataModule
    parser.add_subclass_arguments(base, "x")
    return parser


def refusal(kind: type, flag: str) -> str:
    with pytest.raises(Exception) as refused:  # noqa: PT011 (jsonargparse has several kinds)
        parser_of(kind).parse_args([flag] if kind in OTHERS else [f"--x={kind.__name__}", flag])
    return str(refused.value)


@each_class
def test_help_has_type_default_and_text_of_every_key(
    kind: type, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser_of(kind).parse_args([f"--x.help={kind.__name__}"])
    listed = re.split(r"^  --x\.", capsys.readouterr().out, flags=re.M)[1:]
    entries = {entry.split()[0].rstrip(","): " ".join(entry.split()) for entry in listed}
    entries = {key: entry for key, entry in entries.items() if not key.endswith(".help")}
    for key, entry in entries.items():
        text, facts = re.split(r"\((?=type: |required, type: )", entry, maxsplit=1)
        assert "default: " in facts or "required, " in facts, entry
        assert text.endswith(". "), entry
        # The key and what stands for its value come first.
        assert len(text.split()) > 3, f"{kind.__name__}: the help of {key} says nothing: {entry}"
    # A dataclass is listed by its fields: lora.rank.
    assert {key.partition(".")[0] for key in entries} == set(declared(kind))


@each_class
def test_misspelt_and_mistyped_keys_are_refused_by_name(kind: type) -> None:
    for key, annotation in declared(kind).items():
        if re.match(r"(bool|Layout|TrunkDtype|Quantization)\b|Literal", annotation):
            assert key in refusal(kind, f"--x.{key}=many")
    assert "sede" in refusal(kind, "--x.sede=1")


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_hyperparameters_hold_every_argument(kind: type[LightningModule]) -> None:
    with weightless(LlamaSizes(16, 1, 2, 32, 64).config()):
        module = kind(trunk="trunk")
    assert set(module.hparams) == set(declared(kind)) - NOT_STORED
    assert module.hparams["trunk"] == "trunk"


def leaves(hint: Any, listed: bool = False) -> Iterator[tuple[Any, bool]]:  # noqa: ANN401
    """The types that a type is made of, and whether a value of each stands in a list."""
    if not get_args(hint) or get_origin(hint) is Literal:
        yield hint, listed
    # The weights of a mapping of sources are refused by its reader.
    for part in get_args(hint) if get_origin(hint) not in (Literal, dict) else ():
        yield from leaves(part, listed or get_origin(hint) in (tuple, list, Sequence))


@pytest.mark.parametrize("kind", [*CLASSES, *OTHERS], ids=lambda kind: kind.__name__)
def test_numbers_out_of_range_are_refused_by_name(kind: type) -> None:
    for base in kind.__mro__:
        if not base.__module__.startswith("lightning_perl") or "__init__" not in vars(base):
            continue
        for name, hint in get_type_hints(vars(base)["__init__"]).items():
            for leaf, listed in leaves(hint):
                assert leaf not in (int, float), f"{base.__name__}.{name} has no range"
                if get_origin(leaf) is Literal:
                    refused(kind, name, "none of them")
                if hasattr(leaf, "allowed"):
                    numbers = () if leaf is arguments.Text else (math.nan, math.inf, -math.inf)
                    for value in (*OUTSIDE[leaf.__name__], *numbers):
                        refused(kind, name, [value] * 2 if listed else value)


def refused(kind: type, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.{name} must be .*, got "):
        kind(**{name: value})
    assert name in refusal(kind, f"--x.{name}={value}")


def adamw(lr: float = 1e-4, **values: Any) -> OptimizerCallable:
    return lambda params: torch.optim.AdamW(params, lr=lr, **values)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (adamw(0.0), "model.optimizer: lr must be above 0 and finite, got 0.0"),
        (adamw(math.inf), "model.optimizer: lr must be above 0 and finite, got inf"),
        (adamw(eps=math.inf), "model.optimizer: eps must be finite, got inf"),
        (adamw(-1.0), "model.optimizer: Invalid learning rate: -1.0"),
    ],
)
def test_an_optimizer_that_cannot_learn_is_refused(
    optimizer: OptimizerCallable, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        modules.SFT("is not read", optimizer=optimizer)
