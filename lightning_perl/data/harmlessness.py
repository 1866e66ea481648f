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
from typing import Any

from lightning_perl.data.corpus import CorpusDataModule, text_of
from lightning_perl.data.messages import transcript
from lightning_perl.data.rows import BadRow


def dialogs(chosen: str, rejected: str) -> dict[str, Any]:
    """Returns two transcripts in our columns; their group is the first turn."""
    better, worse = transcript(chosen), transcript(rejected)
    if better is None or worse is None:
        raise BadRow(
            f"no transcript: a transcript begins with Human:, got {(rejected if better else chosen)[:40]!r}. "
            "Right file?"
        )
    group = json.dumps(["user", better[0]["content"]], ensure_ascii=False)
    return {"chosen": better, "rejected": worse, "group": group}


class HarmlessnessDataModule(CorpusDataModule):
    """Preference pairs of harmless-base.

    Rows that begin with the same human turn are of one dialog and go to one split.

    Args:
        data_dir: The folder that holds ``hh-harmless-base/`` or upstream's ``harmless-base/``, each
            with ``train.jsonl`` and ``test.jsonl``, plain or ``.gz``. Where it holds neither,
            ``fit`` downloads the corpus (14 MB) into ``harmless-base/``.
    """

    corpus = "harmless-base"

    def own(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the two dialogs of a row."""
        return dialogs(text_of(row, "chosen"), text_of(row, "rejected"))
