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

from lightning_perl.data.base import ConversationDataModule
from lightning_perl.data.corpus import matching, usable, value_of
from lightning_perl.data.download import Remote, fetch_all
from lightning_perl.data.files import json_rows, parse_json, tsv_rows
from lightning_perl.data.folds import assign_folds, hold_out, stable_hash
from lightning_perl.data.rows import Item, Row, Splits, Turn, first_row
from lightning_perl.data.tokenization import BadRow

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


def render_call(name: str, arguments: object) -> str:
    """Returns an API call as the text of an agent turn.

    Args:
        name: The API; may be empty.
        arguments: Anything JSON can say, in its own order; a string that is no JSON is kept as it
            is; None leaves it out.

    Example:
        >>> render_call("get_menu_items", {"query": "espresso"})
        'call get_menu_items {"query": "espresso"}'
    """
    return " ".join(part for part in ("call", name, _dump(arguments)) if part)


def render_answer(name: str, response: object) -> str:
    """Returns an API's answer as the text of an ``api`` turn.

    Args:
        name: The API that answers.
        response: As ``arguments`` of :func:`render_call`.

    Example:
        >>> render_answer("finish_order", {"success": True})
        'finish_order {"success": true}'
    """
    return " ".join(part for part in (name, _dump(response)) if part)


def _dump(value: object) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


def dialog_key(context: Sequence[Turn], response: Sequence[Turn]) -> str:
    """Returns the group of a rated row: the first two turns of its context.

    Rows are steps of shared dialogs, each under an id of its own, and every dialog opens with one
    greeting and the user's request. A context of fewer turns takes its answer in.
    """
    turns = context[:2] if len(context) >= 2 else [*context, *response]
    return json.dumps(turns, ensure_ascii=False)


