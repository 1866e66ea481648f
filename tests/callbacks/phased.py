"""A module that names its phases and does nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_perl.modules.base import AdapterModule

Work = Callable[["Phased"], Mapping[str, Any] | None]


class Phased(LightningModule):
    """Runs `work`, one optimizer step per train batch, by hand; `work` names the phases."""

    phase: Any = AdapterModule.phase

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.work = work

    def training_step(self, batch: Tensor, batch_idx: int) -> Mapping[str, Any] | None:
        outputs = self.work(self)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.weight.sum())
        optimizer.step()
        return outputs

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Rows:
    """A loader of one-number batches."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.zeros(self.batches, 1))

    def __len__(self) -> int:
        return self.batches


def quiet_trainer(folder: Path, callbacks: Iterable[Callback], **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "logger": False,
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **settings})
