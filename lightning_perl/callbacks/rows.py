"""Rows that a run writes into its folder: what ``predict`` finds, and batches that nothing was learned from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_perl.callbacks.run_folder import run_folder

MOST = 10
"""Batches that are kept of a run."""


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
