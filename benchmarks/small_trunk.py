"""What the small-scale studies share: small trunks that have read no rated row, runs in processes of their own.

A trunk is a Llama of 4 layers and hidden size 128 with a tokenizer of its own, trained from scratch on
demonstrations only: ``coffee`` on Taskmaster's coffee dialogs; ``general`` on those, its ticketing turns, Alpaca,
DialogSum, and the posts of TL;DR that nobody judged. No answer that a reward model is trained or tested on is
among them.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import shutil
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lightning_perl.commands.new_trunk import new_trunk
from lightning_perl.data.base import ConversationDataModule
from lightning_perl.data.rows import Item, Row, Splits, Turn, hold_out
from lightning_perl.data.taskmaster import TaskmasterDataModule
from lightning_perl.modules import SFT
from lightning_perl.modules.base import AdapterModule

MAX_TOKENS, MAX_RESPONSE_TOKENS = 256, 80
PASSES = {"coffee": (8, 3, 384, 120), "general": (16, 1, 512, 160)}
"""Batch, epochs, tokens of a row and of an answer, by trunk."""
HIDDEN, LAYERS, HEADS, VOCABULARY = 128, 4, 4, 4096


class GivenRows(ConversationDataModule):
    """Rows that were read already.

    Args:
        tokenizer: As `ConversationDataModule`'s.
        splits: The rows.
        options: As `ConversationDataModule`'s.
    """

    def __init__(self, tokenizer: str, splits: Splits, **options: Any) -> None:
        sizes = {"max_tokens": MAX_TOKENS, "max_response_tokens": MAX_RESPONSE_TOKENS}
        super().__init__(tokenizer, **{**sizes, "on_bad_row": "reject", **options})
        self.given = splits

    def read(self) -> Splits:
        """The rows as given."""
        return self.given


def json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """``file:line`` and row."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            yield f"{file.name}:{number}", json.loads(line)


def demonstration(prompt: str, answer: str, where: str) -> Row:
    """A row to imitate."""
    return Row((Turn("user", prompt),), (Turn("agent", answer),), None, True, prompt, where)


def dialogs(task: Literal["coffee", "ticketing"], data_dir: Path) -> list[Item]:
    """Taskmaster's demonstrations."""
    module = TaskmasterDataModule("none", data_dir, task, thumbs=False, val_fraction=0.0)
    return module.read().train


def demonstrations(name: str, data_dir: Path) -> list[Item]:
    """Everything a trunk reads."""
    rows = dialogs("coffee", data_dir)
    if name == "coffee":
        return rows
    rows += dialogs("ticketing", data_dir)
    for where, row in json_lines(data_dir / "alpaca/alpaca_5000.jsonl.gz"):
        if row["output"]:
            asked = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
            rows.append(demonstration(asked, row["output"], where))
    for name in ("dev", "test"):
        for where, row in json_lines(data_dir / f"dialogsum/dialogsum.{name}.jsonl.gz"):
            summary = row["summary"] if name == "dev" else row["summary1"]
            rows.append(demonstration(f"{row['dialogue']}\n\nTL;DR:", summary, where))
    for where, row in json_lines(data_dir / "tldr/oai1b_judged.jsonl.gz"):
        if not row["preferred"]:
            rows.append(demonstration(row["query"], row["reference_responses"].strip(), where))
    return rows


def divided(rows: list[Item], fraction: float = 0.02) -> Splits:
    """A small validation part by dialog; no test part."""
    held = hold_out((row.dialog for row in rows if isinstance(row, Row)), fraction)
    val = [row for row in rows if isinstance(row, Row) and row.dialog in held]
    train = [row for row in rows if isinstance(row, Row) and row.dialog not in held]
    return Splits([*train], [*val], [])


class StepClock(Callback):
    """Seconds of every training step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Look at the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Look again."""
        self.seconds.append(time.perf_counter() - self._started)


