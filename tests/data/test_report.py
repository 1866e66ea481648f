from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_perl.batches import PromptBatch, RatedBatch
from lightning_perl.data import PreferenceDataModule, TaskmasterDataModule
from lightning_perl.data.base import ConversationDataModule
from lightning_perl.data.report import DataReport, SplitReport, quantile
from lightning_perl.data.rows import PromptExample, RatedExample, RatedRow
from tests.data.counts import check_counts
from tests.data.taskmaster_files import save_corpora


def test_auroc_is_the_chance_of_being_longer() -> None:
    draw = Random(0)
    for _ in range(20):
        up = [draw.randrange(12) for _ in range(draw.randrange(1, 30))]
        down = [draw.randrange(3, 15) for _ in range(draw.randrange(1, 30))]
        wins = sum((a > b) + 0.5 * (a == b) for a in up for b in down) / (len(up) * len(down))
        report = SplitReport(
            up=len(up), down=len(down), up_tokens=Counter(up), down_tokens=Counter(down)
        )
        assert report.length_auroc == pytest.approx(wins, abs=1e-6)
    assert SplitReport(up=1, up_tokens=Counter([1])).length_auroc is None
    assert SplitReport(down=1, down_tokens=Counter([1])).length_auroc is None


def test_quantiles_are_values_that_were_there() -> None:
    counts = Counter({3: 1, 5: 2, 9: 1})
    assert [quantile(counts, share) for share in (0.0, 0.25, 0.5, 0.75, 0.76, 1.0)] == [
        3, 3, 5, 5, 9, 9,
    ]  # fmt: skip
    assert quantile(Counter(range(1, 101)), 0.95) == 95
    with pytest.raises(ValueError, match="nothing"):
        quantile(Counter(), 0.5)


def rated(prompt: int, response: int, label: float | None = None) -> RatedRow:
    mask = [False] * prompt + [True] * response
    return RatedRow([1] * len(mask), mask, True, label, 0)


def test_a_split_in_numbers() -> None:
    report = SplitReport()
    for chosen, rejected in ((5, 3), (3, 5), (4, 4), (6, 1)):
        report.keep(RatedExample((rated(7, chosen), rated(7, rejected))))
    for response, label in ((9, 1.0), (2, 1.0), (2, 0.0), (8, 0.25), (8, 0.5), (1, None)):
        report.keep(RatedExample((rated(2, response, label),), 1))
    assert report.kept == 10
    assert (report.pairs, report.up, report.down, report.even, report.unlabelled) == (4, 2, 2, 1, 1)
    assert report.chosen_longer == 2.5 / 4
    # (9, 2) against (2, 8): two wins, a tie and a loss.
    assert report.length_auroc == 2.5 / 4
    assert report.prompt_tokens == {7: 4, 2: 6}
    assert report.response_tokens.total() == 14
    assert report.cut_turns == 6
    numbers = report.numbers()
    assert numbers["response_tokens_max"] == 9
    assert numbers["prompt_tokens_median"] == 2
    assert "chosen is the longer in 62.5%; AUROC of the length alone 0.625" in str(report)
    prompts = SplitReport()
    prompts.keep(PromptExample([1] * 4, 0, 2))
    assert prompts.numbers()["prompt_tokens_95"] == 4
    assert not {"chosen_longer", "length_auroc", "response_tokens_max"} & set(prompts.numbers())
    assert str(SplitReport(rejected=Counter(bad=2), duplicates=1)) == (
        "3 rows, 0 kept, 2 rejected, 1 repeated"
    )


def test_a_split_that_is_another_counts_once() -> None:
    val = SplitReport(kept=2)
    report = DataReport({"train": SplitReport(kept=3), "val": val, "test": val})
    report.rejected["broken JSON"] = 1
    report.left_out["not asked for"] = 4
    assert report.rows == 10


