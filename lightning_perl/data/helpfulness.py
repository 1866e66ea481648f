"""Helpful replies: Anthropic's HH-RLHF helpful-base, and Stanford's SHP from Reddit.

Sources: https://huggingface.co/datasets/Anthropic/hh-rlhf, MIT, Copyright (c) 2022 Anthropic,
arXiv 2204.05862; https://huggingface.co/datasets/stanfordnlp/SHP, MIT for the collection, the posts
under Reddit's terms, Ethayarajh et al. 2022.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lightning_perl.data.corpus import (
    Corpus,
    CorpusDataModule,
    Part,
    preference,
    prompt_of,
    text_of,
    usable,
    value_of,
)
from lightning_perl.data.download import Remote
from lightning_perl.data.files import jsonl_rows
from lightning_perl.data.rows import Item, Pair
from lightning_perl.data.tokenization import BadRow
from lightning_perl.data.transcripts import HUB, transcript_pair

_SUBREDDITS = (
    "askacademia",
    "askanthropology",
    "askbaking",
    "askcarguys",
    "askculinary",
    "askdocs",
    "askengineers",
    "askhistorians",
    "askhr",
    "askphilosophy",
    "askphysics",
    "askscience",
    "asksciencefiction",
    "asksocialscience",
    "askvet",
    "changemyview",
    "explainlikeimfive",
    "legaladvice",
)
_SHP_HUB = "https://huggingface.co/datasets/stanfordnlp/SHP/resolve/main"
_SHP_SPLITS: tuple[tuple[Part, str], ...] = (
    ("train", "train.json"),
    ("val", "validation.json"),
    ("test", "test.json"),
)
_CORPORA = {
    "hh": Corpus(
        home="Download helpful-base/train.jsonl.gz and helpful-base/test.jsonl.gz of "
        "https://huggingface.co/datasets/Anthropic/hh-rlhf (MIT) and put the folder there.",
        layouts=(
            (("train", "hh-helpful-base/train.jsonl"), ("test", "hh-helpful-base/test.jsonl")),
            (("train", "helpful-base/train.jsonl"), ("test", "helpful-base/test.jsonl")),
        ),
        remotes=(
            Remote(
                "helpful-base/train.jsonl.gz",
                f"{HUB}/helpful-base/train.jsonl.gz",
                "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
            ),
            Remote(
                "helpful-base/test.jsonl.gz",
                f"{HUB}/helpful-base/test.jsonl.gz",
                "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b",
            ),
        ),
    ),
    "shp": Corpus(
        home="Download the subreddits' folders (each with train.json, validation.json and "
        "test.json) of https://huggingface.co/datasets/stanfordnlp/SHP and put them there.",
        layouts=tuple(
            tuple((part, f"{folder}/*/{name}") for part, name in _SHP_SPLITS)
            for folder in ("shp", "SHP")
        ),
        remotes=tuple(
            Remote(f"shp/{subreddit}/{name}", f"{_SHP_HUB}/{subreddit}/{name}")
            for subreddit in _SUBREDDITS
            for _, name in _SHP_SPLITS
        ),
    ),
}


class HelpfulnessDataModule(CorpusDataModule):
    """Preference pairs of helpful-base, or of SHP.

    ``hh``: transcripts as in :class:`HarmlessnessDataModule`; a row is ``{"chosen", "rejected"}``
    (upstream) or ``{"text": [a, b], "score": [1.0, 0.0]}``, where the higher score was chosen. Rows
    that begin with the same human turn are never divided.

    ``shp``: a row is a Reddit post (``history``) and two comments, of which readers voted one
    higher although it came later; ``labels`` is 1 where ``human_ref_A`` is the better one. Rows of
    one post are never divided. The preference is that of many voters, not of one rater.

    Args:
        data_dir: ``hh``: the folder that holds ``hh-helpful-base/`` or upstream's
            ``helpful-base/``, each with ``train.jsonl`` and ``test.jsonl``. ``shp``: the folder
            that holds ``shp/``, with a folder for each subreddit and in it ``train.json``,
            ``validation.json`` and ``test.json``. Files may be ``.gz``. Without them, ``fit``
            downloads the corpus (17 MB, or all 18 subreddits of SHP).
        corpus: ``hh`` or ``shp``.
        min_score_ratio: Of ``shp``: leave out pairs whose votes have a lower ratio. 1 keeps all, as
            PERL did; the dataset's card recommends 2 for a cleaner signal.
        settings: As :class:`~lightning_perl.data.corpus.CorpusDataModule`.

    Raises:
        ValueError: An argument out of its range; in ``setup`` a bad row, or no training row.
        FileNotFoundError: No local copy and no network, with what to download from where.
    """

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase,
        data_dir: str | Path,
        corpus: Literal["hh", "shp"] = "hh",
        min_score_ratio: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(tokenizer, data_dir=data_dir, **settings)
        if corpus not in _CORPORA:
            raise ValueError(f"data.corpus must be one of {sorted(_CORPORA)}, got {corpus!r}.")
        if min_score_ratio < 1:
            raise ValueError(f"data.min_score_ratio must be at least 1, got {min_score_ratio}.")
        self.corpus = corpus
        self.min_score_ratio = min_score_ratio

    @property
    def corpus_files(self) -> Corpus:
        """Where the corpus lies."""
        return _CORPORA[self.corpus]

    def items(self, file: Path, part: Part) -> Iterator[tuple[Part, Item]]:
        """Yields the pairs of a file."""
        pair = _hh_pair if self.corpus == "hh" else self._shp_pair
        for item in usable(jsonl_rows(file, self.bad_row), pair, self.bad_row):
            yield part, item

    def _shp_pair(self, row: dict[str, Any], where: str) -> Item | None:
        if _number(row, "score_ratio", where) < self.min_score_ratio:
            self.report.left_out["below data.min_score_ratio"] += 1
            return None
        first, second = (text_of(row, key, where) for key in ("human_ref_A", "human_ref_B"))
        label = value_of(row, "labels", where)
        if label not in (0, 1):
            raise BadRow("wrong type", f"{where}: 'labels' must be 0 or 1, got {label!r}.")
        better, worse = (first, second) if label else (second, first)
        context = prompt_of(text_of(row, "history", where), where)
        return preference(context, better, worse, text_of(row, "post_id", where), where)


def _number(row: dict[str, Any], key: str, where: str) -> float:
    value = value_of(row, key, where)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow("wrong type", f"{where}: {key!r} must be a number, got {value!r}.")
    return value


def _hh_pair(row: dict[str, Any], where: str) -> Pair:
    if "text" not in row:
        chosen, rejected = (text_of(row, key, where, strip=False) for key in ("chosen", "rejected"))
        return transcript_pair(chosen, rejected, where)
    match row:
        case {
            "text": [str(first), str(second)],
            "score": [int() | float() as one, int() | float() as other],
        } if one != other:
            better, worse = (first, second) if one > other else (second, first)
            return transcript_pair(better, worse, where)
    raise BadRow(
        "wrong type",
        f"{where}: expected two transcripts under 'text' and two different numbers under 'score', "
        f"got {sorted(row)} with score {row.get('score')!r}.",
    )
