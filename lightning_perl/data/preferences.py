"""A user's own rows: preferences, thumbs, ratings, demonstrations or prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lightning_perl.arguments import Count, Finite, FractionBelowOne
from lightning_perl.data.base import ConversationDataModule
from lightning_perl.data.folds import held_out, stable_hash
from lightning_perl.data.loaders import FixedLoader, FixedStream, ResumableLoader, StreamingLoader
from lightning_perl.data.reading import Source, Sources, parse_json, shuffled_stream, sources_of
from lightning_perl.data.report import SplitReport
from lightning_perl.data.rows import (
    BadRow,
    BadRowHook,
    Item,
    Pair,
    PromptExample,
    RatedExample,
    Row,
    Splits,
    Turn,
    first_row,
)
from lightning_perl.data.tokenization import example_of

_KINDS = (
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("prompt", "response", "label"),
    ("prompt", "response", "rating"),
    ("prompt", "response"),
    ("messages",),
)
_PROMPT_KINDS = (("prompt",), ("messages",), ("chosen", "rejected"))
_NAMES = ("prompt", "chosen", "rejected", "response", "label", "rating", "messages")
_ROLES: dict[object, Literal["system", "user", "agent"]] = {
    "system": "system",
    "user": "user",
    "assistant": "agent",
}
_LABELS = {"1": 1.0, "1.0": 1.0, "true": 1.0, "0": 0.0, "0.0": 0.0, "false": 0.0}


class PreferenceDataModule(ConversationDataModule):
    """Rows of your own, of one of these kinds, recognised by their columns; the first that fits.

    ==========================  ==========================================================
    columns                     a row is
    ==========================  ==========================================================
    prompt, chosen, rejected    a preference pair
    chosen, rejected            a preference pair of two message lists, which are the same
                                but for the last message
    prompt, response, label     an answer with a thumb: 1 or true up, 0 or false down
    prompt, response, rating    an answer with a rating from ``rating_range[0]`` to
                                ``rating_range[1]``
    prompt, response            a demonstration
    messages                    a demonstrated dialog; every assistant message counts
    prompt                      a prompt to answer (``rows: prompts``)
    ==========================  ==========================================================

    With ``rows: prompts`` the prompt of any kind is enough, and answers are not looked at. Of
    ``messages`` it is all of them where the user has the last word, else those before the first
    answer.

    A prompt is a string (one user turn) or a list of ``{"role", "content"}`` messages, role ``system``, ``user``
    or ``assistant``; an answer is a string or a list of one assistant message, which may follow the messages of
    the prompt. In CSV a list is written as JSON. Chosen and thumbs-up answers, and those rated above the middle,
    also enter the language-modelling loss of Hydra-SFT. A rating becomes a label from 0 to 1, linearly: the soft
    target of the cross-entropy. A label or rating that is there but null is a bad row. Other columns are ignored.

    Rows of one dialog (the same words up to the first user turn) go to one split. Duplicates are used once.

    A corpus in another form needs a file with one of these kinds of rows, and ``columns``. BOLT English SMS/Chat
    (LDC2018T19), for example, holds conversations in XML without summaries: write each as ``{"conversation":
    text}`` to a ``.jsonl`` file, and set ``columns: {prompt: conversation}`` and ``rows: prompts``.

    Args:
        train: Where the training rows come from: a file (``.jsonl``, ``.json`` with one array, ``.csv``, each also
            with ``.gz``, or ``.parquet``; in UTF-8), a data set of the Hugging Face hub (``owner/name`` or
            ``owner/name/config:split``, split ``train`` unless named), a list of rows, or several files and names.
            A list of files and names is read as one after the other. A mapping ``{file or name: weight}`` is
            mixed: a batch has of each source what its weight says on average, and an epoch ends when every row was
            drawn, so that sources with fewer rows for their weight begin again.
        val: Where the validation rows come from, as ``train`` but without weights. None:
            ``val_fraction`` of the training prompts, at least one of two or more.
        test: Where the test rows come from, as ``val``. None: the validation rows.
        val_fraction: Share of the training prompts that is held out when ``val`` is None.
        columns: The file's names for ours, for example ``{prompt: question, chosen: better}``.
        rating_range: The lowest and the highest rating there can be. What lies outside is a bad row.
        streaming: Read and encode training rows while training, for files that do not fit into memory. The loader
            then has no length: give ``trainer.max_steps``, and ``val_check_interval`` as a number of batches.
            Duplicates and conflicts are not looked for. Without ``val``, the prompts whose hash is below
            ``val_fraction`` are held out, and every validation reads the sources again for them
            (``trainer.limit_val_batches`` stops it early). The report counts the first pass and comes at its end.
            A resumed run reads past the rows before its position.
        shuffle_block: Rows of a stream that are in memory to be shuffled.
        keep_conflicts: Learn from rows whose labels contradict each other (a thumb up and a thumb down for one
            answer, a pair in both orders), and count them. False takes each of them for a bad row.
        settings: As :class:`~lightning_perl.data.base.ConversationDataModule`.
    """

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase,
        train: Sources,
        val: Sources | None = None,
        test: Sources | None = None,
        val_fraction: FractionBelowOne = 0.1,
        columns: dict[str, str] | None = None,
        rating_range: tuple[Finite, Finite] | None = None,
        streaming: bool = False,
        shuffle_block: Count = 4096,
        keep_conflicts: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(tokenizer, keep_conflicts=keep_conflicts, **settings)
        unknown = sorted(set(columns or {}) - set(_NAMES))
        if unknown:
            raise ValueError(f"data.columns: unknown {unknown}; the names are {list(_NAMES)}.")
        low, high = rating_range or (0, 1)
        if not low < high:
            raise ValueError(
                f"data.rating_range must be the lowest and the highest rating there can be, got {[low, high]}."
            )
        self.train_sources = sources_of(train, "data.train")
        self.val_sources = None if val is None else sources_of(val, "data.val")
        self.test_sources = None if test is None else sources_of(test, "data.test")
        for source in [*(self.val_sources or []), *(self.test_sources or [])]:
            if source.weight is not None:
                raise ValueError(
                    f"{source.argument}: rows to measure on are read as they are, so weights mean "
                    "nothing. Give a list."
                )
        weights = [source.weight for source in self.train_sources if source.weight is not None]
        self.weights = weights or None
        self.val_fraction = val_fraction
        self.columns = {name: name for name in _NAMES} | (columns or {})
        self.rating_range = rating_range
        self.streaming = streaming
        self.shuffle_block = shuffle_block
        self._holds_out = streaming and val is None and val_fraction > 0
        self._streams: list[tuple[int, Source]] = []
        self._begun = False

    def prepare_data(self) -> None:
        """Fetches data sets of the hub into its cache."""
        held_out = [*(self.val_sources or []), *(self.test_sources or [])]
        for source in held_out if self.streaming else [*self.train_sources, *held_out]:
            source.fetch()

    def read(self) -> Splits:
        """Returns the rows of the sources, the training rows divided by dialog if need be."""
        train: list[Item] = []
        val: list[Item] = []
        if self.streaming:
            self._open_streams()
        else:
            train = self._all(self.train_sources)
        if self.val_sources is not None:
            val = self._all(self.val_sources)
        else:
            train, val = held_out(train, self.val_fraction)
        test = val if self.test_sources is None else self._all(self.test_sources)
        trained = {first_row(item).dialog for item in train}
        for name, items in (("validation", val), ("test", test)):
            shared = sum(first_row(item).dialog in trained for item in items)
            if shared and (name == "validation" or test is not val):
                self.report.notes[f"{name} rows whose prompt is a training prompt"] = shared
        return Splits(train, val, test)

    def _all(self, sources: list[Source]) -> list[Item]:
        items: list[Item] = []
        for number, source in enumerate(sources):
            items += self._items(number, source, self.bad_row)
        return self.distinct(items)

    def _items(
        self, number: int, source: Source, bad_row: BadRowHook, streaming: bool = False
    ) -> Iterator[Item]:
        for where, row in source.rows(bad_row, streaming):
            try:
                yield self._item(row, where, number)
            except BadRow as error:
                bad_row(error.reason, f"{where}: {error}")

    def _open_streams(self) -> None:
        """Finds out before the run which files are not there, and which have no row at all."""
        for number, source in enumerate(self.train_sources):
            if next(source.rows(self._uncounted, streaming=True), None):
                self._streams.append((number, source))
            else:
                list(source.rows(self.bad_row, streaming=True))

    def _uncounted(self, reason: str, message: str) -> None:
        """Takes a bad row that is counted at another reading."""
        if self.on_bad_row == "raise":
            raise BadRow(reason, message)

    def train_dataloader(self) -> ResumableLoader | StreamingLoader:
        """Returns shuffled batches; the loader's position goes into checkpoints."""
        if not self.streaming:
            return super().train_dataloader()
        # Where it limits the batches, Lightning knows how many there are and asks for none ahead.
        limited = self.trainer is None or isinstance(self.trainer.limit_train_batches, int)
        return StreamingLoader(
            self._train_stream,
            self.batch_size,
            self.collate,
            self.seed,
            self.shuffle_block,
            self.bucket,
            ahead=0 if limited else 1,
        )

    def _fixed(self, split: str) -> FixedLoader | FixedStream:
        if self._holds_out and (split == "val" or self.test_sources is None):
            return FixedStream(self._held_out_stream, self.val_batch_size, self.collate)
        return super()._fixed(split)

    def _train_stream(
        self, epoch: int, start: int
    ) -> Iterator[tuple[int, RatedExample | PromptExample]]:
        """Yields an epoch's training rows from row ``start`` on; the first pass is counted."""
        first, self._begun = not self._begun, True
        split = self.report.splits["train"] if first else SplitReport()
        bad_row = self.bad_row if first else self._uncounted
        rows = islice(enumerate(self._mixed(epoch, bad_row)), start, None)
        yield from self._encoded(rows, False, split, bad_row)
        if first:
            self.announce()
            self.log_report()

    def _held_out_stream(self) -> Iterator[RatedExample | PromptExample]:
        streams = (self._numbered(*stream, self._uncounted) for stream in self._streams)
        rows = enumerate(chain.from_iterable(streams))
        for _, example in self._encoded(rows, True, SplitReport(), self._uncounted):
            yield example

    def _encoded(
        self,
        rows: Iterable[tuple[int, tuple[int, Item]]],
        held: bool,
        split: SplitReport,
        bad_row: BadRowHook,
    ) -> Iterator[tuple[int, RatedExample | PromptExample]]:
        """Yields the rows of a stream that are held out for validation, or the others."""

        def of_the_split() -> Iterator[tuple[tuple[int, int], Item]]:
            for place, (number, item) in rows:
                share = int(stable_hash(first_row(item).dialog)[:12], 16) / 16**12
                if held == (self._holds_out and share < self.val_fraction):
                    yield (place, number), item
                elif split is self.report.splits["train"]:
                    self.report.left_out["held out for validation"] += 1

        prompts = self.rows == "prompts"
        limits = self.max_tokens, self.max_response_tokens
        encoded = self.encoder.encode_all(of_the_split(), *limits, prompts, bad_row, split.rejected)
        for (place, number), item, sides in encoded:
            example = example_of(item, sides, number, prompts)
            split.keep(example)
            yield place, example

    def _mixed(self, epoch: int, bad_row: BadRowHook) -> Iterator[tuple[int, Item]]:
        """Yields an epoch's rows of all streams, shuffled."""
        opened: set[int] = set()

        def rows(number: int, source: Source) -> Iterator[tuple[int, Item]]:
            # A mixture reads a short source again; its bad rows are counted once.
            hook = self._uncounted if number in opened else bad_row
            opened.add(number)
            return self._numbered(number, source, hook)

        streams = [partial(rows, *stream) for stream in self._streams]
        weights = [source.weight for _, source in self._streams if source.weight is not None]
        return shuffled_stream(streams, weights or None, self.shuffle_block, self.seed, epoch)

    def _numbered(
        self, number: int, source: Source, bad_row: BadRowHook
    ) -> Iterator[tuple[int, Item]]:
        """Yields a stream's rows with numbers that no row of another stream has."""
        for place, item in enumerate(self._items(number, source, bad_row, streaming=True)):
            # A pair takes two numbers.
            yield 2 * (len(self.train_sources) * place + number), item

    def teardown(self, stage: str) -> None:
        """Reports on a stream that was not read to its end."""
        if self._begun and not self.announced:
            self.announce()
            self.log_report()

    def _item(self, row: Mapping[str, Any], where: str, source: int) -> Item:
        named = {
            name: row[column]
            for name, column in self.columns.items()
            if row.get(column) is not None
        }
        if self.rows == "prompts":
            context = self._context(row, named)
            return Row(context, (), None, False, _opening(context), where, source)
        self._refuse_null(row, named)
        kind = next((kind for kind in _KINDS if named.keys() >= set(kind)), ())
        # Half of a kind, or a mapped column that is not there, is a slip, not a row of another kind.
        half = ("chosen" in named) != ("rejected" in named)
        mapped = {name for name, column in self.columns.items() if column != name}
        if half or not kind or mapped - named.keys():
            raise self._missing(row, _KINDS)
        if "chosen" in kind:
            return _pair(named, where, source)
        label = None
        if "messages" in kind:
            prompt, response = self._dialog(named["messages"])
        else:
            prompt = _prompt(named["prompt"])
            response = (_answer(named["response"], "response", prompt),)
            label = self._label(named, where)
        imitate = label is None or label > 0.5
        return Row(prompt, response, label, imitate, _opening(prompt), where, source)

    def _context(self, row: Mapping[str, Any], named: dict[str, Any]) -> tuple[Turn, ...]:
        """Returns the prompt of a row of any kind."""
        if "prompt" in named:
            return _prompt(named["prompt"])
        if "messages" in named:
            turns = _messages(named["messages"], "messages")
            asked = turns[-1].role != "agent"
            return turns if asked else self._dialog(named["messages"])[0]
        if "chosen" in named and "rejected" in named:
            return _common_prompt(named)
        raise self._missing(row, _PROMPT_KINDS)

    def _dialog(self, messages: object) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
        """Returns the prompt of a demonstrated dialog, and the turns from its first answer on."""
        turns = _messages(messages, "messages")
        agent = [number for number, turn in enumerate(turns) if turn.role == "agent"]
        if not agent:
            raise BadRow("no answer", "messages hold no assistant message to imitate.")
        return turns[: agent[0]], turns[agent[0] : agent[-1] + 1]

    def _refuse_null(self, row: Mapping[str, Any], named: dict[str, Any]) -> None:
        # An answer whose thumb got lost may be a bad one, so it is nothing to imitate.
        if named.keys() & set(_NAMES) - {"messages"} != {"prompt", "response"}:
            return
        for name in ("label", "rating"):
            column = self.columns[name]
            if column in row:
                raise BadRow(
                    f"{name} is null",
                    f"{column} is null, so whether the answer is good is not known. "
                    "Leave the column out of demonstrations, or set on_bad_row: reject.",
                )

    def _missing(self, row: Mapping[str, Any], kinds: tuple[tuple[str, ...], ...]) -> BadRow:
        wanted = "; ".join(" + ".join(self.columns[name] for name in kind) for kind in kinds)
        null = sorted(name for name in self.columns.values() if name in row and row[name] is None)
        empty = f" (null: {null})" if null else ""
        return BadRow(
            "missing column",
            f"missing column: got {sorted(row)}{empty}, expected one of: {wanted}. "
            "Map your names with data.columns, for example {prompt: question}.",
        )

    def _label(self, named: dict[str, Any], where: str) -> float | None:
        if "label" in named:
            label = _LABELS.get(str(named["label"]).strip().lower())
            if label is None:
                raise _wrong_type("label", "1, 0, true or false", named["label"])
            return label
        if "rating" not in named:
            return None
        if self.rating_range is None:
            raise ValueError(
                f"{where}: has a {self.columns['rating']}, and data.rating_range does not say what "
                "it means. Give the lowest and the highest rating there can be, for example [1, 5]; "
                "or take the column out, to imitate every answer."
            )
        return _rating(named["rating"], self.rating_range)


