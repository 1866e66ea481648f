"""Is a policy as sure as it is right, before and after? SuperHF's paper (2310.16763) asks it of its models.

Two expected calibration errors in ten bins, on the quickstart's held-out orders. *Choice*: of four answers to an
order one repeats it, and three get one part of it wrong. The probabilities of the four texts are divided by their
sum; the likeliest is picked, and is right or not. *Token*: the likeliest next token of other held-out answers, as
they were written, good and bad. ``bakeoff.py`` measures both of every run.

Shapes: ``N`` predictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from coffee_world import answer, orders, prompt_row
from torch import Tensor

from lightning_perl.data import PreferenceDataModule
from lightning_perl.functional.sequences import predicting
from lightning_perl.metrics import Judgements, reliability_of
from lightning_perl.models.adapters import OFF, LoraSpec
from lightning_perl.modules import DPO

QUESTIONS, AT_ONCE = 256, 64
MISHEARD = ("drink", "size", "quantity")
"""What the three wrong answers get wrong: parts that every customer names."""


def choices() -> list[dict[str, Any]]:
    """The held-out prompts with four answers each, the right one first."""
    drawn = list(orders("test", "test", 2 * QUESTIONS, seed=0, distinct=True))[:QUESTIONS]
    faults: list[tuple[str, ...]] = [(), *((part,) for part in MISHEARD)]
    return [prompt_row(o) | {"response": answer(o, fault)} for o in drawn for fault in faults]


def measured(confidence: Tensor, right: Tensor) -> tuple[float, float]:
    """Share of right predictions, and their calibration error. Shapes: ``(N,)``."""
    outcomes = right.double()
    judgements = Judgements(confidence.double().logit(), outcomes, torch.ones_like(outcomes))
    return float(outcomes.mean()), reliability_of(judgements).error


@torch.no_grad()
def of_choices(module: DPO, rows: PreferenceDataModule, adapter: str) -> tuple[float, float]:
    """Accuracy and calibration error of picking the likeliest of four answers."""
    batches = rows.val_dataloader()
    found = torch.cat([module.response_logprobs(batch, adapter) for batch in batches])
    probabilities = found.view(-1, 1 + len(MISHEARD)).softmax(1)
    confidence, picked = probabilities.max(1)
    return measured(confidence, picked == 0)


@torch.no_grad()
def of_tokens(module: DPO, rows: PreferenceDataModule, adapter: str) -> tuple[float, float]:
    """Accuracy and calibration error of the likeliest next token."""
    parts = []
    for batch in rows.val_dataloader():
        mask = batch.response_mask[:, batch.prompt_tokens :]
        states = predicting(module.hidden(batch, adapter), mask.shape[1])
        confidence, picked = module.trunk.project(states).softmax(-1).max(-1)
        right = picked == batch.ids[:, batch.prompt_tokens :]
        parts.append(torch.stack([confidence[mask], right[mask]]))
    confidence, right = torch.cat(parts, 1)
    return measured(confidence, right)


def calibration(trunk: str, weights: Mapping[str, Tensor], lora: LoraSpec) -> dict[str, float]:
    """Both measures of a policy, and of the reference as ``reference_...``."""
    module = DPO(trunk, lora=lora).eval()
    with torch.no_grad():
        for name, weight in module.trunk.adapters.tensors("actor").items():
            weight.copy_(weights[name])
    written = "packaged:quickstart/orders/rated_test.jsonl.gz"
    found = {}
    for kind, measure, rows in (
        ("choice", of_choices, choices()),
        ("token", of_tokens, written),
    ):
        data = PreferenceDataModule(
            trunk, rows, rows, val_batch_size=AT_ONCE, max_tokens=80, max_response_tokens=32
        )
        data.setup()
        for prefix, adapter in (("", "actor"), ("reference_", OFF)):
            accuracy, error = measure(module, data, adapter)
            found |= {f"{prefix}{kind}_accuracy": accuracy, f"{prefix}{kind}_ece": error}
    return found
