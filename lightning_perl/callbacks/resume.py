"""How a run goes on from a checkpoint: as it was, with the settings that are given now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from lightning_perl.callbacks.handover import model_checkpoints

GIVEN = ("lr", "initial_lr", "max_lr", "min_lr", "weight_decay", "eps")
"""Settings of a parameter group that are taken as they are given now."""


class Resume(Callback):
    """Mends what Lightning forgets or keeps too faithfully when a run goes on.

    The best checkpoint of earlier parts stays the best. A run that was stopped inside an epoch (by max_episodes or
    max_time) goes on inside it. Learning rates and weight decay are those given now, where the checkpoint's state
    has others; a scheduled rate is scaled. every_n_train_steps also saves where a batch makes several steps and
    passes the number instead of meeting it.
    """

    def __init__(self) -> None:
        self._given: list[dict[str, Any]] = []
        self._steps = 0

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Do not count an epoch that was stopped inside, as Lightning does, so that the rest is not left out."""
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if not trainer.should_stop or not 0 < batches < trainer.fit_loop.max_batches:
            return
        for counts in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
            for key in ("processed", "completed"):
                counts[key] = min(counts[key], counts["started"] - 1)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the best of earlier parts, which lie in other folders, as long as its file is there."""
        states = checkpoint.get("callbacks", {})
        for callback in model_checkpoints(trainer):
            state = states.get(callback.state_key)
            if state and Path(state["best_model_path"]).is_file():
                state["dirpath"] = callback.dirpath

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the learning rates before a checkpoint's state replaces them."""
        self._given = [_settings(group) for group in _groups(trainer)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put them back."""
        self._steps = trainer.global_step
        rates = [
            (_rate(group), _rate(given))
            for group, given in zip(_groups(trainer), self._given, strict=True)
        ]
        for group, given, (before, now) in zip(_groups(trainer), self._given, rates, strict=True):
            scheduled = group["lr"] * now / before if before else now
            group.update(given | {"lr": group["lr"] if now == before else scheduled})
        for config in trainer.lr_scheduler_configs:
            if hasattr(config.scheduler, "base_lrs"):
                config.scheduler.base_lrs = [now for _, now in rates]
        if any(before != now for before, now in rates):
            changed = ", ".join(f"{before:g} -> {now:g}" for before, now in rates)
            rank_zero_info(f"learning rates, the checkpoint's -> those given now: {changed}")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Save where the steps of this batch passed a multiple of ``every_n_train_steps``."""
        before, self._steps = self._steps, trainer.global_step
        for callback in model_checkpoints(trainer):
            every = callback._every_n_train_steps
            if every > 0 and self._steps // every > before // every and self._steps % every:
                candidates = callback._monitor_candidates(trainer)
                if callback.monitor is None or callback.monitor in candidates:
                    callback._save_topk_checkpoint(trainer, candidates)
                    callback._save_last_checkpoint(trainer, candidates)


def _groups(trainer: Trainer) -> list[dict[str, Any]]:
    optimizers: list[Optimizer] = trainer.optimizers
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    # A scheduler may be in the middle of changing the others.
    return {key: group[key] for key in GIVEN if key in group}


def _rate(group: dict[str, Any]) -> float:
    """The learning rate that was asked for, before a scheduler changes it."""
    return float(group.get("initial_lr", group["lr"]))
