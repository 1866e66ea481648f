"""The skeleton of methods that draw many responses to a prompt and learn from few of them.

Shapes: ``B`` prompts, ``k`` responses to each.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_perl.arguments import Count, NonNegative, TwoOrMore
from lightning_perl.callbacks.run_folder import run_folder
from lightning_perl.models.roles import Layout
from lightning_perl.modules.base import Stats
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.rollouts.rollout import Experience, Rollout, Scored

KEPT_FILE = "kept.jsonl"


class Selecting(OnPolicy):
    """Learns from the best response to each prompt, or with ``samples_kept`` 2 from the best and the worst.

    Leaves fill `policy_loss`. Scores of different prompts are never compared. What was kept is appended to
    ``kept.jsonl`` in the run's folder, to be looked at.

    Args:
        trunk: Folder of the SFT or Hydra-SFT trunk, or a hub name.
        samples: Responses per prompt that are drawn and ranked; at least 2.
        rank_kl_coef: Responses are ranked by their score less this times ``log pi - log ref``, summed over tokens.
        epochs: Passes over the kept responses of each rollout batch.
        minibatch_size: Kept responses per optimizer step. None: all of a rollout batch.
    """

    samples_kept: ClassVar[int | None] = 1

    def __init__(
        self,
        trunk: str,
        samples: TwoOrMore = 8,
        rank_kl_coef: NonNegative = 0.0,
        epochs: Count = 1,
        minibatch_size: Count | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(trunk, samples=samples, **settings)
        self.learn_in(epochs, minibatch_size)
        self.rank_kl_coef = rank_kl_coef
        self._kept: tuple[Rollout, Tensor] | None = None

    def require_settings(self, layout: Layout) -> None:
        """Refuse to compare responses that no micro-batch holds together."""
        super().require_settings(layout)
        if self.hparams["micro_batch_size"] < (self.samples_kept or 1):
            raise ValueError(
                f"{type(self).__name__} compares two responses to a prompt, so micro_batch_size must be at least "
                f"2; got {self.hparams['micro_batch_size']}."
            )

    def experience(self, rollout: Rollout, scored: Scored) -> tuple[Experience, Stats]:
        """The kept responses; a row's advantages are what it was ranked by."""
        ranks = scored.scores - self.rank_kl_coef * scored.kl(rollout.response_mask)
        rows = kept_rows(ranks, rollout.samples, self.samples_kept == 2)
        kept = rollout.rows(rows)._replace(samples=self.samples_learned)
        earned = scored.rows(rows)
        self._kept = (kept, earned.scores)
        experience = Experience(
            kept.sequences(),
            earned.logprobs,
            ranks[rows].unsqueeze(1) * kept.response_mask,
            reference=earned.reference,
            importance=earned.importance,
        )
        best = rows[:: self.samples_learned]
        return experience, {"best_score": scored.scores[best].mean()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401 (Lightning's)
        """Append what was kept to a file."""
        folder = run_folder(self.trainer)
        if self._kept is None or not self.trainer.is_global_zero:
            return
        with (folder / KEPT_FILE).open("a", encoding="utf-8") as file:
            kept, scores = self._kept
            columns = (kept.row.tolist(), *self.texts(kept), scores.tolist())
            for row in zip(*columns, strict=True):
                named = dict(zip(("row", "prompt", "response", "score"), row, strict=True))
                file.write(json.dumps({"rollout": self.rollout_index - 1, **named}) + "\n")
        self._kept = None


def kept_rows(ranks: Tensor, samples: int, worst: bool) -> Tensor:
    """Row of the best response to each prompt, followed by the row of the worst one where ``worst``.

    Where all ranks are equal, both are the first row. Shape: ``(B k,)`` to ``(B,)`` or ``(2 B,)``.
    """
    groups = ranks.view(-1, samples)
    start = torch.arange(len(groups), device=ranks.device) * samples
    best = start + groups.argmax(1)
    return torch.stack([best, start + groups.argmin(1)], 1).flatten() if worst else best
