"""Helpful replies: Anthropic's HH-RLHF helpful-base, and Stanford's SHP from Reddit.

Sources: :mod:`lightning_perl.data.harmlessness`; https://huggingface.co/datasets/stanfordnlp/SHP, MIT for the
collection, the posts under Reddit's terms, Ethayarajh et al. 2022.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lightning_perl.arguments import AtLeastOne
from lightning_perl.data.corpus import CorpusDataModule, own_row, text_of
from lightning_perl.data.harmlessness import dialogs
from lightning_perl.data.messages import wrong_type


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
