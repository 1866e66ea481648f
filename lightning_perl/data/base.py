"""What every datamodule does: read a corpus, encode it once, report on it, and batch it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lightning_perl.arguments import Checked, Count, CountOrZero
from lightning_perl.chat import load_tokenizer
from lightning_perl.data.loaders import (
    Collate,
    FixedLoader,
    ResumableLoader,
    StreamingLoader,
    mixture,
)
from lightning_perl.data.report import DataReport, SplitReport
from lightning_perl.data.rows import (
    BadRow,
    BadRowHook,
    Item,
    LeftOut,
    Splits,
    collate_prompts,
    collate_rated,
    conflicting,
    digest_of,
    judgement,
    stable_hash,
)
from lightning_perl.data.tokenization import Encoded, TurnEncoder, example_of
from lightning_perl.packaged import unpackaged

Raw = TypeVar("Raw")
T = TypeVar("T")


class ConversationDataModule(Checked, LightningDataModule, ABC):
    """Encodes the conversations that a subclass reads, and yields rated rows or prompts.

    Subclasses implement :meth:`read`. After :meth:`setup`, ``splits`` holds the rows and ``report`` what was read,
    rejected and cut, how long the rows are and how they are labelled. It is printed once, and its numbers go to
    the trainer's loggers (``data/train_rows`` and so on).

    Args:
        tokenizer: The folder of a trunk or tokenizer, or a name of the Hugging Face hub. From
            Python also a loaded tokenizer.
        rows: What a batch holds. ``rated``: prompts with their answers, labels and pairs, for SFT,
            Hydra-SFT and reward models (``RatedBatch``). ``prompts``: the distinct prompts alone,
            for reinforcement learning (``PromptBatch``).
        batch_size: Rows of a training batch. A pair counts as one row.
        val_batch_size: Rows of a validation or test batch. None: ``batch_size``.
        max_tokens: Tokens of a row, prompt and answer together. A prompt that is too long loses
            whole turns on the left.
        max_response_tokens: Tokens of an answer, end-of-sequence token included. A prompt may take
            the rest, ``max_tokens - max_response_tokens``.
        bucket: Put rated rows of similar length into a batch, which saves padding. False: shuffle only, as prompts
            always are: a rollout batch is a mixture, and its micro-batches are cut by length later.
        seed: Seed of the order of the rows. The splits do not depend on it.
        num_workers: Processes that collate batches. 0 is enough for text.
        on_bad_row: ``raise`` stops at the first row that cannot be used, naming file and line. ``reject`` counts
            such rows in ``report`` and goes on. A file that cannot be read to its end counts as one such row.
        keep_conflicts: Learn from rows whose labels contradict each other (a thumb up and a thumb down for one
            answer, a pair in both orders), and count them. False takes each of them for a bad row.
        chat_template: Write turns with the tokenizer's own chat template. False: with the plain turn template, as
            for a base model. None: with the chat template where the tokenizer has one.
    """

    pairs: ClassVar[bool] = True
    """Whether rated rows may be preference pairs; ``estimate`` then counts two answers for each row."""
    texts_as: str | None = None
    """What lies beside the prompts of a batch: ``demonstrations``, ``pairs``, or nothing."""

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase,
        rows: Literal["rated", "prompts"] = "rated",
        batch_size: Count = 8,
        val_batch_size: Count | None = None,
        max_tokens: Count = 512,
        max_response_tokens: Count = 128,
        bucket: bool = True,
        seed: CountOrZero = 0,
        num_workers: CountOrZero = 0,
        on_bad_row: Literal["reject", "raise"] = "raise",
        keep_conflicts: bool = True,
        chat_template: bool | None = None,
    ) -> None:
        super().__init__()
        if max_response_tokens >= max_tokens:
            raise ValueError(
                f"data.max_response_tokens must leave room for a prompt below data.max_tokens = {max_tokens}, "
                f"got {max_response_tokens}."
            )
        self.tokenizer_source = tokenizer
        self.rows = rows
        self.collate: Collate = collate_prompts if rows == "prompts" else collate_rated
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.max_tokens = max_tokens
        self.max_response_tokens = max_response_tokens
        self.bucket = bucket and rows == "rated"
        self.seed = seed
        self.num_workers = num_workers
        self.on_bad_row = on_bad_row
        self.keep_conflicts = keep_conflicts
        self.chat_template = chat_template
        #: Whether training rows are read while training; the report then comes after the first pass.
        self.streaming = False
        self.streamed: list[str] = []
        self.report = DataReport()
        self.announced = False
        self.splits: Splits | None = None
        #: Weights of the sources of the training rows; None draws every row once an epoch.
        self.weights: list[float] | None = None
        self._examples: dict[str, list[Any]] = {}
        # What each example was made of.
        self._used: dict[str, list[Item]] = {}
        self._distinct = 0
        self._reported_to: Trainer | None = None

    @abstractmethod
    def read(self) -> Splits:
        """Returns the rows of the corpus, divided by dialog.

        Rows that cannot be used go to :meth:`bad_row`, the others through :meth:`distinct` before
        they are divided. Good rows that are passed over before that are counted in
        ``self.report.left_out``; what is only worth knowing in ``self.report.notes``.
        """

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        source = self.tokenizer_source
        if isinstance(source, PreTrainedTokenizerBase):
            return source
        # No Path, which would rewrite hub names on Windows.
        return load_tokenizer(os.path.expanduser(unpackaged(str(source))), "data.tokenizer")  # noqa: PTH111

    def bad_row(self, where: str, message: str, counted: bool = True) -> None:
        """Counts a bad row, unless another reading does, or raises :class:`BadRow`, as ``on_bad_row`` says."""
        if self.on_bad_row == "raise":
            raise BadRow(f"{where}: {message}")
        if counted:
            self.report.reject(where, BadRow(message))

    def usable(
        self,
        rows: Iterable[tuple[str, Raw]],
        read: Callable[[Raw, str], Iterable[T]],
        bad_row: BadRowHook | None = None,
    ) -> Iterator[T]:
        """Yields what ``read`` makes of rows and their places; ``bad_row`` (None: our own) takes bad ones."""
        for where, row in rows:
            try:
                yield from read(row, where)
            except LeftOut as left_out:
                # Counted where bad rows are counted: once.
                if bad_row in (None, self.bad_row):
                    self.report.left_out[left_out.reason] += 1
            except BadRow as error:
                (bad_row or self.bad_row)(where, str(error))

    def distinct(self, items: Iterable[Item]) -> list[Item]:
        """Drops rows that repeat another, and counts those whose labels contradict each other.

        Subclasses call this once, with every row they read, before they divide them: otherwise a row and its
        duplicate could lie on two sides of a split. Two rows are duplicates where context, answers and label are
        the same. An answer with both thumbs, or a pair that is there in both orders, is a conflict: with
        ``keep_conflicts`` it stays (people disagree, and the loss takes the mean), else its rows are bad rows.
        """
        known: dict[object, dict[object, Item]] = defaultdict(dict)
        kept: list[tuple[object, Item]] = []
        for item in items:
            question, verdict = judgement(item)
            if verdict in known[question]:
                self.report.duplicates += 1
                continue
            known[question][verdict] = item
            kept.append((question, item))
        contested = [question for question, verdicts in known.items() if conflicting(verdicts)]
        self.report.conflicts += len(contested)
        if not self.keep_conflicts:
            for question in contested:
                self._refuse_conflict(known.pop(question))
        distinct = [item for question, item in kept if question in known]
        self._distinct += len(distinct)
        return distinct

    def _refuse_conflict(self, verdicts: dict[object, Item]) -> None:
        for verdict, item in verdicts.items():
            against = [verdicts[v].where for v in verdicts if conflicting((v, verdict))]
            # A rating in the middle contradicts none, but what it judges is contested.
            other = against[0] if against else next(iter(verdicts.values())).where
            self.bad_row(
                item.where,
                f"conflicting labels: {other} says the opposite of the same answers. Remove one, set "
                "keep_conflicts: true to learn from both, or on_bad_row: reject to use neither.",
            )

    def setup(self, stage: str | None = None) -> None:
        """Reads, encodes and reports once, whatever the stage."""
        if self.splits is not None:
            return
        # First: a tokenizer that cannot be used should not wait for the files.
        encoder = self.encoder
        splits = self.read()
        divided = sum({id(items): len(items) for items in splits}.values())
        if self._distinct > divided:
            self.report.left_out["not asked for"] = self._distinct - divided
        for name, items in splits._asdict().items():
            if name != "test" or items is not splits.val:
                self._encode(encoder, name, items)
                continue
            kept: list[dict[str, Any]] = [self.report.splits, self._examples, self._used]
            for parts in kept:
                parts["test"] = parts["val"]
        self.splits = splits
        self.report.template = f"{encoder.template}, an answer ends with {encoder.ending!r}"
        self.report.notes.update(encoder.notes)
        if splits.val and not self._examples["val"]:
            self.report.notes["validation rows, of which none could be used"] = len(splits.val)
        if not self.streaming:
            self.announce()

    def announce(self) -> None:
        """Prints the report, once all rows were read; refuses one without a training row."""
        self.announced = True
        rank_zero_info(f"{type(self).__name__}\n{self.report}")
        if not self.report.splits["train"].kept:
            raise ValueError(
                f"{type(self).__name__}: no training row is left. What was read:\n{self.report}"
            )

    def log_report(self) -> None:
        """Sends the report's numbers to the trainer's loggers, once for each trainer."""
        # Called for loaders, not by setup: a run that the module refuses leaves nothing in its folder.
        trainer = self.trainer
        if trainer is None or trainer is self._reported_to or not self.announced:
            return
        self._reported_to = trainer
        for logger in trainer.loggers:
            logger.log_metrics(self.report.numbers(), step=0)
        # On every rank: the folder is the first one's.
        folder = trainer.log_dir or trainer.default_root_dir
        dry: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.report.messages and trainer.is_global_zero and not dry:
            file = Path(folder) / "rejected_rows.csv"
            self.report.write_rejected(file)
            rank_zero_info(f"{len(self.report.messages)} rejected rows are listed in {file}")

    @cached_property
    def trained_rows(self) -> dict[str, str]:
        """Tells the training rows from others, for checkpoints; a stream is known by its sources alone."""
        items, examples = self.splits.train if self.splits else [], self._examples["train"]
        files = sorted({item.where.rpartition(":")[0] for item in items})
        sources = ", ".join(files or self.streamed)
        names = ", ".join(sorted(Path(source).name for source in self.streamed))
        digest = stable_hash(names)[:16] if self.streaming else digest_of(examples)
        rows = "a stream" if self.streaming else f"{len(examples)} rows"
        weights = f" and weights {self.weights}" if self.weights else ""
        return {"rows": f"{rows} with digest {digest}{weights}", "sources": sources}

    @property
    def template(self) -> str:
        """Names how turns become tokens, for manifests."""
        return self.encoder.template

    @property
    def encoder(self) -> TurnEncoder:
        """A fresh encoder of turns."""
        given = self.chat_template
        chats = bool(self.tokenizer.chat_template) if given is None else given
        return TurnEncoder(self.tokenizer, chats)

    def _encode(self, encoder: TurnEncoder, name: str, items: list[Item]) -> None:
        """Makes the examples of a split, and its report."""
        report = self.report.splits[name] = SplitReport()
        tried = [(item, self.encoded(encoder, item, self.bad_row, report)) for item in items]
        used = [(item, rows) for item, rows in tried if rows]
        if self.rows == "prompts":
            first: dict[tuple[int, ...], tuple[Item, list[Encoded]]] = {}
            for item, rows in used:
                first.setdefault(tuple(rows[0].ids), (item, rows))
            report.duplicates = len(used) - len(first)
            used = list(first.values())
        self._used[name] = [item for item, _ in used]
        numbers = accumulate((len(rows) for _, rows in used), initial=0)
        self._examples[name] = [
            example_of(item, rows, number, self.rows == "prompts")
            for (item, rows), number in zip(used, numbers, strict=False)
        ]
        for example in self._examples[name]:
            report.keep(example)

    def encoded(
        self, encoder: TurnEncoder, item: Item, bad_row: BadRowHook, report: SplitReport
    ) -> list[Encoded]:
        """Returns the rows of an item, or its prompt alone, as tokens.

        None of them where one does not fit or cannot be said: that goes to ``bad_row`` and is counted.
        """
        limits = self.max_tokens, self.max_response_tokens
        try:
            if self.rows == "prompts":
                return [encoder.encode_prompt(item.context, limits[0] - limits[1])]
            return [encoder.encode(row, *limits) for row in item.rows]
        except BadRow as error:
            report.rejected[error.reason] += 1
            bad_row(item.where, str(error))
            return []

    def train_dataloader(self) -> ResumableLoader | StreamingLoader:
        """Returns shuffled batches; the loader's position goes into checkpoints."""
        self.log_report()
        sources = [item.source for item in self._used["train"]]
        return ResumableLoader(
            self._examples["train"],
            self.batch_size,
            self.collate,
            self.num_workers,
            self.seed,
            self.bucket,
            None if self.weights is None else mixture(sources, self.weights),
        )

    def val_dataloader(self) -> FixedLoader:
        """Returns the validation rows in their order."""
        return self._fixed("val")

    def test_dataloader(self) -> FixedLoader:
        """Returns the test rows in their order."""
        return self._fixed("test")

    predict_dataloader = test_dataloader

    def _fixed(self, split: str) -> FixedLoader:
        self.log_report()
        return FixedLoader(
            self._examples[split], self.val_batch_size, self.collate, self.num_workers
        )

    def where(self, row: int) -> str:
        """Returns file and line of a test row, by its number."""
        return self._places[row]

    @cached_property
    def _places(self) -> list[str]:
        places = zip(self._used["test"], self._examples["test"], strict=True)
        return [item.where for item, example in places for _ in example.rows]
