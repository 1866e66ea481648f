"""Anthropic's HH-RLHF, harmless-base: which of two replies does less harm, judged by people.

Source: https://huggingface.co/datasets/Anthropic/hh-rlhf, MIT, Copyright (c) 2022 Anthropic; the
paper is arXiv 2204.05862. The texts are offensive and upsetting on purpose.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_perl.data.corpus import Corpus, CorpusDataModule, Part, text_of, usable
from lightning_perl.data.download import Remote
from lightning_perl.data.files import jsonl_rows
from lightning_perl.data.rows import Item
from lightning_perl.data.transcripts import HUB, transcript_pair

_CORPUS = Corpus(
    home="Download harmless-base/train.jsonl.gz and harmless-base/test.jsonl.gz of "
    "https://huggingface.co/datasets/Anthropic/hh-rlhf (MIT) and put the folder there.",
    layouts=(
        (("train", "hh-harmless-base/train.jsonl"), ("test", "hh-harmless-base/test.jsonl")),
        (("train", "harmless-base/train.jsonl"), ("test", "harmless-base/test.jsonl")),
    ),
    remotes=(
        Remote(
            "harmless-base/train.jsonl.gz",
            f"{HUB}/harmless-base/train.jsonl.gz",
            "bf3e1ecd3db61bf21d190f69351d26670c67aababa0fd282fa008c17a7202217",
        ),
        Remote(
            "harmless-base/test.jsonl.gz",
            f"{HUB}/harmless-base/test.jsonl.gz",
            "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
        ),
    ),
)


class HarmlessnessDataModule(CorpusDataModule):
    """Preference pairs of harmless-base.

    The prompt is what both transcripts begin with; see :mod:`lightning_perl.data.transcripts` for
    the pairs that are bad rows. A reply that is the beginning of the other one is used. Rows of one
    dialog begin with the same human turn and are never divided. Where only the test file is there,
    all splits are carved out of it, and the report says so.

    Args:
        data_dir: The folder that holds ``hh-harmless-base/`` or upstream's ``harmless-base/``, each
            with ``train.jsonl`` and ``test.jsonl``, plain or ``.gz``. Where it holds neither,
            ``fit`` downloads the corpus (14 MB) into ``harmless-base/``.
        settings: As :class:`~lightning_perl.data.corpus.CorpusDataModule`.

    Raises:
        ValueError: An argument out of its range; in ``setup`` a bad row, or no training row.
        FileNotFoundError: No local copy and no network, with what to download from where.
    """

    @property
    def corpus_files(self) -> Corpus:
        """Where harmless-base lies."""
        return _CORPUS

    def items(self, file: Path, part: Part) -> Iterator[tuple[Part, Item]]:
        """Yields the pairs of a file."""
        for item in usable(jsonl_rows(file, self.bad_row), _pair, self.bad_row):
            yield part, item


def _pair(row: dict[str, Any], where: str) -> Item:
    return transcript_pair(
        text_of(row, "chosen", where, strip=False),
        text_of(row, "rejected", where, strip=False),
        where,
    )
