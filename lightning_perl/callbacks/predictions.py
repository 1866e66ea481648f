"""What ``predict`` finds, in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_perl.callbacks.run_folder import run_folder


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
