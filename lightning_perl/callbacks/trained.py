"""One line that says what is trained."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from lightning.pytorch.utilities import rank_zero_info


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
