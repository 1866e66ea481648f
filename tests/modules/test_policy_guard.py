"""A policy that leaves its reference, or games its reward, is taken back; and a resumed run does the same."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from lightning_perl.callbacks import PolicyGuard
from lightning_perl.callbacks.policy_guard import signs_of_hacking
from lightning_perl.modules import SFT, Reinforce
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.rollouts.sampling import SamplingSpec
from tests.callbacks.phased import Phased, Rows, quiet_trainer
from tests.modules import tiny
from tests.modules.test_resume import KilledError, Watch

CEILING = 4.0
ROLLOUTS = 14


def words(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[int]) -> list[float]:
    """A reward that is easily gamed: it pays length, whatever the answer says."""
    return [float(len(response.split())) for response in responses]


def play(
    trunk: Path, root: Path, guard: PolicyGuard, watch: Watch, **options: Any
) -> tuple[OnPolicy, Trainer, Path]:
    """Learns from the gameable reward with a learning rate that is far too high."""
    module = Reinforce(
        str(trunk),
        lora=tiny.LORA,
        sampling=SamplingSpec(max_new_tokens=12),
        reward_function=words,
        learned_reward_weight=0.0,
        beta=0.05,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.0),
        micro_batch_size=16,
    )
    batches = [tiny.prompts(16, seed) for seed in range(ROLLOUTS)]
    return module, *tiny.fit(module, root, batches, guard, watch, **options)


def test_a_gamed_reward_is_rolled_back_and_the_kl_stays_under_its_ceiling(
    plain_trunk: Path, tmp_path: Path
) -> None:
    def guard() -> PolicyGuard:
        return PolicyGuard(max_kl=CEILING, lr_factor=0.1)

    free, held = Watch(tmp_path), Watch(tmp_path)
    play(plain_trunk, tmp_path, PolicyGuard(window=None), free)
    with pytest.warns(UserWarning, match=r"Step \d+: KL of .* max_kl allows 4; back to the last"):
        module, trainer, folder = play(plain_trunk, tmp_path, guard(), held)
    above = [
        [number for number, logged in enumerate(watch.logged) if logged["rollout/kl"] > CEILING]
        for watch in (free, held)
    ]
    assert above[1] == above[0][:1]
    assert len(above[0]) > 1
    assert len(held.logged) == ROLLOUTS
    assert held.logged[-1]["train/rollbacks"] == 1
    # What schedulers and logs see are the rates that were asked for.
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1
    assert "unfinished" not in (folder / "adapters/actor/manifest.json").read_text()
    # Killed right after the rollback.
    killed_after = above[1][0] + 1
    with pytest.raises(KilledError):
        play(plain_trunk, tmp_path, guard(), Watch(tmp_path, killed_after))
    resumed, path = Watch(tmp_path), tmp_path / f"{killed_after}.ckpt"
    again, later, _ = play(plain_trunk, tmp_path, guard(), resumed, ckpt_path=path)
    assert resumed.logged == held.logged[killed_after:]
    assert tiny.changed(tiny.weights(module), again) == set()
    tiny.assert_equal_moments(later, trainer)


def test_other_modules_have_no_guard(hydra_trunk: Path, tmp_path: Path) -> None:
    callbacks = tiny.hydra(hydra_trunk).configure_callbacks()
    assert len([one for one in callbacks if isinstance(one, PolicyGuard)]) == 1
    with pytest.raises(MisconfigurationException, match="PolicyGuard reads rollouts, and SFT has"):
        tiny.fit(SFT(str(hydra_trunk), tiny.LORA), tmp_path, [tiny.rated(2)], PolicyGuard())


# ---- what the guard does with measures that are written down -------------------------------------

CALM = {
    **{"score": 0.0, "kl": 0.1, "score_gap": 0.3},
    **{"length_score_correlation": 0.0, "distinct_2": 0.8},
}


class Scripted(Phased):
    """Logs one rollout's measures after another; its weight says how many it has learned from."""

    def __init__(self, rollouts: Sequence[dict[str, float]]) -> None:
        self.rollouts, self.weights = list(rollouts), list[float]()
        super().__init__(self.play)

    def play(self, _: Phased) -> None:
        self.weights.append(-self.weight.item())
        for key, value in {**CALM, **self.rollouts.pop(0), "response_tokens": 5.0}.items():
            self.log(f"rollout/{key}", value)


