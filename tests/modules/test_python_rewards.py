"""Rewards in Python, alone or beside the learned one."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from jsonargparse import ArgumentParser
from torch.testing import assert_close

from lightning_perl.models.roles import Layout
from lightning_perl.modules import PPO, HydraPPO, Reinforce
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.rewards import Brevity
from tests.modules import tiny
from tests.modules.own_rewards import shortest_wins

LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def words(responses: Sequence[str]) -> torch.Tensor:
    return torch.tensor([float(len(response.split())) for response in responses])


def logged_under(folder: Path, prefix: str) -> dict[str, list[float]]:
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        key: [float(row[key]) for row in rows if row[key]]
        for key in rows[0]
        if key.startswith(prefix)
    }


# ---- what is paid --------------------------------------------------------------------------------


def test_prompts_are_shown_without_their_chat_template(hydra_trunk: Path) -> None:
    module = tiny.hydra(hydra_trunk, reward_function=shortest_wins, learned_reward_weight=0.0)
    tokenizer = module.policy_trunk.tokenizer
    plain = module.texts(module.collect(tiny.prompts(2), 0))[0]
    role = "{{ 'w4' if m.role == 'user' else 'w9' }}"
    tokenizer.chat_template = "{% for m in messages %}w3 " + role + " {{ m.content }} {% endfor %}"
    asked = tokenizer.encode("w3 w4 w5 w6", add_special_tokens=False)
    again = tiny.hydra(hydra_trunk, reward_function=shortest_wins, learned_reward_weight=0.0)
    again.policy_trunk.tokenizer.chat_template = tokenizer.chat_template
    assert again.prompts_read([asked]) == ["User: w5 w6\nAgent:"]
    assert again.texts(again.collect(tiny.prompts(2), 0))[0] == plain


def test_scores_are_the_weighted_sum(hydra_trunk: Path) -> None:
    module = tiny.hydra(
        hydra_trunk,
        learned_reward_weight=0.5,
        reward_function=shortest_wins,
        reward_function_weight=3.0,
    )
    rollout = module.collect(tiny.prompts(6), 0)
    learned = module.score(rollout).scores
    scores, parts = module.rewarded(rollout, learned)
    found = words(module.texts(rollout)[1]).to(learned)
    assert len(set(found.tolist())) > 1
    assert_close(scores, 0.5 * learned - 3.0 * found)
    assert_close(parts, {"function_score": -found.mean(), "learned_score": learned.mean()})
    # Who asks for written answers is told the same scores.
    answers = module.answer(tiny.prompts(6), "policy")
    held_out = module.collect(tiny.prompts(6), -1)
    expected, _ = module.rewarded(held_out, module.score(held_out).scores)
    assert answers.scores == pytest.approx(expected.tolist(), rel=1e-5)
    module = tiny.hydra(hydra_trunk, learned_reward_weight=2.0)
    assert_close(module.rewarded(rollout, learned), (2 * learned, {}), rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_function_alone_needs_no_head_no_pass_and_no_trunk(
    layout: Layout, plain_trunk: Path, hydra_trunk: Path
) -> None:
    alone = {"learned_reward_weight": 0.0, "reward_function": shortest_wins}
    for trunk in (plain_trunk, hydra_trunk):
        module = tiny.hydra(trunk, layout=layout, **alone)
        both = tiny.hydra(hydra_trunk, layout=layout, reward_function=shortest_wins)
        trunks, with_reward = (one.roles.distinct_trunks() for one in (module, both))
        assert len(trunks) == len(with_reward) - (layout in ("full", "lora"))
        assert "reward" not in module.policy_trunk.adapters.specs
        rollout = module.collect(tiny.prompts(3), 0)
        counts = []
        for one in (module, both):
            before = sum(trunk.passes for trunk in one.roles.distinct_trunks())
            one.score(rollout)
            counts.append(sum(trunk.passes for trunk in one.roles.distinct_trunks()) - before)
        # In the Hydra layouts the reward reads the reference's pass, so it costs none.
        assert counts[0] == counts[1] - (layout not in ("hydra", "joint_hydra"))
        scored = module.score(rollout)
        assert not scored.scores.any()
        scores, parts = module.rewarded(rollout, scored.scores)
        assert_close(scores, -words(module.texts(rollout)[1]).double())
        assert set(parts) == {"function_score"}
        # The critic starts from the trunk's reward head where there is one, else from nothing.
        assert bool(scored.values.any()) == (trunk == hydra_trunk)


# ---- logs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [0.0, 0.5])
def test_parts_are_logged_in_training_and_validation(
    learned: float, hydra_trunk: Path, tmp_path: Path
) -> None:
    module = tiny.hydra(
        hydra_trunk,
        learned_reward_weight=learned,
        reward_function=shortest_wins,
        reward_function_weight=2.0,
    )
    # The reference is measured by the same reward: the same answers, the same score.
    logged = tiny.measured(module, tmp_path, [tiny.prompts(4)])
    assert logged["val/score"] == pytest.approx(logged["val/reference_score"])
    assert logged["val/win_rate"] == 0.5
    batches = [tiny.prompts(5, seed) for seed in range(2)]
    _, folder = tiny.fit(module, tmp_path, batches, held_out=[tiny.prompts(4, 9)])
    for prefix in ("rollout", "val"):
        seen = logged_under(folder, f"{prefix}/")
        assert (f"{prefix}/learned_score" in seen) == (learned > 0)
        own, total = seen[f"{prefix}/function_score"], seen[f"{prefix}/score"]
        judged = seen.get(f"{prefix}/learned_score", [0.0] * len(own))
        expected = [2 * mine + learned * theirs for mine, theirs in zip(own, judged, strict=True)]
        assert total == pytest.approx(expected, rel=1e-4)
        assert all(one < 0 for one in own)


# ---- refusals ------------------------------------------------------------------------------------


class Broken:
    """A reward that fails on one row."""

    def __init__(self, row: int, score: object = None, error: Exception | None = None) -> None:
        self.row, self.score, self.error = row, score, error

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[int]
    ) -> list[Any]:
        if self.error is not None and self.row in rows:
            raise self.error
        return [self.score if row == self.row else 0.0 for row in rows]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (Broken(203, math.nan), r"reward_function \(Broken\) gave nan for row 203, response 'w"),
        (Broken(201, "7"), r"gave '7' for row 201, response '"),
        (Broken(202, error=KeyError("x")), r"raised KeyError on row 202, response '.*: 'x'"),
    ],
)
def test_bad_scores_stop_training_and_validation(
    broken: Broken, words: str, hydra_trunk: Path, tmp_path: Path
) -> None:
    module = HydraPPO(
        str(hydra_trunk), lora=tiny.LORA, sampling=tiny.SAMPLING, reward_function=broken
    )
    trainer, _ = tiny.quiet_trainer(tmp_path)
    batches = tiny.Batches([tiny.prompts(5, 2)])
    before = tiny.weights(module)
    for run in (lambda: trainer.fit(module, batches), lambda: trainer.validate(module, batches)):
        with pytest.raises(ValueError, match=words):
            run()
    assert tiny.changed(before, module) == set()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learned_reward_weight": 0.0}, "every score would be 0. Give one of them"),
        (
            {
                "learned_reward_weight": 0.0,
                "reward_function": shortest_wins,
                "reward_function_weight": 0.0,
            },
            "every score would be 0",
        ),
        (
            {"learned_reward_weight": -1.0},
            r"learned_reward_weight must be at least 0 and finite, got -1",
        ),
        (
            {"reward_function_weight": math.nan},
            r"reward_function_weight must be at least 0 and finite, got nan",
        ),
        (
            {"learned_reward_weight": 0.0, "reward_function": shortest_wins, "reward": "RUN/x"},
            "reward is RUN/x, but learned_reward_weight is 0, so nobody would ask it",
        ),
    ],
)
@pytest.mark.parametrize("kind", [PPO, Reinforce])
def test_refused_at_construction(
    kind: Callable[..., OnPolicy], options: dict[str, Any], words: str, hydra_trunk: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        kind(str(hydra_trunk), layout="perl", **options)


# ---- in a YAML -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PPO", "Reinforce"])
@pytest.mark.parametrize(
    "named",
    [
        "tests.modules.own_rewards.shortest_wins",
        {"class_path": "tests.modules.own_rewards.shortest_wins"},
        {"class_path": "lightning_perl.rewards.Brevity", "init_args": {"words": 3}},
        {"class_path": "Brevity", "init_args": {"words": 3}},
    ],
)
def test_rewards_are_named_by_import_path(kind: str, named: object, hydra_trunk: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(OnPolicy, "model")
    given = {
        "class_path": f"lightning_perl.modules.{kind}",
        "init_args": {"trunk": str(hydra_trunk), "reward_function": named},
    }
    config = parser.parse_object({"model": given})
    module = parser.instantiate(config).model
    if isinstance(named, dict) and "init_args" in named:
        assert isinstance(module.reward_function, Brevity)
        assert module.reward_function.words == 3
        assert module.rewarded_by[1].endswith(".Brevity")
    else:
        assert module.reward_function is shortest_wins
        assert module.rewarded_by[1] == "tests.modules.own_rewards.shortest_wins"


def test_several_rewards_are_a_list_in_a_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(OnPolicy, "model", instantiate=False)
    for reward in ("RUN/adapters/reward", ["A/adapters/reward", "B/adapters/reward"], None):
        arguments = {"trunk": "RUN/trunk", "reward": reward, "reward_ensemble": "minimum"}
        config = parser.parse_object({"model": {"class_path": "Reinforce", "init_args": arguments}})
        assert config.model.init_args.reward == reward