def messy(folder: Path, **arguments: Any) -> dict[str, Any]:
    """Arguments of a datamodule of 300 rows of every kind, many of them bad."""
    draw = Random(1)
    lines: list[str] = []
    for _ in range(300):
        prompt, answer = f"q{draw.randrange(40)}", f"a{draw.randrange(3)}"
        kinds: list[dict[str, object]] = [
            {"prompt": prompt, "response": answer, "label": draw.randrange(2)},
            {"prompt": prompt, "response": answer, "rating": draw.randrange(7)},
            {"prompt": prompt, "chosen": answer, "rejected": f"a{draw.randrange(3)}"},
            {"prompt": prompt, "response": answer * draw.choice((1, 1, 99))},
            {"prompt": prompt * draw.choice((1, 1, 99)), "response": answer},
            {"prompt": prompt},
        ]
        row = json.dumps(draw.choice(kinds))
        lines.append(draw.choice([row, "{", "[1]"][: draw.randrange(1, 4)]))
    file = folder / "rows.jsonl"
    file.write_text("\n".join(lines))
    limits: dict[str, Any] = {"max_tokens": 64, "max_response_tokens": 32}
    limits |= {"val_fraction": 0.0} if arguments.get("streaming") else {}
    return {"train": file, "rating_range": (1, 5), "on_bad_row": "reject"} | limits | arguments


@pytest.mark.parametrize(
    ("taskmaster", "arguments"),
    [
        (False, {}),
        (False, {"keep_conflicts": True}),
        (False, {"val_fraction": 0.0}),
        (False, {"rows": "prompts"}),
        (False, {"streaming": True}),
        (False, {"streaming": True, "rows": "prompts"}),
        (True, {}),
        (True, {"max_demonstrations": 10, "train_folds": [1, 2]}),
        (True, {"rows": "prompts"}),
    ],
)
def test_the_counts_add_up(
    taskmaster: bool, arguments: dict[str, Any], tmp_path: Path, tokenizer_dir: Path
) -> None:
    module: ConversationDataModule
    if taskmaster:
        save_corpora(tmp_path)
        module = TaskmasterDataModule(str(tokenizer_dir), tmp_path, **arguments)
    else:
        module = PreferenceDataModule(str(tokenizer_dir), **messy(tmp_path, **arguments))
    module.setup()
    batches: list[RatedBatch | PromptBatch] = list(module.train_dataloader())
    check_counts(module.report, 3 * 40 if taskmaster else 300)
    kept = module.report.splits["train"].kept
    yielded = sum(
        len(batch.ids) - (len(batch.pairs) if isinstance(batch, RatedBatch) else 0)
        for batch in batches
    )
    assert yielded == kept > 0


class Nothing(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: RatedBatch) -> torch.Tensor:
        return self.weight * 1.0

    def validation_step(self, batch: RatedBatch) -> None:
        self.log("val/rows", float(len(batch.ids)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **arguments: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": CSVLogger(folder, "run"),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    }
    return Trainer(**defaults | arguments)


def logged(folder: Path) -> list[dict[str, str]]:
    with (folder / "run/version_0/metrics.csv").open(encoding="utf-8", newline="") as lines:
        return [row for row in csv.DictReader(lines) if row.get("data/rows")]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_report_goes_to_the_logger_once(
    tmp_path: Path, tokenizer_dir: Path, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    arguments = messy(tmp_path, streaming=streaming)
    module = PreferenceDataModule(str(tokenizer_dir), **arguments)
    if not streaming:
        # Before there is a trainer, and after.
        module.setup()
    run = trainer(tmp_path, max_epochs=2)
    run.fit(Nothing(), datamodule=module)
    run.validate(Nothing(), datamodule=module, verbose=False)
    (row,) = logged(tmp_path)
    numbers = module.report.numbers()
    assert {key: float(row[key]) for key in numbers} == numbers
    assert numbers["data/rows"] == 300
    assert numbers["data/train_pairs"] > 0
    assert 0 < numbers["data/train_chosen_longer"] < 1
    assert 0 < numbers["data/train_length_auroc"] < 1
    assert caplog.text.count("300 rows read") == 1
    assert not [key for key in row if key.startswith("data/") and key not in numbers]


def test_a_stream_that_is_not_read_to_its_end_is_reported_as_far_as_it_was(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    module = PreferenceDataModule(
        str(tokenizer_dir), **messy(tmp_path, streaming=True, shuffle_block=8)
    )
    trainer(tmp_path, max_steps=3).fit(Nothing(), datamodule=module)
    (row,) = logged(tmp_path)
    assert 16 < float(row["data/rows"]) < 150
    check_counts(module.report, module.report.rows)
