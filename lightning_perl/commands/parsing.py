"""The command line's parser: says what is wrong in one line, and what was perhaps meant."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import takewhile
from pkgutil import resolve_name
from types import FunctionType
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace, get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser
from torch import optim

from lightning_perl import callbacks, data, modules, rewards

CLASSES = [name for room in (modules, data, rewards, callbacks) for name in room.__all__]
CLASSES += [name for room in (optim, optim.lr_scheduler) for name in dir(room) if name[0].isupper()]
EXAMPLES = {
    "torch.optim.Optimizer": "torch.optim.AdamW",
    "typing.Union": "StepLR",  # of learning-rate schedulers
}
"""A class of each kind whose settings are often given alone; the kind as jsonargparse names it."""


_load_yaml = get_loader("yaml")


def load_yaml(text: str) -> Any:  # noqa: ANN401 (whatever was written)
    """The value of a YAML text.

    Raises:
        MarkedYAMLError: A key is there twice, of which YAML would take the last one without a word.
    """
    value = _load_yaml(text)
    _refuse_twice(yaml.compose(text, yaml.SafeLoader))
    return value


def _refuse_twice(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.SequenceNode):
        for part in node.value:
            _refuse_twice(part)
    elif isinstance(node, yaml.MappingNode):
        known: set[str] = set()
        for key, value in node.value:
            name = f"{key.tag} {key.value}"  # 1 and "1" are two keys
            if name in known and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(
                    problem=f"the key {str(key.value)!r} is there twice",
                    problem_mark=key.start_mark,
                )
            known.add(name)
            _refuse_twice(value)


set_loader("yaml", load_yaml, (yaml.YAMLError,))


def meant(given: str, names: Iterable[str]) -> str:
    """Ends a message about an unknown name with the known one that is nearest, if any is near."""
    spelt = {name.lower(): name for name in names}
    near = get_close_matches(given.lower(), spelt, 1)
    return f"; did you mean {spelt[near[0]]}?" if near else ""


class Parser(LightningArgumentParser):
    """LightningCLI's parser with short errors, whose dumps can be read again."""

    reading = ""
    """The configuration file that is being read."""

    def dump(self, cfg: Namespace, *args: Any, **settings: Any) -> str:
        """A module's own default function has no YAML form; left out, the module takes it again."""
        cfg = cfg.clone()
        if "skip_none" in settings:  # Lightning's name for it, which jsonargparse has deprecated
            settings["skip_unset"] = settings.pop("skip_none")
        for key, value in list(cfg.items()):
            if isinstance(value, FunctionType) and "<lambda>" in value.__qualname__:
                del cfg[key]
        return str(super().dump(cfg, *args, **settings))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program with one line."""
        unknown = re.match(r"unrecognized arguments: --([^\s=]+)", message)
        if unknown:
            names = [option.removeprefix("--") for option in self._option_string_actions]
            message = f"there is no --{unknown[1]}{meant(unknown[1], names)}"
        elif unknown := re.match(r"Subcommand '.+' does not accept option '(\w+)", message):
            message += meant(
                unknown[1], ("model", "data", "trainer", "ckpt_path", "seed_everything")
            )
        short = in_short(message) if "Parser key" in message else message
        if self.reading:
            short = re.sub("(?s)Unexpected config: .*", "no settings (KEY: VALUE)", short)
            short = short.removeprefix("Problems parsing config: ")
            short = short.replace('in "<unicode string>", ', "at ")
            message = short = f"{self.reading}: {short}"
        if not self.exit_on_error:
            # Inside of another parser, which reports its error too.
            super().error(message, ex)
        program = getattr(ex, "subcommand_parser", self).prog.replace(" [options]", "")
        self.exit(2, f"error: {' '.join(short.split())} (all settings: {program} --help)\n")


def in_short(message: str) -> str:
    """One line of jsonargparse's account of all the types that it tried: the innermost key and its rules."""
    key = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    owner, inner = _innermost(message)
    if missing := re.search(r"arguments are required: (.+)", inner):
        return f"{key}: {owner} needs {missing[1]}"
    if unknown := re.search(r"there is no --(.+)", inner):
        # A dataclass's own parser has looked for the name already.
        return f"{key}: there is no {unknown[1]}"
    if unknown := re.search(r"Option '([^']+)' is not accepted(?:.*class_path='([^']+)')?", inner):
        owner = unknown[2] or owner
        if owner in EXAMPLES:
            return f"{key}.{unknown[1]}: name its class first, as in --{key}={EXAMPLES[owner]}"
        return f"{key}: {owner} has no {unknown[1]}{meant(unknown[1], _arguments(owner))}"
    if several := re.search(r"Multiple subclasses with name .*", inner):
        return f"{key}: {several[0]}"
    if unknown := re.search(r"dot import path string: (\S+)", inner):
        return f"{key}: there is no class {unknown[1]}{meant(unknown[1], CLASSES)}"
    said = r"(?:Expected an? |Not a valid subclass of |Not of type \w+: must be )"
    rules = re.findall(rf"{said}(.+?)(?:\. Got value.*)?$", inner, re.M)
    if not rules:
        return message
    plain = [re.sub(r"typing\.|<class '(?:.*\.)?(\w+)'>", r"\1", rule) for rule in rules]
    expected = " or ".join(dict.fromkeys(plain)).replace("NoneType", "null")
    given = re.search(r"G(?:iven|ot) value: (.{0,80})$", inner, re.M)
    given = given or re.search(r"Given value: NestedArg\(.*val=(.{0,80}?)\)$", message, re.M)
    return f"{key} must be {expected}" + (f", got {given[1]}" if given else "")


def _innermost(message: str) -> tuple[str, str]:
    """The class whose arguments were wrong in the end, and what was said about them."""
    owner, indent, start = "", "", 0
    for found in re.finditer(r"Problem with given class_path '([^']+)':\n( *)", message):
        owner, indent, start = found[1], found[2], found.start(2)
    lines = message[start:].splitlines()
    return owner, "\n".join(takewhile(lambda line: not line or line.startswith(indent), lines))


def _arguments(path: str) -> set[str]:
    """Names of the arguments of a class and of its bases."""
    found: Any = resolve_name(path)
    makers = [vars(base)["__init__"] for base in found.__mro__ if "__init__" in vars(base)]
    return {name for maker in makers for name in inspect.signature(maker).parameters}
