"""Model FLOPs in closed form against torch's counter of the products that really ran."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_perl.batches import RatedBatch
from lightning_perl.callbacks import SpeedMonitor
from lightning_perl.functional.packing import plan
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.modules import PPO, SFT, Reinforce, RewardModel
from lightning_perl.modules.base import AdapterModule
from lightning_perl.modules.supervised import Supervised
from tests.modules import tiny

Result = TypeVar("Result")
RANK = 3
LORA = LoraSpec(rank=RANK, alpha=4.0)
LAYOUTS = ("full", "lora", "dynamic_lora", "perl", "hydra", "joint_hydra")


def addmm_in_place(_: object, left: list[int], right: list[int], **__: object) -> int:
    """FLOPs of ``x.addmm_(left, right)``, which torch's counter leaves out."""
    return 2 * left[0] * left[1] * right[1]


class NoModules:
    """torch's counter without its hooks on modules, which an ``autograd.grad`` inside a forward breaks."""

    parents = ("Global",)

    def __enter__(self) -> NoModules:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def both(module: AdapterModule, work: Callable[[], Result]) -> tuple[Result, int, int]:
    """What ``work`` gives, the FLOPs that the module counted, and those that ran."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_in_place})
    counter.mod_tracker = NoModules()  # type: ignore[assignment]
    before = module.flops
    with counter:
        result = work()
    return result, module.flops - before, counter.get_total_flops()


def first_inputs(tokens: int) -> int:
    """Gradients of the first block's input, which nobody needs: three projections of Llama's."""
    out = tiny.HIDDEN * 2  # queries as wide as the states, keys and values half
    return 2 * tokens * tiny.HIDDEN * (out + 3 * RANK)


def ppo(trunk: Path, layout: str, **options: Any) -> PPO:
    settings: dict[str, Any] = {
        "layout": layout,
        "lora": LORA,
        "sampling": tiny.SAMPLING,
        "attention": "eager",
        **options,
    }
    return PPO(str(trunk), ppo_epochs=2, micro_batch_size=3, **settings)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_phase_of_an_iteration(hydra_trunk: Path, layout: str) -> None:
    module = ppo(hydra_trunk, layout)
    optimizer = tiny.one_optimizer(module)
    rollout, counted, ran = both(module, lambda: module.collect(tiny.prompts(6), 0))
    assert counted == ran > 0

    scored, counted, ran = both(module, lambda: module.score(rollout, by_length=False))
    positions, rows = rollout.response_ids.numel(), len(rollout.row)
    assert counted + 2 * tiny.HIDDEN * (positions + rows) == ran  # the two scalar heads

    experience, _ = module.experience(rollout, scored)
    _, counted, ran = both(module, lambda: module.update(experience, optimizer, by_length=False))
    value_head = 2 * 3 * 2 * tiny.HIDDEN * positions  # two epochs, forward and both gradients
    if layout == "full":
        again = 2 * 2 * positions * tiny.WORDS * tiny.HIDDEN  # logits made again in backward
        assert counted + value_head + again == ran
        return
    passes = 2 * (1 if layout == "joint_hydra" else 2)
    unneeded = passes * first_inputs(experience.sequences.ids.numel())
    assert counted + value_head - unneeded == ran


def test_length_buckets_save_flops_by_the_columns_they_cut(hydra_trunk: Path) -> None:
    module = ppo(hydra_trunk, "hydra", score_batch_size=1)
    rollout = module.collect(tiny.prompts(6), 0)
    _, plain, _ = both(module, lambda: module.score(rollout, by_length=False))
    _, counted, ran = both(module, lambda: module.score(rollout))
    assert counted < plain
    assert counted == pytest.approx(ran, rel=2e-3)


def test_what_is_computed_again_is_no_model_flop(hydra_trunk: Path) -> None:
    counts = []
    for checkpointing in (False, True):
        module = ppo(hydra_trunk, "hydra", checkpointing=checkpointing)
        _, experience = tiny.experienced(module, tiny.prompts(6))
        optimizer = tiny.one_optimizer(module)
        update = partial(module.update, experience, optimizer)
        counts.append(both(module, update)[1:])
    (counted, ran), (counted_again, ran_again) = counts
    assert counted_again == counted
    assert ran_again > 1.2 * ran


def learn(module: Supervised, batch: RatedBatch) -> Tensor:
    with module.trunk.training_pass():
        loss, _ = module.objective(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


@pytest.mark.parametrize(
    ("trunk", "lora"),
    # GPT-2 keeps its weights the other way round.
    [("plain_trunk", None), ("plain_trunk", LORA), ("gpt2_trunk", None)],
    ids=["full", "lora", "gpt2"],
)
def test_supervised_fine_tuning(
    trunk: str, lora: LoraSpec | None, request: pytest.FixtureRequest
) -> None:
    module = SFT(str(request.getfixturevalue(trunk)), lora=lora, attention="eager")
    batch = tiny.rated(5)
    _, counted, ran = both(module, lambda: learn(module, batch))
    positions = 5 * (batch.ids.shape[1] - batch.prompt_tokens)
    if lora is None:
        assert counted + 2 * positions * tiny.WORDS * tiny.HIDDEN == ran  # logits made again
    else:
        assert counted - first_inputs(batch.ids.numel()) == ran


@pytest.mark.parametrize("shared", [False, True])
def test_reward_model_on_pairs(plain_trunk: Path, shared: bool) -> None:
    module = RewardModel(str(plain_trunk), lora=LORA, share_prompts=shared, attention="eager")
    batch = tiny.rated(4, pairs=2)
    batch.ids[1::2, :2] = batch.ids[::2, :2]  # a pair's prompt
    rows = [row[mask].tolist() for row, mask in zip(batch.ids, batch.attention_mask, strict=True)]
    groups = [[rows[int(number)] for number in pair] for pair in batch.pairs]
    batch = batch._replace(packing=plan(groups))
    before = module.flops
    assert module.trunk.packs(batch.ids.shape[1])
    assert module.flops == before  # trying it out is no work of the module's
    _, counted, ran = both(module, lambda: learn(module, batch))
    packing = batch.packing
    assert packing is not None
    tokens = packing.lines * packing.columns if shared else batch.ids.numel()
    head = 3 * 2 * tiny.HIDDEN * len(batch.ids)
    assert counted + head - first_inputs(tokens) == ran


def test_throughput_in_the_log(hydra_trunk: Path, tmp_path: Path) -> None:
    rl = Reinforce(str(hydra_trunk), "hydra", lora=tiny.LORA, sampling=tiny.SAMPLING)
    monitor = SpeedMonitor(peak_tflops=0.5)
    logged = tiny.fit(rl, tmp_path, [tiny.prompts(4)], monitor).trainer.logged_metrics
    tokens = {f"speed/{phase}_tokens_per_second" for phase in ("rollout", "score", "update")}
    tflops = {f"speed/{phase}_tflops" for phase in ("rollout", "score", "actor", "critic")}
    assert all(logged[key] > 0 for key in tokens | tflops)
    whole = logged["speed/seconds_per_episode"] * 4
    assert logged["speed/tflops"] == pytest.approx(float(rl.flops / whole / 1e12), rel=1e-5)
    assert logged["speed/mfu"] == pytest.approx(float(logged["speed/tflops"]) / 0.5)

    module, batch = SFT(str(hydra_trunk), lora=tiny.LORA), tiny.rated(4)
    monitor = SpeedMonitor(peak_tflops=0.5)
    logged = tiny.fit(module, tmp_path, [batch], monitor).trainer.logged_metrics
    read = logged["speed/step_tokens_per_second"] * logged["speed/step_seconds"]
    assert float(read) == pytest.approx(int(batch.attention_mask.sum()), rel=1e-5)
    assert 0 < logged["speed/mfu"] < 1