def fitted(
    module: AdapterModule,
    data: LightningDataModule,
    epochs: int = 1,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> tuple[Trainer, StepClock]:
    """Train quietly, without checkpoints."""
    clock = StepClock()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[clock, *callbacks],
        **options,
    )
    module.configure_callbacks = list  # type: ignore[method-assign]  # we hand over ourselves
    trainer.fit(module, datamodule=data)
    return trainer, clock


def linear_decay(steps: int) -> Callable[[torch.optim.Optimizer], Any]:
    """To a fiftieth of the learning rate over ``steps``."""
    return lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)


def adam(learning_rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    """AdamW without decay."""
    return lambda groups: torch.optim.AdamW(groups, lr=learning_rate, eps=1e-5, weight_decay=0.0)


def train_trunk(name: str, root: Path, data_dir: Path) -> dict[str, Any]:
    """Train the trunk ``name`` into ``root/trunk_NAME``; what it reached."""
    folder = root / f"trunk_{name}"
    fresh = root / f"trunk_{name}_untrained"
    shutil.rmtree(fresh, ignore_errors=True)
    splits = divided(demonstrations(name, data_dir))
    new_trunk(
        fresh, GivenRows("none", splits), VOCABULARY, HIDDEN, LAYERS, HEADS, window=1024, seed=0
    )
    batch, epochs, tokens, answer = PASSES[name]
    data = GivenRows(
        str(fresh),
        splits,
        batch_size=batch,
        val_batch_size=32,
        max_tokens=tokens,
        max_response_tokens=answer,
    )
    data.setup()
    steps = epochs * len(data.train_dataloader())
    module = SFT(str(fresh), optimizer=adam(3e-3), scheduler=linear_decay(steps))
    trainer, clock = fitted(module, data, epochs)
    module.save_trunk(folder)
    loss = float(trainer.callback_metrics["val/loss"])
    return {"steps": len(clock.seconds), "val_loss": loss}


def trunks(root: Path, data_dir: Path, *names: str) -> dict[Path, Callable[[], dict[str, Any]]]:
    """Trainings of trunks, for `run_missing`."""
    return {
        root / f"trunk_{name}.json": partial(train_trunk, name, root, data_dir) for name in names
    }


def resident_mb(key: str) -> float:
    """``VmRSS`` or ``VmHWM`` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {key}: the memory columns need Linux")


def _child(path: Path, work: Callable[[], dict[str, Any]], threads: int) -> None:
    torch.set_num_threads(threads)
    before = resident_mb("VmRSS")
    started = time.monotonic()
    try:
        result = work()
    except Exception:
        traceback.print_exc()
        raise
    result["peak_mb"] = resident_mb("VmHWM") - before
    result["minutes"] = (time.monotonic() - started) / 60
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(result))
    temporary.rename(path)


def run_missing(
    runs: dict[Path, Callable[[], dict[str, Any]]], workers: int, threads: int = 1
) -> None:
    """Run what has no result yet, each in a process of its own that shares the imports and has so many threads.

    Memory is the highest resident size of that process above what it began with.
    """
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    waiting = [(path, work) for path, work in runs.items() if not path.exists()]
    print(f"{len(runs) - len(waiting)} runs kept, {len(waiting)} to do", flush=True)
    running: list[Any] = []
    while waiting or running:
        while waiting and len(running) < workers:
            path, work = waiting.pop(0)
            process = context.Process(target=_child, args=(path, work, threads), name=str(path))
            process.start()
            running.append(process)
        time.sleep(0.2)
        for process in [one for one in running if not one.is_alive()]:
            running.remove(process)
            said = "done" if process.exitcode == 0 else f"FAILED ({process.exitcode})"
            print(f"{time.strftime('%H:%M:%S')} {process.name} {said}", flush=True)


def middle(seconds: list[float]) -> float:
    """Median without the first steps."""
    return statistics.median(seconds[3:] or seconds)
