"""Taskmaster: coffee orders (TM-4) and movie tickets (TM-3) with API calls and human thumbs.

Source: https://github.com/google-research-datasets/Taskmaster, CC BY 4.0, Bill Byrne, Saravanan
Ganesh and Karthik Krishnamoorthi, Google LLC; the thumbs are those of PERL (arXiv 2403.10704).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import PreTrainedTokenizerBase

from lightning_perl.arguments import Count, CountOrZero, FractionBelowHalf, TwoOrMore
from lightning_perl.data.base import ConversationDataModule
from lightning_perl.data.corpus import Corpus, corpora, fetch_all
from lightning_perl.data.messages import reading
from lightning_perl.data.reading import json_rows, parse_json, tsv_rows
from lightning_perl.data.rows import (
    BadRow,
    Item,
    Row,
    Splits,
    Turn,
    assign_folds,
    held_out,
    stable_hash,
)

_TAG = re.compile(r"[<\[](U|A|PN|PAN|PAV|PR|PRAN|PRAV|S)[>\]]")


class TaskmasterDataModule(ConversationDataModule):
    """Demonstrated dialogs and human thumbs of the Taskmaster corpora.

    Rated turns are divided into folds by dialog: ``fold`` is the test split, the dialogs of ``train_folds`` are
    training and validation. Folds and validation dialogs depend on the rows alone, so every run sees the same,
    whatever its seed. Demonstrations share no dialog with the rated turns; ``val_fraction`` of their dialogs go to
    validation and as many to test.

    Demonstrations are whole dialogs, of which the agent's turns count; API calls are agent turns. Where the
    dialogs of ticketing are not there, the agent's next turns are read (``splits/train/train-*.tsv``).

    Args:
        data_dir: The folder that holds ``taskmaster-coffee/`` and ``taskmaster-ticketing/``, or the
            original repository's ``TM-4-2024/`` and ``TM-3-2020/``, or one such folder itself.
            Files may be gzip-compressed. What is not there, ``fit`` downloads.
        task: ``coffee`` (86% thumbs up) or ``ticketing`` (16% thumbs up).
        demonstrations: Read the demonstrated dialogs.
        thumbs: Read the rated turns.
        max_demonstrations: How many demonstrated dialogs to keep, always the same ones. None: all.
        folds: Number of folds that the rated dialogs are divided into.
        fold: The fold that is the test split.
        train_folds: Folds to train and validate on. None: every fold but ``fold``.
        val_fraction: Share of the training dialogs that become the validation split; above 0 at
            least one dialog of two or more.
        on_bad_row: ``reject`` counts rows that cannot be used in ``report`` and goes on (the
            corpora have empty answers, and turns longer than the window); ``raise`` stops at the
            first one, naming file and row. A file that cannot be read counts as one such row.
    """

    pairs: ClassVar[bool] = False

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase,
        data_dir: str | Path,
        task: Literal["coffee", "ticketing"] = "coffee",
        demonstrations: bool = True,
        thumbs: bool = True,
        max_demonstrations: Count | None = None,
        folds: TwoOrMore = 5,
        fold: CountOrZero = 0,
        train_folds: Sequence[CountOrZero] | None = None,
        val_fraction: FractionBelowHalf = 0.1,
        on_bad_row: Literal["reject", "raise"] = "reject",
        **settings: Any,
    ) -> None:
        super().__init__(tokenizer, on_bad_row=on_bad_row, **settings)
        if not (demonstrations or thumbs):
            raise ValueError("data.demonstrations and data.thumbs are both false: nothing to read.")
        if fold >= folds:
            raise ValueError(
                f"data.fold must be from 0 to data.folds - 1, got fold {fold} of {folds}."
            )
        others = [other for other in range(folds) if other != fold]
        training = others if train_folds is None else sorted(set(train_folds))
        if not training or not set(training) <= set(others):
            raise ValueError(
                f"data.train_folds must be some of {others} (not the test fold {fold}), got {training}."
            )
        self.data_dir = Path(data_dir)
        self.task = task
        self.demonstrations = demonstrations
        self.thumbs = thumbs
        self.max_demonstrations = max_demonstrations
        self.folds = folds
        self.fold = fold
        self.train_folds = training
        self.val_fraction = val_fraction

    def prepare_data(self) -> None:
        """Downloads what is asked for from the original repository, unless it is in ``data_dir``."""
        wanted = [corpus for corpus in self._corpora.values() if not corpus.files(self.data_dir)]
        fetch_all([remote for corpus in wanted for remote in corpus.remotes], self.data_dir)

    @property
    def _corpora(self) -> dict[str, Corpus]:
        """What is asked for, by kind."""
        kinds = {"data": self.demonstrations, "reward": self.thumbs}
        return {kind: corpora()[f"{self.task} {kind}"] for kind, asked in kinds.items() if asked}

    def read(self) -> Splits:
        """Returns demonstrations and rated turns, divided by dialog."""
        splits = Splits([], [], [])
        for kind, corpus in self._corpora.items():
            items = list(self._items(kind, corpus))
            (self._divide_demonstrations if kind == "data" else self._divide_thumbs)(items, splits)
        return splits

    def _items(self, kind: str, corpus: Corpus) -> Iterator[Item]:
        files = corpus.files(self.data_dir)
        if not files:
            wanted = self.data_dir / corpus.layouts[0]["train"]
            raise FileNotFoundError(
                f"No {wanted.name} (or {wanted.name}.gz) in {wanted.parent} (data.data_dir = "
                f"{str(self.data_dir)!r}). {corpus.home}"
            )
        read = reading(self.task)(_dialog if kind == "data" else _rated_turn)
        for _, file in files:
            if ".tsv" in file.suffixes:
                rows = tsv_rows(file, self.bad_row)
                yield from self.usable(rows, reading("ticketing")(_next_turns))
            else:
                yield from self.usable(json_rows(file, self.bad_row), read)

    def _divide_demonstrations(self, items: list[Item], splits: Splits) -> None:
        # Another hash than hold_out's, or the kept dialogs would all be held out.
        rows = self.distinct(items)
        ordered = sorted(rows, key=lambda row: stable_hash(f"kept {row.dialog}"))
        kept = ordered[: self.max_demonstrations]
        train, held = held_out(kept, 2 * self.val_fraction)
        dialogs = sorted({row.dialog for row in held}, key=stable_hash)
        # A single dialog validates: a checkpoint callback may watch that loss, nothing watches the test's.
        test = set(dialogs[::2]) if len(dialogs) > 1 else set()
        splits.train.extend(train)
        splits.val.extend(row for row in held if row.dialog not in test)
        splits.test.extend(row for row in held if row.dialog in test)

    def _divide_thumbs(self, items: list[Item], splits: Splits) -> None:
        rows = self.distinct(items)
        folds = assign_folds((row.dialog for row in rows), self.folds)
        splits.test.extend(row for row in rows if folds[row.dialog] == self.fold)
        training = [row for row in rows if folds[row.dialog] in self.train_folds]
        for split, part in zip(splits, held_out(training, self.val_fraction), strict=False):
            split.extend(part)


def _said(*parts: object) -> str:
    """Joins words and JSON; a string is kept as it is, None and an empty one are left out."""
    texts = [
        part if isinstance(part, str) else json.dumps(part, ensure_ascii=False)
        for part in parts
        if part is not None
    ]
    return " ".join(text for text in texts if text)


def _call(name: str, arguments: object) -> Turn:
    """Returns an agent's call of an API, as text: ``call get_menu_items {"query": "espresso"}``."""
    return Turn("agent", _said("call", name, arguments))


