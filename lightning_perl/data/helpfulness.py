"""Helpful replies: Anthropic's HH-RLHF helpful-base, and Stanford's SHP from Reddit.

Sources: :mod:`lightning_perl.data.harmlessness`; https://huggingface.co/datasets/stanfordnlp/SHP, MIT for the
collection, the posts under Reddit's terms, Ethayarajh et al. 2022.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lightning_perl.arguments import AtLeastOne
from lightning_perl.data.corpus import (
    Corpus,
    CorpusDataModule,
    Part,
    preference,
    prompt_of,
    text_of,
    value_of,
    wrong_type,
)
from lightning_perl.data.download import Remote
from lightning_perl.data.harmlessness import chosen_and_rejected, hh_corpus, transcript_pair
from lightning_perl.data.rows import Item, Pair

_SUBREDDITS = (
    "askacademia askanthropology askbaking askcarguys askculinary askdocs askengineers askhistorians askhr "
    "askphilosophy askphysics askscience asksciencefiction asksocialscience askvet changemyview "
    "explainlikeimfive legaladvice"
)
_SHP_HUB = "https://huggingface.co/datasets/stanfordnlp/SHP/resolve/main"
_SHP_SPLITS: tuple[tuple[Part, str], ...] = (
    ("train", "train.json"),
    ("val", "validation.json"),
    ("test", "test.json"),
)
_CORPORA = {
    "hh": hh_corpus(
        "helpful-base",
        "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
        "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b",
    ),
    "shp": Corpus(
        home="Download the subreddits' folders (each with train.json, validation.json and test.json) of "
        "https://huggingface.co/datasets/stanfordnlp/SHP and put them there.",
        layouts=tuple(
            tuple((part, f"{folder}/*/{name}") for part, name in _SHP_SPLITS)
            for folder in ("shp", "SHP")
        ),
        remotes=tuple(
            Remote(f"shp/{subreddit}/{name}", f"{_SHP_HUB}/{subreddit}/{name}")
            for subreddit in _SUBREDDITS.split()
            for _, name in _SHP_SPLITS
        ),
    ),
}


class HelpfulnessDataModule(CorpusDataModule):
    """Preference pairs of helpful-base, or of SHP.

    ``hh``: transcripts as in :class:`HarmlessnessDataModule`; a row is ``{"chosen", "rejected"}`` (upstream) or
    ``{"text": [a, b], "score": [1.0, 0.0]}``, where the higher score was chosen.

    ``shp``: a row is a Reddit post (``history``) and two comments, of which readers voted one higher although it
    came later; ``labels`` is 1 where ``human_ref_A`` is the better one. Rows of one post go to one split. The
    preference is that of many voters, not of one rater.

    Args:
        data_dir: ``hh``: the folder that holds ``hh-helpful-base/`` or upstream's
            ``helpful-base/``, each with ``train.jsonl`` and ``test.jsonl``. ``shp``: the folder
            that holds ``shp/``, with a folder for each subreddit and in it ``train.json``,
            ``validation.json`` and ``test.json``. Files may be ``.gz``. Without them, ``fit``
            downloads the corpus (17 MB, or all 18 subreddits of SHP).
        corpus: ``hh`` or ``shp``.
        min_score_ratio: Leave out pairs of ``shp`` whose votes have a lower ratio. 1 keeps all, as
            PERL did; the dataset's card recommends 2 for a cleaner signal.
        settings: As :class:`~lightning_perl.data.corpus.CorpusDataModule`.
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

    @property
    def corpus_files(self) -> Corpus:
        """Where the corpus lies."""
        return _CORPORA[self.corpus]

    def item(self, row: dict[str, Any], where: str, part: Part) -> tuple[Part, Item] | None:
        """Returns the pair of a row; None below ``min_score_ratio``."""
        if self.corpus == "hh":
            read = chosen_and_rejected if "text" not in row else _scored_pair
            return part, read(row, where)
        ratio = value_of(row, "score_ratio", where)
        if isinstance(ratio, bool) or not isinstance(ratio, int | float):
            raise wrong_type(where, "'score_ratio' must be a number", ratio)
        if ratio < self.min_score_ratio:
            self.report.left_out["below data.min_score_ratio"] += 1
            return None
        return part, _voted_pair(row, where)


def _scored_pair(row: dict[str, Any], where: str) -> Pair:
    match row:
        case {
            "text": [str(first), str(second)],
            "score": [int() | float() as first_score, int() | float() as second_score],
        } if first_score != second_score:
            better, worse = (first, second) if first_score > second_score else (second, first)
            return transcript_pair(better, worse, where)
    rule = "expected two transcripts under 'text' and two different numbers under 'score'"
    raise wrong_type(where, rule, row.get("score"))


def _voted_pair(row: dict[str, Any], where: str) -> Pair:
    first, second = (text_of(row, key, where) for key in ("human_ref_A", "human_ref_B"))
    label = value_of(row, "labels", where)
    if label not in (0, 1):
        raise wrong_type(where, "'labels' must be 0 or 1", label)
    better, worse = (first, second) if label else (second, first)
    context = prompt_of(text_of(row, "history", where), where)
    return preference(context, better, worse, text_of(row, "post_id", where), where)
