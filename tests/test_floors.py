"""Imports point down only: the floors of the house, read from the sources with `ast`."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_perl"

# What each floor may import from the floors below. Its own floor and the root (the version) are
# always allowed; a floor that is not named here is a violation until someone places it.
BELOW: dict[str, set[str]] = {
    "": set(),
    "arguments": set(),
    "batches": {"functional"},
    "functional": set(),
    "losses": {"functional"},
    "models": {"arguments", "chat", "functional", "quiet", "ranks", "whole"},
    "optim": {"arguments", "ranks"},
    "phases": set(),
    "ranks": {"functional"},
    "rollouts": {"arguments", "batches", "functional", "models", "ranks", "whole"},
    "packaged": set(),
    "quiet": set(),
    "chat": set(),
    "whole": set(),
    "data": {"arguments", "batches", "chat", "functional", "metrics", "packaged"},
    "rewards": {"arguments", "data"},
    "callbacks": {"arguments", "batches", "metrics", "phases", "ranks", "whole"},
    "metrics": {"functional"},
    "modules": {"functional", "losses", "models", "optim", "rollouts", "batches", "rewards"}
    | {"arguments", "callbacks", "chat", "metrics", "packaged", "phases", "ranks", "whole"},
}
BELOW["commands"] = set(BELOW) - {""}
BELOW["cli"] = set(BELOW) - {""}
BELOW["__main__"] = {"cli"}

# Floors that may import only these third parties (the standard library is free).
THIRD_PARTIES: dict[str, set[str]] = {
    "": set(),
    "arguments": {"jsonargparse"},
    "batches": {"torch"},
    "optim": {"torch"},
    "phases": {"lightning", "torch"},
    "ranks": {"torch"},
    "functional": {"torch"},
    "losses": {"torch"},
    "callbacks": {"lightning", "torch", "wandb", "matplotlib", "psutil"},
}

PEFT_FILE = "models/adapters.py"
LOADING_FILE = "models/loading.py"
# `from_pretrained` of these is not a model's.
NO_MODEL = re.compile(r"tokenizer|config|processor", re.IGNORECASE)


def imported_names(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yields (line, absolute dotted name) of every import, wherever it stands in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else [])))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def wrong_arrow(file: str, floor: str, name: str) -> str | None:
    """Says what is wrong with one import, or None."""
    top, _, rest = name.partition(".")
    if top == "peft" and file != PEFT_FILE:
        return f"imports peft; only {PEFT_FILE} may"
    if name.startswith("transformers.AutoModel") and file != LOADING_FILE:
        return f"imports {name}; only {LOADING_FILE} may load models"
    if top == PACKAGE.name:
        target = rest.partition(".")[0]
        # A name of the root itself (__version__), not a floor.
        target = "" if target not in BELOW and target.startswith("__") else target
        if target not in BELOW[floor] | {floor, ""}:
            return f"{floor or 'the root'} imports {target}; arrows point down only"
    elif top not in sys.stdlib_module_names and top not in THIRD_PARTIES.get(floor, {top}):
        return f"{floor or 'the root'} imports {top}; it may import {sorted(THIRD_PARTIES[floor])}"
    return None


def loaded_models(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields (line, expression) of every `x.from_pretrained` whose x looks like a model."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "from_pretrained":
            owner = ast.unparse(node.value)
            if not NO_MODEL.search(owner):
                yield node.lineno, f"{owner}.from_pretrained"


def violations(package: Path) -> list[str]:
    """Lists `file:line: what is wrong` over a package folder."""
    found = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        file = relative.as_posix()
        floor = relative.parts[0].removesuffix(".py")
        floor = "" if floor == "__init__" else floor
        if floor not in BELOW:
            found.append(f"{file}:1: {floor} is on no floor; place it in BELOW")
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=file)
        for line, name in imported_names(tree, (PACKAGE.name, *relative.parts[:-1])):
            if wrong := wrong_arrow(file, floor, name):
                found.append(f"{file}:{line}: {wrong}")
        # A PEFT adapter is no trunk; adapters.py may load one.
        if file not in (LOADING_FILE, PEFT_FILE):
            for line, expression in loaded_models(tree):
                found.append(f"{file}:{line}: calls {expression}; only {LOADING_FILE} loads models")
    return found


def test_arrows_point_down() -> None:
    assert list(PACKAGE.rglob("*.py")), f"no sources under {PACKAGE.name}"
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("functional/kl.py", "import numpy", "functional imports numpy"),
        ("functional/kl.py", "import lightning_perl.losses.ppo", "functional imports losses"),
        ("functional/kl.py", "from ..losses import ppo", "functional imports losses"),
        ("losses/ppo.py", "from lightning_perl.models import heads", "losses imports models"),
        ("batches.py", "import lightning", "batches imports lightning"),
        ("data/rows.py", "def f():\n    from lightning_perl import modules", "rows.py:2: data"),
        ("callbacks/memory.py", "import transformers", "callbacks imports transformers"),
        ("modules/ppo.py", "from lightning_perl.data import rows", "modules imports data"),
        ("modules/ppo.py", "from lightning_perl import utils", "modules imports utils"),
        ("__main__.py", "from lightning_perl.modules import PPO", "__main__ imports modules"),
        ("__init__.py", "import torch", "the root imports torch"),
        ("models/trunk.py", "import peft.tuners.lora", "trunk.py:1: imports peft"),
        ("models/heads.py", "from transformers import AutoModelForCausalLM", "load models"),
        ("cli.py", "import transformers as t\nt.AutoModel.from_pretrained('x')", "cli.py:2: calls"),
        ("utils.py", "import torch", "utils is on no floor"),
        # What is allowed.
        ("functional/kl.py", "import math\nimport torch.nn.functional as F", None),
        ("functional/kl.py", "from . import masked", None),
        ("models/adapters.py", "import peft\npeft.PeftModel.from_pretrained('x')", None),
        ("models/loading.py", "from transformers import AutoModel as A\nA.from_pretrained", None),
        ("data/base.py", "import transformers\ntransformers.AutoTokenizer.from_pretrained", None),
        ("modules/ppo.py", "from ..models import heads", None),
        ("commands/export.py", "from lightning_perl import __version__, data, modules", None),
    ],
)
def test_the_checker_sees(tmp_path: Path, file: str, source: str, message: str | None) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source, encoding="utf-8")
    found = violations(tmp_path)
    assert len(found) == (message is not None)
    assert message is None or message in found[0]
