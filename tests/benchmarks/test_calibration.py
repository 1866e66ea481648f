"""What the bake-off measures of a policy's calibration, by hand."""

from __future__ import annotations

import pytest
import torch

from lightning_perl.rewards.coffee_orders import CoffeeOrderQuality
from tests.benchmarks.conftest import Script


def test_error_of_predictions_by_hand(script: Script) -> None:
    # Three of four at 0.75 are right; two at 0.95 are wrong.
    confidence = torch.tensor([0.75] * 4 + [0.95] * 2)
    right = torch.tensor([True, True, True, False, False, False])
    accuracy, error = script("calibration").measured(confidence, right)
    assert accuracy == 0.5
    assert error == pytest.approx(2 / 6 * 0.95)


def test_one_answer_of_four_is_right_and_comes_first(script: Script) -> None:
    choices, gold = script("calibration").choices(), CoffeeOrderQuality()
    assert len(choices) == 4 * 256
    asked = [f"User:{row['prompt'][-1]['content']}Agent:" for row in choices]
    scores = gold(asked, [row["response"] for row in choices], [0] * len(choices))
    first, *others = torch.tensor(scores).view(-1, 4).unbind(1)
    assert all(bool((first > other).all()) for other in others)


def test_a_fresh_policy_is_as_sure_as_its_reference(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn", reason="the bake-off needs the extra benchmarks")
    calibration, bakeoff = script("calibration"), script("bakeoff")
    monkeypatch.setattr(calibration, "QUESTIONS", 8)
    weights = bakeoff.policy().policy_trunk.adapters.tensors("actor")
    found = calibration.calibration(bakeoff.TRUNK, weights, bakeoff.LORA)
    fresh = {key: value for key, value in found.items() if not key.startswith("reference")}
    assert len(fresh) == 4
    assert fresh == {key: found[f"reference_{key}"] for key in fresh}
    assert found["token_ece"] < 0.05  # it was trained on answers like these
