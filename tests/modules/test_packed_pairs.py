"""A pair's scores are its own: shuffled, padded, packed, or alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_perl.data.rows import RatedExample, RatedRow, collate_rated
from lightning_perl.modules import HydraSFT, RewardModel
from lightning_perl.modules.supervised import Supervised
from tests.modules.tiny import LORA, WORDS, gradients_of, train_adapters

EOS = 2


def examples(count: int, seed: int) -> list[RatedExample]:
    """Pairs of one prompt, prefix pairs among them, and some thumbs."""
    draw = random.Random(seed)

    def words(longest: int) -> list[int]:
        return [draw.randrange(3, WORDS) for _ in range(draw.randint(1, longest))]

    found = []
    for number in range(count):
        prompt, answer = words(9), words(6)
        answers = (
            [answer] if number % 4 == 3 else [answer, answer[:2] if number % 4 == 2 else words(6)]
        )
        if len(answers) == 2 and answers[0] == answers[1]:
            answers[1] = [*answers[1], 5]
        found.append(
            RatedExample(
                tuple(
                    RatedRow(
                        [*prompt, *text, EOS],
                        [False] * len(prompt) + [True] * (len(text) + 1),
                        imitate=side == 0,
                        label=1.0 if len(answers) == 1 else None,
                        row=10 * number + side,
                    )
                    for side, text in enumerate(answers)
                )
            )
        )
    return found


def trained(trunk: Path, share: bool, kind: type[Supervised]) -> Supervised:
    # GPT-2 computes in float64 throughout; Llama's norms sum in fp32 whatever the weights.
    module = kind(str(trunk), lora=LORA, share_prompts=share, trunk_dtype="float64")
    train_adapters(module)
    return module


def scores(module: Supervised, batches: Sequence[Sequence[RatedExample]]) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for batch in map(collate_rated, batches):
        seen = module.predict_step(batch, 0)
        found.update(zip(seen["row"].tolist(), seen["score"], strict=True))
    return found


@torch.no_grad()
@pytest.mark.parametrize("kind", [RewardModel, HydraSFT])
@pytest.mark.parametrize("seed", range(5))
def test_no_batch_mate_changes_a_score(gpt2_trunk: Path, seed: int, kind: type[Supervised]) -> None:
    rows = examples(12, seed)
    alone = scores(
        trained(gpt2_trunk, False, kind),
        [[RatedExample((row,))] for one in rows for row in one.rows],
    )
    draw = random.Random(seed)
    for share in (True, False):
        module = trained(gpt2_trunk, share, kind)
        for size in (1, 5, 12):
            shuffled = draw.sample(rows, len(rows))
            batches = [shuffled[start : start + size] for start in range(0, len(rows), size)]
            found = scores(module, batches)
            assert found.keys() == alone.keys()
            for row, score in alone.items():
                assert_close(found[row], score, rtol=0, atol=1e-12)
        assert module.trunk.passes == 1 + 3 + 12


@pytest.mark.parametrize("kind", [RewardModel, HydraSFT])
def test_loss_and_gradients_do_not_depend_on_packing(
    gpt2_trunk: Path, kind: type[Supervised]
) -> None:
    batch = collate_rated(examples(8, 1))
    assert batch.packing is not None
    assert batch.packing.lines < 8  # pairs share lines
    assert batch.packing.lines * batch.packing.columns < batch.ids.numel()
    plain = batch._replace(response_places=None)
    packed, separate = (
        gradients_of(trained(gpt2_trunk, share, kind), rows)
        for share, rows in ((True, batch), (False, plain))
    )
    assert packed.keys() == separate.keys()
    for name, gradient in packed.items():
        assert_close(gradient, separate[name], rtol=0, atol=1e-12)
