from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor

from lightning_perl.batches import Answers, PromptBatch
from lightning_perl.callbacks import SampleWriter
from lightning_perl.callbacks.samples import Sample, sample_table
from tests.callbacks.phased import Phased, Rows, quiet_trainer


def prompt_batch(first: int, rows: int, tokens: int) -> PromptBatch:
    number = torch.arange(first, first + rows)
    return PromptBatch(
        number[:, None].expand(rows, tokens).clone(),
        torch.ones(rows, tokens, dtype=torch.bool),
        number,
    )


class Prompts:
    """Batches of 3, 3 and 2 prompts, each batch with a width of its own."""

    def __iter__(self) -> Iterator[PromptBatch]:
        yield from (prompt_batch(0, 3, 5), prompt_batch(3, 3, 2), prompt_batch(6, 2, 9))

    def __len__(self) -> int:
        return 3


class Answerer(Phased):
    """Answers with its own number of optimizer steps, and remembers who was asked."""

    def __init__(self, score: float = 0.25) -> None:
        super().__init__(lambda module: None)
        self.asked: list[str] = []
        self.score = score

    def answer(self, prompts: PromptBatch, role: Literal["policy", "reference"]) -> Answers:
        assert not torch.is_grad_enabled()
        self.asked.append(role)
        # Each train batch moves the weight by -1; the reference stands at 0.
        moved = -self.weight.item() if role == "policy" else 0.0
        rows = prompts.row.tolist()
        return Answers(
            [f"prompt {row}" for row in rows],
            [f"{role} at {moved:.0f} on {row}\nbye" for row in rows],
            [moved + row * self.score for row in rows],
        )

    def validation_step(self, batch: PromptBatch | Tensor, batch_idx: int) -> None:
        pass


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_lines_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Answerer()
    trainer = quiet_trainer(tmp_path, [SampleWriter(prompts=4)], limit_val_batches=1, max_epochs=2)
    trainer.fit(module, Rows(3), Prompts())
    lines = lines_of(tmp_path / "version_0" / "samples.jsonl")
    # Validation after 3 and after 6 batches; the fit ends with the latter, which is written once.
    assert [line["step"] for line in lines] == [3] * 4 + [6] * 4
    # The first four rows, across batches of three.
    assert [line["prompt"] for line in lines] == [f"prompt {row}" for row in range(4)] * 2
    assert lines[5] == {
        "step": 6,
        "prompt": "prompt 1",
        "before": "reference at 0 on 1\nbye",
        "after": "policy at 6 on 1\nbye",
        "score_before": 0.25,
        "score_after": 6.25,
    }
    for key in ("before", "score_before"):
        assert [line[key] for line in lines[:4]] == [line[key] for line in lines[4:]]
    # The reference is asked once, in two batches; the policy at every look.
    assert module.asked == ["reference"] * 2 + ["policy"] * 4
    printed = capsys.readouterr().out
    assert "score +0.25 -> +6.25" in printed
    assert "policy at 6 on 3" in printed
    assert "policy at 3" not in printed


class Data(LightningDataModule):
    def train_dataloader(self) -> Rows:
        return Rows(1)

    def val_dataloader(self) -> list[Any]:
        return [Rows(2), Prompts()]


@pytest.mark.parametrize("asked", [8, 50])
def test_prompts_of_a_datamodule_with_other_loaders(tmp_path: Path, asked: int) -> None:
    trainer = quiet_trainer(tmp_path, [SampleWriter(asked)], limit_val_batches=0)
    trainer.fit(Answerer(), datamodule=Data())
    lines = lines_of(tmp_path / "version_0" / "samples.jsonl")
    assert [line["prompt"] for line in lines] == [f"prompt {row}" for row in range(8)]


def test_validation_outside_a_fit_writes_nothing(tmp_path: Path) -> None:
    module = Answerer()
    trainer = quiet_trainer(tmp_path, [SampleWriter()])
    trainer.validate(module, Prompts(), verbose=False)
    trainer.fit(module, Rows(1), Prompts())
    asked = list(module.asked)
    trainer.validate(module, Prompts(), verbose=False)
    assert module.asked == asked
    assert asked[0] == "reference"


def test_scores_that_json_cannot_hold_beside_the_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    logger = CSVLogger(tmp_path, name="quickstart")
    trainer = quiet_trainer(tmp_path, [SampleWriter(prompts=2)], logger=logger)
    trainer.fit(Answerer(score=float("nan")), Rows(1), Prompts())
    path = tmp_path / "quickstart" / "version_0" / "samples.jsonl"
    assert [line["score_after"] for line in lines_of(path)] == [None, None]
    assert "NaN" not in path.read_text(encoding="utf-8")
    assert "score not finite -> not finite" in capsys.readouterr().out


def test_wandb_table_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandbLogger(offline=True, save_dir=tmp_path, project="coffee")
    trainer = quiet_trainer(tmp_path, [SampleWriter(prompts=2)], logger=logger, max_epochs=2)
    trainer.fit(Answerer(), Rows(3), Prompts())
    run = logger.experiment
    lines = lines_of(tmp_path / "coffee" / run.id / "samples.jsonl")
    tables = sorted(Path(run.dir).rglob("samples_*.table.json"), key=lambda path: path.name)
    logger.experiment.finish()
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in tables]
    # One table at each validation; the fit's end adds none, nothing was trained in between.
    assert [[row[0] for row in content["data"]] for content in contents] == [[3, 3], [6, 6]]
    assert contents[-1]["columns"] == list(lines[0])
    assert contents[-1]["data"] == [list(line.values()) for line in lines[-2:]]


@pytest.mark.parametrize(
    ("module", "loader", "words"),
    [
        (
            Phased(lambda module: None),
            Rows(2),
            r"`answer\(prompts, role\)`.*Phased has none: add the method, or remove the callback",
        ),
        (Answerer(), Rows(2), "validation data yields no PromptBatch"),
        (Answerer(), None, "validation data yields no PromptBatch"),
    ],
)
def test_a_module_that_cannot_answer_and_data_without_prompts_are_refused(
    tmp_path: Path, module: Phased, loader: Rows | None, words: str
) -> None:
    trainer = quiet_trainer(tmp_path, [SampleWriter()], num_sanity_val_steps=0)
    with pytest.raises(MisconfigurationException, match=words):
        trainer.fit(module, Rows(1), loader)


def test_the_printed_table() -> None:
    samples = [
        Sample(7, "User: hi\nAgent:", "a tall latte with milk", "", -0.5, 1.25),
        Sample(7, "x" * 299 + "yz", "b" * 301, "ok", None, 0.0),
    ]
    assert sample_table(samples[:1], width=54).split("\n") == [
        "prompt           | before           | after",
        "-----------------+------------------+-----------------",
        "User: hi         | score -0.50      | score -0.50 ->",
        "Agent:           | a tall latte     | +1.25",
        "                 | with milk        | (empty)",
        "-----------------+------------------+-----------------",
    ]
    second = sample_table(samples[1:], width=1000)
    assert "..." + "x" * 298 + "yz " in second  # a prompt ends with what was asked
    assert "b" * 300 + "... " in second
    assert "score not finite -> +0.00" in second
