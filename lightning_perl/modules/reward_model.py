"""Reward models and Hydra-SFT: one weighted sum of a language-modelling and a reward loss, from one forward."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_perl.arguments import NonNegative, Positive
from lightning_perl.batches import RatedBatch
from lightning_perl.functional.sequences import at_last_response
from lightning_perl.losses.bradley_terry import bradley_terry, centering
from lightning_perl.losses.thumbs import thumbs
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.heads import ScalarHead
from lightning_perl.modules.base import Stats
from lightning_perl.modules.sft import imitation_loss
from lightning_perl.modules.supervised import Judging, sequences_of
from lightning_perl.whole import MANIFEST_FILE


class Scoring(Judging):
    """``L = lm_weight * xent(y_w) + reward_weight * L_RM``; leaves differ in the two weights.

    ``L_RM`` is Bradley-Terry on the batch's pairs and binary cross-entropy on its thumbs, a mean over both: a
    pair weighs as much as a thumb, and a row in a pair carries no thumb.

    Args:
        trunk: Folder or hub name of a decoder.
        margin: Score difference below which a pair still pays in full.
        positive_weight: Weight of a thumbs up against a thumbs down; below 1 where most are up. Null: the
            training data's thumbs down per thumb up (balanced). Scores are then logits of a balanced world, and
            ``ece`` and ``brier``, taken in the real one, are worse for it.
        center_coef: Weight of ``(r_w + r_l)^2``, which keeps a pair's scores around 0 (2312.09244, Eq. 2; TRL
            recommends 0.01). Thumbs need none.
        normalize_scores: After training, shift and scale the head so that demonstrations (rows to imitate) of
            the validation split, or of the training split where that has none, score 0 on average with standard
            deviation 1. No comparison changes; but a thumb's threshold moves away from 0, so leave it off where
            a score is read as a logit (probabilities, ``balanced_accuracy``, ``ece``, ``brier``).
        head_learning_rate: Learning rate of the reward head. None: the optimizer's.
    """

    lm_weight: float = 1.0
    reward_weight: float = 1.0

    def __init__(
        self,
        trunk: str,
        margin: NonNegative = 0.0,
        positive_weight: NonNegative | None = 1.0,
        center_coef: NonNegative = 0.0,
        normalize_scores: bool = False,
        head_learning_rate: Positive | None = None,
        **settings: Any,
    ) -> None:
        if normalize_scores and settings.get("trunk_sharding") is not None:
            raise ValueError(
                "normalize_scores reads demonstrations on one rank when the run has ended, and trunk_sharding "
                "leaves it no whole trunk. Give one of the two."
            )
        super().__init__(trunk, **settings)
        dtype = torch.promote_types(self.trunk.dtype, torch.float32)
        self.reward_head = ScalarHead(self.trunk.hidden_size, self.seed).to(dtype)
        self.head_learning_rate = head_learning_rate
        self.margin = margin
        self.positive_weight = positive_weight
        self.center_coef = center_coef
        self.normalize_scores = normalize_scores
        # By default NaN is left out, and a diverged model would have the best loss of all.
        # Every rank has all rows, which must not be counted once per rank.
        options: Any = {"nan_strategy": float("nan"), "sync_on_compute": False}
        self.mean_lm = MeanMetric(**options)
        self.mean_reward = MeanMetric(**options)

    def heads(self) -> dict[str, ScalarHead]:
        """The reward head, unless nothing ever trains it."""
        return {"reward": self.reward_head} if self.reward_weight > 0 else {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trunk or its adapter, and the head."""
        rate = {} if self.head_learning_rate is None else {"lr": self.head_learning_rate}
        head = {"name": "head", "params": list(self.reward_head.parameters()), **rate}
        return [*super().parameter_groups(), head]

    # ---- the objective ---------------------------------------------------------------------------

    def score_of(self, hidden: Tensor, batch: RatedBatch) -> Tensor:
        """Scores of all rows, of which ``hidden`` are the last states of this rank's share. Shape: ``(B,)``."""
        share = self.share(batch)
        last = at_last_response(hidden, sequences_of(batch).response_mask[share.rows])
        return share.gathered(self.reward_head(last))

    def scores(self, batch: RatedBatch) -> Tensor:
        """Scores of the responses, read at their last tokens. Shape: ``(B,)``."""
        return self.score_of(self.hidden(batch), batch)

    def reward_loss(self, scores: Tensor, batch: RatedBatch) -> tuple[Tensor, Stats]:
        """``L_RM`` and its statistics. Only pairs are centred: thumbs themselves fix where 0 is."""
        if self.positive_weight is None:
            raise RuntimeError(
                f"{type(self).__name__}.positive_weight is None and no trainer has set it from its data: "
                "call `module.balance(up, down)`."
            )
        chosen, rejected = scores[batch.pairs[:, 0]], scores[batch.pairs[:, 1]]
        margin = self.margin if batch.margins is None else self.margin + batch.margins
        pair_loss, pair = bradley_terry(chosen, rejected, margin)
        if self.center_coef:
            pair_loss = pair_loss + self.center_coef * centering(chosen, rejected)
        thumb_loss, thumb = thumbs(scores, batch.label, batch.labelled, self.positive_weight)
        pairs, ratings = len(batch.pairs), batch.labelled.sum()
        loss = (pairs * pair_loss + ratings * thumb_loss) / (pairs + ratings).clamp(min=1)
        accuracy = (pair if pairs else thumb)["accuracy"]
        return loss, {"reward_loss": loss.detach(), **pair, "accuracy": accuracy}

    def losses(self, batch: RatedBatch) -> tuple[Tensor, Tensor, Tensor, Tensor, Stats]:
        """Language-modelling loss, its tokens, reward loss, scores and statistics, from one forward."""
        hidden = self.hidden(batch)
        scores = self.score_of(hidden, batch)
        reward_loss, stats = self.reward_loss(scores, batch)
        if self.lm_weight == 0:
            nothing = torch.zeros_like(reward_loss)
            return nothing, nothing.long(), reward_loss, scores, stats
        lm_loss, lm_tokens = imitation_loss(self, hidden, batch)
        return lm_loss, lm_tokens, reward_loss, scores, {"lm_loss": lm_loss.detach(), **stats}

    def objective(self, batch: RatedBatch) -> tuple[Tensor, Stats]:
        """``lm_weight * xent + reward_weight * L_RM``."""
        lm_loss, _, reward_loss, _, stats = self.losses(batch)
        return self.lm_weight * lm_loss + self.reward_weight * reward_loss, stats

    # ---- Lightning -------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Balance the thumbs by the training data's, where that was asked for.

        Raises:
            ValueError: ``positive_weight`` is None and the data does not say how many there are.
        """
        super().setup(stage)
        if self.positive_weight is not None or stage == "predict":
            return
        up, down = (getattr(self.training_rows, name, 0) for name in ("up", "down"))
        if not up or not down:
            raise ValueError(
                f"positive_weight: null weighs thumbs up by the training data's thumbs down per thumb up, "
                f"but the data counted {up} up and {down} down (a stream, or loaders without a "
                "datamodule, count none). Give the number, 1.0 for no weight, or call "
                "`module.balance(up, down)` first."
            )
        self.balance(up, down)
        rank_zero_info(f"thumbs up weigh {self.positive_weight:.4g}: {up} up, {down} down")

    def balance(self, up: int, down: int) -> None:
        """Give both classes of thumbs the same weight in all: ``positive_weight = down / up``."""
        self.positive_weight = down / up

    def on_train_start(self) -> None:
        """Refuse to train towards scores that nothing could normalize in the end."""
        super().on_train_start()
        if self.normalize_scores:
            self._demonstrations()

    def validation_step(self, batch: RatedBatch, batch_idx: int) -> None:
        """Loss per token weighted by tokens, reward loss by rated rows, and the scores' measures."""
        lm_loss, lm_tokens, reward_loss, scores, _ = self.losses(batch)
        rated = self.ratings(batch)
        if lm_tokens > 0:
            options = {"batch_size": int(lm_tokens), "on_epoch": True}
            self.log(f"{self.held_out}/lm_loss", lm_loss, prog_bar=True, **options)  # type: ignore[arg-type]
            # Summed at the end: a batch without thumbs would otherwise count as one whose thumbs cost 0.
            self.mean_lm.update(lm_loss, int(lm_tokens))
        if rated:
            self.log(f"{self.held_out}/reward_loss", reward_loss, batch_size=rated, on_epoch=True)
            self.mean_reward.update(reward_loss, rated)
        self.measure(scores, batch)

    test_step = validation_step

    def on_test_start(self) -> None:
        """Warn where the head was neither trained nor loaded."""
        if self.rated == 0:
            rank_zero_warn(
                f"{type(self).__name__} is tested with a random reward head: it was neither trained in this "
                "process nor loaded from a checkpoint (`--ckpt_path last` finds none in a new run). Give "
                "--ckpt_path RUN/checkpoints/NAME.ckpt."
            )

    def on_validation_epoch_end(self) -> None:
        """Log the loss of all rows, and the measures."""
        means = (self.mean_lm, self.mean_reward)
        parts = zip((self.lm_weight, self.reward_weight), means, strict=True)
        losses = [weight * mean.compute() for weight, mean in parts if mean.update_called]
        if losses:
            self.log(f"{self.held_out}/loss", torch.stack(losses).sum(), prog_bar=True)
        for mean in means:
            mean.reset()
        super().on_validation_epoch_end()

    # ---- handing over ----------------------------------------------------------------------------

    def hand_over(self, folder: Path) -> Path:
        """As `Supervised`; with ``normalize_scores`` the manifest says what demonstrations scored before."""
        about: dict[str, Any] = {}
        if self.normalize_scores:
            home = self.device  # Lightning has moved the module to the CPU by now.
            self.to(self.trainer.strategy.root_device)
            mean, deviation = self.normalize(self._demonstrations())
            self.to(home)
            about["normalized_from"] = {"mean": mean, "sd": deviation}
            rank_zero_info(
                f"scores of demonstrations: mean {mean:.4g}, sd {deviation:.4g}; now 0 and 1"
            )
        written = super().hand_over(folder)
        manifest = written / MANIFEST_FILE
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | about, indent=2) + "\n")
        return written

    def normalize(self, batches: Iterable[RatedBatch]) -> tuple[float, float]:
        """Shift and scale the head so that demonstrations score 0 on average, with deviation 1.

        Only the head changes: ``w / sd`` and ``(b - mean) / sd``. 2403.17031, detail 12, sets the mean;
        the scale is that of Ziegler et al. (1909.08593).

        Args:
            batches: Batches whose rows with ``imitate`` are the demonstrations.

        Returns:
            Mean and standard deviation of the scores before.

        Raises:
            ValueError: Fewer than two demonstrations, all with one score, or a score that is not finite.
        """
        parts = []
        with torch.no_grad():
            for batch in batches:
                moved = move_data_to_device(batch, self.device)
                parts.append(self.scores(moved)[moved.imitate].cpu().double())
        scores = torch.cat(parts) if parts else torch.zeros(0)
        mean = float(scores.mean())
        deviation = float(((scores - mean) ** 2).mean().sqrt())
        if not 0 < deviation < math.inf:
            raise ValueError(
                f"normalize_scores: the scores of {len(scores)} demonstrations have standard deviation "
                f"{deviation}; nothing can be scaled by that."
            )
        with torch.no_grad():
            self.reward_head.weight.div_(deviation)
            self.reward_head.bias.sub_(mean).div_(deviation)
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
                # A fresh loader: a training loader remembers where it was left.
                return _batches(split())
        raise ValueError(
            "normalize_scores: neither the validation rows nor the datamodule's training rows hold a "
            "demonstration, a row with `imitate`, such as a chosen or thumbs-up answer (loaders without "
            "a datamodule: only validation rows are read). Add some, or leave normalize_scores off."
        )


