"""The skeleton of methods that learn a policy from judged answers, without a reward model."""

from __future__ import annotations

from abc import abstractmethod
from hashlib import blake2b
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_perl.arguments import Positive
from lightning_perl.batches import RatedBatch
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.modules.base import Stats
from lightning_perl.modules.supervised import Judging


class Pairwise(Judging):
    """A policy adapter whose reference is the same trunk without it. Leaves fill `preference_loss`.

    A leaf that learns from thumbs as well as from pairs sets ``needs_pairs`` to False.

    The policy's implicit reward, ``beta * log(pi / ref)`` of a whole response, is its score: accuracy,
    calibration and the other measures of reward models apply to it. The adapter is handed over as
    ``RUN/adapters/actor``, as that of the on-policy methods.

    Args:
        trunk: Folder or hub name of the SFT trunk.
        lora: Shape of the adapter.
        beta: Weight of the KL to the reference that is implied; the smaller, the further the policy may go.
        keep_reference: Ask the reference once for each row: what it says in the first epoch is kept (16 bytes a
            row, in checkpoints too), and later epochs and validations save its pass. Their numbers change by
            rounding, as a row's log-probability does from batch to batch.
    """

    adapter_name: ClassVar[str] = "actor"
    keeps_adapter: ClassVar[bool] = True
    needs_ratings: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = True
    rating_columns: ClassVar[str] = "`chosen` and `rejected`"

    def __init__(
        self,
        trunk: str,
        lora: LoraSpec | None = LoraSpec(),
        beta: Positive = 0.1,
        keep_reference: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(trunk, lora=self.needed(lora), **settings)
        self.beta = beta
        self.keep_reference = keep_reference
        self._kept: dict[int, float] = {}

    @abstractmethod
    def preference_loss(self, ratios: Tensor, batch: RatedBatch) -> tuple[Tensor, Stats]:
        """Loss and statistics of a batch.

        Args:
            ratios: ``log pi(y|x) - log ref(y|x)`` of each response, summed over its tokens. Shape: ``(B,)``.
            batch: The rows.
        """

    def ratings(self, batch: RatedBatch) -> int:
        """Number of pairs in the batch, and of thumbs where the leaf learns from them."""
        return len(batch.pairs) if self.needs_pairs else super().ratings(batch)

    def losses(self, batch: RatedBatch) -> tuple[Tensor, Tensor, Stats]:
        """Loss, scores and statistics."""
        logprobs = self.response_logprobs(batch)
        ratios = logprobs - self.kept_reference(batch)
        loss, stats = self.preference_loss(ratios, batch)
        scores = self.beta * ratios.detach()
        if self.needs_pairs:
            # Both log-probabilities may fall while the margin grows. 0 without pairs.
            pairs = max(len(batch.pairs), 1)
            for name, rows in zip(("chosen", "rejected"), batch.pairs.unbind(1), strict=True):
                stats[f"{name}_logprobs"] = logprobs.detach()[rows].sum() / pairs
                stats[f"{name}_rewards"] = scores[rows].sum() / pairs
        return loss, scores, stats

    def objective(self, batch: RatedBatch) -> tuple[Tensor, Stats]:
        """The leaf's loss."""
        loss, _, stats = self.losses(batch)
        return loss, stats

    def kept_reference(self, batch: RatedBatch) -> Tensor:
        """`reference_logprobs`, of each row as it was first seen with ``keep_reference``. Shape: ``(B,)``."""
        # Shapes without values (see `weightless`) are no rows.
        if not self.keep_reference or self.trunk.weightless:
            return self.reference_logprobs(batch)
        rows = row_keys(batch)
        if any(row not in self._kept for row in rows):
            for row, logprob in zip(rows, self.reference_logprobs(batch).tolist(), strict=True):
                self._kept.setdefault(row, logprob)
        kept = [self._kept[row] for row in rows]
        dtype = torch.promote_types(self.trunk.dtype, torch.float32)
        return torch.tensor(kept, dtype=dtype, device=batch.ids.device)

    @torch.no_grad()
    def scores(self, batch: RatedBatch) -> Tensor:
        """Implicit rewards. Shape: ``(B,)``."""
        return self.beta * (self.response_logprobs(batch) - self.kept_reference(batch))

    def validation_step(self, batch: RatedBatch, batch_idx: int) -> None:
        """Loss, weighted by ratings, and the scores' measures."""
        loss, scores, _ = self.losses(batch)
        if rated := self.ratings(batch):
            name, options = f"{self.held_out}/loss", {"batch_size": rated, "on_epoch": True}
            self.log(name, loss, prog_bar=True, **options)  # type: ignore[arg-type]
        self.measure(scores, batch)

    test_step = validation_step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also what is kept of the reference."""
        super().on_save_checkpoint(checkpoint)
        if self.keep_reference:
            rows = torch.tensor([*self._kept], dtype=torch.int64)
            values = torch.tensor([*self._kept.values()], dtype=torch.float64)
            checkpoint["kept_reference"] = (rows, values)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with it: a checkpoint of another trunk is refused."""
        super().on_load_checkpoint(checkpoint)
        if "kept_reference" in checkpoint:
            rows, values = checkpoint["kept_reference"]
            self._kept = dict(zip(rows.tolist(), values.tolist(), strict=True))


def row_keys(batch: RatedBatch) -> list[int]:
    """A number for each row's tokens and which of them count; the same text has the same number in any batch."""
    tokens = (2 * batch.ids + batch.response_mask).cpu()
    rows = zip(tokens, batch.attention_mask.cpu(), strict=True)
    digests = (blake2b(row[mask].numpy().tobytes(), digest_size=8).digest() for row, mask in rows)
    return [int.from_bytes(digest, "big", signed=True) for digest in digests]
