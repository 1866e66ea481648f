"""What a run shows on the console: a bar, what is trained, and how the policy was before and after."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that tell a terminal to do something, or that turn the direction of the text behind them."""
SHOWN = {
    "rollout/score": ("score", "{:+.2f}"),
    "rollout/kl": ("KL", "{:.2f}"),
    "rollout/response_tokens": ("length", "{:.0f}"),
    "speed/rollout_tokens_per_second": ("tokens/s", "{:.0f}"),
    "memory/rollout_peak_allocated_gib": ("GiB", "{:.2f}"),
    "memory/rollout_resident_gib": ("GiB", "{:.2f}"),
}
"""Measures of the last rollout, and how the bar writes them."""


def show(text: str, end: str = "\n") -> None:
    """Print a text; what the console's encoding lacks becomes a question mark instead of an error.

    Models and data write such texts, so what a terminal would obey is spelt out.
    """
    text = COMMANDS.sub(lambda found: repr(found[0])[1:-1], text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end=end, flush=True)


def in_columns(rows: Iterable[Sequence[str]], width: int | None = None) -> str:
    """Texts side by side, as wide as the terminal, with a rule under each row; their own lines stay lines."""
    width, lines = width or shutil.get_terminal_size((120, 24)).columns, list[str]()
    for row in rows:
        column = max(16, (width - 3 * (len(row) - 1)) // len(row))
        cells = [
            [part for line in text.splitlines() for part in textwrap.wrap(line, column) or [""]]
            for text in row
        ]
        together = [*zip_longest(*cells, fillvalue="")]
        lines += [" | ".join(cell.ljust(column) for cell in line).rstrip() for line in together]
        lines.append("-+-".join(["-" * column] * len(row)))
    return "\n".join(lines)


class EpisodeBar(TQDMProgressBar):
    """Counts episodes towards the module's ``max_episodes``, with score, KL, length, speed and memory of the last.

    On-policy modules have it in place of Lightning's own bar, which counts batches towards an end that nobody
    knows; a `TQDMProgressBar`'s ``refresh_rate`` is kept. A bar of another class stays.
    """

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ANN401 (counts episodes)
        """Begin where a resumed run is."""
        super().on_train_start(trainer, pl_module)
        self.train_progress_bar.total = getattr(pl_module, "max_episodes", None)
        self.train_progress_bar.unit = "episodes"
        self.train_progress_bar.set_description("episodes")
        self.train_progress_bar.n = pl_module.episodes
        self.train_progress_bar.refresh()

    def on_train_epoch_start(self, *_: object) -> None:
        """An epoch is no new beginning."""

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,  # noqa: ANN401
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Show the last rollout."""
        self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
        self.train_progress_bar.n = pl_module.episodes  # which the end shows, whatever the rate
        if self._should_update(batch_idx + 1, 0):
            self.train_progress_bar.refresh()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What the bar shows."""
        measures = trainer.callback_metrics
        known = {key: form for key, form in SHOWN.items() if key in measures}
        return {name: form.format(float(measures[key])) for key, (name, form) in known.items()}


def count_episodes(callbacks: list[Callback]) -> None:
    """Put an `EpisodeBar` in the place of one of Lightning's own bars, if that is there."""
    for place, callback in enumerate(callbacks):
        if type(callback) is TQDMProgressBar:
            callbacks[place] = EpisodeBar(callback.refresh_rate)
        elif type(callback) is RichProgressBar:  # its rate is another: times a second
            callbacks[place] = EpisodeBar(int(callback.is_enabled))


class TrainedParameters(ModelSummary):
    """Counts the trained parameters by optimizer group, in place of Lightning's table of the module's parts.

    That table has a row for every metric and counts no FLOPs. A summary of another class or depth stays.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ANN401 (has groups)
        """Print the line."""
        counts = {
            group["name"]: sum(weight.numel() for weight in group["params"]) / 1e6
            for group in pl_module.parameter_groups()
        }
        named = ", ".join(f"{name} {millions:.2f}M" for name, millions in counts.items())
        total = sum(weight.numel() for weight in pl_module.parameters()) / 1e6
        rank_zero_info(f"trained: {named}, of {total:.2f}M parameters")


def count_trained(callbacks: list[Callback]) -> None:
    """Put `TrainedParameters` in the place of Lightning's own summary, if that is there."""
    for place, callback in enumerate(callbacks):
        if type(callback) in (ModelSummary, RichModelSummary) and callback._max_depth == 1:  # type: ignore[attr-defined]
            callbacks[place] = TrainedParameters()


class BeforeAfter(Callback):
    """At the end of ``fit``, prints held-out measures of the last validation: reference -> policy.

    Reads ``val/score``, ``val/kl``, ``val/response_tokens``, ``val/win_rate`` and, where a gold reward is
    known, ``val/gold`` in standard deviations of the reference's answers.
    """

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print, if there was a validation."""
        lines = before_after(dict(trainer.callback_metrics))
        if lines:
            show("\n".join(["held-out prompts, reference -> policy", *lines]))


def before_after(measures: dict[str, Tensor]) -> list[str]:
    """One line per logged measure."""
    value = {key: float(number) for key, number in measures.items()}
    lines = []
    if "val/score" in value:
        before, after = value["val/reference_score"], value["val/score"]
        lines.append(f"  score     {before:8.3f} -> {after:8.3f}   ({after - before:+.3f})")
    if "val/gold" in value:
        before, after = value["val/reference_gold"], value["val/gold"]
        spread = value["val/reference_gold_sd"]
        gain = f"({after - before:+.3f}, {(after - before) / max(spread, 1e-9):+.2f} sd)"
        lines.append(f"  gold      {before:8.3f} -> {after:8.3f}   {gain}")
    if "val/win_rate" in value:
        rate = value["val/win_rate"]
        lines.append(f"  win rate  {rate:8.3f}   (against the reference, by score)")
    if "val/kl" in value:
        lines.append(f"  KL        {value['val/kl']:8.3f}   nats per response")
    if "val/response_tokens" in value:
        lines.append(f"  length    {value['val/response_tokens']:8.1f}   tokens")
    return lines
