"""How a run ends, with what the next stage loads written first, and how it goes on from a checkpoint."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from shlex import quote
from types import FrameType
from typing import Any, TextIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.trainer.call import _call_callbacks_state_dict
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_perl.callbacks.policy_guard import PolicyGuard
from lightning_perl.callbacks.run_folder import (
    forget_rows,
    give_back,
    holds_another_run,
    link_latest,
    locked,
    run_folder,
)
from lightning_perl.ranks import alone
from lightning_perl.whole import WholeCheckpoints, damage, written_whole

NEXT = {
    "adapters/actor": "talk to it: python -m lightning_perl generate {run}",
    "policy": "talk to it: python -m lightning_perl generate {run}",
    "adapters/reward": "learn from it: --model.layout=perl --model.reward={place}",
    "trunk": "begin the next stage with it: --model.trunk={place}",
}
"""What to do with a folder that was handed over."""
FIXED = ("class", "layout", "lora", "loraplus_lr_ratio", "seed", "samples")
"""What a run may not change on its way: shapes, the optimizer's groups, and what its random numbers depend on."""
GIVEN = ("lr", "initial_lr", "max_lr", "min_lr", "weight_decay", "eps")
"""Settings of a parameter group that are taken as they are given now."""
PROGRESS = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr")
"""What ReduceLROnPlateau has seen; the rest of its state are settings."""


def model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    """The callbacks that save checkpoints."""
    return [call for call in trainer.checkpoint_callbacks if isinstance(call, ModelCheckpoint)]


def best_checkpoint(trainer: Trainer) -> str | None:
    """Path of the best checkpoint, if a `ModelCheckpoint` of the trainer watches a measure."""
    for callback in model_checkpoints(trainer):
        # A resumed run may remember a best file of its first part that was cleared away since.
        path = Path(callback.best_model_path)
        if callback.monitor is not None and path.is_file() and not damage(path):
            return callback.best_model_path
    return None


