"""How runs end and go on: what is written whatever happens, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file, save_file
from torch.optim import lr_scheduler

from lightning_perl.callbacks.handover import best_checkpoint
from lightning_perl.modules.base import AdapterModule
from lightning_perl.whole import require_whole
from tests.callbacks.phased import Phased, Rows, quiet_trainer


class Counter(Phased):
    """Hands over a weight, which says how many batches were learned from."""

    configure_callbacks: Any = AdapterModule.configure_callbacks

    def hand_over(self, folder: Path) -> None:
        (folder / "trunk").mkdir(parents=True)
        save_file({"weight": self.weight.detach()}, folder / "trunk/model.safetensors")
        (folder / "trunk/manifest.json").write_text("{}")


class Act(Callback):
    """Does something at the end of the third batch, or at a named hook."""

    def __init__(self, act: Callable[[Trainer], object], hook: str = "on_train_batch_end") -> None:
        setattr(self, hook, self.call)
        self.act, self.hook, self.calls = act, hook, 0

    def call(self, trainer: Trainer, *_: object) -> None:
        self.calls += 1
        if self.calls == (3 if self.hook == "on_train_batch_end" else 1):
            self.act(trainer)


def fail(trainer: Trainer) -> None:
    raise UnicodeEncodeError("ascii", "thé", 2, 3, "ordinal not in range")


def fit(
    folder: Path, *callbacks: Callback, module: Counter | None = None, **options: Any
) -> tuple[Path, Counter]:
    """Five batches; returns the run's folder and the module."""
    logger = options.pop("logger", None) or CSVLogger(folder, "run")
    ckpt_path = options.pop("ckpt_path", None)
    keep = ModelCheckpoint(save_last=True, every_n_train_steps=100)
    settings = {"logger": logger, "enable_checkpointing": True} | options
    limit = Timer(duration={"hours": 1})
    trainer = quiet_trainer(folder, [*callbacks, limit, keep], **settings)
    module = module or Counter(lambda module: None)
    trainer.fit(module, Rows(5), ckpt_path=ckpt_path)
    return Path(logger.log_dir), module


def kill(number: signal.Signals) -> Callable[[Trainer], object]:
    return lambda trainer: os.kill(os.getpid(), number)


def out_of_time(trainer: Trainer) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Timer):
            callback._duration = 0.0


