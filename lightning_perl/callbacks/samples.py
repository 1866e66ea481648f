"""Rows that a run writes into its folder: answers before and after, predictions, batches that were left out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_perl.arguments import Checked, Count
from lightning_perl.batches import Answers, PromptBatch
from lightning_perl.callbacks.console import in_columns, show
from lightning_perl.callbacks.run_folder import run_folder
from lightning_perl.callbacks.wandb_summary import wandb_loggers

# Characters of a text in the printed table; the file holds all of it.
_PRINTED = 300
MOST = 10
"""Batches that are kept of a run."""


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
    """Samples in three columns (prompt, before, after), which fill a width or the terminal.

    Long texts are cut to 300 characters: prompts at their start, answers at their end.
    """
    rows = [("prompt", "before", "after")]
    for _, prompt, *answers, score_before, score_after in samples:
        if len(prompt) > _PRINTED:
            prompt = f"...{prompt[-_PRINTED:]}"
        before, after = (
            text if len(text) <= _PRINTED else f"{text[:_PRINTED]}..." for text in answers
        )
        scores = f"score {_score(score_before)}"
        both = f"{scores} -> {_score(score_after)}"
        rows.append((prompt, f"{scores}\n{before or '(empty)'}", f"{both}\n{after or '(empty)'}"))
    return in_columns(rows, width)


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


class PredictionWriter(Callback):
    """Writes what ``predict`` returns to ``predictions.jsonl`` in the run's folder.

    One line per row: the keys that the module predicts, and ``where`` (file and line) if the datamodule knows it.
    """

    def __init__(self) -> None:
        self._path = Path()
        self._rows = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the file, which needs every rank."""
        self._path = run_folder(trainer) / "predictions.jsonl"
        self._rows = 0

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401 (whatever predict_step returns)
        *_: object,
    ) -> None:
        """Append a batch's rows."""
        if not isinstance(outputs, Mapping) or not trainer.is_global_zero:
            return
        where = getattr(trainer.datamodule, "where", None)  # type: ignore[attr-defined]
        columns = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in outputs.items()}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a" if self._rows else "w", encoding="utf-8") as file:
            for row in rows:
                place = {"where": where(row["row"])} if where else {}
                file.write(json.dumps(place | row, ensure_ascii=False) + "\n")
        self._rows += len(rows)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where they are."""
        rank_zero_info(f"{self._rows} predictions in {self._path}")


class SkippedBatches(Callback):
    """Writes each batch whose step was left out, since a gradient was not finite, to ``RUN/skipped/NUMBER.pt``.

    ``torch.load`` gives its tensors by name: ``row`` is the rows' numbers in their corpus. A rollout batch is its
    prompts, from which the same responses can be drawn again.
    """

    def __init__(self) -> None:
        self._batch: object = None
        self._before = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Note the batch."""
        self._batch, self._before = batch, _skipped(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Keep it, if its step was left out."""
        # Where rollouts overlap, it is the batch before.
        batch = self._batch and (getattr(pl_module, "learned_from", None) or self._batch)
        count, self._batch = _skipped(pl_module), None
        if batch is None or not self._before < count <= MOST or not trainer.is_global_zero:
            return
        path = run_folder(trainer) / "skipped" / f"{count}.pt"
        path.parent.mkdir(exist_ok=True)
        torch.save(_plain(batch), path)
        rank_zero_warn(f"A step was left out: a gradient was not finite. Its batch is in {path}.")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Keep the one that ended the run as well."""
        self.on_train_batch_end(trainer, pl_module)


def _skipped(module: Any) -> int:  # noqa: ANN401 (an AdapterModule, which this room does not import)
    guard = getattr(module, "guard", None)
    return 0 if guard is None else int(guard.skipped)


def _plain(batch: Any) -> Any:  # noqa: ANN401 (tuples with names become dicts, others stay)
    if not hasattr(batch, "_asdict"):
        return batch
    return {name: _plain(part) for name, part in batch._asdict().items()}
