"""RLOO, and what the floor owes a method with several responses per prompt and no critic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from lightning_perl.batches import PromptBatch
from lightning_perl.models.roles import LAYOUTS, Layout
from lightning_perl.models.shortcuts import PLAIN, Shortcuts
from lightning_perl.modules import PPO, RLOO
from lightning_perl.modules.base import Stats
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.rollouts.rollout import Experience, Rollout, Scored
from tests.modules import tiny


def rloo(trunk: Path, **options: Any) -> RLOO:
    return tiny.on_policy(RLOO, trunk, **{"samples": 3, "micro_batch_size": 6, **options})


def responses(rollout: Rollout) -> list[tuple[int, ...]]:
    rows = zip(rollout.response_ids, rollout.response_mask, strict=True)
    return [tuple(row[kept].tolist()) for row, kept in rows]


# ---- the method ----------------------------------------------------------------------------------


def test_advantages_by_hand(hydra_trunk: Path) -> None:
    module = rloo(hydra_trunk, kl_coef=0.4)
    tiny.train_adapters(module)
    rollout = module.collect(tiny.prompts(4), 0, samples=3)
    scored = module.score(rollout)
    experience, stats = module.experience(rollout, scored)
    rewards = []
    for row in range(12):
        kept = rollout.response_mask[row]
        kl = float((scored.logprobs - scored.reference)[row][kept].sum())
        rewards.append(float(scored.scores[row]) - 0.4 * kl)
    assert stats["reward"].item() == pytest.approx(sum(rewards) / 12)
    for row in range(12):
        others = [rewards[other] for other in range(12) if other // 3 == row // 3 and other != row]
        kept = rollout.response_mask[row]
        advantage = rewards[row] - sum(others) / 2
        assert experience.advantages[row][kept].tolist() == pytest.approx(
            [advantage] * int(kept.sum())
        )
        assert not experience.advantages[row][~kept].any()
    _, steps = tiny.rehearse(module, experience)
    assert len(steps) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"checkpointing": ["value"]},
            r"\['value'\] are no trained roles of RLOO, which trains \['policy'\]",
        ),
        ({"layout": "joint_hydra"}, "RLOO trains no critic. Use layout hydra"),
        ({"value_coef": 1.0}, "unexpected keyword argument 'value_coef'"),
        ({"critic_learning_rate": 1.0}, "unexpected keyword argument 'critic_learning_rate'"),
    ],
)
def test_refused_at_construction(options: dict[str, Any], words: str, hydra_trunk: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        rloo(hydra_trunk, **options)


def test_minibatches_never_part_the_responses_to_a_prompt(hydra_trunk: Path) -> None:
    options: dict[str, Any] = {"layout": "hydra", "lora": tiny.LORA, "samples": 3}
    with pytest.raises(ValueError, match=r"multiple of samples \(3\).*got 4"):
        PPO(str(hydra_trunk), minibatch_size=4, **options)
    module = PPO(str(hydra_trunk), minibatch_size=6, **options)
    rows = [part.tolist() for part in module._minibatches(15, 3, 1)]
    assert [len(part) for part in rows] == [6, 6, 3]
    assert sorted(row for part in rows for row in part) == list(range(15))
    for part in rows:
        groups = [part[start : start + 3] for start in range(0, len(part), 3)]
        assert all(group == [group[0] + sample for sample in range(3)] for group in groups)


# ---- several responses per prompt ----------------------------------------------------------------


def test_samples_of_a_prompt_have_noise_of_their_own(hydra_trunk: Path) -> None:
    module = rloo(hydra_trunk)
    prompts = tiny.prompts(4)
    alone, three = module.collect(prompts, 0), module.collect(prompts, 0, samples=3)
    assert three.row.tolist() == prompts.row.repeat_interleave(3).tolist()
    texts = responses(three)
    assert len(set(texts)) > 8
    # The first of them is the one that would be drawn alone, however many there are.
    assert texts[::3] == responses(alone)
    # Another rollout, or another seed, draws others.
    assert responses(module.collect(prompts, 1, samples=3)) != texts
    module.seed = 1
    assert responses(module.collect(prompts, 0, samples=3)) != texts


@pytest.mark.parametrize("size", [1, 5, 100])
def test_rollouts_in_chunks_are_the_same(size: int, hydra_trunk: Path) -> None:
    module = rloo(hydra_trunk)
    whole = module.collect(tiny.prompts(4), 0, samples=3)
    chunked = module.collect(
        tiny.prompts(4), 0, samples=3, sampling=replace(tiny.SAMPLING, batch_size=size)
    )
    for name in ("prompt_ids", "response_ids", "response_mask", "stopped", "row"):
        assert torch.equal(getattr(whole, name), getattr(chunked, name)), name
    assert whole.logprobs is not None
    assert chunked.logprobs is not None
    assert_close(chunked.logprobs, whole.logprobs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("micro", [2, 3, 7])
@pytest.mark.parametrize(
    "make", [rloo, lambda trunk, **options: tiny.hydra(trunk, samples=3, **options)]
)
def test_prompts_read_once_give_the_same_step(
    make: Callable[..., OnPolicy], micro: int, tmp_path: Path
) -> None:
    # Wide enough that a shared prompt is worth a longer line; GPT-2 computes in float64 throughout.
    trunk = tiny.save_trunk(tmp_path / "wide", "gpt2", hidden=64)
    options: dict[str, Any] = {
        "micro_batch_size": micro,
        "learned_reward_weight": 0.0,
        "reward_function": lambda prompts, responses, rows: [float(len(r)) for r in responses],
    }
    steps = []
    tokens = []
    for shortcuts in (Shortcuts(), PLAIN):
        module = make(trunk, shortcuts=shortcuts, **options)
        tiny.train_adapters(module)
        prompts = tiny.prompts(4, longest=14)
        rollout = module.collect(prompts, 0, samples=3)
        flops = module.flops
        scored = module.score(rollout)
        scored = scored._replace(scores=module.rewarded(rollout, scored.scores)[0])
        experience, _ = module.experience(rollout, scored)
        steps.append(tiny.rehearse(module, experience))
        tokens.append(module.flops - flops)
    (stats, ours), (plain_stats, plain) = steps
    assert ours[0].keys() == plain[0].keys()
    for name, gradient in ours[0].items():
        assert_close(gradient, plain[0][name], rtol=1e-10, atol=1e-12)
    for name, value in stats.items():
        assert_close(value, plain_stats[name], rtol=1e-10, atol=1e-12)
    assert tokens[0] < tokens[1]


# ---- no critic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "joint_hydra"])
def test_nothing_is_kept_for_a_critic(layout: Layout, hydra_trunk: Path, tmp_path: Path) -> None:
    with_critic = tiny.hydra(hydra_trunk, layout=layout)
    module = rloo(
        hydra_trunk, layout=layout, trunk_dtype="float32" if layout == "full" else "float64"
    )
    trunks = len(module.roles.distinct_trunks())
    assert trunks == len(with_critic.roles.distinct_trunks()) - (layout in ("full", "lora"))
    assert not hasattr(module.roles, "value_head")
    assert [group["name"] for group in module.parameter_groups()] == ["actor"]
    assert not any("critic" in name or "value_head" in name for name in module.state_dict())
    before = tiny.weights(module)
    trainer, folder = tiny.fit(module, tmp_path, [tiny.prompts(4, seed) for seed in range(2)])
    assert trainer.global_step == 2
    assert module.episodes == 24
    assert tiny.changed(before, module) <= module.trainable_names()
    assert tiny.changed(before, module)
    handed = {path.name for path in (folder if layout == "full" else folder / "adapters").iterdir()}
    assert "critic" not in handed
    assert ("policy" if layout == "full" else "actor") in handed
    logged = set(trainer.callback_metrics)
    assert {"train/policy_loss", "train/entropy", "train/reward", "train/grad_norm_actor"} <= logged
    assert not {key for key in logged if "value" in key or "critic" in key}


def test_a_prompt_without_all_of_its_responses_is_refused(hydra_trunk: Path) -> None:
    module = rloo(hydra_trunk)
    rollout = module.collect(tiny.prompts(4), 0, samples=3)
    experience, _ = module.experience(rollout, module.score(rollout))
    some = experience.rows(torch.arange(7))
    with pytest.raises(ValueError, match="needs all 3 responses to each prompt, got 7 responses"):
        module.update(some, tiny.one_optimizer(module))


def test_a_greedy_baseline_is_scored_for_a_leaf_that_wants_it(
    hydra_trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Rollout, Scored]] = []
    learn = RLOO.experience

    def experience(module: RLOO, rollout: Rollout, scored: Scored) -> tuple[Experience, Stats]:
        seen.append((rollout, scored))
        return learn(module, rollout, scored)

    monkeypatch.setattr(RLOO, "experience", experience)
    monkeypatch.setattr(RLOO, "greedy_baseline", True)
    module = rloo(hydra_trunk, score_clip=0.1)
    tiny.fit(module, tmp_path, [tiny.prompts(4)])
    rollout, scored = seen[0]
    first = rollout.rows(torch.arange(0, len(rollout.row), 3))
    prompts = PromptBatch(first.prompt_ids, first.prompt_mask, first.row)
    fresh = rloo(hydra_trunk)
    greedy = fresh.collect(prompts, 5, sampling=replace(tiny.SAMPLING, temperature=0.0))
    expected = fresh.score(greedy, values=False).scores.clamp(-0.1, 0.1)
    assert scored.baseline is not None
    assert_close(scored.baseline, expected.repeat_interleave(3))
    # Its own scores have gone by the same rules; what is logged has not.
    assert_close(scored.scores, fresh.score(rollout).scores.clamp(-0.1, 0.1))
    assert scored.scores.abs().max() <= 0.1
