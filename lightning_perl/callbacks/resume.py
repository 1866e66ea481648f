"""How a run goes on from a checkpoint: as it was, with the settings that are given now."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.call import _call_callbacks_state_dict
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_perl.callbacks.handover import (
    between_batches,
    model_checkpoints,
    stopped_checkpoint,
)
from lightning_perl.callbacks.run_folder import forget_rows

FIXED = ("class", "layout", "lora", "loraplus_lr_ratio", "seed", "samples")
"""What a run may not change on its way: shapes, the optimizer's groups, and what its random numbers depend on."""
GIVEN = ("lr", "initial_lr", "max_lr", "min_lr", "weight_decay", "eps")
"""Settings of a parameter group that are taken as they are given now."""
PROGRESS = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr")
"""What ReduceLROnPlateau has seen; the rest of its state are settings."""


class Resume(Callback):
    """Mends what Lightning forgets or keeps too faithfully when a run goes on.

    A checkpoint that differs in one of `FIXED`, or was trained on other rows, is refused; other settings are those
    given now, and the log names them. Learning rates and weight decay are those that a run with today's optimizer
    and scheduler would have reached. The best checkpoint of earlier parts stays the best. A run that was stopped
    inside an epoch (by max_episodes or max_time) goes on inside it.
    every_n_train_steps also saves where a batch makes several steps and passes the number instead of meeting it.
    A rollout that fails before its first step leaves a checkpoint of the moment before it.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._groups: list[dict[str, Any]] = []
        self._schedules: list[dict[str, Any]] = []
        self._before: dict[str, Any] = {}
        self._going_on = False

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say what was trained, and on which rows; an epoch that was stopped inside is not counted."""
        checkpoint["class"] = type(pl_module).__name__
        checkpoint["data"] = _trained_rows(trainer)
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if not trainer.should_stop or not 0 < batches < trainer.fit_loop.max_batches:
            return
        # Lightning counts it, so that the rest would be left out.
        for counts in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
            for key in ("processed", "completed"):
                counts[key] = min(counts[key], counts["started"] - 1)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse another run's checkpoint; keep the best of earlier parts as long as its file is there.

        Raises:
            ValueError: It is another run's.
        """
        if trainer.state.fn != "fit":
            return
        if "optimizer_states" not in checkpoint:
            raise ValueError(
                f"{trainer.ckpt_path} holds weights alone (save_weights_only), and no optimizer to go on with. "
                "Give another file."
            )
        now = {"class": type(pl_module).__name__, **pl_module.hparams}
        for key, (before, given) in changes(now, checkpoint, trainer.ckpt_path).items():
            rank_zero_info(f"goes on with {key} {given}; it was {before}")
        here, there = _trained_rows(trainer), checkpoint.get("data")
        if here and there and here["rows"] != there["rows"]:
            raise ValueError(
                f"{trainer.ckpt_path} was trained on other rows: data is {here['rows']} of {here['sources']}, "
                f"there {there['rows']} of {there['sources']}. Give the same data (files may have moved), or "
                "begin a run of its own on the trunk or adapter that was handed over."
            )
        states = checkpoint.get("callbacks", {})
        for callback in model_checkpoints(trainer):
            state = states.get(callback.state_key, {})
            best = state.get("best_model_path")
            if not best or Path(best).is_file():
                state["dirpath"] = callback.dirpath

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note settings before a checkpoint's state replaces them."""
        for group in _groups(trainer):
            group.setdefault("initial_lr", group["lr"])
        self._groups = [{k: group[k] for k in GIVEN if k in group} for group in _groups(trainer)]
        configs = trainer.lr_scheduler_configs
        self._schedules = [dict(config.scheduler.state_dict()) for config in configs]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go by today's settings."""
        self._steps = trainer.global_step
        self._going_on = bool(trainer.ckpt_path)
        if not self._going_on:
            return
        groups = _groups(trainer)
        before = [group["lr"] for group in groups]
        for group, given in zip(groups, self._groups, strict=True):
            # A checkpoint from elsewhere may not say which rate was asked for.
            ratio = given["initial_lr"] / group.get("initial_lr", group["lr"])
            group.update(given | {"lr": group["lr"] * ratio})
        for config, given in zip(trainer.lr_scheduler_configs, self._schedules, strict=True):
            _go_by(given, config.scheduler, self._groups)
        now = [group["lr"] for group in groups]
        if now != before:
            changed = ", ".join(f"{b:g} -> {n:g}" for b, n in zip(before, now, strict=True))
            rank_zero_info(f"learning rates, the checkpoint's -> by today's settings: {changed}")

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        """Let a run that was killed and goes on in its folder log no row twice."""
        going_on, self._going_on = self._going_on, False
        if going_on and trainer.is_global_zero:
            forget_rows(trainer, trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Save where the steps of this batch passed a multiple of ``every_n_train_steps``.

        Of a batch that is a whole rollout, note what a checkpoint would hold: its weights and moments are those
        of the run itself, and copied by nobody.
        """
        saves = model_checkpoints(trainer) and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if saves and not pl_module.automatic_optimization:
            self._before = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        before, self._steps = self._steps, trainer.global_step
        for callback in model_checkpoints(trainer):
            every = callback._every_n_train_steps
            if every > 0 and self._steps // every > before // every and self._steps % every:
                candidates = callback._monitor_candidates(trainer)
                if callback.monitor is None or callback.monitor in candidates:
                    callback._save_topk_checkpoint(trainer, candidates)
                    callback._save_last_checkpoint(trainer, candidates)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save what was noted, as long as nothing was learned since."""
        steps = self._before.get("global_step")
        if steps != trainer.global_step or between_batches(trainer):
            return
        # Validation since then may have found a best checkpoint.
        self._before["callbacks"] = _call_callbacks_state_dict(trainer)
        path = stopped_checkpoint(trainer)
        try:
            trainer.strategy.save_checkpoint(self._before, path)
            rank_zero_info(f"saved {path}, before this rollout; to go on, add --ckpt_path last")
        except OSError as error:  # the first one is the one to raise
            rank_zero_warn(str(error))


def changes(
    now: Mapping[str, Any], checkpoint: Mapping[str, Any], path: object
) -> dict[str, tuple[Any, Any]]:
    """Settings that differ: key, the checkpoint's value, the one given now. Unknown keys are passed over.

    Args:
        now: ``class``, the module's name, and its arguments.
        checkpoint: One that a run goes on from.
        path: Where it lies, for the message.

    Raises:
        ValueError: One of `FIXED` differs.
    """
    stored = dict(checkpoint.get("hyper_parameters", {}))
    if "class" in checkpoint:
        stored["class"] = checkpoint["class"]
    flat_before, flat_now = dict(_flat(stored)), dict(_flat(now))
    shared = sorted(flat_before.keys() & flat_now.keys())
    changed = {k: (flat_before[k], flat_now[k]) for k in shared if flat_before[k] != flat_now[k]}
    fixed = [key for key in changed if key.split(".")[0] in FIXED]
    if fixed:
        wrong = ", ".join(f"{key} is {changed[key][1]}, there {changed[key][0]}" for key in fixed)
        raise ValueError(
            f"{path} has other settings, which cannot change: {wrong}. Give them as they were, or leave ckpt_path "
            "out to begin."
        )
    return changed


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        if isinstance(plain, Mapping):
            yield from _flat(plain, f"{prefix}{key}.")
        else:
            # A reward or another object of a class is compared by its arguments.
            name = f"{prefix}{key}".replace("init_args.", "")
            yield name, list(plain) if isinstance(plain, tuple) else plain


def _go_by(
    given: dict[str, Any],
    scheduler: LRScheduler | ReduceLROnPlateau,
    groups: list[dict[str, Any]],
) -> None:
    """Bring a scheduler and its rates where a fresh one with today's settings stands after as many steps."""
    state = scheduler.state_dict()
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.load_state_dict(given | {key: state[key] for key in PROGRESS})
        return
    if "last_epoch" not in state:  # ChainedScheduler does not count
        return
    scheduler.load_state_dict(given)
    for group, own in zip(scheduler.optimizer.param_groups, groups, strict=True):
        group.update(own)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*before `optimizer.step")
        for _ in range(state["last_epoch"]):
            scheduler.step()


def _trained_rows(trainer: Trainer) -> dict[str, str] | None:
    """A digest of the training rows and the names of their sources, from a datamodule that knows them."""
    return getattr(trainer.datamodule, "trained_rows", None)  # type: ignore[attr-defined]


def _groups(trainer: Trainer) -> list[dict[str, Any]]:
    optimizers: list[Optimizer] = trainer.optimizers
    return [group for optimizer in optimizers for group in optimizer.param_groups]
