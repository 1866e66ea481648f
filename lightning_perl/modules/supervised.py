"""Supervised modules stand on one trunk and one batch of rows: the skeleton of SFT and reward models."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_perl.batches import Bounded, RatedBatch
from lightning_perl.functional.sequences import Sequences
from lightning_perl.models.adapters import OFF, LoraSpec
from lightning_perl.models.heads import ScalarHead, save_heads
from lightning_perl.models.loading import NO_BF16_TUNING, TrunkDtype, load_trunk
from lightning_perl.models.manifest import save_trunk
from lightning_perl.models.quantization import NO_QUANTIZED_TUNING, Quantization
from lightning_perl.models.shortcuts import Shortcuts
from lightning_perl.models.trunk import Trunk
from lightning_perl.modules.base import AdapterModule, FiniteGuard, clip_by_group
from lightning_perl.packaged import unpackaged

Stats = dict[str, Tensor]


def sequences_of(batch: RatedBatch) -> Sequences:
    """The batch's rows, their response columns cut off the prompt's."""
    return Sequences(batch.ids, batch.attention_mask, batch.response_mask[:, batch.prompt_tokens :])


class Supervised(AdapterModule):
    """One trunk, tuned whole or by one adapter, perhaps with a scalar head.

    Args:
        trunk: Folder or hub name.
        adapter: Name of the adapter; used only with ``lora``.
        lora: The adapter's shape. None: the whole trunk is tuned.
        trunk_dtype: Of the trunk's weights and matrix products.
        checkpointing: Recompute activations in backward.
        attention: transformers' ``attn_implementation``, such as sdpa, eager or flash_attention_2; None
            leaves it to transformers.
        quantization: Keep the frozen trunk's linear layers in 4 bits (nf4) or 8 bits (int8).
        shortcuts: Which work is saved where the result is the same.
        optimizer: Makes the optimizer.
        scheduler: Makes the scheduler, stepped once per optimizer step.
        seed: Of the adapter.
    """

    rows: ClassVar[Literal["rated", "prompts"]] = "rated"

    def __init__(
        self,
        trunk: str,
        adapter: str,
        lora: LoraSpec | None,
        trunk_dtype: TrunkDtype,
        checkpointing: bool,
        attention: str | None,
        quantization: Quantization | None,
        shortcuts: Shortcuts,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        seed: int,
    ) -> None:
        if lora is None and trunk_dtype == "bfloat16":
            raise ValueError(NO_BF16_TUNING)
        if lora is None and quantization is not None:
            raise ValueError(NO_QUANTIZED_TUNING)
        super().__init__(
            trunk_dtype,
            checkpointing,
            attention,
            quantization,
            shortcuts,
            optimizer,
            scheduler,
            seed,
        )
        self.guard = FiniteGuard()
        self.rated = 0
        self.trunk: Trunk = load_trunk(
            unpackaged(trunk), trunk_dtype, checkpointing, attention, quantization, shortcuts
        )
        self.adapter = adapter if lora else OFF
        # A pair's prompt is read once; False reads both rows whole, for comparison.
        self.share_prompts = True
        self.reward_head: ScalarHead | None = None
        self.head_learning_rate: float | None = None
        self.trunk.requires_grad_(False)
        if lora is None:
            self.trunk.requires_grad_(True)
        else:
            self.trunk.adapters.add(adapter, lora, seed)
            # Fresh layers come in train mode; dropout belongs to training passes.
            self.trunk.eval()

    def add_reward_head(self, learning_rate: float | None, seed: int) -> None:
        """A fresh scalar head, at least fp32, with its own learning rate or the optimizer's."""
        dtype = torch.promote_types(self.trunk.dtype, torch.float32)
        self.reward_head = ScalarHead(self.trunk.hidden_size, seed).to(dtype)
        self.head_learning_rate = learning_rate

    def on_train_epoch_end(self) -> None:
        """Refuse to go on where a reward head had nothing to learn from.

        Raises:
            ValueError: No row of the epoch had a thumb or stood in a pair.
        """
        # A dry run reads a batch or two of the epoch, perhaps none of them rated.
        dry: bool = self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.heads() and self.rated == 0 and not dry:
            raise ValueError(
                f"{type(self).__name__} saw no thumb and no pair in a whole epoch, so its reward head is "
                "still random. Give rows with `label` or with `chosen` and `rejected`; for demonstrations "
                "alone use SFT."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also how many ratings were seen: the rest of an epoch may have none."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["rated"] = self.rated

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        super().on_load_checkpoint(checkpoint)
        self.rated = checkpoint.get("rated", 0)

    def heads(self) -> dict[str, ScalarHead]:
        """The heads by name."""
        return {} if self.reward_head is None else {"reward": self.reward_head}

    def _head(self, hidden: Tensor) -> Tensor:
        if self.reward_head is None:
            raise RuntimeError(f"{type(self).__name__} has no reward head.")
        scores: Tensor = self.reward_head(hidden)
        return scores

    @abstractmethod
    def objective(self, batch: RatedBatch) -> tuple[Tensor, Stats]:
        """Loss and named statistics of a batch; pure in everything but the weights."""

    def hidden(self, batch: RatedBatch) -> Tensor:
        """Last hidden states with the adapter on. Shape: ``(B, T, H)``."""
        with self.trunk.switch.use(self.adapter):
            if batch.packing is None or not self.share_prompts:
                states: Tensor = self.trunk(batch.ids, batch.attention_mask)
            else:
                states = self.trunk.packed(batch.ids, batch.attention_mask, batch.packing)
        return states

    @property
    def window(self) -> int | None:
        """The trunk's."""
        return self.trunk.window

    def longest_row(self, data: Bounded) -> int:
        """Rows as they are."""
        return data.max_tokens

    def training_step(self, batch: RatedBatch, batch_idx: int) -> dict[str, Any]:
        """One batch: its loss, and its rows' tokens (a shared prompt's in each row)."""
        self.rated += int(batch.labelled.sum()) + len(batch.pairs)
        with self.trunk.training_pass():
            loss, stats = self.objective(batch)
        self.log_stats({f"train/{key}": value for key, value in stats.items()}, len(batch.ids))
        self.log("train/loss", loss.detach(), batch_size=len(batch.ids), prog_bar=True)
        return {"loss": loss, "tokens": {"step": int(batch.attention_mask.sum())}}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave out a step whose gradient is not finite: without gradients nothing moves."""
        if not self.guard(clip_by_group(optimizer, {})):
            optimizer.zero_grad(set_to_none=True)
        self.log("train/skipped_steps", float(self.guard.skipped))

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Lightning's, and the gradients go at once: it would keep them through the next forward."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad(set_to_none=True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trunk or its adapter, and the head."""
        head = list(self.reward_head.parameters()) if self.reward_head is not None else []
        groups: list[dict[str, Any]] = [{"name": "trunk", "params": self._body_parameters()}]
        if head:
            rate = {} if self.head_learning_rate is None else {"lr": self.head_learning_rate}
            groups.append({"name": "head", "params": head, **rate})
        return groups

    def _body_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.trunk.parameters() if parameter.requires_grad]

    def hand_over(self, folder: Path) -> None:
        """Write ``RUN/trunk``: the tuned weights, LoRA merged once in full precision, and the head."""
        self.save_trunk(folder / "trunk")

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
            str(folder),
            dtype=self.hparams["trunk_dtype"],
            attention=self.trunk.model.config._attn_implementation,
        )
        ids = torch.arange(16, device=self.device).unsqueeze(0) % self.trunk.vocabulary_size
        mask = torch.ones_like(ids, dtype=torch.bool)
        again.to(self.device)
        with torch.no_grad(), self.trunk.switch.use(self.adapter), again.switch.use(OFF):
            ours = self.trunk.project(self.trunk(ids, mask)).double()
            stored = again.project(again(ids, mask)).double()
        difference = float((ours - stored).abs().max())
        # A merged adapter is added to the weights instead of to the products: rounding differs.
        allowed = 64 * torch.finfo(self.trunk.dtype).eps * max(1.0, float(ours.abs().max()))
        if not difference <= allowed:
            raise RuntimeError(
                f"{folder} was written but gives logits that differ by {difference:.3g} from the trained "
                f"model's (allowed {allowed:.3g})."
            )
