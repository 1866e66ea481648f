"""Summaries: of Reddit posts (TL;DR), judged by people or by an AI, and of conversations.

Sources: OpenAI's summaries from human feedback, https://github.com/openai/summarize-from-feedback,
arXiv 2009.01325 (comparisons under its Modified MIT licence, Reddit posts CC BY 4.0); DialogSum,
https://github.com/cylnlp/dialogsum, CC BY-NC-SA 4.0.

A prompt is one user turn that ends with ``TL;DR:``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from lightning_perl.arguments import Count
from lightning_perl.data.corpus import CorpusDataModule, Part, own_row, text_of
from lightning_perl.data.dialects import post_prompt
from lightning_perl.data.dialects import read as read_dialect
from lightning_perl.data.messages import wrong_type

Corpora: TypeAlias = Literal["tldr", "tldr_judged", "tldr_human", "comparisons", "dialogsum"]
_PARTS_OF_OPENAI: dict[str, Part] = {"train": "train", "valid1": "val", "valid2": "test"}


class SummarizationDataModule(CorpusDataModule):
    """Summaries, as demonstrations, preference pairs or prompts, by corpus.

    Rows of one post or conversation go to one split. OpenAI's splits are ``train``, ``valid1`` (to choose models
    by: our validation) and ``valid2`` (final: our test). Of the three summaries of a DialogSum test row the first
    is read. ``tldr_human`` has no subreddits. A post is one turn, which is never cut.

    Args:
        data_dir: The folder that holds, by corpus: ``tldr_3_filtered/{train,valid,test}.jsonl``, or
            ``tldr/oai1b_judged.jsonl`` for its authors' summaries; ``tldr/oai1b_judged.jsonl`` or
            ``tldr/oai1b.csv_judged.csv``; ``tldr-human/*.jsonl``; ``comparisons/batch*.json``; ``dialogsum/`` or
            ``DialogSum_Data/`` with ``dialogsum.{train,dev,test}.jsonl``. Files may be ``.gz``. ``fit`` downloads
            what is missing, but for ``tldr_human``.
        corpus: ``tldr``: a Reddit post and its author's summary. ``tldr_judged``: an author's and a model's
            summary, of which an AI preferred one. ``comparisons``: two summaries of which a person preferred one;
            ``tldr_human``: a flattened local part of these. ``dialogsum``: a conversation and its summary.
        max_tokens: Tokens of a row, prompt and answer together. A longer row is a bad row.
    """

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase,
        data_dir: str | Path,
        corpus: Corpora = "tldr",
        max_tokens: Count = 640,
        **settings: Any,
    ) -> None:
        super().__init__(tokenizer, data_dir=data_dir, max_tokens=max_tokens, **settings)
        self.corpus = corpus

    def own(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """Returns the summary, or the pair of summaries, of a row; None where the judge is silent."""
        if self.corpus == "tldr_judged" and not text_of(row, "preferred"):
            self.report.left_out["posts that were not judged"] += 1
            return None
        if self.corpus == "dialogsum" and "summary" not in row:
            self.report.notes["dialogs with three summaries, the first one read"] += 1
        return _READERS[self.corpus](row)


def _post(row: dict[str, Any]) -> dict[str, Any]:
    """Reads a post of OpenAI's filtered TL;DR, or of the judged file."""
    if "query" in row:
        query = text_of(row, "query")
        return own_row(query, query, response=text_of(row, "reference_responses"))
    return own_row(text_of(row, "id"), post_prompt(row), response=text_of(row, "summary"))


def _judged(row: dict[str, Any]) -> dict[str, Any]:
    query, preferred = text_of(row, "query"), text_of(row, "preferred")
    sides = [text_of(row, name) for name in ("postprocessed_response", "reference_responses")]
    if preferred not in ("ours", "reference"):
        raise wrong_type("preferred", "ours, reference or empty", preferred)
    better, worse = sides if preferred == "ours" else reversed(sides)
    return own_row(query, query, chosen=better, rejected=worse)


def _human(row: dict[str, Any]) -> dict[str, Any]:
    sides = {side: text_of(row, f"{name}_summary") for side, name in _SIDES.items()}
    return own_row(text_of(row, "id"), post_prompt(row), **sides)


def _comparison(row: dict[str, Any]) -> dict[str, Any]:
    part = _PARTS_OF_OPENAI.get(row.get("split", ""))
    if part is None:
        raise wrong_type("split", f"one of {list(_PARTS_OF_OPENAI)}", row.get("split"))
    (own,) = read_dialect(row, "openai_comparisons")
    sides = {side: own[side].strip() for side in _SIDES}
    return own_row(text_of(row["info"], "id"), own["prompt"], **sides) | {"part": part}


def _conversation(row: dict[str, Any]) -> dict[str, Any]:
    dialogue = text_of(row, "dialogue")
    # Three people wrote summaries of each test dialog.
    summary = text_of(row, "summary" if "summary" in row else "summary1")
    prompt = dialogue and f"CONVERSATION:\n{dialogue}\n\nTL;DR:"
    return own_row(dialogue, prompt, response=summary)


_SIDES = {"chosen": "preferred", "rejected": "rejected"}
_READERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "tldr": _post,
    "tldr_judged": _judged,
    "tldr_human": _human,
    "comparisons": _comparison,
    "dialogsum": _conversation,
}
