"""The skeletons of supervised modules: one trunk, tuned whole or by an adapter, on batches of given rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from lightning_perl.batches import Bounded, RatedBatch
from lightning_perl.callbacks.reward_report import RewardReport
from lightning_perl.functional.masked import masked_row_sums
from lightning_perl.functional.packing import plan
from lightning_perl.functional.sequences import Sequences, predicting
from lightning_perl.metrics import RewardMeasures, RewardMetrics
from lightning_perl.models.adapters import OFF, LoraSpec
from lightning_perl.models.heads import ScalarHead, save_heads
from lightning_perl.models.loading import NO_BF16_TUNING, load_trunk
from lightning_perl.models.manifest import require_alike, save_trunk, write_adapter_manifest
from lightning_perl.models.quantization import NO_QUANTIZED_TUNING
from lightning_perl.models.sharding import NO_SHARDED_TUNING
from lightning_perl.models.trunk import Trunk
from lightning_perl.modules.base import NO_LORAPLUS, AdapterModule, Stats
from lightning_perl.modules.safety import FiniteGuard, clip_by_group
from lightning_perl.optim import room_for_moments
from lightning_perl.packaged import unpackaged
from lightning_perl.ranks import Share, share_of_lines, sum_gradients, trained_by

WATCHED = ("auroc", "balanced_accuracy", "accuracy", "margin", "ece", "brier")
"""Measures that validation logs; a test logs all of them."""


def sequences_of(batch: RatedBatch) -> Sequences:
    """The batch's rows, with the response columns cut off the prompt's."""
    return Sequences(batch.ids, batch.attention_mask, batch.response_mask[:, batch.prompt_tokens :])


def lengthened(batch: RatedBatch, tokens: int) -> RatedBatch:
    """The batch with rows of so many tokens, the last of each repeated."""
    last = batch.attention_mask.sum(1, keepdim=True) - 1
    column = torch.arange(tokens, device=last.device).expand(len(last), tokens)
    ids = batch.ids.gather(1, column.minimum(last))
    counts = batch.response_mask.gather(1, column.minimum(last))
    packing = batch.packing
    if packing is not None:
        groups: dict[tuple[int, int], list[list[int]]] = {}
        for *begin, row in zip(
            packing.line.tolist(), packing.first.tolist(), ids.tolist(), strict=True
        ):
            groups.setdefault((begin[0], begin[1]), []).append(row)
        packing = plan(list(groups.values()), ids.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = batch._replace(ids=ids, attention_mask=mask, response_mask=counts, packing=packing)
    if batch.response_places is None:
        return batch
    predicted = counts & (column > 0)
    return batch._replace(response_places=predicted.flatten().nonzero().squeeze(1))


class Supervised(AdapterModule):
    """One trunk, tuned whole or by one adapter. Leaves fill `objective`.

    A leaf names its adapter in ``adapter_name``. What it hands over is the trunk with the adapter merged in, or
    with ``keeps_adapter`` the adapter alone. With ``needs_ratings`` (pairwise methods) a step without `ratings`
    moves nothing and is counted, and an epoch without any is refused; ``rating_columns`` says what rows need.

    Args:
        trunk: Folder or hub name of a decoder.
        lora: Shape of the adapter. None: the whole trunk is tuned.
        checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        share_prompts: Read a pair's prompt once: chosen and rejected lie behind it on one line, with a mask
            between them. The same result in less time and memory; families that cannot (ALiBi, sliding windows
            shorter than the row, flash or flex attention) read two rows all the same.
    """

    rows: ClassVar[Literal["rated", "prompts"]] = "rated"
    adapter_name: ClassVar[str] = "sft"
    keeps_adapter: ClassVar[bool] = False
    needs_ratings: ClassVar[bool] = False
    rating_columns: ClassVar[str] = "`label`, or with `chosen` and `rejected`"

    def __init__(
        self,
        trunk: str,
        lora: LoraSpec | None = None,
        checkpointing: bool = False,
        share_prompts: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(checkpointing=checkpointing, **settings)
        if lora is None and self.trunk_dtype == "bfloat16":
            raise ValueError(NO_BF16_TUNING)
        if lora is None and self.quantization is not None:
            raise ValueError(NO_QUANTIZED_TUNING)
        if lora is None and self.trunk_sharding is not None:
            raise ValueError(NO_SHARDED_TUNING)
        if lora is None and self.loraplus_lr_ratio is not None:
            raise ValueError(NO_LORAPLUS)
        self.guard = FiniteGuard()
        self.rated = 0
        self.unrated_steps = 0
        self._ratings_of_step = 0
        self.trunk: Trunk = load_trunk(
            unpackaged(trunk),
            self.trunk_dtype,
            checkpointing,
            self.attention,
            self.quantization,
            self.shortcuts,
        )
        self.adapter = self.adapter_name if lora else OFF
        self.share_prompts = share_prompts
        self.trunk.requires_grad_(lora is None)
        if lora is not None:
            self.trunk.adapters.add(self.adapter, lora, self.seed)
            # Fresh layers come in train mode; dropout belongs to training passes.
            self.trunk.eval()

    @abstractmethod
    def objective(self, batch: RatedBatch) -> tuple[Tensor, Stats]:
        """Loss and named statistics of a batch."""

    def ratings(self, batch: RatedBatch) -> int:
        """Number of thumbs and pairs in the batch; a pairwise method counts pairs alone."""
        return int(batch.labelled.sum()) + len(batch.pairs)

    def heads(self) -> dict[str, ScalarHead]:
        """The heads that are trained and handed over, by name."""
        return {}

    # ---- what objectives are made of -------------------------------------------------------------

    def share(self, batch: RatedBatch) -> Share:
        """The rows that this rank reads; those of one line stay together."""
        packing = batch.packing if self.share_prompts else None
        return share_of_lines(None if packing is None else packing.line, len(batch.ids))

    def hidden(self, batch: RatedBatch, adapter: str | None = None) -> Tensor:
        """Last hidden states of this rank's share ``b`` of the rows. Shape: ``(b, T, H)``.

        Args:
            batch: The rows.
            adapter: Name of the adapter that answers, or `OFF`. None: the module's own.
        """
        with self.trunk.switch.use(self.adapter if adapter is None else adapter):
            rows = self.share(batch).rows
            ids, mask = batch.ids[rows], batch.attention_mask[rows]
            if batch.packing is None or not self.share_prompts:
                states: Tensor = self.trunk(ids, mask)
            else:
                states = self.trunk.packed(ids, mask, batch.packing.rows(rows))
        return states

    def token_logprobs(self, hidden: Tensor, batch: RatedBatch) -> Tensor:
        """Log-probabilities of the response columns of all rows, at least fp32. Shape: ``(B, R)``.

        ``hidden`` are the states of this rank's share. Where the batch names its response tokens' places, other
        columns are 0.
        """
        share = self.share(batch)
        sequences, places = sequences_of(batch).rows(share.rows), batch.response_places
        if places is None:
            states = predicting(hidden, sequences.response_mask.shape[1])
            found, _ = self.trunk.logprobs(states, sequences.response_ids, entropy=False)
            return share.gathered(found)
        own = share.places(places, batch.ids.shape[1])
        states, targets = hidden.flatten(0, 1)[own - 1], sequences.ids.flatten()[own]
        found, _ = self.trunk.logprobs(states.unsqueeze(0), targets.unsqueeze(0), entropy=False)
        every = found.new_zeros(sequences.ids.numel()).scatter(0, own, found.squeeze(0))
        return share.gathered(every.view_as(sequences.ids)[:, batch.prompt_tokens :])

    def response_logprobs(self, batch: RatedBatch, adapter: str | None = None) -> Tensor:
        """Log-probability of each response, summed over its tokens, at least fp32. Shape: ``(B,)``."""
        logprobs = self.token_logprobs(self.hidden(batch, adapter), batch)
        return masked_row_sums(logprobs, sequences_of(batch).response_mask)

    @torch.no_grad()
    def reference_logprobs(self, batch: RatedBatch) -> Tensor:
        """`response_logprobs` of the trunk without its adapter; the trunk itself must not be tuned."""
        return self.response_logprobs(batch, OFF)

    # ---- Lightning -------------------------------------------------------------------------------

    @property
    def window(self) -> int | None:
        """Longest row in tokens that the trunk has positions for; None where it does not say."""
        return self.trunk.window

    def longest_row(self, data: Bounded) -> int:
        """Rows are read as they are."""
        return data.max_tokens

    def training_step(self, batch: RatedBatch, batch_idx: int) -> dict[str, Any]:
        """The loss of a batch, and the tokens of its rows (a shared prompt's in each row)."""
        ratings = self.ratings(batch)
        self.rated += ratings
        self._ratings_of_step += ratings
        with self.trunk.training_pass():
            loss, stats = self.objective(batch)
        self.log_stats({f"train/{key}": value for key, value in stats.items()}, len(batch.ids))
        self.log("train/loss", loss.detach(), batch_size=len(batch.ids), prog_bar=True)
        return {"loss": loss, "tokens": {"step": int(batch.attention_mask.sum())}}

    def preflight(self, batch: RatedBatch, optimizer: Optimizer) -> None:
        """Take the gradients of these rows, each made as long as the longest there may be."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        tokens = max(batch.ids.shape[1], data.max_tokens if isinstance(data, Bounded) else 0)
        with self.trunk.training_pass():
            loss, _ = self.objective(lengthened(batch, tokens))
        loss.backward()  # type: ignore[no-untyped-call]
        room_for_moments(optimizer)

    def setup(self, stage: str) -> None:
        """Refuse training rows of which none says what is to be learned, as far as their report knows.

        Raises:
            ValueError: No training row has a thumb or stands in a pair.
        """
        super().setup(stage)
        train = self.training_rows
        kept = getattr(train, "kept", 0)
        if stage != "fit" or not kept or not (self.needs_ratings or self.heads()):
            return
        thumbs = 0 if getattr(self, "needs_pairs", False) else train.up + train.down + train.even
        if train.pairs + thumbs == 0:
            raise ValueError(
                f"{type(self).__name__} finds no row to learn a preference from among {kept} training rows. "
                f"Give rows with {self.rating_columns}; for demonstrations alone use SFT."
            )

    @property
    def training_rows(self) -> Any:  # noqa: ANN401 (a SplitReport, which this room does not import)
        """What the data's report says of the training rows; None where it says nothing."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return getattr(getattr(data, "report", None), "splits", {}).get("train")

    def on_train_epoch_end(self) -> None:
        """Refuse to go on where there was nothing to learn a preference from."""
        # A dry run reads a batch or two of the epoch, perhaps none of them rated.
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._require_ratings()

    def _require_ratings(self) -> None:
        if (self.needs_ratings or self.heads()) and self.rated == 0:
            outcome = "its reward head is still random" if self.heads() else "it learned nothing"
            raise ValueError(
                f"{type(self).__name__} saw no row to learn a preference from in a whole epoch, so {outcome}. "
                f"Give rows with {self.rating_columns}; for demonstrations alone use SFT."
            )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave out a step whose gradient is not finite or comes from no rating: nothing moves without it."""
        sum_gradients(trained_by(optimizer))
        unrated = self.needs_ratings and self._ratings_of_step == 0
        self._ratings_of_step = 0
        if unrated or not self.guard(clip_by_group(optimizer, {})):
            optimizer.zero_grad(set_to_none=True)
        self.log("train/skipped_steps", float(self.guard.skipped))
        if self.needs_ratings:
            self.unrated_steps += unrated
            self.log("train/unrated_steps", float(self.unrated_steps))

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Drop the gradients right after the step: Lightning would keep them through the next forward."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad(set_to_none=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the number of ratings as well: the rest of an epoch may have none."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["rated"] = self.rated
        checkpoint["skipped"] = (self.guard.skipped, self.guard.in_a_row)
        if self.needs_ratings:
            checkpoint["unrated_steps"] = self.unrated_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        super().on_load_checkpoint(checkpoint)
        self.rated = checkpoint.get("rated", 0)
        self.guard.skipped, self.guard.in_a_row = checkpoint.get("skipped", (0, 0))
        self.unrated_steps = checkpoint.get("unrated_steps", 0)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trunk or its adapter."""
        trained = [parameter for parameter in self.trunk.parameters() if parameter.requires_grad]
        return [{"name": "trunk", "params": trained}]

    # ---- handing over ----------------------------------------------------------------------------

    def hand_over(self, folder: Path) -> Path:
        """Write ``RUN/adapters/NAME``, or ``RUN/trunk`` with the adapter merged in full precision; heads too."""
        if self.heads():
            self._require_ratings()
        if self.adapter == OFF or not self.keeps_adapter:
            kept = self.trunk
            self.trunk = kept if kept.sharding is None else self._whole_trunk()
            self.save_trunk(folder / "trunk")
            self.trunk = kept
            return folder / "trunk"
        target = folder / "adapters" / self.adapter
        self.trunk.adapters.save(self.adapter, target, self.trunk.source)
        if self.heads():
            save_heads(target, self.heads())
        write_adapter_manifest(target, self.trunk)
        return target

    def _whole_trunk(self) -> Trunk:
        """The trunk with its adapter in the host's memory, where its blocks are sharded: read once more."""
        dtype, sharded = self.trunk_dtype, self.trunk
        trunk = load_trunk(sharded.source, dtype, False, self.attention, None, self.shortcuts)
        trunk.adapters.add(self.adapter, sharded.adapters.specs[self.adapter], self.seed)
        for key, weight in sharded.adapters.tensors(self.adapter).items():
            trunk.adapters.tensors(self.adapter)[key].data.copy_(weight)
        return trunk

    def save_trunk(self, folder: Path) -> None:
        """Write the tuned trunk and its head, read it back, and compare.

        A quantized trunk is written dense: the very values that were trained on, LoRA added.

        Raises:
            RuntimeError: The folder gives other logits than the module.
        """
        merged = None if self.adapter == OFF else self.adapter
        save_trunk(self.trunk, folder, merged, {"module": type(self).__name__})
        if self.heads():
            save_heads(folder, self.heads())
        again = load_trunk(
            str(folder), self.trunk_dtype, attention=self.trunk.model.config._attn_implementation
        )
        ids = self.trunk.probe()
        mask = torch.ones_like(ids, dtype=torch.bool)
        again.to(ids.device)
        with torch.no_grad(), self.trunk.switch.use(self.adapter), again.switch.use(OFF):
            ours = self.trunk.project(self.trunk(ids, mask)).double()
            stored = again.project(again(ids, mask)).double()
        require_alike(folder, ours, stored, self.trunk.dtype)


class Judging(Supervised):
    """Measures its scores on pairs and thumbs. Leaves fill `scores`, and call `measure` in validation.

    After a test ``measures`` holds the results, for the report. Arguments as `Supervised`.
    """

    def __init__(self, trunk: str, **settings: Any) -> None:
        super().__init__(trunk, **settings)
        self.metrics = RewardMetrics()
        self.measures: RewardMeasures | None = None

    @abstractmethod
    def scores(self, batch: RatedBatch) -> Tensor:
        """Scores of the responses; higher is better. Shape: ``(B,)``."""

    def configure_callbacks(self) -> list[Callback]:
        """A test ends with a report."""
        return [*super().configure_callbacks(), RewardReport()]

    def measure(self, scores: Tensor, batch: RatedBatch) -> None:
        """Add the scores of a batch to what is measured."""
        lengths = batch.response_mask.sum(1)
        self.metrics.update(scores, batch.label, batch.labelled, batch.pairs, lengths, batch.turns)

    def on_validation_epoch_end(self) -> None:
        """Log the measures of all rows: a few in validation, all in a test."""
        if self.metrics.update_called:
            self.measures = self.metrics.compute()
            for key, value in self.measures.values.items():
                if key in WATCHED or self.trainer.testing:
                    self.log(f"{self.held_out}/{key}", value, prog_bar=key in ("auroc", "accuracy"))
        self.metrics.reset()

    def on_test_epoch_end(self) -> None:
        """As after a validation."""
        self.on_validation_epoch_end()

    def predict_step(self, batch: RatedBatch, batch_idx: int) -> dict[str, Any]:
        """Row numbers, which answer of a pair it is, and scores."""
        answers: list[str | None] = [None] * len(batch.row)
        for chosen, rejected in batch.pairs.tolist():
            answers[chosen], answers[rejected] = "chosen", "rejected"
        return {"row": batch.row, "answer": answers, "score": self.scores(batch)}
