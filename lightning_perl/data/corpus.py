"""What the public corpora have in common: where their files are published and lie, typed fields, and splits."""

from __future__ import annotations

import http.client
import socket
import tempfile
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lightning_perl.arguments import FractionBelowHalf
from lightning_perl.data.base import ConversationDataModule
from lightning_perl.data.messages import reading, wrong_type
from lightning_perl.data.own_rows import RowReader
from lightning_perl.data.reading import csv_rows, is_html, jsonl_rows
from lightning_perl.data.rows import Item, Pair, Splits, held_out

Part: TypeAlias = Literal["train", "val", "test"]
_SECONDS = 30.0
_PARTS: tuple[Part, ...] = ("train", "val", "test")
_NAMES = {"val": "validation", "test": "test"}


@dataclass(frozen=True)
class Remote:
    """A file in its official place.

    Attributes:
        path: Its place below the data folder, with forward slashes.
        url: Where it is published.
        sha256: Its checksum in hexadecimal, or how that begins; None where the authors may change the file.
    """

    path: str
    url: str
    sha256: str | None = None


@dataclass(frozen=True)
class Corpus:
    """A corpus of ``corpora.yaml``, which says what these are; ``remotes`` are empty without an official place."""

    home: str
    layouts: tuple[dict[Part, str], ...]
    remotes: tuple[Remote, ...] = ()

    def files(self, folder: Path) -> list[tuple[Part, Path]]:
        """Returns the files of the first layout that has any below the data folder, and their splits."""
        for layout in self.layouts:
            patterns = [(part, pattern) for part in layout for pattern in layout[part].split()]
            files = [(part, file) for part, name in patterns for file in matching(folder, name)]
            if files:
                return files
        return []


@cache
def corpora() -> dict[str, Corpus]:
    """Returns what ``corpora.yaml`` says of each corpus."""
    table = yaml.safe_load(Path(__file__).with_name("corpora.yaml").read_text(encoding="utf-8"))
    read = {}
    for name, entry in table.items():
        folders = [f"{folder}/" for folder in entry.get("folders", ())] or [""]
        named = [
            f"{below}{file}".split() for below, file in product(folders, entry.get("files", ()))
        ]
        remotes = tuple(
            Remote(f"{entry['folder']}/{file}", f"{entry['url']}/{file}", *sums)
            for file, *sums in named
        )
        read[name] = Corpus(entry["home"], tuple(entry["layouts"]), remotes)
    return read


def matching(folder: Path, pattern: str) -> list[Path]:
    """Returns the files of a pattern in their order; a file and its gzip are one file."""
    files = {str(file).removesuffix(".gz"): file for file in folder.glob(f"{pattern}.gz")}
    files |= {str(file): file for file in folder.glob(pattern)}
    return [files[name] for name in sorted(files)]


def fetch_all(remotes: Sequence[Remote], folder: Path) -> None:
    """Downloads what is not below ``folder``, plain or gzip-compressed.

    Files appear under their names when all of them are whole and have the right checksums: a download that stopped
    leaves no half corpus, which a later run would take for the whole.

    Raises:
        FileNotFoundError: One could not be downloaded; says what to put where by hand.
        ValueError: What came is a web page or has another checksum. It is not kept.
    """
    missing = [
        remote for remote in remotes if not matching(folder, remote.path.removesuffix(".gz"))
    ]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
        for number, remote in enumerate(missing):
            rank_zero_info(f"Downloading {remote.url} to {folder / remote.path}")
            _download(remote, Path(scratch, str(number)), folder / remote.path)
        for number, remote in enumerate(missing):
            file = folder / remote.path
            file.parent.mkdir(parents=True, exist_ok=True)
            Path(scratch, str(number)).replace(file)


