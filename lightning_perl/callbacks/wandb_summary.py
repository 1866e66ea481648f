"""What a Weights & Biases run shows beside its curves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

import lightning_perl
from lightning_perl.callbacks.run_folder import run_folder
from lightning_perl.phases import only_sent

FRONTIER = ("rollout/kl", "rollout/score", "gold/score")
"""The KL, and what is drawn over it."""
HANDED_OVER = ("adapters", "policy", "trunk", "critic")
"""Folders in a run's folder that a module may have handed over."""


def wandb_loggers(trainer: Trainer) -> Iterator[WandbLogger]:
    """The trainer's loggers of Weights & Biases."""
    return (logger for logger in trainer.loggers if isinstance(logger, WandbLogger))


class WandbSummary(Callback):
    """Completes the run of every `WandbLogger`; without one it does nothing.

    When a fit begins, it notes this package's version. When it ends, it draws the scores over the KL
    (``frontier/...``, a point per rollout) and the largest memory of each phase (``memory/by_phase``), and keeps
    ``config.yaml`` and what was handed over as an artifact; of a whole trunk only where it lies.
    """

    def __init__(self) -> None:
        self._points: dict[str, list[list[float]]] = {key: [] for key in FRONTIER[1:]}
        self._memory: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note which version of this package runs; W&B itself notes the settings and the commit."""
        version = {"lightning_perl": lightning_perl.__version__}
        for logger in wandb_loggers(trainer) if trainer.is_global_zero else ():
            logger.experiment.config.update(version, allow_val_change=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, *_: object
    ) -> None:
        """Remember a point of each frontier, and the peaks; a batch that was only sent to servers has none."""
        if not any(wandb_loggers(trainer)) or only_sent(outputs):
            return
        logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
        across = logged.get(FRONTIER[0])
        for key, points in self._points.items():
            if across is not None and key in logged:
                points.append([across, logged[key]])
        for key, value in logged.items():
            if key.startswith("memory/") and not key.endswith("_peak_reserved_gib"):
                phase = key.removeprefix("memory/").removesuffix("_gib")
                self._memory[phase] = max(value, self._memory.get(phase, 0.0))

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on draws, too."""
        anything = self._memory or any(self._points.values())
        return {"points": self._points, "memory": self._memory} if anything else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self._points, self._memory = state_dict["points"], state_dict["memory"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, and keep what was handed over."""
        for logger in wandb_loggers(trainer) if trainer.is_global_zero else ():
            logger.log_metrics(dict(self._charts()))
            self._keep(logger.experiment, run_folder(trainer))

    def _charts(self) -> Iterator[tuple[str, Any]]:
        import wandb

        for key, points in self._points.items():
            if points:
                table = wandb.Table(columns=[FRONTIER[0], key], data=points)
                yield (
                    f"frontier/{key}",
                    wandb.plot.scatter(table, FRONTIER[0], key, f"{key} over KL"),
                )
        if self._memory:
            table = wandb.Table(columns=["phase", "GiB"], data=[*map(list, self._memory.items())])
            yield "memory/by_phase", wandb.plot.bar(table, "phase", "GiB", "memory by phase")

    @staticmethod
    def _keep(run: Any, folder: Path) -> None:  # noqa: ANN401 (wandb's run)
        import wandb

        places = {place: str(folder.resolve() / place) for place in HANDED_OVER}
        found = {place: path for place, path in places.items() if Path(path).is_dir()}
        if not found:
            return
        artifact = wandb.Artifact(f"run-{run.id}", "handed over", metadata=found)
        if (folder / "config.yaml").is_file():
            artifact.add_file(str(folder / "config.yaml"))
        if "adapters" in found:
            artifact.add_dir(found["adapters"], name="adapters")
        run.log_artifact(artifact)