class RewardModel(Scoring):
    """A scalar score for a whole answer, read at its last token (EOS where there is one).

    Pairs are fitted by Bradley-Terry, thumbs by binary cross-entropy (PERL, 2403.10704, App. A.1). With
    ``lm_weight``, ``L = L_RM + lm_weight * xent(y_w)``, as in PPO-max (2307.04964, Eq. 2, whose print lacks the
    second term's minus sign). PERL's LoRA learning rates are 1e-4 to 2e-4.

    Args:
        trunk: Folder or hub name of a decoder; best the SFT trunk.
        lora: Shape of the adapter, written as ``RUN/adapters/reward``. None: the whole trunk is tuned and written
            as ``RUN/trunk``.
        lm_weight: Weight of the cross-entropy per token of chosen and thumbs-up answers and of demonstrations
            (PPO-max: 1). With full tuning the LM head is then trained too.
    """

    adapter_name: ClassVar[str] = "reward"
    keeps_adapter: ClassVar[bool] = True

    def __init__(
        self,
        trunk: str,
        lora: LoraSpec | None = LoraSpec(),
        lm_weight: NonNegative = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(trunk, lora=lora, **settings)
        if lora is None and lm_weight == 0:
            # No loss ever reads the LM head; where it is the embedding too, it is trained as that.
            self.trunk.requires_grad_(False)
            self.trunk.model.base_model.requires_grad_(True)
        self.lm_weight = lm_weight


class HydraSFT(Scoring):
    """Hydra-SFT (2309.00754): ``L = xent(y_w) + gamma * L_RM``, language and reward in one trunk.

    The language-modelling loss is taken on demonstrations and on thumbs-up (or chosen) answers, the reward loss on
    pairs or thumbs, whichever the batch has. An adapter is merged into the trunk at the end.

    Args:
        trunk: Folder or hub name of a decoder.
        lora: Shape of the adapter. None: the whole trunk is tuned.
        reward_weight: Weight of the reward loss, the paper's gamma. 0: plain SFT.
    """

    def __init__(
        self,
        trunk: str,
        lora: LoraSpec | None = None,
        reward_weight: NonNegative = 0.1,
        **settings: Any,
    ) -> None:
        if settings.get("normalize_scores") and reward_weight == 0:
            raise ValueError(
                "normalize_scores needs a trained reward head: set reward_weight above 0."
            )
        super().__init__(trunk, lora=lora, **settings)
        self.reward_weight = reward_weight


def _batches(loaders: Any) -> Iterator[RatedBatch]:  # noqa: ANN401 (one loader, or any nest of them)
    for loader in CombinedLoader(loaders, "sequential").flattened:
        yield from loader
