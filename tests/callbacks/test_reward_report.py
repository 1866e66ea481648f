"""The table and the pictures at the end of a test."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import DataLoader

from lightning_perl.batches import RatedBatch
from lightning_perl.callbacks.reward_report import (
    RewardReport,
    reliability_figure,
    reward_table,
    score_figure,
)
from lightning_perl.metrics import RewardMeasures, RewardMetrics
from lightning_perl.modules import SFT, HydraSFT, RewardModel
from tests.modules import tiny

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_trunk(tmp_path_factory.mktemp("report") / "trunk"))


def loader(*batches: RatedBatch) -> DataLoader[RatedBatch]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def measures_of(batch: RatedBatch, scores: torch.Tensor) -> RewardMeasures:
    metrics = RewardMetrics()
    lengths = batch.response_mask.sum(1)
    metrics.update(scores, batch.label, batch.labelled, batch.pairs, lengths, batch.turns)
    found: RewardMeasures = metrics.compute()
    return found


def test_the_headline_says_which_rows_and_counts_what_lies_in_the_middle() -> None:
    batch = tiny.rated(4)._replace(
        label=torch.tensor([1.0, 0.5, 0.25, 0.5]), labelled=torch.ones(4).bool()
    )
    table = reward_table(measures_of(batch, torch.randn(4)), "the validation rows")
    assert (
        table[0] == "reward model on the validation rows: 4 thumbs (1 up, 1 down, 2 in the middle)"
    )


def test_a_test_prints_and_draws(
    trunk: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = RewardModel(trunk, tiny.LORA)
    trainer, folder = tiny.quiet_trainer(tmp_path)
    batches = (tiny.rated(9, 1, pairs=2), tiny.rated(8, 2, pairs=4))
    (logged,) = trainer.test(module, loader(*batches), verbose=False)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "reward model on test rows: 6 pairs, 5 thumbs (3 up, 2 down)"
    for key, name, rows in (
        ("accuracy", "pair accuracy", 6),
        ("auroc", "AUROC", 5),
        ("ece", "ECE", 11),
    ):
        (line,) = (line for line in printed if line.startswith(f"  {name} "))
        value, count = line[28:38], line[-10:]
        assert float(value) == pytest.approx(logged[f"test/{key}"], abs=5e-4)
        assert int(count) == rows
    (line,) = (line for line in printed if line.startswith("  pair accuracy "))
    assert float(line[38:48]) == pytest.approx(logged["test/length_accuracy"], abs=5e-4)
    assert len({len(line) for line in printed[1:] if line.startswith("  ")}) == 1  # aligned
    # Length in tokens of the answer alone.
    assert any(line.startswith("  length-score correlation ") for line in printed)
    scores, tokens = [], []
    for batch in batches:
        rated = batch.labelled | (torch.arange(len(batch.ids)) < 2 * len(batch.pairs))
        scores.append(module.scores(batch).detach()[rated])
        tokens.append(batch.response_mask.sum(1)[rated])
    both = torch.stack([torch.cat(scores), torch.cat(tokens)])
    expected = float(torch.corrcoef(both)[0, 1])
    assert logged["test/length_score_correlation"] == pytest.approx(expected, rel=1e-4)
    # The next test starts from nothing.
    trainer.test(module, loader(*batches), verbose=False)
    assert capsys.readouterr().out.splitlines() == printed
    for name in ("reliability", "scores"):
        assert (folder / f"{name}.png").read_bytes().startswith(PNG)


def test_a_test_logs_every_measure_and_a_validation_a_few(trunk: str, tmp_path: Path) -> None:
    module = HydraSFT(trunk, tiny.LORA)
    trainer, folder = tiny.quiet_trainer(tmp_path)
    rows = loader(tiny.rated(9, 1, pairs=2))
    (validated,) = trainer.validate(module, rows, verbose=False)
    (tested,) = trainer.test(module, rows, verbose=False)
    few = {"auroc", "balanced_accuracy", "accuracy", "margin", "ece", "brier"}
    losses = {"loss", "lm_loss", "reward_loss"}
    assert set(validated) == {f"val/{key}" for key in few | losses}
    assert set(tested) > {f"test/{key}" for key in few | losses | {"temperature", "length_auroc"}}
    for key in few | losses:
        assert tested[f"test/{key}"] == validated[f"val/{key}"]
    assert (folder / "scores.png").is_file()


def test_nothing_rated_nothing_said(
    trunk: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unrated = tiny.rated(4)._replace(labelled=torch.zeros(4, dtype=torch.bool))
    trainer, folder = tiny.quiet_trainer(tmp_path)
    trainer.test(RewardModel(trunk, tiny.LORA), loader(unrated), verbose=False)
    # A module that measures nothing may have the callback too.
    trainer, _ = tiny.quiet_trainer(tmp_path, RewardReport())
    trainer.test(SFT(trunk), loader(unrated), verbose=False)
    assert "reward model" not in capsys.readouterr().out
    assert not (folder / "scores.png").exists()


def test_pictures_go_to_weights_and_biases(
    trunk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, Any] = {}
    monkeypatch.setattr(
        WandbLogger, "log_image", lambda self, key, images: sent.update({key: images})
    )
    # W&B remembers the process's first mode: "disabled" here would spoil later tests' "offline".
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandbLogger(offline=True, project="p", save_dir=tmp_path)
    trainer, _ = tiny.quiet_trainer(tmp_path, logger=logger)
    trainer.test(RewardModel(trunk, tiny.LORA), loader(tiny.rated(6)), verbose=False)
    assert set(sent) == {"test/reliability", "test/scores"}
    for images in sent.values():
        (path,) = images
        assert Path(path).read_bytes().startswith(PNG)
    wandb.finish()


def legend(measures: RewardMeasures) -> list[str]:
    shown = score_figure(measures).axes[0].get_legend()
    return [] if shown is None else [text.get_text() for text in shown.get_texts()]


def test_pairs_are_drawn_from_one_half_on() -> None:
    batch = tiny.rated(6, pairs=3)
    measures = measures_of(batch, torch.tensor([2.0, 0.0, 0.1, 0.0, 0.0, 1.0]))
    figure = reliability_figure(measures)
    upper, lower = figure.axes
    assert (upper.get_ylabel(), lower.get_ylabel()) == ("share of pairs ranked right", "pairs")
    assert legend(measures) == ["chosen: 3, mean +0.70", "rejected: 3, mean +0.33"]
    assert upper.get_xlim() == (0.5, 1.0)
    # One pair per bar: sure of 0.52, 0.73 and 0.88.
    assert [bar.get_height() for bar in lower.patches] == [1, 0, 1, 1, 0]  # type: ignore[attr-defined]
    _, line = upper.lines
    assert line.get_ydata() == pytest.approx([1, 0, 1])
    assert "ECE" in figure.get_suptitle()
    assert "length alone" in upper.get_title()


def test_thumbs_are_drawn_from_zero_on() -> None:
    measures = measures_of(tiny.rated(4), torch.tensor([2.0, -2.0, 0.5, 0.5]))
    upper, lower = reliability_figure(measures).axes
    assert lower.get_xlabel() == "predicted probability"
    assert [text.split(":")[0] for text in legend(measures)] == ["thumbs up", "thumbs down"]
    assert upper.get_xlim() == (0.0, 1.0)
    heights = [bar.get_height() for bar in lower.patches]  # type: ignore[attr-defined]
    assert heights == [0, 1, 0, 0, 0, 0, 2, 0, 1, 0]


@pytest.mark.parametrize(
    "scores",
    [[math.nan, 1.0, 0.0, 2.0], [math.nan] * 4, [0.0] * 4, [math.inf, 1.0, 0.0, 2.0]],
    ids=["a NaN", "NaN", "constant", "infinite"],
)
def test_whatever_the_scores_are_is_shown(scores: list[float], tmp_path: Path) -> None:
    measures = measures_of(tiny.rated(4), torch.tensor(scores))
    assert len(reward_table(measures)) > 4
    for figure in (reliability_figure(measures), score_figure(measures)):
        figure.savefig(tmp_path / "figure.png")