class TaskmasterDataModule(ConversationDataModule):
    """Demonstrated dialogs and human thumbs of the Taskmaster corpora.

    Rated turns are divided into folds by dialog: ``fold`` is the test split, the dialogs of
    ``train_folds`` are training and validation. Folds and validation dialogs depend on the rows
    alone, so every run, whatever its seed, sees the same. Demonstrations share no dialog with the
    rated turns; ``val_fraction`` of their dialogs go to validation and as many to test.

    Demonstrations are whole dialogs, of which the agent's turns count. Of ticketing they may also be
    the agent's next turns after a history (``splits/train/train-*.tsv``), read where the dialogs
    are not there. API calls are agent turns.

    Args:
        data_dir: The folder that holds ``taskmaster-coffee/`` and ``taskmaster-ticketing/``, or the
            original repository's ``TM-4-2024/`` and ``TM-3-2020/``, or one such folder itself.
            Files may be gzip-compressed. What is not there, ``fit`` downloads.
        task: ``coffee`` (86% thumbs up) or ``ticketing`` (16% thumbs up).
        demonstrations: Read the demonstrated dialogs.
        thumbs: Read the rated turns.
        max_demonstrations: Keep this many demonstrated dialogs, always the same ones; None all.
        folds: Into how many folds the rated dialogs are divided.
        fold: The fold that is the test split.
        train_folds: Folds to train and validate on; None takes every other fold.
        val_fraction: Share of the training dialogs that become the validation split; above 0 at
            least one dialog of two or more.
        on_bad_row: ``reject`` counts the rows that cannot be used (the corpora have empty answers,
            and turns longer than the window); ``raise`` stops at the first, with file and row. A
            file that cannot be read is one such row.
        settings: As :class:`~lightning_perl.data.base.ConversationDataModule`.

    Raises:
        ValueError: An argument out of its range; in ``setup`` a bad row, or no training row.
        FileNotFoundError: No local copy and no network, with what to download from where.
    """

    pairs: ClassVar[bool] = False

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase,
        data_dir: str | Path,
        task: Literal["coffee", "ticketing"] = "coffee",
        demonstrations: bool = True,
        thumbs: bool = True,
        max_demonstrations: int | None = None,
        folds: int = 5,
        fold: int = 0,
        train_folds: Sequence[int] | None = None,
        val_fraction: float = 0.1,
        on_bad_row: Literal["reject", "raise"] = "reject",
        **settings: Any,
    ) -> None:
        super().__init__(tokenizer, on_bad_row=on_bad_row, **settings)
        if task not in _FOLDERS:
            raise ValueError(f"data.task must be one of {sorted(_FOLDERS)}, got {task!r}.")
        if not (demonstrations or thumbs):
            raise ValueError("data.demonstrations and data.thumbs are both false: nothing to read.")
        if folds < 2 or not 0 <= fold < folds:
            raise ValueError(
                f"data.fold must be from 0 to data.folds - 1 and data.folds at least 2, got fold "
                f"{fold} of {folds}."
            )
        training = [other for other in range(folds) if other != fold]
        if train_folds is not None:
            wrong = sorted(set(train_folds) - set(training))
            if wrong or not train_folds:
                raise ValueError(
                    f"data.train_folds must be some of {training} (not the test fold {fold}), got "
                    f"{list(train_folds)}."
                )
            training = sorted(set(train_folds))
        if not 0 <= val_fraction < 0.5:
            raise ValueError(
                f"data.val_fraction must be at least 0 and below 0.5, got {val_fraction}."
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
        """Downloads what is asked for from the original repository, unless it is in ``data_dir``.

        Raises:
            FileNotFoundError: No network.
            ValueError: What came is not the file.
        """
        upstream = _FOLDERS[self.task][1]
        remotes = []
        for kind, wanted in (("data", self.demonstrations), ("reward", self.thumbs)):
            if wanted and not self._files(kind):
                names = [f"{kind}/{kind}_{n:02d}.json" for n in range(len(_SUMS[self.task][kind]))]
                remotes += [
                    Remote(f"{upstream}/{name}", f"{_RAW}/{upstream}/{name}", sha256)
                    for name, sha256 in zip(names, _SUMS[self.task][kind], strict=True)
                ]
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
            raise self._missing(kind)
        return [item for file in files for item in self._items_of(file, kind)]

    def _items_of(self, file: Path, kind: str) -> Iterator[Item]:
        if ".tsv" in file.suffixes:
            return usable(tsv_rows(file, self.bad_row), _ticketing_turns, self.bad_row)
        item = _dialog if kind == "data" else _rated_turn
        return usable(json_rows(file, self.bad_row), item, self.bad_row)

    def _divide_demonstrations(self, items: list[Item], splits: Splits) -> None:
        # Another hash than hold_out's, or the kept dialogs would all be held out.
        rows = self.distinct(items)
        ordered = sorted(rows, key=lambda row: stable_hash(f"kept {first_row(row).dialog}"))
        kept = ordered[: self.max_demonstrations]
        held = hold_out((first_row(row).dialog for row in kept), 2 * self.val_fraction)
        # A single dialog validates: a checkpoint callback may watch that loss, nothing watches the
        # test's.
        test = set(sorted(held, key=stable_hash)[::2]) if len(held) > 1 else set()
        for row in kept:
            if first_row(row).dialog in test:
                splits.test.append(row)
            elif first_row(row).dialog in held:
                splits.val.append(row)
            else:
                splits.train.append(row)

    def _divide_thumbs(self, items: list[Item], splits: Splits) -> None:
        rows = self.distinct(items)
        folds = assign_folds((first_row(row).dialog for row in rows), self.folds)
        training = [row for row in rows if folds[first_row(row).dialog] in self.train_folds]
        held = hold_out((first_row(row).dialog for row in training), self.val_fraction)
        splits.test.extend(row for row in rows if folds[first_row(row).dialog] == self.fold)
        for row in training:
            part = splits.val if first_row(row).dialog in held else splits.train
            part.append(row)

    def _files(self, kind: str) -> list[Path]:
        short, upstream = _FOLDERS[self.task]
        patterns = [f"{kind}/{kind}_*.json"]
        if self.task == "ticketing" and kind == "data":
            patterns += ["sft/train-*.tsv", "splits/train/train-*.tsv"]
        for pattern in patterns:
            for folder in (f"{short}/", f"{upstream}/", ""):
                found = matching(self.data_dir, f"{folder}{pattern}")
                if found:
                    return found
        return []

    def _missing(self, kind: str) -> FileNotFoundError:
        short, upstream = _FOLDERS[self.task]
        return FileNotFoundError(
            f"No {kind}_*.json (or {kind}_*.json.gz) in {self.data_dir / short / kind} "
            f"(data.data_dir = {str(self.data_dir)!r}). Download {upstream}/{kind}/{kind}_*.json of "
            f"{_HOME} and put the files there, or point data.data_dir at the folder that holds "
            f"{upstream}/."
        )


def _parse(row: Mapping[str, Any], key: str, where: str) -> object:
    text = value_of(row, key, where)
    if not isinstance(text, str):
        raise BadRow(
            "wrong type",
            f"{where}: {key!r} must be JSON in a string, got {type(text).__name__}. Download the "
            "file again.",
        )
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
            ((name, arguments),) = api.items()
            return Turn("agent", render_call(name, arguments))
        case {"role": "api", "response": dict(response)} if len(response) == 1:
            ((name, answer),) = response.items()
            return Turn("api", render_answer(name, answer))
    raise BadRow(
        "not a turn",
        f"{where}: not a turn: {json.dumps(turn)[:80]}. Expected a role (user, agent, api) with a "
        "text, one api call or one api response.",
    )


def _rated_turn(row: dict[str, Any], where: str) -> Row:
    turns = _parse(row, "context", where)
    if not isinstance(turns, list):
        raise BadRow(
            "wrong type", f"{where}: 'context' must hold a list, got {type(turns).__name__}."
        )
    context = tuple(_turn(turn, where) for turn in turns)
    response = (_turn(_parse(row, "generation", where), where),)
    label = value_of(row, "reward", where)
    if not isinstance(label, int | float) or label not in (0, 1):
        raise BadRow("wrong type", f"{where}: 'reward' must be 0.0 or 1.0, got {label!r}.")
    return Row(
        context=context,
        response=response,
        label=float(label),
        imitate=label == 1,
        dialog=dialog_key(context, response),
        where=where,
    )


def _dialog(row: dict[str, Any], where: str) -> Row:
    """Reads a dialog of TM-4 (``annotations``) or TM-3 (``apis``)."""
    turns: list[Turn] = []
    spoken: list[str] = []
    utterances = value_of(row, "utterances", where)
    if not isinstance(utterances, list):
        raise BadRow(
            "wrong type", f"{where}: 'utterances' must be a list, got {type(utterances).__name__}."
        )
    for utterance in utterances:
        match utterance:
            case {"speaker": "user" | "assistant" as speaker, "text": str(text)}:
                spoken.append(text)
                turns.append(Turn("user" if speaker == "user" else "agent", text))
                turns += _calls(utterance, where)
            case _:
                raise BadRow(
                    "not an utterance", f"{where}: not an utterance: {json.dumps(utterance)[:80]}."
                )
    # Some dialogs repeat another's words, with other order numbers in the API's answers.
    return _demonstration(turns, json.dumps(spoken, ensure_ascii=False), where)


def _demonstration(turns: list[Turn], dialog: str, where: str) -> Row:
    agent = [number for number, turn in enumerate(turns) if turn.role == "agent"]
    if not agent:
        raise BadRow(
            "dialog without an agent turn",
            f"{where}: has no agent turn to imitate. Set on_bad_row: reject.",
        )
    # A tail that ends on the user or an API has no answer to learn.
    return Row(
        context=tuple(turns[: agent[0]]),
        response=tuple(turns[agent[0] : agent[-1] + 1]),
        label=None,
        imitate=True,
        dialog=dialog,
        where=where,
    )


def _calls(utterance: Mapping[str, Any], where: str) -> list[Turn]:
    """Returns the calls and answers that belong to an utterance; they come after its words."""
    match utterance:
        case {"apis": list(calls)}:
            return [turn for call in calls for turn in _named_call(call, where)]
        case {"annotations": list(annotations)}:
            return _annotated_calls(annotations, where)
        case {"apis": other} | {"annotations": other}:
            raise BadRow(
                "wrong type",
                f"{where}: 'apis' and 'annotations' must be lists, got {type(other).__name__}.",
            )
    return []


def _named_call(call: object, where: str) -> list[Turn]:
    match call:
        case {"name": str(name), "args": dict(arguments), "response": dict(response)}:
            return [
                Turn("agent", render_call(name, arguments)),
                Turn("api", render_answer(name, response)),
            ]
    raise BadRow("not an API call", f"{where}: not an API call: {json.dumps(call)[:80]}.")


def _annotated_calls(annotations: list[object], where: str) -> list[Turn]:
    """Joins the flat annotations of a user utterance to calls and answers, by their numbers."""
    calls: dict[str, dict[str, str]] = {}
    for annotation in annotations:
        match annotation:
            case {"name": str(name), "value": str(value), "context": str(context)}:
                calls.setdefault(context.rsplit("_", 1)[-1], {})[name] = value
            case _:
                raise BadRow(
                    "not an annotation",
                    f"{where}: not an annotation: {json.dumps(annotation)[:80]}.",
                )
    turns = []
    for call in calls.values():
        if "api_call" in call:
            turns.append(Turn("agent", render_call(call["api_call"], _loaded(call, "request"))))
        if "api_response" in call:
            answer = render_answer(call["api_response"], _loaded(call, "response"))
            turns.append(Turn("api", answer))
    return turns


def _loaded(call: dict[str, str], key: str) -> object:
    """Returns the parsed JSON, so that both corpora space it alike; broken JSON as the text."""
    try:
        return parse_json(call[key]) if key in call else None
    except json.JSONDecodeError:
        return call[key]


def _ticketing_turns(fields: list[str], where: str) -> Row:
    if len(fields) != 3:
        raise BadRow(
            "wrong number of columns",
            f"{where}: expected 3 columns (context, target, conversation id), got "
            f"{len(fields)}. Download the file again.",
        )
    latest, _, history = fields[0].partition("<C>")
    context = [*_linear_turns(history, where), *_linear_turns(latest, where)]
    target = _linear_turns(fields[1], where)
    if any(turn.role != "agent" for turn in target):
        raise BadRow("no answer", f"{where}: the target holds a turn that is not the agent's.")
    return Row(
        context=tuple(context),
        response=tuple(target),
        label=None,
        imitate=True,
        dialog=fields[2],
        where=where,
    )


def _linear_turns(text: str, where: str) -> list[Turn]:
    """Parses ``<U>text<PN>api<PAN>name<PAV>value``, in angle or square brackets, to turns."""
    parts = _TAG.split(text)
    if parts[0].strip():
        raise BadRow("not a turn", f"{where}: text before the first tag: {parts[0][:80]!r}.")
    turns: list[Turn] = []
    api: tuple[Literal["agent", "api"], str, dict[str, list[str]]] | None = None
    for tag, value in zip(parts[1::2], parts[2::2], strict=True):
        if tag in ("PAN", "PRAN", "PAV", "PRAV"):
            if api is None or (tag.endswith("V") and not api[2]):
                raise BadRow("not a turn", f"{where}: <{tag}> without the name that it belongs to.")
            if tag.endswith("N"):
                api[2].setdefault(value, [])
                key = value
            else:
                api[2][key].append(value)
            continue
        turns += _linear_api(api)
        api = None
        if tag in ("U", "A"):
            turns.append(Turn("user" if tag == "U" else "agent", value))
        elif tag in ("PN", "PR"):
            api = ("agent" if tag == "PN" else "api", value, {})
    return turns + _linear_api(api)


def _linear_api(
    api: tuple[Literal["agent", "api"], str, dict[str, list[str]]] | None,
) -> list[Turn]:
    if api is None:
        return []
    role, name, values = api
    if role == "api":
        return [Turn("api", render_answer(name, values))]
    # As in the rated rows: an argument is a string, a list only where it has several values.
    arguments = {key: value[0] if len(value) == 1 else value for key, value in values.items()}
    return [Turn("agent", render_call(name, arguments))]
