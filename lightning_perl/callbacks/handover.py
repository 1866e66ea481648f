"""How a run ends: what the next stage loads is written first, whatever else fails."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from shlex import quote
from types import FrameType
from typing import Any, TextIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_perl.callbacks.policy_guard import PolicyGuard
from lightning_perl.callbacks.run_folder import (
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
        """Hand over; a dry run (``fast_dev_run``) writes nothing."""
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
