"""What the tables on a real model count, by hand."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from lightning_perl.data.rows import Item, Pair, Row, Turn
from tests.benchmarks.conftest import BENCHMARKS, Script

metrics = pytest.importorskip("sklearn.metrics", reason="needs the extra benchmarks")


def row(answer: str, dialog: str, where: str = "") -> Row:
    return Row((Turn("user", "hello"),), (Turn("agent", answer),), None, True, dialog, where)


def test_a_judge_of_pairs_and_of_thumbs(script: Script) -> None:
    quality, every = script("real.reward_models").quality, np.arange(4)
    pairs = {"chosen": [1.0, 2.0, 3.0, 4.0], "rejected": [0.0, 2.0, 4.0, 3.0]}
    assert quality(pairs, every) == (1 + 0.5 + 0 + 1) / 4
    assert quality(pairs, every[2:3]) == 0
    generator = np.random.default_rng(0)
    scores, labels = generator.integers(0, 5, 60).astype(float), generator.integers(0, 2, 60)
    thumbs = {"score": scores.tolist(), "label": labels.tolist()}
    assert quality(thumbs, np.arange(60)) == pytest.approx(metrics.roc_auc_score(labels, scores))


def test_no_dialog_lies_on_two_sides(script: Script) -> None:
    divided = script("real.reward_models").divided
    items: list[Item] = [row(str(n), f"dialog {n // 3}", str(n)) for n in range(120)]
    for fold in range(4):
        parts = divided(items, fold)
        assert sum(map(len, parts)) == len(items)
        dialogs = [{item.dialog for item in part} for part in parts]
        assert sum(map(len, dialogs)) == 40
        train, val, test = divided(items, fold, 0.5)
        assert (val, test) == parts[1:]
        assert len(parts.train) / 2 - 3 <= len(train) <= len(parts.train) / 2 + 3
        assert {one.where for one in train} < {one.where for one in parts.train}
    tested = [item.where for fold in range(4) for item in divided(items, fold).test]
    assert len({*tested}) == len(tested) == len(items)


def test_words_and_intervals(script: Script) -> None:
    real = script("real.reward_models")
    pairs: list[Item] = [
        Pair(row(f"kind w{n % 7}", str(n)), row(f"rude w{n % 5}", str(n))) for n in range(40)
    ]
    words = real.sided(pairs, real.words_of_pairs(pairs, pairs))
    assert real.quality(words, np.arange(40)) == 1
    coin = {"chosen": [1.0, 0.0] * 20, "rejected": [0.0, 1.0] * 20}
    judges = {"length": {0: coin}, "words": {0: words}, "model": {0: words}}
    found = real.with_intervals(judges, {0: [str(n) for n in range(40)]})
    assert found["model"][0] == (1, 1, 1)
    assert found["model"][2] == (0, 0, 0)
    difference, low, high = found["model"][1]
    assert difference == 0.5
    assert 0.3 < low < difference < high < 0.7


def test_a_short_answer_about_the_question(script: Script) -> None:
    methods = script("real.methods")
    prompt = "System: Answer shortly.\nUser: What do penguins eat?\nAgent:"
    scored = methods.ShortAndOnTopic()
    for answer, score in (
        ("Penguins eat fish.", 1.0),
        ("A myth.", 0.5),
        ("penguins " * 21, 0.5),
        ("word " * 21, 0.0),
        ("", 0.0),
    ):
        assert scored.score(prompt, answer, 0) == score
    assert methods.risen({"gold": 0.6, "reference_gold": 0.2}) == pytest.approx(1.0)


def test_nobody_is_judged_by_what_it_learned(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "real"))
    judges = script("judges")
    items: list[Item] = [
        Pair(row("a", f"dialog {n // 3}", str(n)), row("b", f"dialog {n // 3}", str(n)))
        for n in range(240)
    ]
    monkeypatch.setattr(judges, "everything", lambda corpus, folder: items)
    monkeypatch.setattr(judges, "GivenRows", lambda trunk, splits, **_: Mock(splits=splits))
    learned, judged = (
        judges.pairs(Path(), Path(), parts).splits for parts in (judges.LEARNED, judges.JUDGED)
    )
    parts = (learned.train, learned.test, judged.train)
    seen = [{item.dialog for item in part} for part in parts]
    assert sum(map(len, seen)) == len(set.union(*seen))
    assert learned.test == judged.test
    assert judges.pairs(Path(), Path(), judges.LEARNED, 5).splits.train == learned.train[:5]


def test_wins_are_the_judges(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "real"))
    judges, trainer = script("judges"), Mock()
    monkeypatch.setattr(judges, "Trainer", trainer)
    trainer().test.return_value = [{"test/kl": 1.5}]
    heard = [torch.zeros(9), torch.zeros(4), torch.tensor([1.0, 0.0, -1.0, 2.0])]
    found = judges.held_out(Mock(), Mock(), heard)
    assert (found["kl"], found["judge_wins"]) == (1.5, 2.5 / 4)
