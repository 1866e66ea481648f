"""What the public corpora have in common: where their files lie, typed fields, and splits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from transformers import PreTrainedTokenizerBase

from lightning_perl.data.base import ConversationDataModule
from lightning_perl.data.download import Remote, fetch_all
from lightning_perl.data.files import BadRowHook
from lightning_perl.data.folds import hold_out
from lightning_perl.data.rows import Item, Pair, Row, Splits, Turn, first_row
from lightning_perl.data.tokenization import BadRow

Part: TypeAlias = Literal["train", "val", "test"]
_PARTS: tuple[Part, ...] = ("train", "val", "test")
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Corpus:
    """Where a corpus is published and how its files lie.

    Attributes:
        home: Where it comes from and its licence, for a person who has to fetch it by hand.
        layouts: Each a tuple of (split, pattern below the data folder); the first layout of which
            any file is there is read. Files may be gzip-compressed. A corpus that its authors did
            not divide is all ``train``.
        remotes: The files in their official place; empty where they may not be downloaded.
    """

    home: str
    layouts: tuple[tuple[tuple[Part, str], ...], ...]
    remotes: tuple[Remote, ...] = ()


def matching(folder: Path, pattern: str) -> list[Path]:
    """Returns the files of a pattern in their order; a file and its gzip are one file."""
    found = {str(file).removesuffix(".gz"): file for file in folder.glob(f"{pattern}.gz")}
    found |= {str(file): file for file in folder.glob(pattern)}
    return [found[name] for name in sorted(found)]


def text_of(row: Mapping[str, Any], key: str, where: str, strip: bool = True) -> str:
    """Returns a text, without its outer white space unless ``strip`` is false.

    Raises:
        BadRow: The key is missing, or holds no text.
    """
    value = value_of(row, key, where)
    if not isinstance(value, str):
        raise BadRow(
            "wrong type",
            f"{where}: {key!r} must be a string, got {type(value).__name__} ({str(value)[:40]!r}).",
        )
    return value.strip() if strip else value


def value_of(row: Mapping[str, Any], key: str, where: str) -> object:
    """Returns a value.

    Raises:
        BadRow: The key is missing.
    """
    if key not in row:
        raise BadRow(
            "missing key",
            f"{where}: no key {key!r}; got {sorted(row)}. Is this the right file? Download it again, "
            "or set on_bad_row: reject.",
        )
    value: object = row[key]
    return value


def prompt_of(text: str, where: str) -> tuple[Turn, ...]:
    """Returns a prompt of one user turn.

    Raises:
        BadRow: The text is empty.
    """
    if not text:
        raise BadRow("empty prompt", f"{where}: empty prompt. Set on_bad_row: reject.")
    return (Turn("user", text),)


def demonstration(context: tuple[Turn, ...], answer: str, dialog: str, where: str) -> Row:
    """Returns an answer to imitate."""
    return Row(context, (Turn("agent", answer),), None, True, dialog, where)


def preference(context: tuple[Turn, ...], better: str, worse: str, dialog: str, where: str) -> Pair:
    """Returns a pair of answers; the better one is also one to imitate.

    Raises:
        BadRow: Both are the same text.
    """
    if better == worse:
        raise BadRow(
            "identical pair",
            f"{where}: identical pair: both answers are the same text, which says nothing. Set "
            "on_bad_row: reject.",
        )
    return Pair(
        demonstration(context, better, dialog, where),
        Row(context, (Turn("agent", worse),), None, False, dialog, where),
    )


def usable(
    rows: Iterable[tuple[str, _Read]],
    item: Callable[[_Read, str], Item | None],
    bad_row: BadRowHook,
) -> Iterator[Item]:
    """Yields what ``item`` makes of the rows.

    Args:
        rows: ``(where, row)``.
        item: Makes an item of a row; raises BadRow for one that cannot be used, and returns None
            for one that it counted and passed over.
        bad_row: Takes the reason and the message of each BadRow.
    """
    for where, row in rows:
        try:
            made = item(row, where)
        except BadRow as error:
            bad_row(error.reason, str(error))
            continue
        if made is not None:
            yield made


class CorpusDataModule(ConversationDataModule):
    """A public corpus: files of a known layout, fetched if need be, with their authors' splits.

    Leaves say where the files lie (:attr:`corpus_files`) and what a file's rows are
    (:meth:`items`).

    The authors' splits are kept. A split that is not there is carved out of the training rows, by
    prompt or dialog and a hash of it, so it is the same in every run. Where only a test or
    validation split is there, all three are carved out of it, and the report says so: such a test
    score is not the upstream test score. Training files that are there and hold no usable row are
    not replaced so: then no training row is left. A dialog that lies in several splits stays in the
    test split, else the validation split; its other rows are left out and counted.

    Args:
        data_dir: The folder that holds the corpus's files.
        val_fraction: Share of the training dialogs (or prompts) that become the validation split,
            where the corpus's authors made none.
        test_fraction: Share of the dialogs (or prompts) that become the test split, where the
            corpus's authors made none.
        on_bad_row: ``reject`` counts rows that cannot be used in ``report`` and goes on (most public
            corpora have some); ``raise`` stops at the first one, naming file and line. A file that
            cannot be read to its end counts as one such row.
        settings: As :class:`ConversationDataModule`.

    Raises:
        ValueError: An argument out of its range; in ``setup`` a bad row, or no training row.
        FileNotFoundError: No file is there, and none could be downloaded.
    """

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase,
        data_dir: str | Path,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        on_bad_row: Literal["reject", "raise"] = "reject",
        **settings: Any,
    ) -> None:
        super().__init__(tokenizer, on_bad_row=on_bad_row, **settings)
        for name, share in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 <= share < 0.5:
                raise ValueError(f"data.{name} must be at least 0 and below 0.5, got {share}.")
        self.data_dir = Path(data_dir)
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    @property
    @abstractmethod
    def corpus_files(self) -> Corpus:
        """Where the files are published and how they lie."""

    @abstractmethod
    def items(self, file: Path, part: Part) -> Iterator[tuple[Part, Item]]:
        """Yields the usable rows of a file, each with its split.

        Args:
            file: One of the corpus's files.
            part: The split of the file.
        """

    def prepare_data(self) -> None:
        """Downloads the corpus from its official place, unless a copy is in ``data_dir``.

        Raises:
            FileNotFoundError: No network, or a corpus that may not be downloaded.
            ValueError: What came is not the file.
        """
        corpus = self.corpus_files
        if self._found():
            return
        if not corpus.remotes:
            raise self._missing()
        fetch_all(corpus.remotes, self.data_dir)

    def _found(self) -> list[tuple[Part, Path]]:
        for layout in self.corpus_files.layouts:
            found = [
                (part, file)
                for part, pattern in layout
                for file in matching(self.data_dir, pattern)
            ]
            if found:
                return found
        return []

    def _missing(self) -> FileNotFoundError:
        corpus = self.corpus_files
        wanted = " or ".join(
            ", ".join(pattern for _, pattern in layout) for layout in corpus.layouts
        )
        return FileNotFoundError(
            f"No {wanted} (plain or .gz) in {self.data_dir} (data.data_dir, looked from "
            f"{Path.cwd()}). {corpus.home}"
        )

    def read(self) -> Splits:
        """Returns the rows in their authors' splits, and splits of our own where there are none."""
        files = self._found()
        if not files:
            raise self._missing()
        found: dict[Part, list[Item]] = {part: [] for part in _PARTS}
        empty = {part for part, _ in files}
        for part, file in files:
            for own, item in self.items(file, part):
                found[own].append(item)
                empty.discard(part)
        for part, name in (("val", "validation"), ("test", "test")):
            if part in empty:
                self.report.notes[
                    f"upstream {name} files without a usable row: not the upstream {name} score"
                ] = sum(own == part for own, _ in files)
        # Never the test rows in place of training rows that were there and could not be read.
        return self._divide(found if "train" in empty else self._with_training_rows(found))

    def _with_training_rows(self, found: dict[Part, list[Item]]) -> dict[Part, list[Item]]:
        if found["train"]:
            return found
        source: Part = "val" if found["val"] else "test"
        name = {"val": "validation", "test": "test"}[source]
        if found[source]:
            self.report.notes[
                f"rows of the upstream {name} split, divided here: not the upstream {name} score"
            ] = len(found[source])
        return {**found, "train": found[source], source: []}

    def _divide(self, found: dict[Part, list[Item]]) -> Splits:
        # The last one counts: what a test split holds is never trained on.
        part_of = {first_row(item).dialog: part for part in _PARTS for item in found[part]}
        apart = []
        for part in _PARTS:
            for item in found[part]:
                if part_of[first_row(item).dialog] == part:
                    apart.append(item)
                else:
                    self.report.left_out["of a dialog that a later split has"] += 1
        splits: dict[Part, list[Item]] = {part: [] for part in _PARTS}
        for item in self.distinct(apart):
            splits[part_of[first_row(item).dialog]].append(item)
        # The test split first, so that it does not depend on val_fraction.
        shares: tuple[tuple[Part, float], ...] = (
            ("test", self.test_fraction),
            ("val", self.val_fraction),
        )
        for part, share in shares:
            if not splits[part]:
                held = hold_out((first_row(item).dialog for item in splits["train"]), share)
                splits[part] = [i for i in splits["train"] if first_row(i).dialog in held]
                splits["train"] = [i for i in splits["train"] if first_row(i).dialog not in held]
        return Splits(**splits)