def _api(name: str, response: object) -> Turn:
    """Returns an API's answer, as text: ``finish_order {"success": true}``."""
    return Turn("api", _said(name, response))


def dialog_key(context: Sequence[Turn], response: Sequence[Turn]) -> str:
    """Returns the group of a rated row: the first two turns of its context, or of context and answer.

    Rows are steps of shared dialogs, each under an id of its own; a dialog opens with a greeting and a request.
    """
    turns = context[:2] if len(context) >= 2 else [*context, *response]
    return json.dumps(turns, ensure_ascii=False)


def _rated_turn(row: Mapping[str, Any], where: str) -> list[Item]:
    context = tuple(map(_turn, parse_json(row["context"])))
    response = (_turn(parse_json(row["generation"])),)
    label = float(row["reward"])
    if label not in (0, 1):
        raise ValueError(f"the reward must be 0.0 or 1.0, got {label}")
    return [Row(context, response, label, label == 1, dialog_key(context, response), where)]


def _turn(turn: object) -> Turn:
    match turn:
        case {"role": "user" | "agent" as role, "text": str(text)}:
            return Turn(role, text)
        case {"role": "agent", "api": dict(api)} if len(api) == 1:
            return _call(*next(iter(api.items())))
        case {"role": "api", "response": dict(response)} if len(response) == 1:
            return _api(*next(iter(response.items())))
    raise ValueError(f"not a turn: {str(turn)[:80]}")