@pytest.mark.parametrize(
    ("stop", "code"),
    [
        (Act(kill(signal.SIGTERM)), 143),
        (Act(kill(signal.SIGINT)), 130),
        (Act(fail, "on_train_epoch_end"), None),
        (Act(out_of_time), 0),
    ],
    ids=["SIGTERM", "Ctrl-C", "another callback fails", "max_time"],
)
def test_a_stopped_run_hands_over_and_goes_on(
    stop: Act, code: int | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # A shell's background job ignores Ctrl-C; so would the tests in one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    if code == 0:
        fit(tmp_path, stop)
    else:
        with pytest.raises((SystemExit, UnicodeEncodeError)) as stopped:
            fit(tmp_path, stop)
        assert code is None or stopped.value.code == code  # type: ignore[attr-defined]
    learned = 5 if code is None else 3
    folder = tmp_path / "run/latest/trunk"
    assert load_file(folder / "model.safetensors")["weight"] == -learned
    about = json.loads((folder / "manifest.json").read_text())
    assert "unfinished" in about
    newest = max((tmp_path / "run/version_0/checkpoints").iterdir(), key=os.path.getmtime)
    again, module = fit(tmp_path, ckpt_path=newest)
    assert (again.name, module.weight.item()) == ("version_1", -5)
    assert not list(tmp_path.rglob("*.part"))


def test_callbacks_that_fail_at_the_end_come_after_the_handover(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        fit(tmp_path, Act(fail, "on_fit_end"))
    about = json.loads((tmp_path / "run/latest/trunk/manifest.json").read_text())
    assert about.keys() == {"checksums"}


class Diverging(Counter):
    def on_train_end(self) -> None:
        torch.nn.init.constant_(self.weight, float("nan"))


class FullDisk(Counter):
    def hand_over(self, folder: Path) -> None:
        super().hand_over(folder)
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (Counter, {"max_steps": 0}, "Nothing was trained"),
        (Diverging, {}, "are not finite"),
        (FullDisk, {}, r"run/version_0: not written, .*No space"),
    ],
)
def test_what_is_untrained_not_finite_or_not_whole_is_not_handed_over(
    kind: type[Counter], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises((RuntimeError, OSError), match=words):
        fit(tmp_path, module=kind(lambda module: None), **options)
    assert not list(tmp_path.rglob("trunk"))


def test_an_error_inside_a_batch_is_about_the_training(tmp_path: Path) -> None:
    def work(module: Phased) -> None:
        if module.global_step == 3:
            raise RuntimeError("the gradients were not finite")

    with pytest.raises(RuntimeError, match="gradients"):
        fit(tmp_path, module=Counter(work))
    assert not list(tmp_path.rglob("trunk"))


def test_a_run_that_never_began_takes_no_number(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        fit(tmp_path, Act(fail, "on_train_start"))
    assert fit(tmp_path)[0].name == "version_0"


def test_a_named_version_is_gone_on_with_or_refused(tmp_path: Path) -> None:
    def named() -> CSVLogger:
        return CSVLogger(tmp_path, "run", version="mine")

    def work(module: Phased) -> None:
        module.log("weight", module.weight)

    folder, _ = fit(tmp_path, logger=named(), module=Counter(work))
    assert fit(tmp_path)[0] != folder
    before = (folder / "metrics.csv").read_text()
    assert before.count("\n") == 1 + 5
    with pytest.raises(FileExistsError, match="mine holds another run"):
        fit(tmp_path, logger=named())
    path = shutil.copy(folder / "checkpoints/last.ckpt", tmp_path)
    with pytest.warns(UserWarning, match=r"had ended already, after 5 steps; .* trainer.max_epoch"):
        fit(tmp_path, ckpt_path=path)
    for _ in range(2):  # as if the first part had been killed behind the checkpoint's rows
        fit(tmp_path, logger=named(), ckpt_path=path, max_epochs=2, module=Counter(work))
        after = (folder / "metrics.csv").read_text()
        assert after.replace("\r", "").startswith(before.replace("\r", ""))
        assert after.count("\n") == 1 + 10


@pytest.mark.parametrize("keep", [0.5, 1.0], ids=["cut short", "a bit flipped"])
def test_damaged_files_are_never_loaded(keep: float, tmp_path: Path) -> None:
    folder, _ = fit(tmp_path)
    path, weights = folder / "checkpoints/last.ckpt", folder / "trunk/model.safetensors"
    require_whole(folder / "trunk")
    for file in (path, weights):
        content = bytearray(file.read_bytes())
        # The weight's own bytes: 5 in the checkpoint's first tensor, the last number of safetensors.
        place = content.find(torch.tensor(-5.0).numpy().tobytes())
        content[place + 2] ^= 1
        file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=r"last.ckpt is no whole checkpoint"):
        fit(tmp_path, ckpt_path=path)
    with pytest.raises(ValueError, match=r"model.safetensors is missing, cut short or changed"):
        require_whole(folder / "trunk")


class Worse(Counter):
    """Measures more with every batch."""

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/loss", -self.weight)


def test_the_best_of_earlier_parts_stays_the_best(tmp_path: Path) -> None:
    best = []
    path = None
    for epochs in (1, 3):
        keep = ModelCheckpoint(monitor="val/loss", save_last=True, auto_insert_metric_name=False)
        options = {"logger": CSVLogger(tmp_path, "run"), "enable_checkpointing": True}
        trainer = quiet_trainer(tmp_path, [keep], max_epochs=epochs, **options)
        trainer.fit(Worse(lambda module: None), Rows(2), Rows(1), ckpt_path=path)
        best.append(best_checkpoint(trainer))
        path = keep.last_model_path
    assert best[0] == best[1] is not None
    assert load_file(tmp_path / "run/version_1/trunk/model.safetensors")["weight"] == -2


@pytest.mark.parametrize(
    ("schedule", "later", "rate"),
    [
        (None, {}, 0.1),
        # What the one given now yields after the five steps of the first part.
        (partial(lr_scheduler.StepLR, step_size=1, gamma=0.5), {}, 0.1 * 0.5**5),
        (partial(lr_scheduler.StepLR, step_size=1, gamma=0.5), {"step_size": 4}, 0.1 * 0.5),
        # The first part came to its end, where the rate is 0.
        (partial(lr_scheduler.CosineAnnealingLR, T_max=5), {"T_max": 10}, 0.1 * 0.5),
        # Nothing to replay: the rate that was reached is scaled.
        (partial(lr_scheduler.ReduceLROnPlateau, patience=0), {"factor": 0.5}, 0.1 * 0.1**4),
    ],
)
def test_rates_and_schedules_are_those_given_now(
    schedule: Callable[..., Any] | None,
    later: dict[str, float],
    rate: float,
    tmp_path: Path,
) -> None:
    class Scheduled(Counter):
        rate, changed = 1.0, dict[str, float]()

        def configure_optimizers(self) -> Any:  # noqa: ANN401
            optimizer = torch.optim.SGD(self.parameters(), lr=self.rate, weight_decay=self.rate)
            schedulers = [schedule(optimizer, **self.changed)] if schedule else []
            return [optimizer], [{"scheduler": one, "monitor": ""} for one in schedulers]

        def on_train_batch_end(self, *_: object) -> None:
            if scheduler := self.lr_schedulers():
                step: Any = scheduler.step  # type: ignore[union-attr]
                step(*[1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else [])

    folder, _ = fit(tmp_path, module=Scheduled(lambda module: None))
    module = Scheduled(lambda module: None)
    module.rate, module.changed = 0.1, later
    groups: list[dict[str, Any]] = []
    watch = Act(
        lambda trainer: groups.append(dict(trainer.optimizers[0].param_groups[0])),
        "on_train_epoch_start",
    )
    path = folder / "checkpoints/last.ckpt"
    fit(tmp_path, watch, module=module, ckpt_path=path, max_epochs=2)
    assert groups[0]["lr"] == pytest.approx(rate)
    assert groups[0]["weight_decay"] == 0.1
    for config in module.trainer.lr_scheduler_configs:
        assert later.items() <= vars(config.scheduler).items()


def test_every_n_train_steps_counts_steps_that_batches_pass(tmp_path: Path) -> None:
    def step_twice_more(module: Phased) -> None:
        optimizer: Any = module.optimizers()
        for _ in range(2):
            optimizer.step()

    keep = ModelCheckpoint(every_n_train_steps=4, save_top_k=-1, filename="{step}")
    options = {"logger": CSVLogger(tmp_path, "run"), "enable_checkpointing": True}
    trainer = quiet_trainer(tmp_path, [keep], **options)
    trainer.fit(Counter(step_twice_more), Rows(5))
    saved = {path.name for path in (tmp_path / "run/version_0/checkpoints").iterdir()}
    assert saved == {f"step={step}.ckpt" for step in (6, 9, 12)}
