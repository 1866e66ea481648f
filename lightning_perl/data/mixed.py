"""Prompts to answer, and beside them texts to imitate."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import CombinedLoader
from transformers import PreTrainedTokenizerBase

from lightning_perl.arguments import Count
from lightning_perl.batches import MixedBatch
from lightning_perl.data.loaders import ResumableLoader
from lightning_perl.data.preferences import PreferenceDataModule
from lightning_perl.data.reading import Sources, sources_of
from lightning_perl.data.rows import RatedExample, collate_pairs


class Endless:
    """Yields the batches of a loader epoch after epoch; where it stands can be saved as the loader's can."""

    def __init__(self, loader: ResumableLoader) -> None:
        self.loader = loader
        self.state_dict, self.load_state_dict = loader.state_dict, loader.load_state_dict

    def __iter__(self) -> Iterator[Any]:
        """Yields on from where the last iteration stopped."""
        while True:
            yield from self.loader


def beside(prompts: ResumableLoader, texts: ResumableLoader) -> CombinedLoader:
    """Returns batches of both, until an epoch of prompts is over; the texts go on in the next one."""
    return CombinedLoader(MixedBatch(prompts, Endless(texts)), "min_size")  # type: ignore[arg-type]


class MixedDataModule(PreferenceDataModule):
    """Prompts of your own, and with each batch of them texts to learn beside what is answered.

    They are rows to imitate, for ``lm_weight`` of on-policy modules, or pairs, which `INPO` learns beside its own.
    An epoch is one of the prompts; the texts begin again where they end. Held-out rows are prompts alone.

    Args:
        train: Prompts to answer, see :class:`PreferenceDataModule`.
        texts: Rows to imitate, such as those of SFT. Rows that are not imitated (rejected answers, thumbs down)
            are passed over. Or rows with ``chosen`` and ``rejected``, of which those without are passed over.
        texts_batch_size: Texts in a batch. Every optimizer step learns all rows to imitate; pairs are shuffled
            among the sampled ones.
        texts_settings: Arguments of :class:`PreferenceDataModule` for the texts, such as ``columns``. Lengths,
            seed, ``on_bad_row`` and ``chat_template`` are the prompts' unless these are among them.
        texts_as: What the texts are: ``demonstrations`` to imitate, or ``pairs``, which cannot be streamed.
        rows: Always ``prompts``.
    """

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase,
        train: Sources,
        texts: Sources,
        texts_batch_size: Count = 8,
        texts_settings: dict[str, Any] | None = None,
        texts_as: Literal["demonstrations", "pairs"] = "demonstrations",
        rows: Literal["prompts"] = "prompts",
        **settings: Any,
    ) -> None:
        super().__init__(tokenizer, train, rows=rows, **settings)
        shared = ("max_tokens", "max_response_tokens", "seed", "on_bad_row", "chat_template")
        theirs = {name: getattr(self, name) for name in shared} | (texts_settings or {})
        self.texts = PreferenceDataModule(
            tokenizer, texts, batch_size=texts_batch_size, **{"val_fraction": 0.0, **theirs}
        )
        self.texts.train_sources = sources_of(texts, "data.texts")
        self.texts_as = texts_as
        if texts_as == "pairs" and self.texts.streaming:
            raise ValueError(
                "data.texts: pairs are not streamed. Leave streaming out of data.texts_settings."
            )

    def prepare_data(self) -> None:
        """Fetches both."""
        super().prepare_data()
        self.texts.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Reads both; rejected texts are listed among rejected prompts.

        Raises:
            ValueError: No text is imitated, or none is a pair.
        """
        if self.splits is not None:
            return
        super().setup(stage)
        self.texts.setup(stage)
        self.report.messages.extend(self.texts.report.messages)
        if self.texts.streaming:
            return
        examples: list[RatedExample] = self.texts._examples["train"]
        if self.texts_as == "pairs":
            self.texts.collate = collate_pairs
            pairs = (each for each in examples if len(each.rows) == 2)
            kept = [pair for pair in pairs if pair.rows[0].prompt == pair.rows[1].prompt]
            needed = "pair: `chosen` and `rejected`"
        else:
            kept = [RatedExample((row,)) for each in examples for row in each.rows if row.imitate]
            needed = "row to imitate: demonstrations, chosen answers or thumbs up"
        if not kept:
            raise ValueError(f"data.texts has no {needed}. What was read:\n{self.texts.report}")
        self.texts._examples["train"] = kept

    @cached_property
    def trained_rows(self) -> dict[str, str]:
        """Tells prompts and texts from others, for checkpoints."""
        prompts, texts = super().trained_rows, self.texts.trained_rows
        return {key: f"{prompts[key]} beside {texts[key]}" for key in prompts}

    def train_dataloader(self) -> CombinedLoader:  # type: ignore[override]
        """Returns batches of both; their positions go into checkpoints."""
        prompts, texts = super().train_dataloader(), self.texts.train_dataloader()
        return beside(prompts, texts)  # type: ignore[arg-type]  # streams have positions too
