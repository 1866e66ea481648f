"""Every shortcut against the plain way, in float64: nothing but rounding may differ."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._ops import OpOverload
from torch.testing import assert_close

from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.roles import LAYOUTS, Layout
from lightning_perl.models.shortcuts import PLAIN, Shortcuts
from lightning_perl.modules import SFT, HydraSFT, RewardModel
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.modules.supervised import Supervised
from lightning_perl.rollouts.sampling import SamplingSpec
from tests.modules import tiny
from tests.modules.test_reinforce import perl
from tests.refusing import Refusing


def no_shapes_of_values(func: OpOverload[Any, Any], args: tuple[Any, ...]) -> None:
    """Raises where a shape is made of a tensor's values."""
    assert func is not torch.ops.aten.nonzero.default, func


NAMES = [field.name for field in fields(Shortcuts)]
WAYS = [PLAIN, *(replace(Shortcuts(), **{name: False}) for name in NAMES)]
IDS = ["plain", *(f"without {name}" for name in NAMES)]


def iteration(module: OnPolicy) -> dict[str, Any]:
    """Everything a rollout and its update come to."""
    tiny.train_adapters(module)
    rollout = module.collect(tiny.prompts(8), 0)
    scored = module.score(rollout, values=not module.values_come_later)
    scored, value_stats = module.values_of(rollout, scored)
    experience, _ = module.experience(rollout, scored)
    stats, steps = tiny.rehearse(module, experience, value_stats)
    mask = rollout.response_mask
    names = ("logprobs", "reference", "values")
    seen = {name: getattr(scored, name)[mask] for name in names}
    return {
        "ids": rollout.response_ids[mask],
        "tokens": rollout.response_tokens(),
        "scores": scored.scores,
        **seen,
        "advantages": experience.advantages[mask],
        **stats,
        **{
            f"{number} {name}": one
            for number, step in enumerate(steps)
            for name, one in step.items()
        },
    }


@pytest.mark.parametrize("layout", [*LAYOUTS, None])
def test_an_iteration_is_the_same_without_any(layout: Layout | None, hydra_trunk: Path) -> None:
    fast, plain = (
        iteration(
            tiny.hydra(hydra_trunk, layout=layout, minibatch_size=5, shortcuts=way)
            if layout
            else perl(hydra_trunk, layout="hydra", shortcuts=way)
        )
        for way in (Shortcuts(), PLAIN)
    )
    assert len(set(fast["tokens"].tolist())) > 2  # rows of several lengths, or nothing is cut
    assert_close(fast, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", WAYS[1:], ids=IDS[1:])
def test_each_alone(way: Shortcuts, hydra_trunk: Path) -> None:
    settings: dict[str, Any] = {
        "micro_batch_size": 2,
        "sampling": SamplingSpec(max_new_tokens=6, temperature=0.8),
    }
    expected = iteration(tiny.hydra(hydra_trunk, **settings))
    found = iteration(tiny.hydra(hydra_trunk, shortcuts=way, **settings))
    assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [SFT, HydraSFT, RewardModel])
@pytest.mark.parametrize("lora", [None, LoraSpec(rank=2, alpha=4.0)])
def test_supervised(kind: type[Supervised], lora: LoraSpec | None, hydra_trunk: Path) -> None:
    found = []
    for way in (Shortcuts(), PLAIN):
        module: Any = kind(str(hydra_trunk), lora=lora, trunk_dtype="float64", shortcuts=way)
        tiny.train_adapters(module)
        batch = tiny.rated(8, pairs=2)
        found.append((tiny.gradients_of(module, batch), module.objective(batch)[0].detach()))
    assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_the_critic_reads_the_first_minibatch_once(hydra_trunk: Path) -> None:
    counted = []
    for way in (Shortcuts(), replace(Shortcuts(), shared_value_pass=False)):
        module = tiny.hydra(
            hydra_trunk, shortcuts=way, micro_batch_size=8, score_batch_size=8, ppo_epochs=2
        )
        rollout = module.collect(tiny.prompts(8), 0)
        before = module.policy_trunk.passes
        scored = module.score(rollout, values=not module.values_come_later)
        scored, value_stats = module.values_of(rollout, scored)
        module.zero_grad()
        tiny.rehearse(module, module.experience(rollout, scored)[0], value_stats)
        counted.append(module.policy_trunk.passes - before)
    # Off, twice the actor, the critic once or twice and once more.
    assert counted == [1 + 2 + 2, 1 + 2 + 3]


def test_values_and_gradient_at_once_make_no_shape_of_values(hydra_trunk: Path) -> None:
    as_they_come = replace(Shortcuts(), length_buckets=False)
    module = tiny.hydra(hydra_trunk, minibatch_size=3, shortcuts=as_they_come)
    rollout = module.collect(tiny.prompts(8), 0)
    scored = module.score(rollout, values=False)
    with Refusing(no_shapes_of_values):
        module.first_value_pass(rollout, scored)


def test_what_was_not_drawn_from_the_scored_distribution_is_scored_again(hydra_trunk: Path) -> None:
    for way, passes in ((Shortcuts(), 2), (PLAIN, 3)):
        module = tiny.hydra(hydra_trunk, shortcuts=way, score_batch_size=8)
        rollout = module.collect(tiny.prompts(8), 0)
        before = module.policy_trunk.passes
        module.score(rollout)
        assert module.policy_trunk.passes - before == passes
    module = tiny.hydra(hydra_trunk)
    warped = SamplingSpec(max_new_tokens=6, top_p=0.5)
    assert module.collect(tiny.prompts(4), 0).logprobs is not None
    assert module.collect(tiny.prompts(4), 0, sampling=warped).logprobs is None
    colder = SamplingSpec(max_new_tokens=6, temperature=0.5)
    assert module.collect(tiny.prompts(4), 0, sampling=colder).logprobs is None
    assert module.collect(tiny.prompts(4), 0, role="reference").logprobs is None


def test_at_rest_the_weights_are_cast_once_and_never_remembered(hydra_trunk: Path) -> None:
    module = tiny.hydra(hydra_trunk)
    tiny.train_adapters(module)
    before = module.collect(tiny.prompts(4), 0)
    assert module.policy_trunk.switch.rested is None
    tiny.train_adapters(module, seed=1, scale=2.0)
    after = module.collect(tiny.prompts(4), 0)
    assert before.logprobs is not None
    assert after.logprobs is not None
    assert not torch.equal(before.logprobs[:, :1], after.logprobs[:, :1])
