"""Decoders that keep more than keys and values, and those with layers that PEFT takes for others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_perl.models.loading import load_trunk
from lightning_perl.models.trunk import Trunk
from lightning_perl.modules import HydraPPO, RewardModel
from lightning_perl.rollouts.sampling import SamplingSpec
from tests.conftest import TinyTrunk
from tests.models.families import RECURRENT, UNPADDED
from tests.models.rows import build
from tests.modules import tiny
from tests.rollouts.test_decoding import answered

every_family = pytest.mark.parametrize("family", RECURRENT)


@every_family
def test_what_is_sampled_is_what_is_scored(tiny_trunk: TinyTrunk, family: str) -> None:
    roles = build(tiny_trunk(family))
    rollout = answered(roles, SamplingSpec(max_new_tokens=40, temperature=1.4))
    # Rows have left the batch, and their states with them.
    assert len(set(rollout.response_tokens().tolist())) > 1
    with torch.no_grad():
        read = roles.answer(rollout.sequences(), ("policy",), 1.4).policy
    assert read is not None
    assert rollout.logprobs is not None
    gap = (rollout.logprobs - read)[rollout.response_mask].abs()
    # Recurrences round a lot in fp32; a state of another row or step is off by nats.
    assert float(gap.max()) < 0.05


def test_mamba_2_loads_in_bfloat16(tiny_trunk: TinyTrunk) -> None:
    trunk = load_trunk(str(tiny_trunk("mamba2")), dtype="bfloat16")
    trunk.require_cache()
    assert trunk.dtype == torch.bfloat16


@pytest.mark.parametrize("family", UNPADDED)
def test_a_family_that_reads_padding_is_not_sampled_from(
    tiny_trunk: TinyTrunk, family: str
) -> None:
    folder = str(tiny_trunk(family))
    with pytest.raises(ValueError, match=r"when a row is .*padded, so it cannot.*RewardModel"):
        HydraPPO(folder, lora=tiny.LORA, sampling=tiny.SAMPLING)
    # Its rows are padded on the right.
    RewardModel(folder, lora=tiny.LORA)


def test_a_family_that_loses_its_state_is_not_sampled_from(
    tiny_trunk: TinyTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_trunk("mamba2")
    trunk = load_trunk(str(folder))
    # A name that the family does not know is swallowed.
    monkeypatch.setattr(Trunk, "_cache_argument", "memory")
    with pytest.raises(ValueError, match=r"read token by token with a cache.*SFT, HydraSFT"):
        trunk.require_cache()

    def forgetful(self: Any) -> None:  # noqa: ANN401
        raise ValueError("asked")

    monkeypatch.setattr(type(trunk), "require_cache", forgetful)
    with pytest.raises(ValueError, match="asked"):
        HydraPPO(str(folder), lora=tiny.LORA, sampling=tiny.SAMPLING)
    assert torch.is_grad_enabled()
