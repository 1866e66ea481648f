"""Hydra-SFT: language model and reward model in one trunk."""

from __future__ import annotations

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.heads import ScalarHead
from lightning_perl.models.loading import TrunkDtype
from lightning_perl.models.quantization import Quantization
from lightning_perl.models.shortcuts import Shortcuts
from lightning_perl.modules.base import default_optimizer
from lightning_perl.modules.scoring import Scoring


class HydraSFT(Scoring):
    """Hydra-SFT (2309.00754): ``L = xent(y_w) + gamma * L_RM``, one forward for both.

    The language-modelling loss is taken on demonstrations and on thumbs-up (or chosen) answers, the
    reward loss on pairs (Bradley-Terry) or thumbs (binary cross-entropy), whichever the batch has.

    Args:
        trunk: Folder or hub name of a decoder.
        lora: The adapter's shape, merged into the trunk once at the end. None tunes the whole trunk.
        reward_weight: The paper's gamma; 0 is plain SFT.
        margin: Score difference below which a pair still pays in full.
        positive_weight: Weight of a thumbs up against a thumbs down. Null takes the training data's
            thumbs down per thumb up (balanced).
        center_coef: Weight of ``(r_w + r_l)^2``, which keeps a pair's scores around 0 (2312.09244).
        share_prompts: Read a pair's prompt once: chosen and rejected lie behind it on one line, with a
            mask between them. The same scores, in less time and memory; families that cannot (sliding
            windows shorter than the row, ALiBi, flash or flex attention) read two rows all the same. False:
            always two rows.
        trunk_dtype: Of the trunk's weights and matrix products; adapters and head stay fp32.
        checkpointing: Recompute activations in backward.
        attention: transformers' ``attn_implementation``, such as sdpa, eager or flash_attention_2; None
            leaves it to transformers.
        quantization: Keep the frozen trunk's linear layers in 4 bits (nf4, QLoRA's, 2305.14314) or 8 bits
            (int8) by bitsandbytes, the extra ``quantization``; LM head and embeddings stay in
            ``trunk_dtype``. Needs ``lora``. None: everything in ``trunk_dtype``.
        shortcuts: Which work is saved where the result is the same.
        head_learning_rate: Of the reward head; None takes the optimizer's.
        optimizer: Makes the optimizer.
        scheduler: Makes the learning-rate scheduler, stepped once per optimizer step.
        seed: Of the fresh adapter and head.
    """

    def __init__(
        self,
        trunk: str,
        lora: LoraSpec | None = None,
        reward_weight: float = 0.1,
        margin: float = 0.0,
        positive_weight: float | None = 1.0,
        center_coef: float = 0.0,
        share_prompts: bool = True,
        trunk_dtype: TrunkDtype = "float32",
        checkpointing: bool = False,
        attention: str | None = None,
        quantization: Quantization | None = None,
        shortcuts: Shortcuts = Shortcuts(),
        head_learning_rate: float | None = None,
        optimizer: OptimizerCallable = default_optimizer(1e-4),
        scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        if reward_weight < 0:
            raise ValueError(f"reward_weight must be at least 0, got {reward_weight}.")
        super().__init__(
            trunk,
            "sft",
            lora,
            margin,
            positive_weight,
            center_coef,
            share_prompts,
            trunk_dtype,
            checkpointing,
            attention,
            quantization,
            shortcuts,
            head_learning_rate,
            optimizer,
            scheduler,
            seed,
        )
        self.reward_weight = reward_weight

    @property
    def weights(self) -> tuple[float, float]:
        """The reward loss is the auxiliary one."""
        return 1.0, self.reward_weight

    def heads(self) -> dict[str, ScalarHead]:
        """The reward head, unless nothing ever trained it."""
        return super().heads() if self.reward_weight > 0 else {}
