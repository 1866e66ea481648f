"""A user's own rows: preferences, thumbs, ratings, demonstrations, prompts; and prompts with texts beside them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import CombinedLoader
from transformers import PreTrainedTokenizerBase

from lightning_perl.arguments import Count, Finite, FractionBelowOne
from lightning_perl.batches import MixedBatch
from lightning_perl.data.base import ConversationDataModule
from lightning_perl.data.dialects import DIALECTS, NAMES
from lightning_perl.data.loaders import ResumableLoader, StreamingLoader
from lightning_perl.data.own_rows import Columns, ReadsRows, RowReader
from lightning_perl.data.reading import Source, Sources, shuffled_stream, sources_of
from lightning_perl.data.report import SplitReport
from lightning_perl.data.rows import (
    BadRowHook,
    Item,
    PromptExample,
    RatedExample,
    Splits,
    collate_pairs,
    held_out,
)
from lightning_perl.data.tokenization import example_of


class PreferenceDataModule(ConversationDataModule):
    """Rows of your own, recognised by their columns: docs/data.md lists the kinds and public formats.

    With ``rows: prompts`` the prompt of any kind is enough, and answers are not looked at. Chosen and thumbs-up
    answers, and those rated above the middle, also enter the language-modelling loss of Hydra-SFT. A rating
    becomes a label from 0 to 1, linearly: the soft target of the cross-entropy. Rows of one dialog (the same first
    user turn) go to one split. Duplicates are used once.

    Args:
        train: Where the training rows come from: a file (``.jsonl``, ``.json`` with one array, ``.csv``, each also
            with ``.gz``, or ``.parquet``; in UTF-8), a data set of the Hugging Face hub (``owner/name`` or
            ``owner/name/config:split``, split ``train`` unless named), a list of rows (or a ``Dataset``), or
            several files and names. A list of files and names is read as one after the other. A mapping
            ``{file or name: weight}`` is mixed: a batch has of each source what its weight says on average, and an
            epoch ends when every row was drawn, so that sources with fewer rows for their weight begin again.
        val: Where the validation rows come from, as ``train`` but without weights. None:
            ``val_fraction`` of the training prompts, at least one of two or more.
        test: Where the test rows come from, as ``val``. None: the validation rows.
        val_fraction: Share of the training prompts that is held out when ``val`` is None. None: 0.1, and of a
            stream nothing.
        columns: The file's names for ours, for example ``{prompt: question, chosen: better}``; also dotted paths,
            several columns with weights (``rating: {helpfulness: 0.7, correctness: 0.3}``), and null for a column
            that is not to be read.
        dialect: Name of the public format that the rows have (docs/data.md lists them). None: what they look like.
        read_row: Python function that turns a row of the file into one with the columns above, into a list of
            them, or into None to leave it out.
        answer_pairs: What to learn from several answers with scores or ranks. ``best_worst``: one pair, the best
            and the worst. ``all``: every pair of unequal ones.
        rating_range: The lowest and the highest rating there can be. What lies outside is a bad row.
        streaming: Read and encode training rows while training, for files that do not fit into memory. The loader
            then has no length: give ``trainer.max_steps``, and ``val_check_interval`` as a number of batches.
            Duplicates and conflicts are not looked for, and validation rows are those of ``val``. The report
            counts the first pass and comes at its end. A resumed run reads past the rows before its position.
        shuffle_block: Rows of a stream that are in memory to be shuffled.
        keep_conflicts: Learn from rows whose labels contradict each other (a thumb up and a thumb down for one
            answer, a pair in both orders), and count them. False takes each of them for a bad row.
    """

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase,
        train: Sources,
        val: Sources | None = None,
        test: Sources | None = None,
        val_fraction: FractionBelowOne | None = None,
        columns: Columns | None = None,
        dialect: str | None = None,
        read_row: ReadsRows | None = None,
        answer_pairs: Literal["best_worst", "all"] = "best_worst",
        rating_range: tuple[Finite, Finite] | None = None,
        streaming: bool = False,
        shuffle_block: Count = 4096,
        keep_conflicts: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(tokenizer, keep_conflicts=keep_conflicts, **settings)
        unknown = sorted(set(columns or {}) - set(NAMES))
        if unknown:
            raise ValueError(f"data.columns: unknown {unknown}; the names are {list(NAMES)}.")
        if dialect is not None and dialect not in DIALECTS:
            raise ValueError(f"data.dialect: unknown {dialect!r}; there are {list(DIALECTS)}.")
        low, high = rating_range or (0, 1)
        if not low < high:
            raise ValueError(
                f"data.rating_range must be the lowest and the highest rating there can be, got {[low, high]}."
            )
        if streaming and val is None and val_fraction:
            raise ValueError(
                "data.streaming: a stream is not divided. Name the validation rows in data.val, and leave "
                "data.val_fraction out."
            )
        self.train_sources = sources_of(train, "data.train")
        self.val_sources = None if val is None else sources_of(val, "data.val")
        self.test_sources = None if test is None else sources_of(test, "data.test")
        weights = [source.weight for source in self.train_sources if source.weight is not None]
        self.weights = weights or None
        self.val_fraction = (0.0 if streaming else 0.1) if val_fraction is None else val_fraction
        reading = (self.rows == "prompts", dialect, rating_range, answer_pairs, read_row)
        self._reader = RowReader(columns or {}, *reading, self.report)
        self.streaming = streaming
        self.streamed = [source.name for source in self.train_sources]
        self.shuffle_block = shuffle_block
        self._streams: list[Source] = []
        self._begun = False
        # Takes a bad row that is counted at another reading.
        self._uncounted: BadRowHook = partial(self.bad_row, counted=False)

    def prepare_data(self) -> None:
        """Fetches data sets of the hub into its cache."""
        held_out = [*(self.val_sources or []), *(self.test_sources or [])]
        for source in held_out if self.streaming else [*self.train_sources, *held_out]:
            source.fetch()

    def read(self) -> Splits:
        """Returns the rows of the sources, the training rows divided by dialog if need be."""
        if self.streaming:
            self._open_streams()
        train = [] if self.streaming else self._all(self.train_sources)
        if self.val_sources is None:
            train, val = held_out(train, self.val_fraction)
        else:
            val = self._all(self.val_sources)
        test = val if self.test_sources is None else self._all(self.test_sources)
        trained = {item.dialog for item in train}
        for name, items in (("validation", val), ("test", test)):
            shared = sum(item.dialog in trained for item in items)
            if shared and (name == "validation" or test is not val):
                self.report.notes[f"{name} rows whose prompt is a training prompt"] = shared
        return Splits(train, val, test)

    def _all(self, sources: list[Source]) -> list[Item]:
        items = [item for source in sources for item in self._items(source, self.bad_row, False)]
        return self.distinct(items)

    def _items(self, source: Source, bad_row: BadRowHook, streaming: bool) -> Iterator[Item]:
        rows = source.rows(bad_row, streaming)
        return self.usable(rows, partial(self._reader.items, source=source.number), bad_row)

    def _open_streams(self) -> None:
        """Finds out before the run which files are not there, and which have no row at all."""
        for source in self.train_sources:
            if next(source.rows(self._uncounted, streaming=True), None):
                self._streams.append(source)
            else:
                list(source.rows(self.bad_row, streaming=True))

    def train_dataloader(self) -> ResumableLoader | StreamingLoader:
        """Returns shuffled batches; the loader's position goes into checkpoints."""
        if not self.streaming:
            return super().train_dataloader()
        # Where it limits the batches, Lightning knows how many there are and asks for none ahead.
        limited = self.trainer is None or isinstance(self.trainer.limit_train_batches, int)
        batches = (self.batch_size, self.collate, self.seed, self.shuffle_block, self.bucket)
        return StreamingLoader(self._train_stream, *batches, ahead=0 if limited else 1)

    def _train_stream(
        self, epoch: int, start: int
    ) -> Iterator[tuple[int, RatedExample | PromptExample]]:
        """Yields an epoch's training rows from row ``start`` on; the first pass is counted."""
        first, self._begun = not self._begun, True
        split = self.report.splits["train"] if first else SplitReport()
        bad_row = self.bad_row if first else self._uncounted
        encoder = self.encoder
        for place, (number, item) in islice(enumerate(self._mixed(epoch, bad_row)), start, None):
            if rows := self.encoded(encoder, item, bad_row, split):
                example = example_of(item, rows, number, self.rows == "prompts")
                split.keep(example)
                yield place, example
        if first:
            self.report.notes.update(encoder.notes)
            self.announce()
            self.log_report()

    def _mixed(self, epoch: int, bad_row: BadRowHook) -> Iterator[tuple[int, Item]]:
        """Yields an epoch's rows of all streams, shuffled, with numbers that no two of them share."""
        opened: set[int] = set()

        def items(source: Source) -> Iterator[tuple[int, Item]]:
            # A mixture reads a short source again; its bad rows are counted once.
            hook = self._uncounted if source.number in opened else bad_row
            opened.add(source.number)
            for place, item in enumerate(self._items(source, hook, streaming=True)):
                # A pair takes two numbers.
                yield 2 * (len(self.train_sources) * place + source.number), item

        streams = [partial(items, source) for source in self._streams]
        weights = [source.weight for source in self._streams if source.weight is not None]
        return shuffled_stream(streams, weights or None, self.shuffle_block, self.seed, epoch)

    def teardown(self, stage: str) -> None:
        """Reports on a stream that was not read to its end."""
        if self._begun and not self.announced:
            self.announce()
            self.log_report()


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
        theirs = {"val_fraction": 0.0, "batch_size": texts_batch_size, **theirs}
        try:
            self.texts = PreferenceDataModule(tokenizer, texts, rows="rated", **theirs)
        except TypeError as error:
            raise ValueError(f"data.texts_settings: {error}.") from error
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