def _opening(turns: tuple[Turn, ...]) -> str:
    """Returns the group of a row: its dialog up to the first user turn."""
    users = [number for number, turn in enumerate(turns, start=1) if turn.role == "user"]
    return json.dumps(turns[: users[0] if users else None], ensure_ascii=False)


def _pair(named: dict[str, Any], where: str, source: int) -> Pair:
    asked = named.get("prompt")
    prompt = _common_prompt(named) if asked is None else _prompt(asked)
    better = _answer(named["chosen"], "chosen", prompt)
    worse = _answer(named["rejected"], "rejected", prompt)
    if better.text.strip() == worse.text.strip():
        raise BadRow(
            "identical pair",
            "identical pair: chosen and rejected are the same text, which says "
            "nothing. Remove the row, or set on_bad_row: reject.",
        )
    group = _opening(prompt)
    return Pair(
        Row(prompt, (better,), None, True, group, where, source),
        Row(prompt, (worse,), None, False, group, where, source),
    )


def _common_prompt(named: dict[str, Any]) -> tuple[Turn, ...]:
    """Returns the prompt that two dialogs share."""
    better, worse = (_messages(named[name], name) for name in ("chosen", "rejected"))
    prompt = better[:-1]
    if not prompt or worse[:-1] != prompt:
        raise BadRow(
            "no common prompt",
            "there is no prompt column, and chosen and rejected differ before their last "
            "messages. Cut them where they part, or set on_bad_row: reject.",
        )
    if (better[-1].role, worse[-1].role) != ("agent", "agent"):
        raise BadRow("no answer", "chosen or rejected does not end with the assistant.")
    return prompt


