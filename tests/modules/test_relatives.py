"""PPO's relatives: a step against transformers and PEFT alone, what they keep and refuse, that they learn."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lightning_perl import modules
from lightning_perl.batches import RatedBatch
from lightning_perl.data.rows import collate_pairs, collate_rated
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.modules import (
    DPO,
    GRPO,
    INPO,
    IPO,
    KTO,
    RAFT,
    RDPO,
    RLOO,
    Reinforce,
    ReMax,
    SuperHF,
)
from lightning_perl.modules.actor_critic import ActorCritic
from lightning_perl.modules.evaluation import given
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.modules.pairwise import Pairwise
from lightning_perl.modules.selecting import KEPT_FILE, Selecting, kept_rows
from lightning_perl.rollouts.rollout import Experience, Rollout
from lightning_perl.rollouts.sampling import SamplingSpec
from tests.modules import tiny
from tests.modules.test_packed_pairs import examples
from tests.modules.test_pairwise_floor import assert_gradients_of, summed

ON_POLICY = [GRPO, INPO, RAFT, RLOO, Reinforce, ReMax, SuperHF]
PAIRWISE = [DPO, IPO, KTO, RDPO]


def make(kind: type[OnPolicy], trunk: Path, **options: Any) -> OnPolicy:
    samples = {} if kind in (Reinforce, ReMax) else {"samples": 3}
    return tiny.on_policy(kind, trunk, **{"micro_batch_size": 4, **samples, **options})


class Twin(NamedTuple):
    """What a PEFT model in float64 says of rollouts: log-probabilities of tokens, and whole distributions."""

    policy: Tensor
    reference: Tensor
    policy_whole: Tensor
    reference_whole: Tensor
    model: PeftModel


def twin_of(module: OnPolicy, rollout: Rollout, trunk: Path, folder: Path) -> Twin:
    module.hand_over(folder)
    bare = AutoModelForCausalLM.from_pretrained(trunk, dtype=torch.float64).train(False)
    rows, tokens = rollout.sequences(), rollout.response_ids.shape[1]

    def whole(model: torch.nn.Module) -> Tensor:
        mask = rows.attention_mask.long()
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=rows.ids, attention_mask=mask, position_ids=places).logits
        answer: Tensor = logits[:, -tokens - 1 : -1].log_softmax(-1)
        return answer

    def chosen(distributions: Tensor) -> Tensor:
        return distributions.gather(-1, rollout.response_ids[..., None])[..., 0]

    reference = whole(bare).detach()
    adapter = str(folder / "adapters/actor")
    model = PeftModel.from_pretrained(bare, adapter, is_trainable=True).train(False)
    policy = whole(model)
    return Twin(chosen(policy), chosen(reference), policy, reference, model)


def grpo_loss(module: GRPO, twin: Twin, experience: Experience, scores: Tensor) -> Tensor:
    mask, old = experience.sequences.response_mask, experience.old_logprobs
    if module.kl_in_reward:
        scores = scores - module.kl_coef * ((twin.policy - twin.reference).detach() * mask).sum(1)
    losses = []
    for row, score in enumerate(scores):
        group = scores[row // 3 * 3 : row // 3 * 3 + 3]
        advantage = score - group.mean()
        if module.scale_by_group:
            advantage = advantage / (group.std() + 1e-4)
        ratio = (twin.policy - old)[row][mask[row]].exp()
        high = module.clip_range_high or module.clip_range
        clipped = ratio.clamp(1 - module.clip_range, 1 + high)
        terms = -torch.minimum(ratio * advantage, clipped * advantage)
        if not module.kl_in_reward:
            gap = (twin.reference - twin.policy)[row][mask[row]]
            terms = terms + module.kl_coef * (gap.exp() - 1 - gap)
        losses.append(terms)
    if module.token_mean:
        return torch.cat(losses).mean()
    return torch.stack([terms.mean() for terms in losses]).mean()


def best(scores: Tensor) -> list[int]:
    return [start + int(scores[start : start + 3].argmax()) for start in range(0, len(scores), 3)]


def raft_loss(module: RAFT, twin: Twin, experience: Experience, scores: Tensor) -> Tensor:
    mask = ROLLOUTS[-1].response_mask
    return -torch.cat([twin.policy[row][mask[row]] for row in best(scores)]).mean()


def superhf_loss(module: SuperHF, twin: Twin, experience: Experience, scores: Tensor) -> Tensor:
    mask = ROLLOUTS[-1].response_mask
    kl = (twin.reference_whole.exp() * (twin.reference_whole - twin.policy_whole)).sum(-1)
    rows = [(module.kl_coef * kl[row] - twin.policy[row])[mask[row]].mean() for row in best(scores)]
    return torch.stack(rows).mean()


def inpo_loss(module: INPO, twin: Twin, experience: Experience, scores: Tensor) -> Tensor:
    mask, old = ROLLOUTS[-1].response_mask, experience.old_logprobs.view(4, 2, -1)
    losses = []
    for pair, better in enumerate(best(scores)):
        start = better // 3 * 3
        worse = start + int(scores[start : start + 3].argmin())
        sums = [
            (part[better] * mask[better]).sum() - (part[worse] * mask[worse]).sum()
            for part in (twin.policy, twin.reference)
        ]
        before = (old[pair, 0] * mask[better]).sum() - (old[pair, 1] * mask[worse]).sum()
        share = module.tau / module.eta
        h = sums[0] - share * sums[1] - (1 - share) * before
        losses.append((h - 1 / (2 * module.eta)) ** 2)
    return torch.stack(losses).mean()


ROLLOUTS: list[Rollout] = []
STEPS: dict[str, tuple[type[OnPolicy], dict[str, Any], Callable[..., Tensor]]] = {
    "GRPO": (GRPO, {}, grpo_loss),
    "GRPO of DAPO": (
        GRPO,
        {"token_mean": True, "scale_by_group": False, "clip_range_high": 0.28},
        grpo_loss,
    ),
    "GRPO, KL in the reward": (GRPO, {"kl_in_reward": True, "kl_coef": 0.3}, grpo_loss),
    "RAFT": (RAFT, {"epochs": 1}, raft_loss),
    "SuperHF": (SuperHF, {}, superhf_loss),
    "INPO": (INPO, {"eta": 0.5, "tau": 0.2}, inpo_loss),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_against_transformers_and_peft(name: str, gpt2_trunk: Path, tmp_path: Path) -> None:
    kind, options, loss_of = STEPS[name]
    trunk = tiny.with_head(gpt2_trunk, tmp_path / "trunk")
    module = make(kind, trunk, **options)
    tiny.train_adapters(module)
    rollout = module.collect(tiny.prompts(4), 0, samples=3)
    ROLLOUTS.append(rollout)
    scored = module.score(rollout)
    experience, _ = module.experience(rollout, scored)
    if kind in (GRPO, INPO):
        # As in a later epoch: the policy has moved, ratios are clipped.
        moved = 0.3 * torch.sin(torch.arange(experience.old_logprobs.numel()).double())
        old = experience.old_logprobs + moved.view_as(experience.old_logprobs)
        experience = experience._replace(old_logprobs=old)
    twin = twin_of(module, rollout, trunk, tmp_path)
    expected = loss_of(module, twin, experience, scored.scores)
    expected.backward()  # type: ignore[no-untyped-call]
    for size in (2, 3, 100):
        module.micro_batch_size = size
        stats, (gradients,) = tiny.rehearse(module, experience)
        assert_close(stats["policy_loss"], expected.detach(), rtol=1e-9, atol=1e-10)
        assert_gradients_of(twin.model, gradients, rtol=1e-7, atol=1e-9)


def test_inpo_learns_pairs_of_the_data_beside_its_own(gpt2_trunk: Path, tmp_path: Path) -> None:
    trunk = tiny.with_head(gpt2_trunk, tmp_path / "trunk")
    module = make(INPO, trunk, eta=0.5, tau=0.2)
    assert isinstance(module, INPO)
    tiny.train_adapters(module)
    rollout = module.collect(tiny.prompts(4), 0, samples=3)
    ROLLOUTS.append(rollout)
    scored = module.score(rollout)
    own, _ = module.experience(rollout, scored)
    rows = [example for example in examples(9, 2) if len(example.rows) == 2]
    experience, left = module.with_pairs(own, collate_pairs(rows))
    assert left is None
    assert len(experience.old_logprobs) == 8 + 2 * len(rows)
    twin = twin_of(module, rollout, trunk, tmp_path)
    batch = collate_rated(rows)
    bare = AutoModelForCausalLM.from_pretrained(trunk, dtype=torch.float64).train(False)
    policy, reference = (
        better - worse
        for better, worse in (
            summed(model, batch)[batch.pairs].unbind(1) for model in (twin.model, bare)
        )
    )
    h = policy - 0.4 * reference.detach() - 0.6 * policy.detach()
    losses = [4 * inpo_loss(module, twin, own, scored.scores), ((h - 1) ** 2).sum()]
    expected = torch.stack(losses).sum() / (4 + len(rows))
    expected.backward()  # type: ignore[no-untyped-call]
    for size in (2, 100):
        module.micro_batch_size = size
        stats, (gradients,) = tiny.rehearse(module, experience)
        assert_close(stats["policy_loss"], expected.detach(), rtol=1e-9, atol=1e-10)
        assert_gradients_of(twin.model, gradients, rtol=1e-7, atol=1e-9)


def test_remax_pays_what_is_above_the_greedy_response(hydra_trunk: Path) -> None:
    module = make(ReMax, hydra_trunk, kl_coef=0.0)
    rollout = module.collect(tiny.prompts(4), 0)
    scored = module.score(rollout)
    baseline = torch.tensor([0.5, float(scored.scores[1]), -1.0, 2.0], dtype=torch.float64)
    experience, stats = module.experience(rollout, scored._replace(baseline=baseline))
    expected = (scored.scores - baseline).unsqueeze(1) * rollout.response_mask
    assert_close(experience.advantages, expected)
    assert not experience.advantages[1].any()
    assert stats["baseline"] == baseline.mean()


def test_what_is_kept_is_the_best_of_its_own_prompt() -> None:
    ranks = torch.tensor([1.0, 3.0, 2.0, 9.0, 9.0, 9.0, -1.0, -5.0, -2.0])
    assert kept_rows(ranks, 3, worst=False).tolist() == [1, 3, 6]
    assert kept_rows(ranks, 3, worst=True).tolist() == [1, 0, 3, 3, 6, 7]


def test_the_kl_to_the_reference_counts_in_the_ranking(hydra_trunk: Path) -> None:
    module = make(RAFT, hydra_trunk, rank_kl_coef=10.0)
    tiny.train_adapters(module)
    rollout = module.collect(tiny.prompts(4), 0, samples=3)
    scored = module.score(rollout)
    kl = ((scored.logprobs - scored.reference) * rollout.response_mask).sum(1)
    rows = best(scored.scores - 10.0 * kl)
    assert rows != best(scored.scores)
    experience, stats = module.experience(rollout, scored)
    assert torch.equal(experience.sequences.response_ids, rollout.response_ids[rows])
    assert torch.equal(given(experience.reference), scored.reference[rows])
    assert stats["best_score"] == scored.scores[rows].mean()


def test_what_was_kept_lies_in_the_run(hydra_trunk: Path, tmp_path: Path) -> None:
    module = make(INPO, hydra_trunk)
    _, folder = tiny.fit(module, tmp_path, [tiny.prompts(4, seed) for seed in range(2)])
    rows = [json.loads(line) for line in (folder / KEPT_FILE).read_text().splitlines()]
    assert len(rows) == 2 * 4 * 2
    assert [row["rollout"] for row in rows] == [0] * 8 + [1] * 8
    assert [row["row"] for row in rows[:8]] == [0, 0, 1, 1, 2, 2, 3, 3]
    for better, worse in zip(rows[::2], rows[1::2], strict=True):
        assert better["prompt"] == worse["prompt"]
        assert better["score"] >= worse["score"]
    assert module.episodes == 24


# ---- pairs and thumbs ----------------------------------------------------------------------------


def test_thumbs_against_transformers_and_peft(gpt2_trunk: Path, tmp_path: Path) -> None:
    batch = collate_rated(examples(8, 1))  # pairs, and thumbs that are in no pair
    module = KTO(
        str(gpt2_trunk),
        lora=tiny.LORA,
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.7,
        trunk_dtype="float64",
    )
    tiny.train_adapters(module)
    module.hand_over(tmp_path)
    width, others = batch.ids.shape[1], []
    starts = batch.response_mask.long().argmax(1).tolist()
    lengths = batch.attention_mask.sum(1).tolist()
    for row in range(len(batch.ids)):
        answer = (row + 1) % len(batch.ids)
        ids = [*batch.ids[row, : starts[row]], *batch.ids[answer, starts[answer] : lengths[answer]]]
        others.append((ids[:width], starts[row]))
    padded = torch.zeros_like(batch.ids)
    real, answers = torch.zeros_like(batch.attention_mask), torch.zeros_like(batch.response_mask)
    for row, (ids, start) in enumerate(others):
        padded[row, : len(ids)] = torch.tensor(ids)
        real[row, : len(ids)], answers[row, start : len(ids)] = True, True
    mismatched = batch._replace(ids=padded, attention_mask=real, response_mask=answers)
    bare = AutoModelForCausalLM.from_pretrained(gpt2_trunk, dtype=torch.float64).train(False)
    references = [summed(bare, rows).detach() for rows in (batch, mismatched)]
    policy = PeftModel.from_pretrained(bare, str(tmp_path / "adapters/actor"), is_trainable=True)
    policy.train(False)
    anchor = (summed(policy, mismatched) - references[1]).mean().clamp(min=0).detach()
    gains = 0.3 * (summed(policy, batch) - references[0] - anchor)
    losses = []
    chosen, rejected = batch.pairs[:, 0].tolist(), batch.pairs[:, 1].tolist()
    for row, gain in enumerate(gains):
        up = row in chosen or (bool(batch.labelled[row]) and float(batch.label[row]) > 0.5)
        if up or row in rejected or bool(batch.labelled[row]):
            losses.append(1.2 * torch.sigmoid(-gain) if up else 0.7 * torch.sigmoid(gain))
    expected = torch.stack(losses).mean()
    expected.backward()  # type: ignore[no-untyped-call]
    loss, stats = module.objective(batch)
    assert_close(loss, expected, rtol=0, atol=1e-12)
    assert_close(stats["anchor"], anchor, rtol=0, atol=1e-12)
    assert_gradients_of(policy, tiny.gradients_of(module, batch))


def test_length_is_taken_off_what_the_winner_earned(gpt2_trunk: Path) -> None:
    batch = collate_rated(examples(8, 1))
    lengths = batch.response_mask.sum(1)[batch.pairs]
    assert (lengths[:, 0] != lengths[:, 1]).any()
    settings: dict[str, Any] = {"lora": tiny.LORA, "beta": 0.3, "trunk_dtype": "float64"}
    free = RDPO(str(gpt2_trunk), alpha=0.0, **settings)
    paid = RDPO(str(gpt2_trunk), alpha=0.5, **settings)
    smooth = DPO(str(gpt2_trunk), label_smoothing=0.2, **settings)
    plain = DPO(str(gpt2_trunk), **settings)
    assert_close(free.objective(batch)[0], plain.objective(batch)[0])
    # Fresh adapters: every log-ratio is 0, so the margin is the length's part alone.
    offset = 0.5 * (lengths[:, 0] - lengths[:, 1]).double()
    expected = torch.nn.functional.softplus(-offset).mean()
    assert_close(paid.objective(batch)[0], expected)
    assert_close(smooth.objective(batch)[0], plain.objective(batch)[0])


@pytest.mark.parametrize("kind", PAIRWISE)
def test_a_policy_learns_whom_to_prefer(
    kind: type[Pairwise], gpt2_trunk: Path, tmp_path: Path
) -> None:
    batches: list[RatedBatch] = [
        tiny.rated(8, seed, pairs=0 if kind is KTO else 4) for seed in (1, 2)
    ]
    module = kind(
        str(gpt2_trunk),
        lora=tiny.LORA,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.02),
    )
    run = tiny.fit(module, tmp_path, batches, max_epochs=15)
    (logged,) = run.trainer.validate(module, tiny.Batches(batches), verbose=False)
    measure = "val/auroc" if kind is KTO else "val/accuracy"
    assert logged[measure] > 0.85
    assert {"val/loss", "val/ece"} <= logged.keys()
    assert (run.folder / "adapters/actor/adapter_config.json").is_file()
    scores = torch.cat([module.predict_step(batch, 0)["score"] for batch in batches])
    assert len(scores) == 16


# ---- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ON_POLICY)
def test_a_policy_learns_what_the_reward_likes(kind: type[OnPolicy], tmp_path: Path) -> None:
    trunk = tiny.save_trunk(tmp_path / "trunk", hidden=32, spread=0.02)
    options: dict[str, Any] = {"micro_batch_size": 64, "trunk_dtype": "float32"}
    options |= {"eta": 0.05} if kind is INPO else {}
    module = make(
        kind,
        trunk,
        **options,
        lora=LoraSpec(4, 8.0),
        max_grad_norm=1.0,
        sampling=SamplingSpec(max_new_tokens=3),
        learned_reward_weight=0.0,
        reward_function=lambda prompts, responses, rows: [
            float("w5" in r.split()) for r in responses
        ],
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.02),
    )
    scores: list[float] = []
    account = module._account

    def keep(*arguments: Any) -> dict[str, Any]:
        scores.append(float(arguments[2]["score"]))
        return account(*arguments)

    module._account = keep  # type: ignore[method-assign, assignment]
    tiny.fit(module, tmp_path / "runs", [tiny.prompts(32, seed, longest=3) for seed in range(15)])
    early, late = sum(scores[:2]) / 2, sum(scores[-2:]) / 2
    assert early < 0.25
    assert late > early + 0.3, scores


LEAVES = [getattr(modules, name) for name in modules.__all__]


@pytest.mark.parametrize("leaf", [kind for kind in LEAVES if issubclass(kind, OnPolicy | Pairwise)])
def test_leaves_fill_holes_and_override_nothing(leaf: type[OnPolicy | Pairwise]) -> None:
    skeletons = (Selecting, ActorCritic, OnPolicy, Pairwise)
    skeleton = next(kind for kind in skeletons if issubclass(leaf, kind))
    inherited = {
        name
        for base in skeleton.__mro__
        for name, member in vars(base).items()
        if callable(member) and not name.startswith("_")
    }
    again = {name for name in vars(leaf) if name in inherited}
    holes = set(skeleton.__abstractmethods__)
    assert again <= holes


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (GRPO, {"minibatch_size": 4}, r"multiple of samples \(3\)"),
        (INPO, {"tau": 0.1, "eta": 0.1}, "tau must be below eta, got tau 0.1"),
        (INPO, {"micro_batch_size": 1}, "micro_batch_size must be at least 2; got 1"),
        (INPO, {"minibatch_size": 3}, r"multiple of the kept \(2\)"),
        (ReMax, {"sampling": SamplingSpec(top_p=0.9)}, "must be the distribution that is scored"),
        (ReMax, {"layout": "joint_hydra"}, "ReMax trains no critic. Use layout hydra"),
    ],
)
def test_refused_on_policy(
    kind: type[OnPolicy], options: dict[str, Any], words: str, hydra_trunk: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        make(kind, hydra_trunk, **options)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (DPO, {"lora": None}, "has its reference in the trunk without the adapter"),
    ],
)
def test_refused_pairwise(
    kind: type[Pairwise], options: dict[str, Any], words: str, gpt2_trunk: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        kind(str(gpt2_trunk), **options)


def test_the_method_of_the_docs_trains(hydra_trunk: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/adding_a_method.md").read_text(encoding="utf-8")
    source = tmp_path / "my_methods.py"
    source.write_text(page.split("```python\n")[1].split("```")[0], encoding="utf-8")
    spec = importlib.util.spec_from_file_location("my_methods", source)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    module = found.BatchMean(
        str(hydra_trunk), lora=tiny.LORA, sampling=tiny.SAMPLING, trunk_dtype="float64"
    )
    _, experience = tiny.experienced(module, tiny.prompts(4))
    assert abs(float(experience.advantages[:, 0].sum())) < 1e-12
    _, folder = tiny.fit(module, tmp_path, [tiny.prompts(4)])
    assert (folder / "adapters/actor").is_dir()
    with pytest.raises(ValueError, match=r"BatchMean\.kl_coef must be at least 0"):
        found.BatchMean(str(hydra_trunk), kl_coef=-1.0)