def _download(remote: Remote, target: Path, file: Path) -> None:
    patience = socket.getdefaulttimeout()
    # torch.hub has no timeout of its own: a server that falls silent would be waited for without end.
    socket.setdefaulttimeout(_SECONDS)
    try:
        torch.hub.download_url_to_file(remote.url, str(target), remote.sha256, progress=False)
    except RuntimeError as error:
        raise ValueError(
            f"{remote.url}: {error}; nothing was kept. Try again; if it stays so, the authors changed the file: "
            f"look at what changed, then put it at {file} by hand."
        ) from error
    except (http.client.HTTPException, OSError) as error:
        raise FileNotFoundError(
            f"No {file}, and it could not be downloaded ({error}). Download {remote.url} on a machine with a "
            f"network and put it at {file}, or point data.data_dir at a folder that has it."
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    with target.open("rb") as content:
        if is_html(content.read(512)):
            raise ValueError(
                f"{remote.url} sent a web page in place of {file.name}; nothing was kept. Open the address in a "
                f"browser, download the file and put it at {file}."
            )


def text_of(row: Mapping[str, Any], key: str) -> str:
    """Returns a text without its outer white space; raises BadRow for anything else."""
    value = row[key]
    if not isinstance(value, str):
        raise wrong_type(key, "a string", value)
    return value.strip()


def own_row(group: str, prompt: str, **answers: str) -> dict[str, Any]:
    """Returns a prompt and its answers (``response``, or ``chosen`` and ``rejected``) in our columns.

    They become messages: a post that begins with ``User:`` is no dialog. ``group`` names the rows that are never
    divided between splits.
    """
    said = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    return {"prompt": [{"role": "user", "content": prompt}], "group": group, **said}


class CorpusDataModule(ConversationDataModule):
    """A public corpus: files of a known layout, fetched if need be, with their authors' splits.

    Leaves say which ``corpus`` of ``corpora.yaml`` they read, and what a row is (:meth:`own`).

    The authors' splits are kept. A split that is not there is carved out of the training rows, by a hash of the
    prompt or dialog, so it is the same in every run. Where only a test or validation split is there, all three are
    carved out of it, and the report says so: such a test score is not the upstream test score. Training files that
    are there and hold no usable row are not replaced so: then no training row is left. A dialog that lies in
    several splits stays in the test split, else the validation split; its other rows are left out and counted.

    Args:
        data_dir: The folder that holds the corpus's files.
        val_fraction: Share of the training dialogs (or prompts) that become the validation split,
            where the corpus's authors made none.
        test_fraction: Share of the dialogs (or prompts) that become the test split, where the
            corpus's authors made none.
        on_bad_row: ``reject`` counts rows that cannot be used in ``report`` and goes on (most public
            corpora have some); ``raise`` stops at the first one, naming file and line. A file that
            cannot be read to its end counts as one such row.

    Raises:
        ValueError: An argument out of its range; in ``setup`` a bad row, or no training row.
        FileNotFoundError: No file is there, and none could be downloaded.
    """

    corpus: str

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase,
        data_dir: str | Path,
        val_fraction: FractionBelowHalf = 0.1,
        test_fraction: FractionBelowHalf = 0.1,
        on_bad_row: Literal["reject", "raise"] = "reject",
        **settings: Any,
    ) -> None:
        super().__init__(tokenizer, on_bad_row=on_bad_row, **settings)
        self.data_dir = Path(data_dir)
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self._reader = RowReader({}, report=self.report)

    @property
    def corpus_files(self) -> Corpus:
        """Where the files are published and how they lie."""
        return corpora()[self.corpus]

    @abstractmethod
    def own(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """Returns an object of a JSONL file, or a line of a CSV table, in our columns, with its ``group``.

        ``part`` among them is the row's split, where its file does not say that. None is a row that was counted
        and passed over.

        Raises:
            BadRow: The row cannot be used.
        """

    def prepare_data(self) -> None:
        """Downloads the corpus from its official place, unless a copy is in ``data_dir``."""
        corpus = self.corpus_files
        if corpus.files(self.data_dir):
            return
        if not corpus.remotes:
            raise self._missing()
        fetch_all(corpus.remotes, self.data_dir)

    def _missing(self) -> FileNotFoundError:
        corpus = self.corpus_files
        wanted = " or ".join(", ".join(layout.values()) for layout in corpus.layouts)
        return FileNotFoundError(
            f"No {wanted} (plain or .gz) in {self.data_dir} (data.data_dir, looked from {Path.cwd()}). "
            f"{corpus.home}"
        )

    def read(self) -> Splits:
        """Returns the rows in their authors' splits, and splits of our own where there are none."""
        files = self.corpus_files.files(self.data_dir)
        if not files:
            raise self._missing()
        upstream: dict[Part, list[Item]] = {part: [] for part in _PARTS}
        empty = {part for part, _ in files}
        for part, file in files:
            rows = (csv_rows if ".csv" in file.suffixes[-2:] else jsonl_rows)(file, self.bad_row)
            for own, item in self.usable(rows, partial(self._item, part=part)):
                upstream[own].append(item)
                empty.discard(part)
        for part in empty - {"train"}:
            name = _NAMES[part]
            note = f"upstream {name} files without a usable row: not the upstream {name} score"
            self.report.notes[note] = sum(own == part for own, _ in files)
        # Never the test rows in place of training rows that were there and could not be read.
        if not upstream["train"] and "train" not in empty:
            source: Part = "val" if upstream["val"] else "test"
            name = _NAMES[source]
            if upstream[source]:
                note = f"rows of the upstream {name} split, divided here: not the upstream {name} score"
                self.report.notes[note] = len(upstream[source])
            upstream["train"], upstream[source] = upstream[source], []
        return self._divide(upstream)

    def _item(self, row: dict[str, Any], where: str, part: Part) -> Iterator[tuple[Part, Item]]:
        with reading(type(self).__name__):
            own = self.own(row)
        if own is None:
            return
        # With their answers, whatever `rows` is: both kinds of batches have the same splits.
        for item in self._reader.read(own, where):
            rows = [replace(row, dialog=own["group"]) for row in item.rows]
            yield own.get("part", part), Pair(rows[0], rows[1]) if rows[1:] else rows[0]

    def _divide(self, upstream: dict[Part, list[Item]]) -> Splits:
        # The last one counts: what a test split holds is never trained on.
        part_of = {item.dialog: part for part in _PARTS for item in upstream[part]}
        apart = []
        for part in _PARTS:
            for item in upstream[part]:
                if part_of[item.dialog] == part:
                    apart.append(item)
                else:
                    self.report.left_out["of a dialog that a later split has"] += 1
        splits: dict[Part, list[Item]] = defaultdict(list)
        for item in self.distinct(apart):
            splits[part_of[item.dialog]].append(item)
        # The test split first, so that it does not depend on val_fraction.
        if not splits["test"]:
            splits["train"], splits["test"] = held_out(splits["train"], self.test_fraction)
        if not splits["val"]:
            splits["train"], splits["val"] = held_out(splits["train"], self.val_fraction)
        return Splits(splits["train"], splits["val"], splits["test"])