def _wrong_type(column: str, expected: str, got: object) -> BadRow:
    return BadRow(
        "wrong type", f"{column} must be {expected}, got {type(got).__name__} ({str(got)[:40]!r})."
    )


def _unpacked(value: object) -> object:
    """Returns the messages that the text of a CSV cell holds, and any other value as it is."""
    # Words in brackets are a text.
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            messages = parse_json(value)
        except json.JSONDecodeError:
            return value
        if isinstance(messages, list) and all(
            isinstance(message, dict) and "role" in message for message in messages
        ):
            return messages
    return value


def _messages(value: object, column: str) -> tuple[Turn, ...]:
    expected = 'a list of {"role": "system" | "user" | "assistant", "content": text} messages'
    value = _unpacked(value)
    if not isinstance(value, list) or not value:
        raise _wrong_type(column, expected, value)
    turns = []
    for message in value:
        match message:
            case {"role": str(role), "content": str(content)} if role in _ROLES:
                turns.append(Turn(_ROLES[role], content))
            case _:
                raise _wrong_type(column, expected, message)
    return tuple(turns)


def _prompt(value: object) -> tuple[Turn, ...]:
    value = _unpacked(value)
    if isinstance(value, list):
        return _messages(value, "prompt")
    if not isinstance(value, str):
        raise _wrong_type("prompt", "a string or a list of messages", value)
    if not value.strip():
        raise BadRow("empty prompt", "empty prompt. Remove the row.")
    return (Turn("user", value),)


def _answer(value: object, column: str, prompt: tuple[Turn, ...]) -> Turn:
    value = _unpacked(value)
    if isinstance(value, list):
        turns = _messages(value, column)
        if turns[:-1] not in ((), prompt) or turns[-1].role != "agent":
            raise _wrong_type(column, "one assistant message, or it after the prompt", value)
        value = turns[-1].text
    if not isinstance(value, str):
        raise _wrong_type(column, "a string or one assistant message", value)
    if not value.strip():
        raise BadRow(
            "empty answer", f"empty answer in {column}. Remove the row, or set on_bad_row: reject."
        )
    return Turn("agent", value)


def _rating(value: object, limits: tuple[float, float]) -> float:
    """Returns the rating's place between the limits, from 0 to 1."""
    try:
        # In CSV a number is text.
        rating = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        rating = math.nan
    if math.isnan(rating):
        raise _wrong_type("rating", "a number", value)
    low, high = limits
    if not low <= rating <= high:
        raise BadRow(
            "rating out of range",
            f"rating out of range: {rating:g} is not from {low:g} to {high:g} "
            "(data.rating_range). Widen the range, or set on_bad_row: reject.",
        )
    return (rating - low) / (high - low)
