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
from lightning_perl.data.corpus import matching, usable, value_of, wrong_type
from lightning_perl.data.download import Remote, fetch_all
from lightning_perl.data.folds import assign_folds, held_out, hold_out, stable_hash
from lightning_perl.data.reading import json_rows, parse_json, tsv_rows
from lightning_perl.data.rows import BadRow, Item, Row, Splits, Turn, first_row

_FOLDERS = {
    "coffee": ("taskmaster-coffee", "TM-4-2024"),
    "ticketing": ("taskmaster-ticketing", "TM-3-2020"),
}
_HOME = "https://github.com/google-research-datasets/Taskmaster"
_RAW = (
    "https://raw.githubusercontent.com/google-research-datasets/Taskmaster/"
    "d92cb6af3005f1dc09c39e75e7daf4a04905e00b"
)
# SHA-256 of reward_00.json, reward_01.json and so on, and of the dialogs, where known.
_SUMS: dict[str, dict[str, list[str | None]]] = {
    "coffee": {
        "reward": [
            "79f809857b90e8afe28c542dbcbdea79a1a1e365aa4626b6ec2fdc37785a9f24",
            "818fe4604d23cbb3b77aebf98f28300ae411ca3305a4b730d19bd8ff69ab9455",
            "433851379c7143299b2570ffc7c40a8f57ddabf0c8278ad123da7a7dac64c867",
            "d2f96717912652d3bd0a7aa907aa0b798aa35465e5ee5a768f0de118d08fe149",
            "73ae7f65dc98f1906eac243cf95cc75f7b6489ef5e4a7cf8c787f4704672a7df",
            "8d0c124fd06b261596fc72e188fbd326d1b5dd559ecbf3a585a513c1f3e12cf1",
            "55ce13a025dcfb842ef2de75e4cfafb07a1f1938905d5c4e59e5b440a7ce624c",
        ],
        "data": [
            "d9440d1a46e6ba9f8c680a77a7dc7a42b0b3266ef555aeac6160b0d5ac37c647",
            "2577d6af1c9d7cc5540d5193206d35b000ebeff59925c1076ce724f1a85b8964",
            "b353618d9709c6bdeafa08682526e04047ad28d5f9acd65ed7878482a90d49df",
            "45fe8eb52af674b69972d172c911f9cfd6f5044b61338b524997edf1a4861641",
            "bf5f2e3704aab48f657ec97f8d9bf041abec17a1cd3e56206c3424910875088d",
            "3d158e9880bfea3e5db18d008cf1f726f1d802eca28c2b71fc291274b9ee60ba",
            "dd0546a6aaf430a812f4cfb5d8f9f0c823136ba2e77e78103b50a8e95080759c",
            "b61f11f3c950c330049906ae249e858503ec7c905fcad5b4a7edd851ccf07bbc",
        ],
    },
    "ticketing": {
        "reward": [
            "3b35c36b1df6f53142746e3921133971c4a0409cd56afcc4f4ec05b1bc1a9ee1",
            "4ae68457d5977160e77c4e01bd28f07ffdca0840947b0e4a1e9fb119d4150927",
            "b81ef285225471e2db8dbb5bedb58f4cf4da1c8aa1fb44ed29ff894f675a8953",
            "c7feda53f890074be86a7778efa672b5d70a9a323831304889815e2fc5dcb26c",
            "14a121bcc178ba9b5044d9ddde7fa21dd01e53b6382de4d9fbc19a86fdc756f2",
            "ad68debd6c9fec9a3f5fd6ad4990300e5e379ac283f7d400fad4b4cfc1b67b77",
            "a2e36d561ab8026d6771cae79e003e9bc3a674b27cda8eedf2e78b5f24ad3396",
            "323cce6a474f98003bf3661dabde98fbf916cf2ffb49cbd52d36d35fbc09ffb2",
        ],
        "data": [None] * 20,
    },
}
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
        settings: As :class:`~lightning_perl.data.base.ConversationDataModule`.

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
        upstream = _FOLDERS[self.task][1]
        remotes = []
        for kind, wanted in (("data", self.demonstrations), ("reward", self.thumbs)):
            if wanted and not self._files(kind):
                for number, sha256 in enumerate(_SUMS[self.task][kind]):
                    path = f"{upstream}/{kind}/{kind}_{number:02d}.json"
                    remotes.append(Remote(path, f"{_RAW}/{path}", sha256))
        fetch_all(remotes, self.data_dir)

    def read(self) -> Splits:
        """Returns demonstrations and rated turns, divided by dialog."""
        splits = Splits([], [], [])
        if self.demonstrations:
            self._divide_demonstrations(self._items("data"), splits)
        if self.thumbs:
            self._divide_thumbs(self._items("reward"), splits)
        return splits

    def _items(self, kind: str) -> list[Item]:
        files = self._files(kind)
        if not files:
            short, upstream = _FOLDERS[self.task]
            raise FileNotFoundError(
                f"No {kind}_*.json (or {kind}_*.json.gz) in {self.data_dir / short / kind} (data.data_dir = "
                f"{str(self.data_dir)!r}). Download {upstream}/{kind}/{kind}_*.json of {_HOME} and put the files "
                f"there, or point data.data_dir at the folder that holds {upstream}/."
            )
        return [item for file in files for item in self._items_of(file, kind)]

    def _items_of(self, file: Path, kind: str) -> Iterator[Item]:
        if ".tsv" in file.suffixes:
            return usable(tsv_rows(file, self.bad_row), _next_turns, self.bad_row)
        read = _dialog if kind == "data" else _rated_turn
        return usable(json_rows(file, self.bad_row), read, self.bad_row)

    def _files(self, kind: str) -> list[Path]:
        short, upstream = _FOLDERS[self.task]
        patterns = [f"{kind}/{kind}_*.json"]
        if self.task == "ticketing" and kind == "data":
            patterns += ["sft/train-*.tsv", "splits/train/train-*.tsv"]
        for pattern in patterns:
            for folder in (f"{short}/", f"{upstream}/", ""):
                files = matching(self.data_dir, f"{folder}{pattern}")
                if files:
                    return files
        return []

    def _divide_demonstrations(self, items: list[Item], splits: Splits) -> None:
        # Another hash than hold_out's, or the kept dialogs would all be held out.
        rows = self.distinct(items)
        ordered = sorted(rows, key=lambda row: stable_hash(f"kept {first_row(row).dialog}"))
        kept = ordered[: self.max_demonstrations]
        held = hold_out((first_row(row).dialog for row in kept), 2 * self.val_fraction)
        # A single dialog validates: a checkpoint callback may watch that loss, nothing watches the test's.
        test = set(sorted(held, key=stable_hash)[::2]) if len(held) > 1 else set()
        for row in kept:
            dialog = first_row(row).dialog
            held_splits = splits.test if dialog in test else splits.val
            (held_splits if dialog in held else splits.train).append(row)

    def _divide_thumbs(self, items: list[Item], splits: Splits) -> None:
        rows = self.distinct(items)
        folds = assign_folds((first_row(row).dialog for row in rows), self.folds)
        splits.test.extend(row for row in rows if folds[first_row(row).dialog] == self.fold)
        training = [row for row in rows if folds[first_row(row).dialog] in self.train_folds]
        for split, part in zip(splits, held_out(training, self.val_fraction), strict=False):
            split.extend(part)


