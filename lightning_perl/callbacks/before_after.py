"""Held-out measures of the reference and of the policy, printed when a run ends."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lightning_perl.callbacks.console import show


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