class Handover(Callback):
    """Ends ``fit`` by writing the module's result into the run's folder; ``latest`` beside it leads there.

    Where a `ModelCheckpoint` watches a measure (``monitor``), the best checkpoint is handed over, else the last
    weights. It comes before all other callbacks, whose errors then lose nothing. A run that is stopped by Ctrl-C,
    SIGTERM, a time limit or an error hands over too, with ``unfinished`` in the manifests, and leaves a checkpoint
    to go on from. Ctrl-C and SIGTERM wait for the end of the batch, a second Ctrl-C does not.
    """

    def __init__(self) -> None:
        self._began = False
        self._ended = False
        self._interrupted = False
        self._steps: int | None = None
        self._asked = False
        self._lock: TextIO | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Come first, and let checkpoints appear whole and in the run's folder (a dry run's is temporary)."""
        trainer.callbacks = [self, *(other for other in trainer.callbacks if other is not self)]  # type: ignore[attr-defined]
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()
        if stage != "fit":
            return
        folder = str(run_folder(trainer) / "checkpoints")
        for callback in model_checkpoints(trainer):
            given = None if trainer.fast_dev_run else callback.dirpath  # type: ignore[attr-defined]
            callback.dirpath = given or folder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a folder in which another run lies, or in which another process runs."""
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._lock = locked(run_folder(trainer))
        if not trainer.fast_dev_run and not trainer.ckpt_path and holds_another_run(trainer):  # type: ignore[attr-defined]
            raise FileExistsError(
                f"{run_folder(trainer)} holds another run. Go on with it (--ckpt_path last), or give "
                "trainer.logger another version."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let Ctrl-C wait for the end of a batch; and SIGTERM for a batch after which all ranks can stop."""
        self._steps = trainer.global_step
        if threading.current_thread() is not threading.main_thread():
            return
        several = trainer.world_size > 1

        def stop(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT:
                signal.signal(number, signal.default_int_handler)
                self._interrupted = True
                rank_zero_info("Ctrl-C: stops at the end of this batch; once more: stops at once")
            self._asked = True
            if not several:
                # As SIGTERM does: Lightning raises at the end of the batch, and puts the handlers back.
                trainer._signal_connector.received_sigterm = True

        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, stop)
        if several:  # Lightning's own would talk to the other ranks at once, whatever they do then.
            signal.signal(signal.SIGTERM, stop)

    def on_train_batch_end(self, trainer: Trainer, *_: object, **__: object) -> None:
        """Stop where one of several ranks was asked to."""
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(self._asked, all=False)
            trainer._signal_connector.received_sigterm = asked

    def on_train_batch_start(self, *_: object, **__: object) -> None:
        """From here on there is something to lose."""
        self._began = True

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand over; a dry run (``fast_dev_run``) writes nothing.

        Raises:
            RuntimeError: No step was made, or the weights are not finite.
        """
        self._ended = True
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        timers = (call for call in trainer.callbacks if isinstance(call, Timer))  # type: ignore[attr-defined]
        late = trainer.should_stop and any((timer.time_remaining() or 1) <= 0 for timer in timers)
        if trainer.should_stop:
            self._save(trainer)
        # Lightning may not even begin.
        if trainer.ckpt_path and self._steps in (None, trainer.global_step):
            rank_zero_warn(
                f"This run had ended already, after {trainer.global_step} steps; nothing more was learned. To go "
                "on, raise what ended it: model.max_episodes, trainer.max_epochs or trainer.max_steps."
            )
        guards = [one for one in trainer.callbacks if isinstance(one, PolicyGuard)]  # type: ignore[attr-defined]
        reasons = ["the time limit"] * late + [one.stopped_by for one in guards if one.stopped_by]
        self._hand_over(trainer, pl_module, ", ".join(reasons) or None)

    def teardown(self, *_: object, **__: object) -> None:
        """Let others into the folder."""
        if self._lock is not None:
            self._lock.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave weights and a checkpoint, unless the error came inside a batch: it is about the training then."""
        self.teardown()
        pl_module.teardown(trainer.state.fn or "")  # Lightning leaves it out after an error.
        stopped_by = type(exception).__name__
        if isinstance(exception, SIGTERMException):
            number = signal.SIGINT if self._interrupted else signal.SIGTERM
            exception.code, stopped_by = 128 + number, number.name
        if not self._began:
            give_back(trainer)
        fitting = trainer.state.fn == "fit" and not trainer.fast_dev_run  # type: ignore[attr-defined]
        trained = fitting and self._began and trainer.global_step > 0
        asked = isinstance(exception, SIGTERMException | KeyboardInterrupt)
        if self._ended or not trained or not (asked or between_batches(trainer)):
            return
        try:
            # All ranks save, and of an error the others may know nothing.
            if trainer.world_size == 1 or isinstance(exception, SIGTERMException):
                self._save(trainer)
            self._hand_over(trainer, pl_module, stopped_by)
        except Exception as error:  # the first one is the one to raise
            rank_zero_warn(f"Nothing is handed over: {error}")

    def _save(self, trainer: Trainer) -> None:
        """Save a checkpoint where this step has none; one from inside a batch could not go on exactly."""
        keepers = model_checkpoints(trainer)
        whole = [one for one in keepers if not one.save_weights_only]
        saved = any(one._last_global_step_saved == trainer.global_step for one in whole)
        if keepers and not saved and between_batches(trainer):
            path = stopped_checkpoint(trainer)
            trainer.save_checkpoint(path, weights_only=False)
            rank_zero_info(f"saved {path}")

    def _hand_over(
        self,
        trainer: Trainer,
        pl_module: Any,  # noqa: ANN401 (an AdapterModule, which this room does not import)
        stopped_by: str | None,
    ) -> None:
        if trainer.global_step == 0:
            raise RuntimeError(
                "Nothing was trained (0 steps), so nothing is handed over. Look at max_steps, max_time and "
                "limit_train_batches of the trainer, and at the data."
            )
        folder = run_folder(trainer)
        best = best_checkpoint(trainer)
        if best is not None:
            stored = torch.load(best, map_location=pl_module.device, weights_only=True)
            pl_module.load_state_dict(stored["state_dict"], strict=False)
            rank_zero_info(f"handing over the best of the run: {best}")
        _require_finite(pl_module)
        if trainer.is_global_zero:
            note = f"stopped by {stopped_by} after {trainer.global_step} steps"
            about: dict[str, Any] = {"unfinished": note} if stopped_by else {}
            with alone(), written_whole(folder, about) as beside:
                pl_module.hand_over(beside)
            link_latest(folder)
        rank_zero_info(f"handed over in {folder}")
        for place, then in NEXT.items():
            if (folder / place).is_dir():
                rank_zero_info(
                    then.format(run=quote(str(folder)), place=quote(str(folder / place)))
                )
        if stopped_by:
            rank_zero_info(f"unfinished, {note}; to go on, add --ckpt_path last")


def stopped_checkpoint(trainer: Trainer) -> Path:
    """Where a run that ends before its time leaves a checkpoint."""
    return run_folder(trainer) / "checkpoints" / "stopped.ckpt"


def between_batches(trainer: Trainer) -> bool:
    """Whether no batch is being learned from."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(progress.processed == progress.ready)


def _require_finite(module: LightningModule) -> None:
    trained = ((name, p) for name, p in module.named_parameters() if p.requires_grad)
    broken = [name for name, parameter in trained if not bool(torch.isfinite(parameter).all())]
    if broken:
        raise RuntimeError(
            f"{len(broken)} trained tensors are not finite ({broken[0]}), so nothing is handed over. Look at the "
            "learning rates and at the losses; checkpoints that were saved before may still be sound."
        )


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
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
