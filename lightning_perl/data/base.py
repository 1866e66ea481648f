"""The skeleton of every datamodule: leaves read a corpus, this encodes, counts and batches it."""

from __future__ import annotations

import json
import re
import statistics
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_perl.data.collate import (
    PromptExample,
    RatedExample,
    RatedRow,
    collate_prompts,
    collate_rated,
)
from lightning_perl.data.loaders import BucketBatches, FixedLoader, ResumableLoader
from lightning_perl.data.rows import Item, Pair, Row, Splits
from lightning_perl.data.tokenization import BadRow, TurnEncoder
from lightning_perl.packaged import unpackaged


def parse_json(text: str) -> object:
    """Returns the value of a JSON text.

    Raises:
        json.JSONDecodeError: Broken JSON, and what Python alone refuses, each in other words:
            nesting deeper than its stack, integers of more digits than it converts.
    """
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, _deepest(text)) from None
    except ValueError:
        longest = max(re.finditer(r"\d+", text), key=lambda digits: len(digits[0]))
        raise json.JSONDecodeError("too long an integer", text, longest.start()) from None
    return value


def _deepest(text: str) -> int:
    """Returns the position of the innermost bracket of a JSON text."""
    depth = deepest = position = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[][{}]', text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth > deepest:
            deepest, position = depth, token.start()
    return position


@dataclass
class SplitReport:
    """What became of one split.

    Attributes:
        rows: Rows read; a pair is one.
        kept: Rows the loader yields; for prompts the distinct ones.
        up: Kept rows with a thumb up.
        down: Kept rows with a thumb down.
        unlabelled: Kept rows without a thumb, pairs included.
        cut_turns: Turns that did not fit the window.
        tokens: Tokens of each kept row (of the longer side of a pair).
    """

    rows: int = 0
    kept: int = 0
    up: int = 0
    down: int = 0
    unlabelled: int = 0
    cut_turns: int = 0
    tokens: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        """Returns one line."""
        if not self.tokens:
            return f"{self.rows} rows, 0 kept"
        ordered = sorted(self.tokens)
        high = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
        return (
            f"{self.rows} rows, {self.kept} kept; thumbs up {self.up}, down {self.down}, "
            f"without {self.unlabelled}; tokens median {statistics.median(ordered):g}, 95% {high}, "
            f"max {ordered[-1]}; {self.cut_turns} turns cut"
        )


@dataclass
class DataReport:
    """What was read, kept, rejected and cut.

    Attributes:
        splits: One report per split: train, val, test.
        rejected: Rejected rows by reason.
        notes: What else was counted while reading, for example duplicates.
    """

    splits: dict[str, SplitReport] = field(default_factory=dict)
    rejected: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """Returns a line per split, one for the rejections and one for the notes."""
        lines = [f"{name}: {report}" for name, report in self.splits.items()]
        for title, counts in (("rejected", self.rejected), ("noted", self.notes)):
            if counts:
                items = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
                lines.append(f"{title}: {items}")
        return "\n".join(lines)


