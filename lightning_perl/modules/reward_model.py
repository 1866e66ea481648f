"""Reward models: pairs and thumbs on one trunk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info

from lightning_perl.batches import RatedBatch
from lightning_perl.models.adapters import OFF, LoraSpec
from lightning_perl.models.heads import save_heads
from lightning_perl.models.loading import TrunkDtype
from lightning_perl.models.manifest import MANIFEST_FILE, write_adapter_manifest
from lightning_perl.models.quantization import Quantization
from lightning_perl.models.shortcuts import Shortcuts
from lightning_perl.modules.base import default_optimizer
from lightning_perl.modules.scoring import Scoring


class RewardModel(Scoring):
    """A scalar score for a whole answer, read at its last token (EOS where there is one).

    Pairs are fitted by Bradley-Terry, thumbs by binary cross-entropy (PERL, 2403.10704, App. A.1);
    the batch says which rows are which. With ``lm_weight``, ``L = L_RM + lm_weight * xent(y_w)``, as in
    PPO-max (2307.04964, Eq. 2, whose print lacks the second term's minus sign).

    Args:
        trunk: Folder or hub name of a decoder; best the SFT trunk.
        lora: The adapter's shape, written as ``RUN/adapters/reward``. None tunes the whole trunk and
            writes ``RUN/trunk``.
        margin: Score difference below which a pair still pays in full.
        positive_weight: Weight of a thumbs up against a thumbs down; below 1 where most are up. Null
            takes the training data's thumbs down per thumb up, so that both classes weigh the same in
            all (balanced); scores are then logits of a balanced world, and ``ece`` and ``brier``, which
            are taken in the real one, are worse for it.
        center_coef: Weight of ``(r_w + r_l)^2``, which keeps a pair's scores around 0 (2312.09244, Eq. 2);
            TRL recommends 0.01, 0 is without. Thumbs need none.
        lm_weight: Weight of the cross-entropy per token of chosen and thumbs-up answers and of
            demonstrations (PPO-max: 1); 0 is without. With full tuning the LM head is then trained too.
        normalize_scores: After training, shift and scale the head so that the demonstrations (rows that
            are imitated: chosen, thumbs up) of the validation split, or of the training split where
            there is none, score 0 on average with standard deviation 1. No order of scores and no
            comparison changes. Leave it off where a score is read as a logit: a thumb's threshold moves
            away from 0, so probabilities, ``balanced_accuracy``, ``ece`` and ``brier`` lose their meaning.
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
        optimizer: Makes the optimizer. PERL's LoRA learning rates are 1e-4 to 2e-4.
        scheduler: Makes the learning-rate scheduler, stepped once per optimizer step.
        seed: Of the fresh adapter and head.
    """

    def __init__(
        self,
        trunk: str,
        lora: LoraSpec | None = LoraSpec(),
        margin: float = 0.0,
        positive_weight: float | None = 1.0,
        center_coef: float = 0.0,
        lm_weight: float = 0.0,
        normalize_scores: bool = False,
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
        if lm_weight < 0:
            raise ValueError(f"lm_weight must be at least 0, got {lm_weight}.")
        super().__init__(
            trunk,
            "reward",
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
        if lora is None and lm_weight == 0:
            # No loss ever reads the LM head; where it is the embedding too, it is trained as that.
            self.trunk.requires_grad_(False)
            self.trunk.model.base_model.requires_grad_(True)
        self.lm_weight = lm_weight
        self.normalize_scores = normalize_scores

    @property
    def weights(self) -> tuple[float, float]:
        """The LM loss is the auxiliary one."""
        return self.lm_weight, 1.0

    def on_train_start(self) -> None:
        """Refuse to train towards scores that nothing could normalize in the end."""
        super().on_train_start()
        if self.normalize_scores:
            self._demonstrations()

    def normalize(self, batches: Iterable[RatedBatch]) -> tuple[float, float]:
        """Shift and scale the head so that demonstrations score 0 on average, with deviation 1.

        Only the head changes: ``w / sd`` and ``(b - mean) / sd``. 2403.17031, detail 12, sets the mean;
        the scale is that of Ziegler et al. (1909.08593).

        Args:
            batches: Their rows with ``imitate`` count.

        Returns:
            Mean and standard deviation of the scores before.

        Raises:
            ValueError: Fewer than two demonstrations, all with one score, or a score that is not finite.
        """
        scores = []
        with torch.no_grad():
            for batch in batches:
                moved = move_data_to_device(batch, self.device)
                scores.append(self.scores(moved)[moved.imitate].cpu().double())
        found = torch.cat(scores) if scores else torch.zeros(0)
        mean = float(found.mean())
        deviation = float(((found - mean) ** 2).mean().sqrt())
        if not 0 < deviation < math.inf:
            raise ValueError(
                f"normalize_scores: the scores of {len(found)} demonstrations have standard deviation "
                f"{deviation}; nothing can be scaled by that."
            )
        head = self.heads()["reward"]
        with torch.no_grad():
            head.weight.div_(deviation)
            head.bias.sub_(mean).div_(deviation)
        return mean, deviation

    def _demonstrations(self) -> Iterator[RatedBatch]:
        """Batches of the validation rows, or of the training rows where those have no demonstration.

        Raises:
            ValueError: There is no demonstration.
        """
        trainer = self.trainer
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by `fit`, undeclared
        splits: list[Callable[[], Any]] = []
        if trainer.val_dataloaders is not None:
            splits.append(
                lambda: trainer.val_dataloaders if data is None else data.val_dataloader()
            )
        if data is not None:
            splits.append(data.train_dataloader)
        for split in splits:
            if any(bool(batch.imitate.any()) for batch in _batches(split())):
                # Asked anew: a training loader remembers where it was left.
                return _batches(split())
        raise ValueError(
            "normalize_scores: neither the validation rows nor the datamodule's training rows hold a "
            "demonstration, a row with `imitate`, such as a chosen or thumbs-up answer (loaders without "
            "a datamodule: only validation rows are read). Add some, or leave normalize_scores off."
        )

    def hand_over(self, folder: Path) -> None:
        """Write ``RUN/adapters/reward`` (PEFT folder and head), or ``RUN/trunk`` after full tuning.

        With ``normalize_scores`` the manifest says what the demonstrations scored before.
        """
        about = self._normalized() if self.normalize_scores else {}
        target = folder / ("trunk" if self.adapter == OFF else "adapters/reward")
        if self.adapter == OFF:
            super().hand_over(folder)
        else:
            self.trunk.adapters.save(self.adapter, target, self.trunk.source)
            save_heads(target, self.heads())
            write_adapter_manifest(target, self.trunk)
        manifest = target / MANIFEST_FILE
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | about, indent=2) + "\n")

    def _normalized(self) -> dict[str, dict[str, float]]:
        """Normalize on the trainer's device: Lightning has moved the module to the CPU by now."""
        home = self.device
        self.to(self.trainer.strategy.root_device)
        mean, deviation = self.normalize(self._demonstrations())
        self.to(home)
        rank_zero_info(
            f"scores of demonstrations: mean {mean:.4g}, sd {deviation:.4g}; now 0 and 1"
        )
        return {"normalized_from": {"mean": mean, "sd": deviation}}


def _batches(loaders: Any) -> Iterator[RatedBatch]:  # noqa: ANN401 (one loader, or any nest of them)
    for loader in CombinedLoader(loaders, "sequential").flattened:
        yield from loader
