r"""Anthropic's HH-RLHF, whose corpora hold the less harmful or the more helpful of two replies; Stanford's SHP.

Sources: https://huggingface.co/datasets/Anthropic/hh-rlhf, MIT, Copyright (c) 2022 Anthropic; arXiv 2204.05862.
The texts of harmless-base are offensive and upsetting on purpose. https://huggingface.co/datasets/stanfordnlp/SHP,
MIT for the collection, the posts under Reddit's terms, Ethayarajh et al. 2022.

A transcript is ``\n\nHuman: ...\n\nAssistant: ...``. A tag counts after a blank line only; ``Human:`` elsewhere
is text. The prompt of a pair is the longest run of turns that both transcripts begin with, and has to be all of
both but the last reply. Where a reply holds a tag of its own, one transcript has a turn more: what was compared
is then not two replies to one prompt, and the pair is a bad row.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lightning_perl.arguments import AtLeastOne
from lightning_perl.data.corpus import CorpusDataModule, own_row, text_of
from lightning_perl.data.messages import transcript, wrong_type
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


class HelpfulnessDataModule(CorpusDataModule):
    """Preference pairs of helpful-base, or of SHP.

    ``hh``: transcripts as in :class:`HarmlessnessDataModule`; a row is ``{"chosen", "rejected"}`` (upstream) or
    ``{"text": [a, b], "score": [1.0, 0.0]}``, where the higher score was chosen.

    ``shp``: a row is a Reddit post (``history``) and two comments, of which readers voted one higher although it
    came later; ``labels`` is 1 where ``human_ref_A`` is the better one. Rows of one post go to one split. The
    preference is that of many voters, not of one rater.

    Args:
        data_dir: ``hh``: the folder that holds ``hh-helpful-base/`` or upstream's ``helpful-base/``, each with
            ``train.jsonl`` and ``test.jsonl``. ``shp``: the folder that holds ``shp/``, with a folder for each
            subreddit and in it ``train.json``, ``validation.json`` and ``test.json``. Files may be ``.gz``.
            Without them, ``fit`` downloads the corpus (17 MB, or all 18 subreddits of SHP).
        corpus: ``hh`` or ``shp``.
        min_score_ratio: Leave out pairs of ``shp`` whose votes have a lower ratio. 1 keeps all, as
            PERL did; the dataset's card recommends 2 for a cleaner signal.
    """

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase,
        data_dir: str | Path,
        corpus: Literal["hh", "shp"] = "hh",
        min_score_ratio: AtLeastOne = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(tokenizer, data_dir=data_dir, **settings)
        self.corpus = corpus
        self.min_score_ratio = min_score_ratio

    def own(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """Returns the pair of a row; None below ``min_score_ratio``."""
        if self.corpus == "shp":
            ratio = row["score_ratio"]
            if isinstance(ratio, bool) or not isinstance(ratio, int | float):
                raise wrong_type("score_ratio", "a number", ratio)
            if ratio < self.min_score_ratio:
                self.report.left_out["below data.min_score_ratio"] += 1
                return None
            return _voted(row)
        if "text" in row:
            return dialogs(*_by_score(row))
        return dialogs(text_of(row, "chosen"), text_of(row, "rejected"))


def _by_score(row: dict[str, Any]) -> tuple[str, str]:
    match row:
        case {
            "text": [str(first), str(second)],
            "score": [int() | float() as first_score, int() | float() as second_score],
        } if first_score != second_score:
            return (first, second) if first_score > second_score else (second, first)
    raise wrong_type("'text' and 'score'", "two transcripts and two different numbers", row)


def _voted(row: dict[str, Any]) -> dict[str, Any]:
    label = row["labels"]
    if label not in (0, 1):
        raise wrong_type("labels", "0 or 1", label)
    better, worse = (f"human_ref_{side}" for side in ("AB" if label else "BA"))
    sides = {"chosen": text_of(row, better), "rejected": text_of(row, worse)}
    return own_row(text_of(row, "post_id"), text_of(row, "history"), **sides)