def api_call(name: str, arguments: object) -> Turn:
    """Returns an agent's call of an API, as text: ``call get_menu_items {"query": "espresso"}``."""
    return Turn("agent", _joined("call", name, arguments))


def api_answer(name: str, response: object) -> Turn:
    """Returns an API's answer, as text: ``finish_order {"success": true}``."""
    return Turn("api", _joined(name, response))


def _joined(*parts: object) -> str:
    """Joins words and JSON; a string is kept as it is, None and an empty one are left out."""
    texts = [
        part if isinstance(part, str) else json.dumps(part, ensure_ascii=False)
        for part in parts
        if part is not None
    ]
    return " ".join(text for text in texts if text)


def dialog_key(context: Sequence[Turn], response: Sequence[Turn]) -> str:
    """Returns the group of a rated row: the first two turns of its context, or of context and answer.

    Rows are steps of shared dialogs, each under an id of its own; a dialog opens with a greeting and a request.
    """
    turns = context[:2] if len(context) >= 2 else [*context, *response]
    return json.dumps(turns, ensure_ascii=False)


def _rated_turn(row: dict[str, Any], where: str) -> Row:
    turns = _parsed(row, "context", where)
    if not isinstance(turns, list):
        raise wrong_type(where, "'context' must hold a list", turns)
    context = tuple(_turn(turn, where) for turn in turns)
    response = (_turn(_parsed(row, "generation", where), where),)
    label = value_of(row, "reward", where)
    if not isinstance(label, int | float) or label not in (0, 1):
        raise wrong_type(where, "'reward' must be 0.0 or 1.0", label)
    dialog = dialog_key(context, response)
    return Row(context, response, float(label), label == 1, dialog, where)


def _parsed(row: Mapping[str, Any], key: str, where: str) -> object:
    text = value_of(row, key, where)
    if not isinstance(text, str):
        raise wrong_type(where, f"{key!r} must be JSON in a string", text)
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise BadRow(
            "broken JSON", f"{where}: {key!r} holds broken JSON ({error}). Download the file again."
        ) from error


def _turn(turn: object, where: str) -> Turn:
    match turn:
        case {"role": "user" | "agent" as role, "text": str(text)}:
            return Turn(role, text)
        case {"role": "agent", "api": dict(api)} if len(api) == 1:
            return api_call(*next(iter(api.items())))
        case {"role": "api", "response": dict(response)} if len(response) == 1:
            return api_answer(*next(iter(response.items())))
    raise _not_a("turn", turn, where)


