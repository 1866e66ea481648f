"""Every module's and datamodule's arguments, wherever in its bases they are declared."""

from __future__ import annotations

import inspect
import re

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule

from lightning_perl import data, modules
from lightning_perl.commands.estimate import LlamaSizes
from lightning_perl.models.weightless import weightless

MODULES = [getattr(modules, name) for name in modules.__all__]
DATAMODULES = [
    kind
    for kind in (getattr(data, name) for name in data.__all__)
    if isinstance(kind, type)
    and issubclass(kind, LightningDataModule)
    and not inspect.isabstract(kind)
]
CLASSES = [*MODULES, *DATAMODULES]
NOT_STORED = {"optimizer", "scheduler", "gold", "reward_function"}
"""Functions, which a checkpoint could not be read back with."""
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


def parser_of(kind: type) -> ArgumentParser:
    """As the command line parses ``--x KIND --x.KEY VALUE``."""
    parser = ArgumentParser(exit_on_error=False)
    base = LightningModule if issubclass(kind, LightningModule) else LightningDataModule
    parser.add_subclass_arguments(base, "x")
    return parser


def refusal(kind: type, flag: str) -> str:
    with pytest.raises(Exception) as refused:  # noqa: PT011 (jsonargparse has several kinds)
        parser_of(kind).parse_args([f"--x={kind.__name__}", flag])
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
        if re.match(r"(int|float|bool|Layout|TrunkDtype|Quantization)\b|Literal", annotation):
            assert key in refusal(kind, f"--x.{key}=many")
    assert "sede" in refusal(kind, "--x.sede=1")


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_hyperparameters_hold_every_argument(kind: type[LightningModule]) -> None:
    with weightless(LlamaSizes(16, 1, 2, 32, 64).config()):
        module = kind(trunk="trunk")
    assert set(module.hparams) == set(declared(kind)) - NOT_STORED
    assert module.hparams["trunk"] == "trunk"
