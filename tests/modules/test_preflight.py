"""Memory runs out before the first step or never, and the message says what to change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.testing import assert_close

from lightning_perl.callbacks import MemoryPreflight
from lightning_perl.data.rows import collate_rated
from lightning_perl.functional.packing import plan
from lightning_perl.modules import DPO, HydraPPO, RewardModel
from lightning_perl.modules.base import AdapterModule
from lightning_perl.rollouts.sampling import SamplingSpec
from tests.modules import tiny
from tests.modules.test_guards import Data
from tests.modules.test_packed_pairs import examples
from tests.modules.test_resume import BATCHES, MAKERS, Watch, loader_for


@pytest.mark.parametrize("kind", MAKERS)
def test_nothing_is_learned_from_the_preflight(
    kind: str, hydra_trunk: Path, tmp_path: Path
) -> None:
    runs = []
    for when in ("never", "always"):
        seed_everything(1, verbose=False)
        module, watch = MAKERS[kind](str(hydra_trunk)), Watch(tmp_path / "unused")
        trainer, _ = tiny.quiet_trainer(tmp_path, watch, MemoryPreflight(when))
        trainer.fit(module, loader_for(module))
        runs.append((module, trainer, watch, torch.get_rng_state()))
    (module, trainer, watch, rng), (again, flown, seen, later) = runs
    assert len(watch.logged) == BATCHES
    assert seen.logged == watch.logged
    assert tiny.changed(tiny.weights(module), again) == set()
    tiny.assert_equal_moments(flown, trainer)
    assert torch.equal(rng, later)
    assert again.flops > module.flops


class Enough(Exception):
    """The preflight is over."""


def over(*_: object, **__: object) -> None:
    raise Enough


def given_to(module: AdapterModule, name: str, patch: pytest.MonkeyPatch) -> list[Any]:
    """The first arguments of a method's calls."""
    method, given = getattr(module, name), list[Any]()

    def note(first: Any, *rest: Any, **options: Any) -> Any:  # noqa: ANN401
        given.append(first)
        return method(first, *rest, **options)

    patch.setattr(module, name, note)
    return given


def test_rows_are_as_long_as_data_and_sampling_allow(
    hydra_trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingSpec(max_new_tokens=6)
    module = HydraPPO(str(hydra_trunk), lora=tiny.LORA, sampling=sampling, micro_batch_size=3)
    scored, learned = (given_to(module, name, monkeypatch) for name in ("score", "update"))
    monkeypatch.setattr(module, "training_step", over)
    trainer, _ = tiny.quiet_trainer(tmp_path, MemoryPreflight("always"))
    with pytest.raises(Enough):
        trainer.fit(module, datamodule=Data("prompts", [tiny.prompts(5)], 20))
    assert scored[0].prompt_ids.shape == (5, 20 - 8)
    assert scored[0].response_mask.shape == (5, 6)
    assert bool(scored[0].prompt_mask.all() & scored[0].response_mask.all())
    assert learned[0].sequences.ids.shape == (3, 20 - 8 + 6)


def test_pairs_are_as_long_as_data_allows(
    hydra_trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = DPO(str(hydra_trunk), lora=tiny.LORA)
    seen = given_to(module, "objective", monkeypatch)
    monkeypatch.setattr(module, "training_step", over)
    trainer, _ = tiny.quiet_trainer(tmp_path, MemoryPreflight("always"))
    with pytest.raises(Enough):
        trainer.fit(module, datamodule=Data("rated", [collate_rated(examples(2, 0))], 30))
    (longest,) = seen
    assert longest.ids.shape == (4, 30)
    assert bool(longest.attention_mask.all())
    rows = longest.ids.tolist()
    assert longest.packing is not None
    assert_close(tuple(longest.packing), tuple(plan([rows[:2], rows[2:]])))
    assert longest.response_places is not None
    places = longest.response_places
    assert len(places) == int(longest.response_mask.sum()) > 2 * 4 * 10
    assert bool(longest.response_mask.flatten()[places].all())


def hungry(*_: object, **__: object) -> Tensor:
    """The CPU's own error, which has no type of its own."""
    return torch.empty(2**60)


def ppo(trunk: Path) -> AdapterModule:
    return tiny.hydra(trunk)


def reward_model(trunk: Path) -> AdapterModule:
    return RewardModel(str(trunk), tiny.LORA)


@pytest.mark.parametrize(
    ("make", "method", "words"),
    [
        (ppo, "start", "phase rollout of .*: lower sampling.batch_size"),
        (ppo, "score", "phase score of .*: lower model.score_batch_size"),
        (ppo, "value_loss", "phase critic of .*: lower model.micro_batch_size, or set model.check"),
        (ppo, "policy_loss", "phase actor of .*: lower model.micro_batch_size, or set model.check"),
        (reward_model, "objective", "phase step of .*: lower data.batch_size"),
    ],
)
@pytest.mark.parametrize("when", ["always", "never"])
def test_out_of_memory_names_the_phase_and_the_setting(
    when: Any,  # noqa: ANN401
    make: Callable[[Path], AdapterModule],
    method: str,
    words: str,
    hydra_trunk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = make(hydra_trunk)
    monkeypatch.setattr(module, method, hungry)
    trainer, _ = tiny.quiet_trainer(tmp_path, MemoryPreflight(when))
    rows = r"the longest rows .*, before the first step .*" if when == "always" else "a batch"
    words = words.replace(" of .*", f" of {rows}")
    with pytest.raises(RuntimeError, match=rf"Out of memory in the {words}.*tells what fits. \(.*"):
        trainer.fit(module, tiny.Batches(tiny.batches_for(module)))
    assert trainer.global_step == 0


def test_out_of_memory_in_validation_is_the_held_out_batch_s(
    hydra_trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = reward_model(hydra_trunk)
    monkeypatch.setattr(module, "validation_step", hungry)
    with pytest.raises(RuntimeError, match=r"phase validation of a batch: lower data.val_batch_si"):
        tiny.fit(module, tmp_path, [tiny.rated(4)], held_out=[tiny.rated(4)])
