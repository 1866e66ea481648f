"""Prompts to answer, and beside them texts to imitate."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import CombinedLoader
from transformers import PreTrainedTokenizerBase

from lightning_perl.arguments import Count
from lightning_perl.batches import MixedBatch
from lightning_perl.data.preferences import PreferenceDataModule
from lightning_perl.data.reading import Sources


class MixedDataModule(PreferenceDataModule):
    """Prompts of your own, and with each batch of them rows to imitate, for ``lm_weight`` of on-policy modules.

    An epoch ends with the longer of the two; the other begins again meanwhile. Held-out rows are prompts alone.

    Args:
        train: Prompts to answer, see :class:`PreferenceDataModule`.
        texts: Rows to imitate, such as those of SFT, read as ``train`` but by their own columns' names.
        texts_batch_size: Texts in a batch; every optimizer step learns all of them.
        rows: Always ``prompts``.
        settings: As :class:`PreferenceDataModule`, for the prompts.
    """

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase,
        train: Sources,
        texts: Sources,
        texts_batch_size: Count = 8,
        rows: Literal["prompts"] = "prompts",
        **settings: Any,
    ) -> None:
        super().__init__(tokenizer, train, rows=rows, **settings)
        self.texts = PreferenceDataModule(
            tokenizer,
            texts,
            val_fraction=0.0,
            batch_size=texts_batch_size,
            max_tokens=self.max_tokens,
            max_response_tokens=self.max_response_tokens,
            seed=self.seed,
            on_bad_row=self.on_bad_row,
            chat_template=self.chat_template,
        )

    def setup(self, stage: str | None = None) -> None:
        """Reads both."""
        super().setup(stage)
        self.texts.setup(stage)

    @cached_property
    def trained_rows(self) -> dict[str, str]:
        """Tells prompts and texts from others, for checkpoints."""
        prompts, texts = super().trained_rows, self.texts.trained_rows
        return {key: f"{prompts[key]} beside {texts[key]}" for key in prompts}

    def train_dataloader(self) -> CombinedLoader:  # type: ignore[override]
        """Returns batches of both; their positions go into checkpoints."""
        loaders = MixedBatch(super().train_dataloader(), self.texts.train_dataloader())  # type: ignore[arg-type]
        return CombinedLoader(loaders, "max_size_cycle")
