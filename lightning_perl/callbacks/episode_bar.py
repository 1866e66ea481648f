"""A progress bar that counts episodes."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

SHOWN = {
    "rollout/score": ("score", "{:+.2f}"),
    "rollout/kl": ("KL", "{:.2f}"),
    "rollout/response_tokens": ("length", "{:.0f}"),
    "speed/rollout_tokens_per_second": ("tokens/s", "{:.0f}"),
    "memory/rollout_peak_allocated_gib": ("GiB", "{:.2f}"),
    "memory/rollout_resident_gib": ("GiB", "{:.2f}"),
}
"""Measures of the last rollout, and how the bar writes them."""


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