def _dialog(row: Mapping[str, Any], where: str) -> list[Item]:
    """Reads a dialog of TM-4 (``annotations``) or TM-3 (``apis``)."""
    turns: list[Turn] = []
    words: list[str] = []
    for utterance in row["utterances"]:
        match utterance:
            case {"speaker": "user" | "assistant" as speaker, "text": str(text)}:
                words.append(text)
                turns += [Turn("user" if speaker == "user" else "agent", text), *_calls(utterance)]
            case _:
                raise ValueError(f"not a spoken utterance: {str(utterance)[:80]}")
    agent = [number for number, turn in enumerate(turns) if turn.role == "agent"]
    if not agent:
        raise BadRow("dialog without an agent turn: nothing to imitate.")
    # A tail that ends on the user or an API has no answer to learn.
    context, response = tuple(turns[: agent[0]]), tuple(turns[agent[0] : agent[-1] + 1])
    # Some dialogs repeat another's words, with other order numbers in the API's answers.
    return [Row(context, response, None, True, json.dumps(words, ensure_ascii=False), where)]


def _calls(utterance: Mapping[str, Any]) -> list[Turn]:
    """Returns the calls and answers that belong to an utterance; they come after its words.

    The flat annotations of TM-4 are joined to calls and answers by their numbers.
    """
    turns = []
    for call in utterance.get("apis", ()):
        turns += [_call(call["name"], call["args"]), _api(call["name"], call["response"])]
    numbered: dict[str, dict[str, str]] = {}
    for note in utterance.get("annotations", ()):
        numbered.setdefault(note["context"].rsplit("_", 1)[-1], {})[note["name"]] = note["value"]
    for notes in numbered.values():
        if "api_call" in notes:
            turns.append(_call(notes["api_call"], _loaded(notes.get("request"))))
        if "api_response" in notes:
            turns.append(_api(notes["api_response"], _loaded(notes.get("response"))))
    return turns


def _loaded(text: str | None) -> object:
    """Returns the parsed JSON, so that both corpora space it alike; broken JSON as the text."""
    try:
        return None if text is None else parse_json(text)
    except json.JSONDecodeError:
        return text


def _next_turns(cells: list[str], where: str) -> list[Item]:
    """Reads the agent's next turns after a history, of ticketing's tables."""
    said, answered, dialog = cells
    latest, _, history = said.partition("<C>")
    context = (*_tagged_turns(history), *_tagged_turns(latest))
    target = tuple(_tagged_turns(answered))
    if any(turn.role != "agent" for turn in target):
        raise BadRow("no answer: the target holds a turn that is not the agent's.")
    return [Row(context, target, None, True, dialog, where)]


def _tagged_turns(text: str) -> list[Turn]:
    """Parses ``<U>text<PN>api<PAN>name<PAV>value``, in angle or square brackets, to turns."""
    before, *parts = _TAG.split(text)
    if before.strip():
        raise ValueError(f"not a turn: text before the first tag: {before[:80]!r}")
    tagged: list[tuple[str, str, dict[str, list[str]]]] = []
    for tag, value in zip(parts[::2], parts[1::2], strict=True):
        if not tag.endswith(("AN", "AV")):
            tagged.append((tag, value, {}))
            continue
        owner, _, values = tagged[-1] if tagged else ("", "", {})
        if owner not in ("PN", "PR") or (tag.endswith("V") and not values):
            raise ValueError(f"not a turn: <{tag}> without the name that it belongs to")
        if tag.endswith("N"):
            values.setdefault(value, [])
            name = value
        else:
            values[name].append(value)
    return [_tagged_turn(*turn) for turn in tagged if turn[0] != "S"]


def _tagged_turn(tag: str, text: str, values: dict[str, list[str]]) -> Turn:
    if tag in ("U", "A"):
        return Turn("user" if tag == "U" else "agent", text)
    if tag == "PR":
        return _api(text, values)
    # As in the rated rows: an argument is a string, a list only where it has several values.
    return _call(text, {key: v[0] if len(v) == 1 else v for key, v in values.items()})
