"""Benchmarks are scripts beside each other; a test imports them as they import one another."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Script = Callable[[str], ModuleType]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Scripts set their number of threads; other tests keep theirs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Call ``script("layouts")`` for the module of benchmarks/layouts.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module
