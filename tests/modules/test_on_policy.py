"""The on-policy loop: its acts alone, its checks, its logs, and what it leaves behind."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import ReduceLROnPlateau
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lightning_perl.functional.sequences import Sequences
from lightning_perl.models.adapters import OFF
from lightning_perl.models.heads import load_head
from lightning_perl.models.loading import load_trunk
from lightning_perl.models.roles import Role, RoleAnswers
from lightning_perl.modules import PPO, RewardModel
from lightning_perl.modules.base import Stats
from lightning_perl.modules.safety import require_trainable
from lightning_perl.rollouts.rollout import (
    Experience,
    Rollout,
    Scored,
    correlation,
    describe,
    distinct_pairs,
)
from lightning_perl.rollouts.sampling import SamplingSpec
from tests.modules import tiny


class CountWords:
    """A gold reward in whole numbers."""

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[int]
    ) -> list[int]:
        assert len(prompts) == len(responses) == len(rows)
        return [len(response.split()) for response in responses]


# ---- without a trainer ---------------------------------------------------------------------------


def test_step_over_a_frozen_parameter_is_refused(hydra_trunk: Path) -> None:
    module = tiny.hydra(hydra_trunk)
    _, experience = tiny.experienced(module, tiny.prompts(4))
    optimizer = tiny.one_optimizer(module)
    before = tiny.weights(module)
    frozen = module.roles.critic_parameters()[:2]
    for parameter in frozen:
        parameter.requires_grad_(False)
    words = r"2 parameters of the group 'critic' no longer require gradients.*set_adapter"
    with pytest.raises(RuntimeError, match=words):
        module.update(experience, optimizer)
    assert tiny.changed(before, module) == set()
    for parameter in frozen:
        parameter.requires_grad_(True)
    require_trainable(optimizer)


# ---- checks at the start -------------------------------------------------------------------------


def refuses(module: PPO, words: str, folder: Path) -> None:
    """``fit`` stops with these words before any update."""
    before = tiny.weights(module)
    trainer, _ = tiny.quiet_trainer(folder)
    with pytest.raises(RuntimeError, match=words):
        trainer.fit(module, tiny.Batches([tiny.prompts(6)]))
    assert trainer.global_step == 0
    assert tiny.changed(before, module) == set()


@pytest.mark.parametrize("layout", ["full", "lora", "dynamic_lora", "perl", "hydra", "joint_hydra"])
def test_policy_that_is_not_the_reference_is_refused(
    layout: str, hydra_trunk: Path, tmp_path: Path
) -> None:
    module = tiny.hydra(hydra_trunk, layout=layout)
    with torch.no_grad():
        module.roles.actor_parameters()[-1][0].add_(0.05)
    words = (
        r"The KL to the reference is not 0 before the first update: mean \|difference of log-prob"
        r"abilities\| is .* per token.*same trunk folder, and are the adapters fresh\?"
    )
    refuses(module, words, tmp_path)


def test_scores_that_are_no_numbers_are_refused(hydra_trunk: Path, tmp_path: Path) -> None:
    module = tiny.hydra(hydra_trunk)
    with torch.no_grad():
        module.roles.reward_head().bias.fill_(float("inf"))
    refuses(module, "reward role gives non-finite scores before any update.*heads.saf", tmp_path)


def test_a_ratio_that_is_not_one_is_refused(
    hydra_trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        r"The ratio of the first minibatch is not 1: .*Is there dropout .* or a temperature that"
    )
    module = tiny.hydra(hydra_trunk, sampling=SamplingSpec(max_new_tokens=6, temperature=0.7))
    learned = module.experience

    def forgetful(rollout: Rollout, scored: Scored) -> tuple[Experience, Stats]:
        module.sampling = SamplingSpec(max_new_tokens=6)
        return learned(rollout, scored)

    monkeypatch.setattr(module, "experience", forgetful)
    refuses(module, words, tmp_path)


def test_temperature_divides_the_scored_logits_too(hydra_trunk: Path, tmp_path: Path) -> None:
    module = tiny.hydra(hydra_trunk, sampling=SamplingSpec(max_new_tokens=6, temperature=0.7))
    # Sampled log-probabilities are those of the reference that reads them, or the run stops.
    trainer, _ = tiny.fit(module, tmp_path, [tiny.prompts(6, seed) for seed in range(2)])
    assert trainer.global_step == 2


def test_second_rollout_is_checked_too_but_not_for_kl(hydra_trunk: Path, tmp_path: Path) -> None:
    module = tiny.hydra(hydra_trunk)
    trainer, _ = tiny.fit(module, tmp_path, [tiny.prompts(6)])
    tiny.train_adapters(module)
    trainer, _ = tiny.fit(module, tmp_path, [tiny.prompts(6, 1)])
    assert trainer.callback_metrics["rollout/kl"].abs() > 0


# ---- under a trainer -----------------------------------------------------------------------------


def test_global_step_counts_updates(hydra_trunk: Path, tmp_path: Path) -> None:
    module = tiny.hydra(hydra_trunk, ppo_epochs=3, minibatch_size=3)
    trainer, _ = tiny.fit(module, tmp_path, [tiny.prompts(8, seed) for seed in range(2)])
    assert trainer.global_step == 2 * 3 * 3  # eight episodes are three minibatches
    assert trainer.callback_metrics["train/episodes"] == 16
    assert trainer.callback_metrics["train/tokens"] == module.tokens > 16


def test_scheduler_steps_once_per_rollout_batch(hydra_trunk: Path, tmp_path: Path) -> None:
    module = tiny.hydra(
        hydra_trunk,
        ppo_epochs=2,
        minibatch_size=2,
        critic_learning_rate=4e-5,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    )
    rates: list[list[float]] = []
    look = LambdaCallback(
        on_train_batch_start=lambda trainer, *_: rates.append(
            [group["lr"] for group in trainer.optimizers[0].param_groups]
        )
    )
    tiny.fit(module, tmp_path, [tiny.prompts(4, seed) for seed in range(3)], look)
    expected = [[scale * 1e-4, scale * 4e-5, scale * 4e-5] for scale in (1, 0.5, 0.25)]
    assert rates == [pytest.approx(one) for one in expected]


@pytest.mark.parametrize(
    ("monitor", "refused"),
    [("val/score", None), ("val/scores", "watches 'val/scores'; validation logs .*'val/score'")],
)
def test_a_scheduler_that_watches_is_stepped_after_each_validation(
    monitor: str, refused: str | None, hydra_trunk: Path, tmp_path: Path
) -> None:
    # A threshold that nothing reaches: every validation but the first is one without progress.
    module = tiny.hydra(
        hydra_trunk,
        scheduler=lambda optimizer: ReduceLROnPlateau(
            optimizer, monitor, factor=0.5, patience=0, threshold=1e9, threshold_mode="abs"
        ),
    )
    trainer, _ = tiny.quiet_trainer(tmp_path, max_epochs=3)
    batches = tiny.Batches([tiny.prompts(4)])
    with pytest.raises(ValueError, match=refused) if refused else nullcontext():
        trainer.fit(module, batches, batches)
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        assert rates == [pytest.approx(1e-4 / 4)] * 3


TRAINED = {
    *("train/loss", "train/policy_loss", "train/value_loss", "train/entropy", "train/reward"),
    *("train/clip_fraction", "train/approx_kl", "train/value_clip_fraction", "train/tokens"),
    *("train/explained_variance", "train/skipped_steps", "train/rollbacks", "train/episodes"),
    *("train/grad_norm_actor", "train/grad_norm_critic", "train/grad_norm_head"),
}
VALIDATED = {"val/score", "val/kl", "val/response_tokens", "val/win_rate", "val/reference_score"}
GOLD = {"val/gold", "val/reference_gold", "val/reference_gold_sd"}


def test_validation_of_a_fresh_policy_is_a_draw(hydra_trunk: Path, tmp_path: Path) -> None:
    module = tiny.hydra(hydra_trunk)
    trainer, _ = tiny.quiet_trainer(tmp_path)
    held_out = tiny.Batches([tiny.prompts(5, 1), tiny.prompts(3, 2)])
    (logged,) = trainer.validate(module, held_out, verbose=False)
    assert set(logged) == VALIDATED
    assert logged["val/win_rate"] == 0.5
    assert abs(logged["val/kl"]) < 1e-12
    assert logged["val/score"] == logged["val/reference_score"]
    rollouts = [module.collect(batch, -1) for batch in held_out.batches]
    tokens = sum(int(one.response_tokens().sum()) for one in rollouts)
    assert logged["val/response_tokens"] == pytest.approx(tokens / 8)  # weighted by prompts
    score = sum(float(module.score(one).scores.sum()) for one in rollouts)
    assert logged["val/score"] == pytest.approx(score / 8, rel=1e-5)


def test_validation_compares_the_trained_policy_with_the_reference(
    hydra_trunk: Path, tmp_path: Path
) -> None:
    module = tiny.hydra(hydra_trunk, gold=CountWords())
    tiny.train_adapters(module, scale=1.0)
    prompts = tiny.prompts(8, 1)
    trainer, _ = tiny.quiet_trainer(tmp_path)
    uneven = tiny.Batches(
        [type(prompts)(*(part[rows] for part in prompts)) for rows in (slice(0, 7), slice(7, 8))]
    )
    (logged,) = trainer.validate(module, uneven, verbose=False)
    assert set(logged) == VALIDATED | GOLD
    ours = module.answer(prompts, "policy")
    theirs = module.answer(prompts, "reference")
    assert ours.prompts == theirs.prompts
    assert ours.prompts[0].split()[0].startswith("w")
    wins = [
        1.0 if mine > other else 0.5 * (mine == other)
        for mine, other in zip(ours.scores, theirs.scores, strict=True)
    ]
    assert 0 < sum(wins) < 8
    assert logged["val/win_rate"] == pytest.approx(sum(wins) / 8)
    assert logged["val/score"] == pytest.approx(sum(ours.scores) / 8, rel=1e-5)
    assert logged["val/reference_score"] == pytest.approx(sum(theirs.scores) / 8, rel=1e-5)
    for key, answers in (("val/gold", ours), ("val/reference_gold", theirs)):
        words = [len(response.split()) for response in answers.responses]
        assert logged[key] == pytest.approx(sum(words) / 8)
    assert logged["val/reference_gold_sd"] == pytest.approx(statistics.pstdev(words))


def test_gold_score_is_logged_only_where_there_is_one(hydra_trunk: Path, tmp_path: Path) -> None:
    for gold in (None, CountWords()):
        module = tiny.hydra(hydra_trunk, gold=gold)
        trainer, _ = tiny.fit(module, tmp_path, [tiny.prompts(5)], held_out=[tiny.prompts(3, 1)])
        logged = set(trainer.callback_metrics)
        assert {"gold/score", "val/gold"} <= logged if gold else not {"gold/score"} & logged
        expected = {"score", "kl", "response_tokens", "truncated_fraction", "distinct_2"}
        expected = {f"rollout/{key}" for key in expected | {"length_score_correlation"}}
        assert {key for key in logged if key.startswith("rollout/")} == expected
        assert {key for key in logged if key.startswith("train/")} == TRAINED


def test_measures_of_test_rows_are_logged_under_test(hydra_trunk: Path, tmp_path: Path) -> None:
    module = tiny.hydra(hydra_trunk, gold=CountWords())
    logged = tiny.measured(module, tmp_path, [tiny.prompts(4)], stage="test")
    assert set(logged) == {key.replace("val/", "test/") for key in VALIDATED | GOLD}


def test_validation_never_asks_the_critic(
    hydra_trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny.hydra(hydra_trunk)
    answer, asked = module.roles.answer, set[Role]()

    def noting(
        sequences: Sequences, roles: Iterable[Role], *args: Any, **kwargs: Any
    ) -> RoleAnswers:
        names = list(roles)
        asked.update(names)
        return answer(sequences, names, *args, **kwargs)

    monkeypatch.setattr(module.roles, "answer", noting)
    trainer, _ = tiny.quiet_trainer(tmp_path)
    trainer.validate(module, tiny.Batches([tiny.prompts(4)]), verbose=False)
    # The policy's log-probabilities were kept while it sampled.
    assert asked == {"reference", "reward"}
    module.score(module.collect(tiny.prompts(4), 0))
    assert "value" in asked


# ---- what a rollout looked like ------------------------------------------------------------------


def test_describe_by_hand() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    rollout = Rollout(
        prompt_ids=torch.ones(3, 2, dtype=torch.int64),
        prompt_mask=torch.ones(3, 2, dtype=torch.bool),
        response_ids=torch.tensor([[5, 6, 5], [9, 0, 0], [5, 6, 7]]),
        response_mask=mask,
        stopped=torch.tensor([False, True, True]),
        row=torch.arange(3),
    )
    junk = 50.0
    scored = Scored(
        logprobs=torch.tensor([[-1.0, -2.0, -3.0], [-1.0, junk, junk], [-4.0, -1.0, junk]]),
        reference=torch.tensor([[-2.0, -2.5, -2.0], [-1.5, 0.0, 0.0], [-3.0, -1.0, 0.0]]),
        values=torch.zeros(3, 3),
        scores=torch.tensor([3.0, 1.0, -1.0]),
    )
    seen = {key: value.item() for key, value in describe(rollout, scored).items()}
    # Lengths 3, 1, 2 against scores 3, 1, -1: covariance 2 over norms sqrt 2 and sqrt 8.
    assert seen == pytest.approx(
        {
            "score": 1.0,
            "kl": ((1 + 0.5 - 1) + 0.5 + (-1 + 0)) / 3,
            "response_tokens": 2.0,
            "truncated_fraction": 1 / 3,
            "distinct_2": 2 / 3,  # (5 6) (6 5) (5 6)
            "length_score_correlation": 2 / (2**0.5 * 8**0.5),
        }
    )


def test_measures_of_nothing() -> None:
    ids = torch.tensor([[4, 4]])
    assert distinct_pairs(ids, torch.tensor([[True, False]])) == 1
    assert correlation(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 5.0])) == 0
    assert correlation(torch.tensor([2.0, 4.0]), torch.tensor([5.0, 1.0])) == pytest.approx(-1)


# ---- handing over --------------------------------------------------------------------------------


def logits_of(module: PPO, role: str, ids: Tensor) -> Tensor:
    with torch.no_grad(), module.roles(role) as trunk:
        return trunk.project(trunk(ids, torch.ones_like(ids, dtype=torch.bool)))


@pytest.mark.parametrize("layout", ["lora", "dynamic_lora", "perl", "hydra", "joint_hydra"])
def test_adapters_load_in_plain_peft(layout: str, hydra_trunk: Path, tmp_path: Path) -> None:
    module = tiny.hydra(hydra_trunk, layout=layout, trunk_dtype="float32")
    _, folder = tiny.fit(module, tmp_path, [tiny.prompts(6)])
    tiny.train_adapters(module)
    module.hand_over(folder)
    names = {"actor"} if layout == "joint_hydra" else {"actor", "critic"}
    assert {path.name for path in (folder / "adapters").iterdir()} == names
    ids = tiny.prompts(3, longest=1).ids.expand(3, 9).contiguous()
    for role, name in (("policy", "actor"), ("value", "critic")):
        if name not in names:
            continue
        bare = AutoModelForCausalLM.from_pretrained(hydra_trunk)
        loaded = PeftModel.from_pretrained(bare, str(folder / "adapters" / name)).eval()
        with torch.no_grad():
            theirs = loaded(input_ids=ids).logits
        ours = logits_of(module, role, ids)
        assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
        manifest = json.loads((folder / "adapters" / name / "manifest.json").read_text())
        assert manifest["trunk_fingerprint"] == module.roles.trunk(role).fingerprint()
        assert manifest["rewarded_by"] == [load_head(hydra_trunk, "reward").fingerprint()]
        assert (ours - logits_of(module, "reference", ids)).abs().max() > 0.01
    where = folder / "adapters" / ("actor" if layout == "joint_hydra" else "critic")
    head = load_head(where, "value")
    assert torch.equal(head.weight, module.roles.value_head.weight)
    assert torch.equal(head.bias, module.roles.value_head.bias)


def test_full_ppo_hands_over_trunks(hydra_trunk: Path, tmp_path: Path) -> None:
    module = tiny.hydra(hydra_trunk, layout="full", trunk_dtype="float32")
    _, folder = tiny.fit(module, tmp_path, [tiny.prompts(6, seed) for seed in range(2)])
    ids = torch.arange(3, 15).unsqueeze(0)
    mask = torch.ones_like(ids, dtype=torch.bool)
    for role, name in (("policy", "policy"), ("value", "critic")):
        stored = load_trunk(str(folder / name))
        with torch.no_grad(), stored.switch.use(OFF):
            theirs = stored.project(stored(ids, mask))
        assert_close(theirs, logits_of(module, role, ids), rtol=0, atol=0)
        assert not torch.equal(theirs, logits_of(module, "reference", ids))
    assert torch.equal(load_head(folder / "critic", "value").weight, module.roles.value_head.weight)


def test_perl_starts_from_the_reward_adapter(plain_trunk: Path, tmp_path: Path) -> None:
    reward = RewardModel(
        str(plain_trunk), tiny.LORA, optimizer=lambda params: torch.optim.AdamW(params, lr=0.02)
    )
    _, folder = tiny.fit(reward, tmp_path, [tiny.rated(8, seed) for seed in range(5)])
    where = str(folder / "adapters" / "reward")
    module = tiny.hydra(plain_trunk, layout="perl", reward=where, trunk_dtype="float32")
    rollout = module.collect(tiny.prompts(6), 0)
    scored = module.score(rollout)
    sequences = rollout.sequences()
    columns = rollout.response_mask.shape[1]
    last = sequences.prompt_tokens + rollout.response_tokens() - 1
    with torch.no_grad(), reward.trunk.switch.use("reward"):
        hidden = reward.trunk(sequences.ids, sequences.attention_mask)
        rewards = reward.heads()["reward"](hidden)
    assert_close(scored.scores, rewards[torch.arange(6), last])
    assert_close(scored.values, rewards[:, -columns - 1 : -1])
    before = tiny.weights(module)
    tiny.fit(module, tmp_path, [tiny.prompts(6, seed) for seed in range(2)])
    changed = tiny.changed(before, module)
    assert any(".critic." in name for name in changed)
    assert not any(".reward." in name or "reward_head" in name for name in changed)