def _not_a(kind: str, value: object, where: str) -> BadRow:
    return BadRow(f"not a {kind}", f"{where}: not a {kind}: {json.dumps(value)[:80]}.")


def _dialog(row: dict[str, Any], where: str) -> Row:
    """Reads a dialog of TM-4 (``annotations``) or TM-3 (``apis``)."""
    turns: list[Turn] = []
    words: list[str] = []
    utterances = value_of(row, "utterances", where)
    if not isinstance(utterances, list):
        raise wrong_type(where, "'utterances' must be a list", utterances)
    for utterance in utterances:
        match utterance:
            case {"speaker": "user" | "assistant" as speaker, "text": str(text)}:
                words.append(text)
                turns.append(Turn("user" if speaker == "user" else "agent", text))
                turns += _calls(utterance, where)
            case _:
                raise _not_a("spoken utterance", utterance, where)
    agent = [number for number, turn in enumerate(turns) if turn.role == "agent"]
    if not agent:
        raise BadRow("dialog without an agent turn", f"{where}: no agent turn to imitate.")
    # A tail that ends on the user or an API has no answer to learn.
    context, response = tuple(turns[: agent[0]]), tuple(turns[agent[0] : agent[-1] + 1])
    # Some dialogs repeat another's words, with other order numbers in the API's answers.
    return Row(context, response, None, True, json.dumps(words, ensure_ascii=False), where)


def _calls(utterance: Mapping[str, Any], where: str) -> list[Turn]:
    """Returns the calls and answers that belong to an utterance; they come after its words."""
    match utterance:
        case {"apis": list(calls)}:
            return [turn for call in calls for turn in _named_call(call, where)]
        case {"annotations": list(annotations)}:
            return _annotated_calls(annotations, where)
        case {"apis": other} | {"annotations": other}:
            raise wrong_type(where, "'apis' and 'annotations' must be lists", other)
    return []


def _named_call(call: object, where: str) -> list[Turn]:
    match call:
        case {"name": str(name), "args": dict(arguments), "response": dict(response)}:
            return [api_call(name, arguments), api_answer(name, response)]
    raise _not_a("call of an API", call, where)


def _annotated_calls(annotations: list[object], where: str) -> list[Turn]:
    """Joins the flat annotations of a user utterance to calls and answers, by their numbers."""
    calls: dict[str, dict[str, str]] = {}
    for annotation in annotations:
        match annotation:
            case {"name": str(name), "value": str(value), "context": str(context)}:
                calls.setdefault(context.rsplit("_", 1)[-1], {})[name] = value
            case _:
                raise _not_a("named annotation", annotation, where)
    turns = []
    for call in calls.values():
        if "api_call" in call:
            turns.append(api_call(call["api_call"], _loaded(call, "request")))
        if "api_response" in call:
            turns.append(api_answer(call["api_response"], _loaded(call, "response")))
    return turns


def _loaded(call: dict[str, str], key: str) -> object:
    """Returns the parsed JSON, so that both corpora space it alike; broken JSON as the text."""
    try:
        return parse_json(call[key]) if key in call else None
    except json.JSONDecodeError:
        return call[key]


def _next_turns(cells: list[str], where: str) -> Row:
    """Reads the agent's next turns after a history, of ticketing's tables."""
    if len(cells) != 3:
        wanted = "expected 3 columns (context, target, conversation id)"
        raise BadRow("wrong number of columns", f"{where}: {wanted}, got {len(cells)}.")
    latest, _, history = cells[0].partition("<C>")
    context = (*_tagged_turns(history, where), *_tagged_turns(latest, where))
    target = tuple(_tagged_turns(cells[1], where))
    if any(turn.role != "agent" for turn in target):
        raise BadRow("no answer", f"{where}: the target holds a turn that is not the agent's.")
    return Row(context, target, None, True, cells[2], where)


def _tagged_turns(text: str, where: str) -> list[Turn]:
    """Parses ``<U>text<PN>api<PAN>name<PAV>value``, in angle or square brackets, to turns."""
    before, *parts = _TAG.split(text)
    if before.strip():
        raise BadRow("not a turn", f"{where}: text before the first tag: {before[:80]!r}.")
    tagged: list[tuple[str, str, dict[str, list[str]]]] = []
    for tag, value in zip(parts[::2], parts[1::2], strict=True):
        if not tag.endswith(("AN", "AV")):
            tagged.append((tag, value, {}))
            continue
        owner, _, values = tagged[-1] if tagged else ("", "", {})
        if owner not in ("PN", "PR") or (tag.endswith("V") and not values):
            raise BadRow("not a turn", f"{where}: <{tag}> without the name that it belongs to.")
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
        return api_answer(text, values)
    # As in the rated rows: an argument is a string, a list only where it has several values.
    return api_call(
        text, {key: value[0] if len(value) == 1 else value for key, value in values.items()}
    )