class ConversationDataModule(LightningDataModule, ABC):
    """Encodes the conversations that a leaf reads, and yields rated rows or prompts.

    Leaves fill one hole, :meth:`read`. After :meth:`setup`, ``report`` says what was read, rejected
    and cut, and ``splits`` holds the rows themselves.

    Args:
        tokenizer: A folder or a name that transformers loads; from Python also a tokenizer.
        rows: What the loaders yield: ``rated`` (:class:`~lightning_perl.batches.RatedBatch`: SFT,
            Hydra-SFT, reward models) or ``prompts``
            (:class:`~lightning_perl.batches.PromptBatch`: the distinct contexts, for sampling).
        batch_size: Rows of a training batch; a pair counts as one.
        val_batch_size: Rows of a validation or test batch; None takes ``batch_size``.
        max_tokens: Tokens of a row, the context window. Longer contexts lose whole turns on the
            left.
        max_response_tokens: Tokens of an answer, EOS included. Prompts may take the rest,
            ``max_tokens - max_response_tokens``.
        bucket: Batch rows of like length. False shuffles only.
        seed: Seed of the order of rows. Splits do not depend on it.
        num_workers: Processes that collate; 0 is enough for text.
        on_bad_row: ``raise`` stops at the first row that cannot be used, ``reject`` counts it in
            ``report`` and goes on.

    Raises:
        ValueError: An argument out of its range.
    """

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase,
        rows: Literal["rated", "prompts"] = "rated",
        batch_size: int = 8,
        val_batch_size: int | None = None,
        max_tokens: int = 512,
        max_response_tokens: int = 128,
        bucket: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        on_bad_row: Literal["reject", "raise"] = "raise",
    ) -> None:
        super().__init__()
        if rows not in ("rated", "prompts"):
            raise ValueError(f"data.rows must be 'rated' or 'prompts', got {rows!r}.")
        if on_bad_row not in ("reject", "raise"):
            raise ValueError(f"data.on_bad_row must be 'reject' or 'raise', got {on_bad_row!r}.")
        for name, size in (("batch_size", batch_size), ("val_batch_size", val_batch_size)):
            if size is not None and size < 1:
                raise ValueError(f"data.{name} must be at least 1, got {size}.")
        if not 1 <= max_response_tokens < max_tokens:
            raise ValueError(
                "data.max_response_tokens must be at least 1 and leave room for a prompt below "
                f"data.max_tokens = {max_tokens}, got {max_response_tokens}."
            )
        self.tokenizer_source = tokenizer
        self.rows = rows
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.max_tokens = max_tokens
        self.max_response_tokens = max_response_tokens
        self.bucket = bucket
        self.seed = seed
        self.num_workers = num_workers
        self.on_bad_row = on_bad_row
        self.chat_template = False
        self.report = DataReport()
        self.splits: Splits | None = None
        self._examples: dict[str, list[Any]] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @abstractmethod
    def read(self) -> Splits:
        """Returns the rows of the corpus, divided by dialog.

        Rows that cannot be used go through :meth:`bad_row`; what is only worth knowing is counted
        in ``self.report.notes``.
        """

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use.

        Raises:
            ValueError: transformers cannot load it.
        """
        if self._tokenizer is None:
            source = self.tokenizer_source
            if isinstance(source, PreTrainedTokenizerBase):
                self._tokenizer = source
            else:
                try:
                    name = unpackaged(str(source))
                    if name.startswith("~"):
                        name = str(Path(name).expanduser())
                    self._tokenizer = AutoTokenizer.from_pretrained(name)
                # A RuntimeError: the ~ of a user that the machine does not know.
                except (OSError, ValueError, RuntimeError) as error:
                    raise ValueError(
                        f"data.tokenizer: no tokenizer could be loaded from {str(source)!r}. Give "
                        "the trunk's folder (it holds tokenizer.json) or a hub name."
                    ) from error
        return self._tokenizer

    def bad_row(self, reason: str, message: str) -> None:
        """Counts a rejected row, or stops, as ``on_bad_row`` says.

        Args:
            reason: A few words to count by.
            message: What, where, got and fix.

        Raises:
            ValueError: ``on_bad_row`` is ``raise``.
        """
        if self.on_bad_row == "raise":
            raise BadRow(reason, message)
        self.report.rejected[reason] += 1

    def setup(self, stage: str | None = None) -> None:
        """Reads, encodes and reports once, whatever the stage.

        Raises:
            ValueError: A bad row while ``on_bad_row`` is ``raise``, or no training row is left.
        """
        if self.splits is not None:
            return
        encoder = TurnEncoder(self.tokenizer, self.chat_template)
        splits = self.read()
        for name, items in splits._asdict().items():
            report = self.report.splits[name] = SplitReport(rows=len(items))
            encode = self._encode_prompts if self.rows == "prompts" else self._encode_rated
            examples = encode(encoder, items, report)
            report.kept = len(examples)
            report.tokens = [example.tokens for example in examples]
            self._examples[name] = list(examples)
        self.splits = splits
        if splits.val and not self._examples["val"]:
            self.report.notes["validation rows, of which none could be used"] = len(splits.val)
        rank_zero_info(f"{type(self).__name__}\n{self.report}")
        if not self._examples["train"]:
            raise ValueError(
                f"{type(self).__name__}: no training row is left. What was read:\n{self.report}"
            )

    def _encode_rated(
        self, encoder: TurnEncoder, items: Sequence[Item], report: SplitReport
    ) -> list[RatedExample]:
        examples = []
        numbers = iter(range(2 * len(items)))
        for item in items:
            sides = (item.chosen, item.rejected) if isinstance(item, Pair) else (item,)
            try:
                encoded = [
                    encoder.encode(side, self.max_tokens, self.max_response_tokens)
                    for side in sides
                ]
            except BadRow as error:
                self.bad_row(error.reason, str(error))
                continue
            examples.append(
                RatedExample(
                    tuple(
                        RatedRow(row.ids, row.response_mask, side.imitate, side.label, number)
                        for row, side, number in zip(encoded, sides, numbers, strict=False)
                    )
                )
            )
            report.cut_turns += sum(row.cut_turns for row in encoded)
            labels = [side.label for side in sides]
            report.up += labels.count(1.0)
            report.down += labels.count(0.0)
            report.unlabelled += None in labels
        return examples

    def _encode_prompts(
        self, encoder: TurnEncoder, items: Sequence[Item], report: SplitReport
    ) -> list[PromptExample]:
        limit = self.max_tokens - self.max_response_tokens
        examples: list[PromptExample] = []
        seen: set[tuple[int, ...]] = set()
        for item in items:
            row: Row = item.chosen if isinstance(item, Pair) else item
            try:
                prompt = encoder.encode_prompt(row.context, limit, row.where)
            except BadRow as error:
                self.bad_row(error.reason, str(error))
                continue
            key = tuple(prompt.ids)
            if key in seen:
                continue
            seen.add(key)
            examples.append(PromptExample(prompt.ids, len(examples)))
            report.cut_turns += prompt.cut_turns
        report.unlabelled = len(examples)
        return examples

    @property
    def _collate(self) -> Callable[[list[Any]], Any]:
        return collate_prompts if self.rows == "prompts" else collate_rated

    def train_dataloader(self) -> ResumableLoader:
        """Returns shuffled batches; the loader's position goes into checkpoints."""
        examples = self._examples["train"]
        lengths = [example.tokens for example in examples]
        sampler = BucketBatches(lengths, self.batch_size, self.seed, self.bucket)
        return ResumableLoader(examples, sampler, self._collate, self.num_workers)

    def val_dataloader(self) -> FixedLoader:
        """Returns the validation rows in their order."""
        return self._fixed("val")

    def test_dataloader(self) -> FixedLoader:
        """Returns the test rows in their order."""
        return self._fixed("test")

    def predict_dataloader(self) -> FixedLoader:
        """Returns the test rows in their order."""
        return self._fixed("test")

    def _fixed(self, split: str) -> FixedLoader:
        return FixedLoader(
            self._examples[split], self.val_batch_size, self._collate, self.num_workers
        )
