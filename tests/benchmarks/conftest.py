"""Benchmarks are scripts beside each other; a test imports them as they import one another."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Script = Callable[[str], ModuleType]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Call ``script("layouts")`` for the module of benchmarks/layouts.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module
