"""Answers to the same held-out prompts before and after training, side by side."""

from __future__ import annotations

import json
import math
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import CombinedLoader

from lightning_perl.arguments import Checked, Count
from lightning_perl.batches import Answers, PromptBatch
from lightning_perl.callbacks.console import show
from lightning_perl.callbacks.run_folder import run_folder
from lightning_perl.callbacks.wandb_summary import wandb_loggers

# Characters of a text in the printed table; the file holds all of it.
_PRINTED = 300


@runtime_checkable
class Answering(Protocol):
    """A module whose policy and reference answer prompts."""

    def answer(self, prompts: PromptBatch, role: Literal["policy", "reference"]) -> Answers:
        """Returns a role's answers, scored with the module's own reward."""


class Sample(NamedTuple):
    """One prompt, answered by the reference (``before``) and by the policy; the fields are the file's keys.

    ``step`` counts optimizer steps, as in checkpoints' names. A score is None where it is not finite.
    """

    step: int
    prompt: str
    before: str
    after: str
    score_before: float | None
    score_after: float | None


class SampleWriter(Checked, Callback):
    """Answers the same held-out prompts before and after training, and writes both with scores.

    The prompts are the first rows of the validation data. The reference answers once, when training starts; the
    policy at every validation's end (``trainer.val_check_interval``) and when the fit ends. Each time one JSON
    line per prompt, with the keys of `Sample`, is appended to ``samples.jsonl`` in the run's folder, and every
    `WandbLogger` gets a growing table, ``samples``. At the fit's end a table is printed. Only rank zero writes.

    Args:
        prompts: Number of prompts; fewer where the validation data has fewer. At least 1.
    """

    def __init__(self, prompts: Count = 8) -> None:
        self.prompts = prompts
        self._path = Path()
        self._chunks: list[PromptBatch] = []
        self._before: Answers | None = None
        self._samples: list[Sample] = []
        self._table: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a module that cannot answer, and chooses the file."""
        self._before = None
        if stage == "fit":
            _answering(pl_module)
            self._path = run_folder(trainer) / "samples.jsonl"
            self._samples, self._table = [], None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chooses the prompts and takes the reference's answers."""
        self._chunks = list(self._first_rows(trainer))
        self._before = self._answers(pl_module, "reference")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes samples; not in the sanity check, and not outside a fit."""
        self._write(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the final samples and prints them."""
        self._write(trainer, pl_module)
        if trainer.is_global_zero and self._samples:
            show(sample_table(self._samples))
        self._before = None
        self._chunks = []

    def _first_rows(self, trainer: Trainer) -> Iterator[PromptBatch]:
        """Yields the validation data's first prompts, as they are batched there."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]  # set by `fit`, undeclared
        loaders = trainer.val_dataloaders if datamodule is None else datamodule.val_dataloader()
        missing = self.prompts
        for loader in CombinedLoader(loaders, "sequential").flattened if loaders else []:
            for batch in loader:
                if not isinstance(batch, PromptBatch) or missing == 0:
                    break
                rows = PromptBatch(*(field[:missing] for field in batch))
                missing -= len(rows.ids)
                yield rows
        if missing == self.prompts:
            raise MisconfigurationException(
                "SampleWriter found no prompts: the validation data yields no PromptBatch. Give "
                "the datamodule a validation split of prompts (and keep limit_val_batches above 0 "
                "where loaders are passed to fit), or remove the callback from `trainer.callbacks`"
            )

    @torch.no_grad()
    def _answers(self, pl_module: LightningModule, role: Literal["policy", "reference"]) -> Answers:
        module = _answering(pl_module)
        chunks = (move_data_to_device(chunk, pl_module.device) for chunk in self._chunks)
        answers = [module.answer(chunk, role) for chunk in chunks]
        return Answers(*(list(chain.from_iterable(parts)) for parts in zip(*answers, strict=True)))

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Appends the policy's answers to the file and sends them to W&B, once per step."""
        step = trainer.global_step
        if self._before is None or (self._samples and self._samples[0].step == step):
            return
        before, after = self._before, self._answers(pl_module, "policy")
        rows = zip(before.prompts, before.responses, after.responses, strict=True)
        scores = zip(map(_finite, before.scores), map(_finite, after.scores), strict=True)
        self._samples = [Sample(step, *row, *pair) for row, pair in zip(rows, scores, strict=True)]
        if trainer.is_global_zero:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(sample._asdict()) + "\n" for sample in self._samples)
            if loggers := list(wandb_loggers(trainer)):
                self._send(loggers)

    def _send(self, loggers: Iterable[WandbLogger]) -> None:
        """Add the rows to the table in W&B; those that it has are not sent again."""
        import wandb

        self._table = self._table or wandb.Table(columns=[*Sample._fields], log_mode="INCREMENTAL")
        for sample in self._samples:
            self._table.add_data(*sample)
        for logger in loggers:
            # No step: W&B's axis counts train batches here, the rows' own step optimizer steps.
            logger.log_metrics({"samples": self._table})


def sample_table(samples: list[Sample], width: int | None = None) -> str:
    """Lays samples out in three columns (prompt, before, after), which fill a width or the terminal.

    Long texts are cut to 300 characters: prompts at their start, answers at their end.
    """
    width = width or shutil.get_terminal_size((120, 24)).columns
    column = max(16, (width - 6) // 3)
    rule = "-+-".join(["-" * column] * 3)
    lines = [_line(("prompt", "before", "after"), column), rule]
    for _, prompt, *answers, score_before, score_after in samples:
        if len(prompt) > _PRINTED:
            prompt = f"...{prompt[-_PRINTED:]}"
        before, after = (
            text if len(text) <= _PRINTED else f"{text[:_PRINTED]}..." for text in answers
        )
        cells = (
            _wrap(prompt, column),
            [f"score {_score(score_before)}", *_wrap(before, column)],
            [f"score {_score(score_before)} -> {_score(score_after)}", *_wrap(after, column)],
        )
        lines += [_line(row, column) for row in zip_longest(*cells, fillvalue="")]
        lines.append(rule)
    return "\n".join(lines)


def _line(cells: tuple[str, ...], column: int) -> str:
    return " | ".join(cell.ljust(column) for cell in cells).rstrip()


def _wrap(text: str, column: int) -> list[str]:
    """Wraps each of the text's own lines; a dialog keeps a turn per line."""
    lines = [line for part in text.strip().splitlines() for line in textwrap.wrap(part, column)]
    return lines or ["(empty)"]


def _score(score: float | None) -> str:
    return "not finite" if score is None else f"{score:+.2f}"


def _finite(score: float) -> float | None:
    """Returns what JSON can hold: it has no NaN and no infinity."""
    return float(score) if math.isfinite(score) else None


def _answering(pl_module: LightningModule) -> Answering:
    if not isinstance(pl_module, Answering):
        raise MisconfigurationException(
            "SampleWriter needs a module with `answer(prompts, role)`, such as PPO, but "
            f"{type(pl_module).__name__} has none: add the method, or remove the callback from "
            "`trainer.callbacks`"
        )
    return pl_module
