"""Supervised fine-tuning."""

from __future__ import annotations

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_perl.batches import RatedBatch
from lightning_perl.functional.sequences import predicting
from lightning_perl.losses.language_modeling import cross_entropy
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.loading import TrunkDtype
from lightning_perl.models.quantization import Quantization
from lightning_perl.models.shortcuts import Shortcuts
from lightning_perl.models.trunk import Trunk
from lightning_perl.modules.base import default_optimizer
from lightning_perl.modules.supervised import Stats, Supervised, sequences_of


def imitation_loss(trunk: Trunk, hidden: Tensor, batch: RatedBatch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the responses to imitate, in nats per token, and how many tokens there were."""
    sequences = sequences_of(batch)
    states = predicting(hidden, sequences.response_mask.shape[1])
    logprobs, _ = trunk.logprobs(states, sequences.response_ids, entropy=False)
    mask = sequences.response_mask & batch.imitate.unsqueeze(-1)
    return cross_entropy(logprobs, mask), mask.sum()


class SFT(Supervised):
    """Supervised fine-tuning: ``L = xent(y)`` over the responses to imitate.

    Rows that are only judged (thumbs down, rejected answers) are read past, so that `SFT` and
    `HydraSFT` can be compared on the very same rows.

    Args:
        trunk: Folder or hub name of a decoder.
        lora: The adapter's shape, merged into the trunk once at the end. None tunes the whole trunk.
        trunk_dtype: Of the trunk's weights and matrix products; adapters stay fp32.
        checkpointing: Recompute activations in backward: less memory, about a third more time.
        attention: transformers' ``attn_implementation``, such as sdpa, eager or flash_attention_2; None
            leaves it to transformers.
        quantization: Keep the frozen trunk's linear layers in 4 bits (nf4, QLoRA's, 2305.14314) or 8 bits
            (int8) by bitsandbytes, the extra ``quantization``; LM head and embeddings stay in
            ``trunk_dtype``. Needs ``lora``. None: everything in ``trunk_dtype``.
        shortcuts: Which work is saved where the result is the same.
        optimizer: Makes the optimizer.
        scheduler: Makes the learning-rate scheduler, stepped once per optimizer step.
        seed: Of the fresh adapter.
    """

    def __init__(
        self,
        trunk: str,
        lora: LoraSpec | None = None,
        trunk_dtype: TrunkDtype = "float32",
        checkpointing: bool = False,
        attention: str | None = None,
        quantization: Quantization | None = None,
        shortcuts: Shortcuts = Shortcuts(),
        optimizer: OptimizerCallable = default_optimizer(1e-4),
        scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            trunk,
            "sft",
            lora,
            trunk_dtype,
            checkpointing,
            attention,
            quantization,
            shortcuts,
            optimizer,
            scheduler,
            seed,
        )

    def objective(self, batch: RatedBatch) -> tuple[Tensor, Stats]:
        """Mean cross-entropy per token."""
        loss, tokens = imitation_loss(self.trunk, self.hidden(batch), batch)
        return loss, {"lm_loss": loss.detach(), "lm_tokens": tokens.float()}

    def validation_step(self, batch: RatedBatch, batch_idx: int) -> None:
        """Loss per token, weighted by tokens."""
        loss, tokens = imitation_loss(self.trunk, self.hidden(batch), batch)
        if tokens > 0:
            options = {"batch_size": int(tokens), "on_epoch": True}
            self.log(f"{self.held_out}/lm_loss", loss, **options)  # type: ignore[arg-type]
            self.log(f"{self.held_out}/loss", loss, prog_bar=True, **options)  # type: ignore[arg-type]

    test_step = validation_step
