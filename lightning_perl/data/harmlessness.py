r"""Anthropic's HH-RLHF: which of two replies does less harm, and how both of its corpora write their pairs.

Source: https://huggingface.co/datasets/Anthropic/hh-rlhf, MIT, Copyright (c) 2022 Anthropic; arXiv 2204.05862. The
texts of harmless-base are offensive and upsetting on purpose.

A transcript is ``\n\nHuman: ...\n\nAssistant: ...``. A tag counts after a blank line only; ``Human:`` elsewhere
is text. The prompt of a pair is the longest run of turns that both transcripts begin with, and has to be all of
both but the last reply. Where a reply holds a tag of its own, one transcript has a turn more: what was compared
is then not two replies to one prompt, and the pair is a bad row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lightning_perl.data.corpus import Corpus, CorpusDataModule, Part, preference, text_of
from lightning_perl.data.download import Remote
from lightning_perl.data.rows import BadRow, Item, Pair, Turn

# A revision, so that the files behind the checksums stay.
_HUB = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
_TAG = re.compile(r"\n\n(Human|Assistant):")
_SPLITS: tuple[Part, ...] = ("train", "test")


def hh_corpus(name: str, *sums: str) -> Corpus:
    """Returns a part of HH-RLHF, such as ``harmless-base``; ``sums`` are its files' SHA-256."""
    files = [f"{name}/{split}.jsonl.gz" for split in _SPLITS]
    return Corpus(
        home=f"Download {' and '.join(files)} of https://huggingface.co/datasets/Anthropic/hh-rlhf (MIT) and put "
        "the folder there.",
        layouts=tuple(
            tuple((split, f"{folder}/{split}.jsonl") for split in _SPLITS)
            for folder in (f"hh-{name}", name)
        ),
        remotes=tuple(
            Remote(file, f"{_HUB}/{file}", sha256) for file, sha256 in zip(files, sums, strict=True)
        ),
    )


def chosen_and_rejected(row: Mapping[str, Any], where: str) -> Pair:
    """Returns the pair of a row as Anthropic publishes it."""
    chosen, rejected = (text_of(row, key, where, strip=False) for key in ("chosen", "rejected"))
    return transcript_pair(chosen, rejected, where)


def parse_transcript(text: str, where: str) -> tuple[Turn, ...]:
    """Returns the turns of a transcript, without outer white space.

    Raises:
        BadRow: Text before the first tag, or no tag at all.
    """
    before, *parts = _TAG.split(text)
    if before.strip() or not parts:
        raise BadRow(
            "no transcript",
            f"{where}: a transcript begins with a blank line and Human:, got {text[:40]!r}. Is it the right file?",
        )
    return tuple(
        Turn("user" if tag == "Human" else "agent", words.strip())
        for tag, words in zip(parts[::2], parts[1::2], strict=True)
    )


def transcript_pair(chosen: str, rejected: str, where: str) -> Pair:
    """Returns the pair of two transcripts; its dialog is the first turn.

    An empty reply is left for the encoder to reject, which needs no answers for prompts alone.

    Raises:
        BadRow: No transcript, identical ones, or ones that differ before their last replies.
    """
    better, worse = (parse_transcript(text, where) for text in (chosen, rejected))
    if better != worse and better[:-1] != worse[:-1]:
        raise BadRow(
            "contexts differ before the last reply",
            f"{where}: the transcripts differ before their last replies ({len(better)} and {len(worse)} turns), "
            "so they are no answers to one prompt. Set on_bad_row: reject.",
        )
    context = better[:-1]
    if not context or (better[-1].role, worse[-1].role) != ("agent", "agent"):
        raise BadRow(
            "no answer",
            f"{where}: a transcript that does not end with the assistant's reply to a human turn.",
        )
    dialog = json.dumps(context[0], ensure_ascii=False)
    return preference(context, better[-1].text, worse[-1].text, dialog, where)


_CORPUS = hh_corpus(
    "harmless-base",
    "bf3e1ecd3db61bf21d190f69351d26670c67aababa0fd282fa008c17a7202217",
    "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
)


class HarmlessnessDataModule(CorpusDataModule):
    """Preference pairs of harmless-base.

    Rows that begin with the same human turn are of one dialog and go to one split.

    Args:
        data_dir: The folder that holds ``hh-harmless-base/`` or upstream's ``harmless-base/``, each
            with ``train.jsonl`` and ``test.jsonl``, plain or ``.gz``. Where it holds neither,
            ``fit`` downloads the corpus (14 MB) into ``harmless-base/``.
        settings: As :class:`~lightning_perl.data.corpus.CorpusDataModule`.
    """

    @property
    def corpus_files(self) -> Corpus:
        """Where harmless-base lies."""
        return _CORPUS

    def item(self, row: dict[str, Any], where: str, part: Part) -> tuple[Part, Item]:
        """Returns the pair of a row."""
        return part, chosen_and_rejected(row, where)
