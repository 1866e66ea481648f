"""What PPO-max and LoRA-RLHF add to PPO: normalized scores, the critic's warm-up, the KL's control."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_perl.batches import MixedBatch, PairBatch, RatedBatch
from lightning_perl.data.rows import collate_pairs
from lightning_perl.functional.logprobs import jensen_shannon, k2, k3
from lightning_perl.modules import JointHydraPPO
from lightning_perl.modules.evaluation import given
from lightning_perl.modules.on_policy import KLControl, seen
from tests.functional.test_kl import Estimator
from tests.modules import tiny
from tests.modules.test_packed_pairs import examples


@pytest.mark.parametrize(("mode", "shift"), [("scale", 0.0), ("standardize", 1.0)])
def test_scores_are_normalized_by_all_that_were_seen(
    mode: str, shift: float, hydra_trunk: Path
) -> None:
    module = tiny.hydra(hydra_trunk, score_normalization=mode, score_clip=0.8)
    rollouts = [torch.tensor(scores).double() for scores in ([5.0], [3.0, -4.0, 7.5], [1.0, 2.0])]
    stopped = torch.ones(3, dtype=torch.bool)
    assert_close(module.shaped_scores(rollouts[1], stopped), rollouts[1].clamp(-0.8, 0.8))
    for scores in rollouts:
        module.score_moments = seen(module.score_moments, scores)
    infinite = torch.tensor([float("nan"), float("inf")])
    module.score_moments = seen(module.score_moments, infinite)
    every = torch.cat(rollouts)
    normalized = (rollouts[1] - shift * every.mean()) / every.std(unbiased=False)
    assert_close(module.shaped_scores(rollouts[1], stopped), normalized.clamp(-0.8, 0.8))


def test_one_score_has_no_spread_to_be_divided_by(hydra_trunk: Path) -> None:
    module = tiny.hydra(hydra_trunk, score_normalization="standardize")
    module.score_moments = seen({}, torch.tensor([3.0, 3.0]))
    assert module.shaped_scores(torch.tensor([3.0]), torch.ones(1, dtype=torch.bool)).item() == 3.0


def test_kl_is_steered_to_its_target(hydra_trunk: Path) -> None:
    module = tiny.hydra(hydra_trunk, kl_coef=0.5, kl_control=KLControl(target=4.0, horizon=100))
    expected = 0.5
    # Too much KL by a tenth, by far more than a fifth, and too little; a KL that is no number changes nothing.
    for kl, error in ((4.4, 0.1), (40.0, 0.2), (1.0, -0.2), (float("nan"), 0.0)):
        stats = module._steer(kl, 20)
        expected *= 1 + error * 20 / 100
        assert stats["kl_coef"].item() == pytest.approx(expected)
    # However many episodes a rollout has, the weight stays positive; and nothing is steered that did not learn.
    assert KLControl(target=6.0, horizon=100).steered(0.05, 0.0, 1024) == pytest.approx(0.04)
    module.critic_warmup = 1
    assert module._steer(40.0, 20) == {}
    fixed = tiny.hydra(hydra_trunk, kl_coef=0.5)
    assert fixed._steer(40.0, 20) == {}
    assert fixed.steered_kl_coef == 0.5


@pytest.mark.parametrize("estimator", [k2, k3, jensen_shannon])
def test_rewards_and_the_loss_by_hand(estimator: Estimator, hydra_trunk: Path) -> None:
    options = {"gae_lambda": 1.0, "kl_coef": 0.5, "whiten_advantages": False}
    module = tiny.hydra(hydra_trunk, kl_control=KLControl(estimator.__name__), **options)  # type: ignore[arg-type]
    tiny.train_adapters(module)
    rollout = module.collect(tiny.prompts(5), 0)
    scored, mask = module.score(rollout), rollout.response_mask
    experience, _ = module.experience(rollout, scored)
    kl = torch.where(mask, estimator(scored.logprobs, scored.reference), 0.0)
    assert_close(given(experience.returns)[:, 0], scored.scores - 0.5 * kl.sum(1))

    bold = tiny.hydra(hydra_trunk, entropy_coef=0.3, advantage_clip=0.05, **options)
    tiny.train_adapters(bold)
    clipped, _ = bold.experience(rollout, scored)
    assert clipped.advantages.abs().max() == 0.05
    with_bonus, steps = tiny.rehearse(bold, clipped)
    bold.entropy_coef, bold.entropy_gradient = 0.0, False
    without, plain_steps = tiny.rehearse(bold, clipped)
    bonus = 0.3 * with_bonus["entropy"]
    assert_close(with_bonus["policy_loss"], without["policy_loss"] - bonus)
    actors = [key for key in steps[0] if ".actor." in key]
    assert any(not torch.equal(steps[0][key], plain_steps[0][key]) for key in actors)


def test_at_first_only_the_critic_learns(hydra_trunk: Path, tmp_path: Path) -> None:
    module = tiny.hydra(hydra_trunk, trunk_dtype="float32", critic_warmup=1, ppo_epochs=2)
    names = []
    for folder, rollouts in (("first", 1), ("second", 2)):
        before = tiny.weights(module)
        batches = [tiny.prompts(6, seed) for seed in range(rollouts)]
        tiny.fit(module, tmp_path / folder, batches[-1:])
        names.append({name.split(".")[-2] for name in tiny.changed(before, module)})
    assert names == [{"critic", "value_head"}, {"actor", "critic", "value_head"}]
    with pytest.raises(ValueError, match="critic_warmup needs a critic of its own; layout joint_h"):
        JointHydraPPO(str(hydra_trunk), critic_warmup=1)


def test_texts_are_imitated_beside_every_step(hydra_trunk: Path) -> None:
    module = tiny.hydra(hydra_trunk, lm_weight=0.4, ppo_epochs=2, minibatch_size=3)
    tiny.train_adapters(module)
    _, experience = tiny.experienced(module, tiny.prompts(6))
    texts = tiny.rated(5, seed=3)
    assert 0 < texts.imitate.sum() < 5
    plain, without = tiny.rehearse(module, experience)
    optimizer = torch.optim.SGD(module.parameter_groups(), lr=0.0)
    steps: list[dict[str, Tensor]] = []

    def record(*_: object) -> None:
        named = module.named_parameters()
        steps.append({name: one.grad.clone() for name, one in named if one.grad is not None})

    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.register_step_pre_hook(record)
    stats = module.update(experience, optimizer, texts=texts)
    # The same texts through the trunk's own forward, one by one.
    trunk, total = module.policy_trunk, torch.zeros((), dtype=torch.float64)
    counted = texts.response_mask & texts.imitate.unsqueeze(1)
    with module.roles("policy"):
        for ids, seen, mask in zip(texts.ids, texts.attention_mask, counted, strict=True):
            hidden = trunk(ids[None], seen[None])
            logits = trunk.project(hidden)[0].log_softmax(-1)
            total = total - logits[:-1].gather(1, ids[1:, None])[:, 0][mask[1:]].sum()
    loss = total / counted.sum()
    assert_close(stats["lm_loss"], loss.detach())
    actor = [name for name in steps[0] if ".actor." in name]
    extra = torch.autograd.grad(loss, [dict(module.named_parameters())[name] for name in actor])
    assert len(steps) == len(without) == 4
    for step, before in zip(steps, without, strict=True):
        for name, gradient in zip(actor, extra, strict=True):
            assert_close(step[name], before[name] + 0.4 * gradient)
        assert all(torch.equal(step[name], before[name]) for name in step if name not in actor)
    assert plain["policy_loss"] == stats["policy_loss"]


@pytest.mark.parametrize(
    ("weight", "texts", "words"),
    [
        (0.0, tiny.rated(2), "0, and the data gives texts"),
        (0.1, None, "0.1, and the data gives no texts"),
        (
            0.0,
            collate_pairs(examples(2, 1)),
            "PPO learns no pairs beside its own responses; INPO does",
        ),
    ],
)
def test_texts_without_a_weight_and_a_weight_without_texts(
    weight: float, texts: RatedBatch | PairBatch | None, words: str, hydra_trunk: Path
) -> None:
    module = tiny.hydra(hydra_trunk, lm_weight=weight)
    prompts = tiny.prompts(2)
    with pytest.raises(ValueError, match=words):
        module.on_train_batch_start(MixedBatch(prompts, texts) if texts else prompts, 0)


def test_a_checkpoint_of_0_2_is_read_which_names_the_control_by_an_earlier_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "lightning_perl.modules.running"
    with monkeypatch.context() as then:
        then.setitem(sys.modules, place, ModuleType(place))
        then.setattr(sys.modules[place], "KLControl", KLControl, raising=False)
        then.setattr(KLControl, "__module__", place)
        torch.save({"kl_control": KLControl(target=4.0)}, tmp_path / "old.ckpt")
    stored = torch.load(tmp_path / "old.ckpt", weights_only=True)
    assert stored == {"kl_control": KLControl(target=4.0)}