def guarded(folder: Path, guard: PolicyGuard, rollouts: Sequence[dict[str, float]]) -> list[float]:
    """The weights that sampled."""
    module = Scripted(rollouts)
    quiet_trainer(folder, [guard]).fit(module, Rows(len(rollouts)))
    return module.weights


@pytest.mark.parametrize(
    ("settings", "kls", "weights", "stopped"),
    [
        # The step after the third rollout is taken back, and the others are half as long.
        ({"max_kl": 1.0}, [0, 0, 2, 0, 0], [0, 1, 2, 1, 1.5], ""),
        ({"max_kl_per_token": 1.0}, [0, 5.1, 0, 4.9, 0], [0, 1, 0, 0.5, 1], ""),
        # Nothing is done that nobody asked for.
        ({}, [0, 5.1, 0, 50.0, 0], [0, 1, 2, 3, 4], ""),
        ({"max_kl": 1.0, "max_rollbacks": 1}, [0, 2, 0, 2, 0], [0, 1, 0, 0.5], "KL of 2 nats"),
        ({"max_kl": 1.0, "max_rollbacks": 0}, [0, 2, 0], [0, 1], "KL of 2 nats"),
        # Not a number is neither a reason nor a policy to go back to.
        ({"max_kl": 1.0}, [0, float("nan"), 2, 0], [0, 1, 2, 0], ""),
        # Nothing to go back to.
        ({"max_kl": 1.0}, [2, 0], [0], "KL of 2 nats"),
    ],
)
def test_the_ceiling_takes_back_slows_and_ends(
    settings: dict[str, Any],
    kls: list[float],
    weights: list[float],
    stopped: str,
    tmp_path: Path,
) -> None:
    guard = PolicyGuard(**settings)
    warned = pytest.warns(UserWarning, match="1 nat per response token|rollback|training ends")
    with warned if max(kls) > 1 else nullcontext():
        assert guarded(tmp_path, guard, [{"kl": kl} for kl in kls]) == weights
    assert (guard.stopped_by or "").partition(" per")[0] == stopped


def rising(**last: float) -> list[dict[str, float]]:
    """Three rollouts of a score of 0, three of 1 with these measures."""
    return [{**CALM, "score": 0.01 * n} for n in range(3)] + [
        {**CALM, "score": 1 + 0.01 * n, **last} for n in range(3)
    ]


@pytest.mark.parametrize(
    ("last", "signs"),
    [
        ({}, []),
        ({"length_score_correlation": 0.7}, ["length_score_correlation from 0 to 0.7"]),
        ({"length_score_correlation": -0.7}, ["length_score_correlation from 0 to -0.7"]),
        ({"length_score_correlation": 0.4}, []),
        ({"distinct_2": 0.5}, ["distinct_2 from 0.8 to 0.5"]),
        ({"score_gap": 0.5}, ["score_gap from 0.3 to 0.5"]),
        ({"kl": 2.1}, ["kl from 0.1 to 2.1"]),
        ({"kl": 0.4}, []),
        # Where the score does not rise, nothing is gamed.
        ({"distinct_2": 0.5, "score": 0.0}, []),
    ],
)
def test_signs_of_hacking(last: dict[str, float], signs: list[str]) -> None:
    found = signs_of_hacking(rising(**last), {**CALM, "score": -1.0, "kl": 0.0})
    assert found[1:] == signs
    assert found[:1] == ["score from 0.01 to 1.01"] * bool(signs)


def test_the_watch_warns_and_then_takes_back_to_the_warning(tmp_path: Path) -> None:
    hacked = [{"score": float(n), "distinct_2": 0.8 / (n - 2)} for n in range(4, 9)]
    rollouts = [{"score": 0.01 * n} for n in range(4)] + hacked + [{"score": 0.0}] * 2
    words = r"signs of reward hacking in 2 rollouts: score from .*; distinct_2 from 0.8 to 0.333"
    for act, weights in (
        (False, list(range(11))),
        # Warned after the sixth, taken back after the eighth.
        (True, [*range(8), 4, 4.5, 5]),
    ):
        with pytest.warns(UserWarning, match=words):
            assert guarded(tmp_path, PolicyGuard(window=2, act_on_hacking=act), rollouts) == weights
