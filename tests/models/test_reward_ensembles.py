"""Several reward adapters on one trunk: what they say together, and what that costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.heads import HEADS_FILE, ScalarHead, load_head, save_heads
from lightning_perl.models.manifest import write_adapter_manifest
from lightning_perl.models.roles import REDUCTIONS, RewardEnsemble, RoleAnswers, Roles
from tests.conftest import TinyTrunk
from tests.models.rows import ROLES, SPEC, backward, gradients, loss, padded, write_reward

# Ranks, scales and layers differ, as those of adapters from different runs may.
SHAPES = (
    LoraSpec(2, 1.0, ("q_proj", "v_proj")),
    LoraSpec(4, 8.0, ("q_proj", "k_proj", "v_proj", "o_proj"), rslora=True),
    LoraSpec(1, 3.0, ("v_proj", "down_proj")),
)


@pytest.fixture(scope="module")
def adapters(tiny_trunk: TinyTrunk, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three trained reward adapters of one trunk, as `RewardModel` writes them."""
    folders = []
    for number, spec in enumerate(SHAPES):
        folder = tmp_path_factory.mktemp(f"reward_{number}")
        trunk = write_reward(folder, tiny_trunk(), spec, number, bias=0.3 * number - 0.2)
        write_adapter_manifest(folder, trunk)
        folders.append(str(folder))
    return folders


def perl(trunk: Path, reward: str | list[str], ensemble: RewardEnsemble = "mean") -> Roles:
    return Roles("perl", str(trunk), SPEC, reward, dtype="float64", ensemble=ensemble)


@torch.no_grad()
def answers(roles: Roles) -> RoleAnswers:
    return roles.answer(padded(), ROLES)


def reward_of(roles: Roles) -> Tensor:
    found = answers(roles).reward
    assert found is not None
    return found


@pytest.mark.parametrize("ensemble", ["mean", "minimum"])
def test_scores_are_reduced_one_forward_each(
    tiny_trunk: TinyTrunk, adapters: list[str], ensemble: RewardEnsemble
) -> None:
    alone = torch.stack([reward_of(perl(tiny_trunk(), folder)) for folder in adapters])
    lowest = alone.argmin(0)
    assert len(set(lowest.tolist())) > 1  # or the minimum would be one adapter's score
    roles = perl(tiny_trunk(), adapters, ensemble)
    assert roles.judges == ("reward", "reward_1", "reward_2")
    expected = alone.mean(0) if ensemble == "mean" else alone.gather(0, lowest[None])[0]
    assert_close(reward_of(roles), expected)
    (trunk,) = roles.distinct_trunks()
    before = trunk.passes
    found = answers(roles)
    assert found.spread is not None
    assert_close(found.spread, alone.amax(0) - alone.amin(0))
    assert trunk.passes - before == 3 + 3  # policy, value and reference once each
    plain = answers(perl(tiny_trunk(), adapters[0]))
    for role in ("policy", "reference", "value"):
        assert torch.equal(getattr(found, role), getattr(plain, role))


def test_one_adapter_is_no_ensemble(tiny_trunk: TinyTrunk, adapters: list[str]) -> None:
    plain = answers(perl(tiny_trunk(), adapters[1]))
    for ensemble in REDUCTIONS:
        roles = perl(tiny_trunk(), adapters[1:2], ensemble)
        assert roles.judges == ("reward",)
        assert_close(tuple(answers(roles)), tuple(plain), rtol=0, atol=0)
        assert roles.trunk("reward").adapters.specs["reward"].rank == 4


def deltas(roles: Roles, name: str) -> dict[str, Tensor]:
    """What an adapter adds to each layer's weight, in the plainest way."""
    adapters = roles.trunk("reward").adapters
    tensors, spec = adapters.tensors(name), adapters.specs[name]
    return {
        key.removesuffix(".lora_A.weight"): spec.alpha
        / spec.rank ** (0.5 if spec.rslora else 1.0)
        * tensors[key.replace("lora_A", "lora_B")].detach()
        @ down.detach()
        for key, down in tensors.items()
        if "lora_A" in key
    }


def test_weight_average_is_the_mean_of_the_deltas(
    tiny_trunk: TinyTrunk, adapters: list[str]
) -> None:
    roles = perl(tiny_trunk(), adapters, "weight_average")
    assert roles.judges == ("reward",)
    assert roles.trunk("reward").adapters.specs["reward"].rank == 2 + 4 + 1
    apart = [deltas(perl(tiny_trunk(), folder), "reward") for folder in adapters]
    found = deltas(roles, "reward")
    assert found.keys() == {layer for one in apart for layer in one}
    assert len(found) == 2 * 5  # five kinds of layers, two blocks
    for layer, delta in found.items():
        total = sum((one[layer] for one in apart if layer in one), torch.zeros_like(delta))
        assert_close(delta, total / 3, rtol=1e-12, atol=1e-14)
    heads = [load_head(Path(folder), "reward") for folder in adapters]
    assert roles.reward_fingerprints == [head.fingerprint() for head in heads]
    mean = torch.stack([head.weight for head in heads]).mean(0)
    assert_close(roles.reward_head().weight, mean.double(), rtol=1e-6, atol=1e-7)
    assert roles.reward_head().bias.item() == pytest.approx(0.1, abs=1e-6)
    (trunk,) = roles.distinct_trunks()
    before = trunk.passes
    answers(roles)
    assert trunk.passes - before == 4


@pytest.mark.parametrize("ensemble", list(REDUCTIONS))
def test_critic_starts_from_the_first_or_from_the_average(
    tiny_trunk: TinyTrunk, adapters: list[str], ensemble: RewardEnsemble
) -> None:
    roles = perl(tiny_trunk(), adapters, ensemble)
    assert_close(deltas(roles, "critic"), deltas(roles, "reward"), rtol=0, atol=0)
    assert torch.equal(roles.value_head.weight, roles.reward_head().weight)
    # Judges are never trained; all of the critic is, in every block of its ranks.
    for _ in range(2):
        roles.zero_grad()
        backward(loss(roles, padded(), "value"))
        found = gradients(roles)
        own = {id(one) for one in (*roles.critic_parameters(), *roles.value_head.parameters())}
        named = dict(roles.named_parameters())
        assert {id(named[name]) for name in found} == own
        with torch.no_grad():
            for name, gradient in found.items():
                named[name].sub_(0.01 * gradient)
    assert all(bool((one != 0).any()) for one in found.values())
    before = reward_of(perl(tiny_trunk(), adapters, ensemble))
    assert torch.equal(reward_of(roles), before)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ensemble", list(REDUCTIONS))
def test_every_member_must_fit_the_trunk(
    tiny_trunk: TinyTrunk, adapters: list[str], ensemble: RewardEnsemble, tmp_path: Path
) -> None:
    other = write_reward(tmp_path, tiny_trunk(seed=1), SHAPES[0], 0, bias=0.0)
    write_adapter_manifest(tmp_path, other)
    with pytest.raises(ValueError, match=rf"{tmp_path} was trained on another trunk"):
        perl(tiny_trunk(), [adapters[0], str(tmp_path)], ensemble)
    (tmp_path / HEADS_FILE).unlink()
    with pytest.raises(ValueError, match=rf"{tmp_path} has no reward head"):
        perl(tiny_trunk(), [adapters[0], str(tmp_path)], ensemble)
    save_heads(tmp_path, {"reward": ScalarHead(48)})
    with pytest.raises(ValueError, match=rf"{tmp_path}: its reward head reads 48 numbers"):
        perl(tiny_trunk(), [adapters[0], str(tmp_path)], ensemble)
