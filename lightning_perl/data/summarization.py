"""Summaries: of Reddit posts (TL;DR), judged by people or by an AI, and of conversations.

Sources: OpenAI's summaries from human feedback, https://github.com/openai/summarize-from-feedback,
arXiv 2009.01325 (comparisons under its Modified MIT licence, Reddit posts CC BY 4.0); DialogSum,
https://github.com/cylnlp/dialogsum, CC BY-NC-SA 4.0; BOLT English SMS/Chat, LDC2018T19, under the
Linguistic Data Consortium's licence.

A prompt is one user turn that ends with ``TL;DR:``: of a post :func:`post_prompt`, of a
conversation :func:`conversation_prompt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias
from xml.etree import ElementTree

from transformers import PreTrainedTokenizerBase

from lightning_perl.data.corpus import (
    Corpus,
    CorpusDataModule,
    Part,
    demonstration,
    preference,
    prompt_of,
    text_of,
    usable,
)
from lightning_perl.data.download import Remote
from lightning_perl.data.files import BadRowHook, UnreadableFile, csv_rows, jsonl_rows, read_text
from lightning_perl.data.rows import Item, Pair, Row
from lightning_perl.data.tokenization import BadRow

Corpora: TypeAlias = Literal[
    "tldr", "tldr_judged", "tldr_human", "comparisons", "dialogsum", "bolt"
]
_OPENAI = "https://openaipublic.blob.core.windows.net/summarize-from-feedback"
_JUDGED = (
    "https://raw.githubusercontent.com/vwxyzjn/summarize_from_feedback_details/"
    "c26c3a85abb454a39262f1176b037941e5b109d1/eval/oai1b.csv_judged.csv"
)
_DIALOGSUM = (
    "https://raw.githubusercontent.com/cylnlp/dialogsum/"
    "848cc8c05e0a04def79326539de827f1b28786a0/DialogSum_Data"
)
# The comparisons of news articles (batch0_cnndm and its like) are another task.
_BATCHES = tuple(f"comparisons/batch{number}.json" for number in (*range(3, 21), 22))
_TLDR_SPLITS: tuple[tuple[Part, str], ...] = (
    ("train", "tldr_3_filtered/train.jsonl"),
    ("val", "tldr_3_filtered/valid.jsonl"),
    ("test", "tldr_3_filtered/test.jsonl"),
)
_JUDGED_FILES: tuple[tuple[Part, str], ...] = (
    ("train", "tldr/oai1b_judged.jsonl"),
    ("train", "tldr/oai1b.csv_judged.csv"),
)
_CORPORA: dict[Corpora, Corpus] = {
    "tldr": Corpus(
        home=f"Download train.jsonl, valid.jsonl and test.jsonl of {_OPENAI}/datasets/"
        "tldr_3_filtered (see https://github.com/openai/summarize-from-feedback) and put them there.",
        layouts=(_TLDR_SPLITS, _JUDGED_FILES),
        remotes=tuple(Remote(path, f"{_OPENAI}/datasets/{path}") for _, path in _TLDR_SPLITS),
    ),
    "tldr_judged": Corpus(
        home=f"Download {_JUDGED} and put it there.",
        layouts=(_JUDGED_FILES,),
        remotes=(Remote("tldr/oai1b.csv_judged.csv", _JUDGED),),
    ),
    "tldr_human": Corpus(
        home="This flattened part of OpenAI's comparisons has no official place: use corpus: "
        "comparisons, which has all of them, or put a local copy there.",
        layouts=((("train", "tldr-human/*.jsonl"),),),
    ),
    "comparisons": Corpus(
        home=f"Download {_OPENAI}/dataset/comparisons/batch3.json to batch20.json and batch22.json "
        "(see https://github.com/openai/summarize-from-feedback) and put them there.",
        layouts=(tuple(("train", path) for path in _BATCHES),),
        remotes=tuple(Remote(path, f"{_OPENAI}/dataset/{path}") for path in _BATCHES),
    ),
    "dialogsum": Corpus(
        home="Download the folder DialogSum_Data of https://github.com/cylnlp/dialogsum "
        "(CC BY-NC-SA 4.0) and put it there.",
        layouts=tuple(
            (
                ("train", f"{folder}/dialogsum.train.jsonl"),
                ("val", f"{folder}/dialogsum.dev.jsonl"),
                ("test", f"{folder}/dialogsum.test.jsonl"),
            )
            for folder in ("dialogsum", "DialogSum_Data")
        ),
        remotes=(
            Remote("dialogsum/dialogsum.train.jsonl", f"{_DIALOGSUM}/dialogsum.train.jsonl"),
            Remote(
                "dialogsum/dialogsum.dev.jsonl",
                f"{_DIALOGSUM}/dialogsum.dev.jsonl",
                "436721e0a3571eef7072964f80e042fb151d8c6178db1a688ce8f803bbf0a13f",
            ),
            Remote(
                "dialogsum/dialogsum.test.jsonl",
                f"{_DIALOGSUM}/dialogsum.test.jsonl",
                "6de36eca7e7b9b10975fd5ea3f47391df172d8b3c15d03d84d763cbaab015fda",
            ),
        ),
    ),
    "bolt": Corpus(
        home="The corpus is licensed, so nothing is downloaded: get LDC2018T19 (BOLT English "
        "SMS/Chat) from https://catalog.ldc.upenn.edu/LDC2018T19, unpack it and put or link its "
        "folder there as bolt.",
        layouts=((("train", "bolt/**/*.xml"),),),
    ),
}
_PARTS_OF_OPENAI: dict[str, Part] = {"train": "train", "valid1": "val", "valid2": "test"}


def post_prompt(title: str, post: str, subreddit: str | None = None) -> str:
    r"""Returns the prompt for a summary of a Reddit post, in the format of OpenAI's release.

    Args:
        title: The post's title.
        post: The post.
        subreddit: Without ``r/``; None leaves its line out.

    Example:
        >>> post_prompt("Tea", "I like it.", "tea")
        'SUBREDDIT: r/tea\n\nTITLE: Tea\n\nPOST: I like it.\n\nTL;DR:'
    """
    start = "" if subreddit is None else f"SUBREDDIT: r/{subreddit}\n\n"
    return f"{start}TITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def conversation_prompt(conversation: str) -> str:
    r"""Returns the prompt for a summary of a conversation; our own words, close to the posts'.

    Args:
        conversation: A line for each turn, ``#Person1#: ...``.

    Example:
        >>> conversation_prompt("#Person1#: Tea?\n#Person2#: Please.")
        'CONVERSATION:\n#Person1#: Tea?\n#Person2#: Please.\n\nTL;DR:'
    """
    return f"CONVERSATION:\n{conversation}\n\nTL;DR:"


class SummarizationDataModule(CorpusDataModule):
    """Summaries, as demonstrations, preference pairs or prompts, by corpus.

    ===============  =========================================================================
    corpus           a row is
    ===============  =========================================================================
    ``tldr``         a Reddit post and its author's summary (SFT)
    ``tldr_judged``  an author's and a model's summary, of which an **AI** preferred one
    ``tldr_human``   two summaries of which a person preferred one; a flattened local part
    ``comparisons``  the same in OpenAI's original release
    ``dialogsum``    a conversation and its summary (SFT)
    ``bolt``         an SMS or chat conversation without any summary (``rows: prompts``)
    ===============  =========================================================================

    Rows of one post or conversation are never divided. OpenAI's splits are ``train``, ``valid1``
    (to choose models by: our validation) and ``valid2`` (final: our test). Of the three summaries
    of a DialogSum test row the first is read. ``tldr_human`` has no subreddits.

    The BOLT reader takes one ``<conversation>`` a file, of
    ``<message>`` elements with a ``participant`` and a ``<body>``; it was never run on the
    licensed files.

    Args:
        data_dir: The folder that holds, by corpus: ``tldr_3_filtered/{train,valid,test}.jsonl``, or
            ``tldr/oai1b_judged.jsonl`` for its authors' summaries; ``tldr/oai1b_judged.jsonl`` or
            ``tldr/oai1b.csv_judged.csv``; ``tldr-human/*.jsonl``; ``comparisons/batch*.json``;
            ``dialogsum/`` or ``DialogSum_Data/`` with ``dialogsum.{train,dev,test}.jsonl``;
            ``bolt/``, with ``*.xml`` anywhere below. Files may be ``.gz``. What is missing, ``fit``
            downloads, but for ``tldr_human`` and ``bolt``.
        corpus: One of the table.
        max_tokens: Tokens of a row, prompt and answer together. A post is one turn, which is never
            cut: a longer one is a bad row.
        settings: As :class:`~lightning_perl.data.corpus.CorpusDataModule`.

    Raises:
        ValueError: An argument out of its range; in ``setup`` a bad row, or no training row.
        FileNotFoundError: No local copy and no network, with what to download from where.
    """

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase,
        data_dir: str | Path,
        corpus: Corpora = "tldr",
        max_tokens: int = 640,
        **settings: Any,
    ) -> None:
        super().__init__(tokenizer, data_dir=data_dir, max_tokens=max_tokens, **settings)
        if corpus not in _CORPORA:
            raise ValueError(f"data.corpus must be one of {sorted(_CORPORA)}, got {corpus!r}.")
        if corpus == "bolt" and self.rows != "prompts":
            raise ValueError(
                "data.corpus bolt has conversations without summaries, so nothing to learn from: "
                "set data.rows: prompts."
            )
        self.corpus = corpus

    @property
    def corpus_files(self) -> Corpus:
        """Where the corpus lies."""
        return _CORPORA[self.corpus]

    def items(self, file: Path, part: Part) -> Iterator[tuple[Part, Item]]:
        """Yields the rows of a file."""
        if self.corpus == "comparisons":
            yield from self._comparisons(file)
        elif self.corpus == "bolt":
            conversations = [(str(file), file)]
            for item in usable(conversations, _bolt_prompt, self.bad_row):
                yield part, item
        else:
            readers: dict[Corpora, Callable[[dict[str, Any], str], Item | None]] = {
                "tldr": _post,
                "tldr_judged": self._judged_pair,
                "tldr_human": _human_pair,
                "dialogsum": self._dialog,
            }
            for item in usable(_rows(file, self.bad_row), readers[self.corpus], self.bad_row):
                yield part, item

    def _comparisons(self, file: Path) -> Iterator[tuple[Part, Item]]:
        for where, row in jsonl_rows(file, self.bad_row):
            for item in usable([(where, row)], _comparison, self.bad_row):
                # _comparison has looked at it.
                yield _PARTS_OF_OPENAI[row["split"]], item

    def _judged_pair(self, row: dict[str, Any], where: str) -> Pair | None:
        preferred = text_of(row, "preferred", where)
        if not preferred:
            self.report.left_out["posts that were not judged"] += 1
            return None
        query = text_of(row, "query", where)
        model, author = (
            text_of(row, key, where) for key in ("postprocessed_response", "reference_responses")
        )
        if preferred not in ("ours", "reference"):
            raise BadRow(
                "wrong type",
                f"{where}: 'preferred' must be ours, reference or empty, got {preferred!r}.",
            )
        better, worse = (model, author) if preferred == "ours" else (author, model)
        return preference(prompt_of(query, where), better, worse, query, where)

    def _dialog(self, row: dict[str, Any], where: str) -> Row:
        # Three people wrote summaries of each test dialog.
        several = "summary" not in row
        dialogue = text_of(row, "dialogue", where)
        summary = text_of(row, "summary1" if several else "summary", where)
        if several:
            self.report.notes["dialogs with three summaries, the first one read"] += 1
        context = prompt_of(dialogue and conversation_prompt(dialogue), where)
        return demonstration(context, summary, dialogue, where)


def _rows(file: Path, bad_row: BadRowHook) -> Iterator[tuple[str, dict[str, Any]]]:
    return csv_rows(file, bad_row) if ".csv" in file.suffixes[-2:] else jsonl_rows(file, bad_row)


def _post(row: dict[str, Any], where: str) -> Row:
    """Reads a post of OpenAI's filtered TL;DR, or of the judged file."""
    if "query" in row:
        query = text_of(row, "query", where)
        summary = text_of(row, "reference_responses", where)
        return demonstration(prompt_of(query, where), summary, query, where)
    title, post, subreddit = (text_of(row, key, where) for key in ("title", "post", "subreddit"))
    prompt = prompt_of(post and post_prompt(title, post, subreddit), where)
    return demonstration(prompt, text_of(row, "summary", where), text_of(row, "id", where), where)


def _human_pair(row: dict[str, Any], where: str) -> Pair:
    title, post = (text_of(row, key, where) for key in ("title", "post"))
    better, worse = (text_of(row, f"{name}_summary", where) for name in ("preferred", "rejected"))
    prompt = prompt_of(post and post_prompt(title, post), where)
    return preference(prompt, better, worse, text_of(row, "id", where), where)


def _comparison(row: dict[str, Any], where: str) -> Pair:
    match row:
        case {
            "info": dict(info),
            "summaries": [{"text": str(first)}, {"text": str(second)}],
            "choice": int(choice),
            "split": str(split),
        } if choice in (0, 1) and split in _PARTS_OF_OPENAI:
            better, worse = (second, first) if choice else (first, second)
        case _:
            raise BadRow(
                "wrong type",
                f"{where}: not a comparison: expected 'info', two 'summaries' with a text, 'choice' "
                f"0 or 1 and 'split' {sorted(_PARTS_OF_OPENAI)}, got {sorted(row)} with choice "
                f"{row.get('choice')!r} and split {row.get('split')!r}.",
            )
    title, post, subreddit = (text_of(info, key, where) for key in ("title", "post", "subreddit"))
    prompt = prompt_of(post and post_prompt(title, post, subreddit), where)
    return preference(prompt, better.strip(), worse.strip(), text_of(info, "id", where), where)


def _bolt_prompt(file: Path, where: str) -> Row:
    """Reads a conversation: its messages in their order, the participants as in DialogSum."""
    try:
        conversation = ElementTree.fromstring(read_text(file))
    except UnreadableFile as error:
        raise BadRow(error.reason, str(error)) from error
    except ElementTree.ParseError as error:
        raise BadRow(
            "broken XML", f"{where}:{error.position[0]}: broken XML ({error}). Unpack it again."
        ) from error
    people: dict[str, str] = {}
    lines = []
    for message in conversation.iter("message"):
        body = message.find("body")
        said = " ".join("".join((message if body is None else body).itertext()).split())
        speaker = message.get("participant", "")
        name = people.setdefault(speaker, f"#Person{len(people) + 1}#")
        if said:
            lines.append(f"{name}: {said}")
    dialogue = "\n".join(lines)
    context = prompt_of(dialogue and conversation_prompt(dialogue), where)
    return Row(context, (), None, False, conversation.get("id", where), where)
