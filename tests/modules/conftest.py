"""Tiny trunks on disk, one per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.modules import tiny


@pytest.fixture(scope="session")
def plain_trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama trunk without a reward head."""
    return tiny.save_trunk(tmp_path_factory.mktemp("plain") / "trunk")


@pytest.fixture(scope="session")
def hydra_trunk(plain_trunk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same trunk with a reward head, as `HydraSFT` writes it."""
    return tiny.with_head(plain_trunk, tmp_path_factory.mktemp("hydra") / "trunk")


@pytest.fixture(scope="session")
def gpt2_trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 whose config asks for dropout, with a reward head."""
    plain = tiny.save_trunk(tmp_path_factory.mktemp("gpt2") / "plain", "gpt2")
    return tiny.with_head(plain, plain.parent / "trunk")
