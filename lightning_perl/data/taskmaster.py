"""Taskmaster: coffee orders (TM-4) and movie tickets (TM-3) with API calls and human thumbs.

Source: https://github.com/google-research-datasets/Taskmaster, CC BY 4.0, Bill Byrne, Saravanan
Ganesh and Karthik Krishnamoorthi, Google LLC; the thumbs are those of PERL (arXiv 2403.10704).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lightning_perl.data.base import ConversationDataModule, parse_json
from lightning_perl.data.folds import assign_folds, hold_out, stable_hash
from lightning_perl.data.rows import Item, Row, Splits, Turn

_FOLDERS = {
    "coffee": ("taskmaster-coffee", "TM-4-2024"),
    "ticketing": ("taskmaster-ticketing", "TM-3-2020"),
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

    Coffee demonstrations are whole dialogs, of which the agent's turns count; ticketing ones are
    the agent's next turns after a history. API calls are agent turns.

    Args:
        tokenizer: A folder or a name that transformers loads; from Python also a tokenizer.
        data_dir: The folder that holds ``taskmaster-coffee/`` and ``taskmaster-ticketing/``, or the
            original repository's ``TM-4-2024/`` and ``TM-3-2020/``, or one such folder itself.
            Files may be gzip-compressed.
        task: ``coffee`` (86% thumbs up) or ``ticketing`` (16% thumbs up).
        demonstrations: Read the demonstrated dialogs.
        thumbs: Read the rated turns.
        max_demonstrations: Keep this many demonstrated dialogs, always the same ones; None all.
        folds: Into how many folds the rated dialogs are divided.
        fold: The fold that is the test split.
        train_folds: Folds to train and validate on; None takes every other fold.
        val_fraction: Share of the training dialogs that become the validation split; above 0 at
            least one dialog of two or more.
        rows: ``rated`` for :class:`~lightning_perl.batches.RatedBatch`, ``prompts`` for the
            distinct contexts as :class:`~lightning_perl.batches.PromptBatch`.
        batch_size: Rows of a training batch.
        val_batch_size: Rows of a validation or test batch; None takes ``batch_size``.
        max_tokens: Tokens of a row. Longer contexts lose whole turns on the left (ticketing has 86
            turns), longer demonstrated dialogs at their end.
        max_response_tokens: Tokens of an answer, EOS included.
        bucket: Batch rows of like length.
        seed: Seed of the order of rows.
        num_workers: Processes that collate.
        on_bad_row: ``reject`` counts the rows that cannot be used (the corpora have empty answers,
            and turns longer than the window); ``raise`` stops at the first. Files that are not in
            the corpus's form always stop.

    Raises:
        ValueError: An argument out of its range; in ``setup`` a broken file, with file and row.
        FileNotFoundError: In ``setup``, with what to download from where.
    """

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
        rows: Literal["rated", "prompts"] = "rated",
        batch_size: int = 8,
        val_batch_size: int | None = None,
        max_tokens: int = 512,
        max_response_tokens: int = 128,
        bucket: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        on_bad_row: Literal["reject", "raise"] = "reject",
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            rows=rows,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            max_tokens=max_tokens,
            max_response_tokens=max_response_tokens,
            bucket=bucket,
            seed=seed,
            num_workers=num_workers,
            on_bad_row=on_bad_row,
        )
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

    def read(self) -> Splits:
        """Returns demonstrations and rated turns, divided by dialog."""
        splits = Splits([], [], [])
        if self.demonstrations:
            rows = _coffee_dialogs if self.task == "coffee" else _ticketing_turns
            files = self._files(
                ("data", "data_*.json") if self.task == "coffee" else ("sft", "train-*.tsv"),
                ("data", "data_*.json")
                if self.task == "coffee"
                else ("splits/train", "train-*.tsv"),
            )
            self._divide_demonstrations([row for file in files for row in rows(file)], splits)
        if self.thumbs:
            files = self._files(("reward", "reward_*.json"), ("reward", "reward_*.json"))
            self._divide_thumbs([row for file in files for row in _rated_turns(file)], splits)
        return splits

    def _divide_demonstrations(self, rows: list[Row], splits: Splits) -> None:
        distinct: dict[tuple[tuple[Turn, ...], tuple[Turn, ...]], Row] = {}
        for row in rows:
            if not row.response:
                self.bad_row(
                    "dialog without an agent turn",
                    f"{row.where}: has no agent turn to imitate. Set on_bad_row: reject.",
                )
            elif (row.context, row.response) in distinct:
                self.report.notes["repeated demonstrations, used once"] += 1
            else:
                distinct[row.context, row.response] = row
        # Another hash than hold_out's, or the kept dialogs would all be held out.
        ordered = sorted(distinct.values(), key=lambda row: stable_hash(f"kept {row.dialog}"))
        kept = ordered[: self.max_demonstrations]
        held = hold_out((row.dialog for row in kept), 2 * self.val_fraction)
        # A single dialog validates: a checkpoint callback may watch that loss, nothing watches the
        # test's.
        test = set(sorted(held, key=stable_hash)[::2]) if len(held) > 1 else set()
        for row in kept:
            if row.dialog in test:
                splits.test.append(row)
            elif row.dialog in held:
                splits.val.append(row)
            else:
                splits.train.append(row)

    def _divide_thumbs(self, rows: list[Row], splits: Splits) -> None:
        seen: dict[tuple[tuple[Turn, ...], tuple[Turn, ...]], set[float | None]] = defaultdict(set)
        distinct = []
        for row in rows:
            labels = seen[row.context, row.response]
            if row.label in labels:
                self.report.notes["repeated rated turns, used once"] += 1
                continue
            labels.add(row.label)
            distinct.append(row)
        conflicts = sum(len(labels) > 1 for labels in seen.values())
        if conflicts:
            self.report.notes["answers with a thumb up and a thumb down, both kept"] = conflicts
        folds = assign_folds((row.dialog for row in distinct), self.folds)
        training = [row for row in distinct if folds[row.dialog] in self.train_folds]
        held = hold_out((row.dialog for row in training), self.val_fraction)
        splits.test.extend(row for row in distinct if folds[row.dialog] == self.fold)
        for row in training:
            part: list[Item] = splits.val if row.dialog in held else splits.train
            part.append(row)

    def _files(self, ours: tuple[str, str], original: tuple[str, str]) -> list[Path]:
        short, upstream = _FOLDERS[self.task]
        places = [
            (self.data_dir / short / ours[0], ours[1]),
            (self.data_dir / upstream / original[0], original[1]),
            (self.data_dir / ours[0], ours[1]),
            (self.data_dir / original[0], original[1]),
        ]
        for folder, pattern in places:
            # A file and its gzip are one file.
            found = {file.name.removesuffix(".gz"): file for file in folder.glob(f"{pattern}.gz")}
            found |= {file.name: file for file in folder.glob(pattern)}
            if found:
                return [found[name] for name in sorted(found)]
        folder, pattern = places[0]
        raise FileNotFoundError(
            f"No {pattern} (or {pattern}.gz) in {folder} (data.data_dir = {str(self.data_dir)!r}). "
            f"Download {upstream}/{original[0]}/{original[1]} of "
            "https://github.com/google-research-datasets/Taskmaster and put the files there, or "
            f"point data.data_dir at the folder that holds {upstream}/."
        )


def _text_of(file: Path) -> str:
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: byte {error.start} is not UTF-8. Download the file again."
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not a whole gzip file ({error}). Download it again.") from error


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = parse_json(_text_of(file))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}:{error.lineno}: broken JSON ({error.msg}, column {error.colno}). Download the "
            "file again."
        ) from error
    if not isinstance(rows, list):
        raise ValueError(f"{file}: expected an array of rows, got {type(rows).__name__}.")
    for number, row in enumerate(rows, start=1):
        where = f"{file}:{number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, got {type(row).__name__}.")
        yield where, row


def _value(row: dict[str, Any], key: str, where: str) -> object:
    if key not in row:
        raise ValueError(f"{where}: no key {key!r}; got {sorted(row)}. Is this the right file?")
    return row[key]


def _parse(row: dict[str, Any], key: str, where: str) -> object:
    text = _value(row, key, where)
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: {key!r} must be JSON in a string, got {type(text).__name__}. Download the "
            "file again."
        )
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: {key!r} holds broken JSON ({error}). Download the file again."
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
    raise ValueError(
        f"{where}: not a turn: {json.dumps(turn)[:80]}. Expected a role (user, agent, api) with a "
        "text, one api call or one api response."
    )


def _rated_turns(file: Path) -> Iterator[Row]:
    for where, row in _json_rows(file):
        turns = _parse(row, "context", where)
        if not isinstance(turns, list):
            raise ValueError(f"{where}: 'context' must hold a list, got {type(turns).__name__}.")
        context = tuple(_turn(turn, where) for turn in turns)
        response = (_turn(_parse(row, "generation", where), where),)
        label = _value(row, "reward", where)
        if not isinstance(label, int | float) or label not in (0, 1):
            raise ValueError(f"{where}: 'reward' must be 0.0 or 1.0, got {label!r}.")
        yield Row(
            context=context,
            response=response,
            label=float(label),
            imitate=label == 1,
            dialog=dialog_key(context, response),
            where=where,
        )


def _coffee_dialogs(file: Path) -> Iterator[Row]:
    for where, row in _json_rows(file):
        turns: list[Turn] = []
        spoken: list[str] = []
        utterances = _value(row, "utterances", where)
        if not isinstance(utterances, list):
            raise ValueError(
                f"{where}: 'utterances' must be a list, got {type(utterances).__name__}."
            )
        for utterance in utterances:
            match utterance:
                case {"speaker": "user", "text": str(text), "annotations": list(annotations)}:
                    spoken.append(text)
                    turns.append(Turn("user", text))
                    turns += _calls(annotations, where)
                case {"speaker": "assistant", "text": str(text)}:
                    spoken.append(text)
                    turns.append(Turn("agent", text))
                case _:
                    raise ValueError(f"{where}: not an utterance: {json.dumps(utterance)[:80]}.")
        # Some dialogs repeat another's words, with other order numbers in the API's answers.
        yield _demonstration(turns, json.dumps(spoken, ensure_ascii=False), where)


def _demonstration(turns: list[Turn], dialog: str, where: str) -> Row:
    agent = [number for number, turn in enumerate(turns) if turn.role == "agent"]
    first = agent[0] if agent else len(turns)
    # A tail that ends on the user or an API has no answer to learn.
    last = agent[-1] + 1 if agent else first
    return Row(
        context=tuple(turns[:first]),
        response=tuple(turns[first:last]),
        label=None,
        imitate=True,
        dialog=dialog,
        where=where,
    )


def _calls(annotations: list[dict[str, Any]], where: str) -> list[Turn]:
    """Joins the flat annotations of a user utterance to calls and answers, by their numbers."""
    calls: dict[str, dict[str, str]] = {}
    for annotation in annotations:
        match annotation:
            case {"name": str(name), "value": str(value), "context": str(context)}:
                calls.setdefault(context.rsplit("_", 1)[-1], {})[name] = value
            case _:
                raise ValueError(f"{where}: not an annotation: {json.dumps(annotation)[:80]}.")
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


def _ticketing_turns(file: Path) -> Iterator[Row]:
    for where, fields in _tsv_rows(file):
        if len(fields) != 3:
            raise ValueError(
                f"{where}: expected 3 columns (context, target, conversation id), got "
                f"{len(fields)}. Download the file again."
            )
        latest, _, history = fields[0].partition("<C>")
        context = [*_linear_turns(history, where), *_linear_turns(latest, where)]
        target = _linear_turns(fields[1], where)
        if any(turn.role != "agent" for turn in target):
            raise ValueError(f"{where}: the target holds a turn that is not the agent's.")
        yield Row(
            context=tuple(context),
            response=tuple(target),
            label=None,
            imitate=True,
            dialog=fields[2],
            where=where,
        )


def _tsv_rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    with io.StringIO(_text_of(file), newline="") as lines:
        reader = csv.reader(lines, "excel-tab", strict=True)
        number = 1
        try:
            for fields in reader:
                yield f"{file}:{number}", fields
                number += 1
        except csv.Error as error:
            raise ValueError(
                f"{file}:{number}: broken table ({error}). Download the file again."
            ) from error


def _linear_turns(text: str, where: str) -> list[Turn]:
    """Parses ``<U>text<PN>api<PAN>name<PAV>value``, in angle or square brackets, to turns."""
    parts = _TAG.split(text)
    if parts[0].strip():
        raise ValueError(f"{where}: text before the first tag: {parts[0][:80]!r}.")
    turns: list[Turn] = []
    api: tuple[Literal["agent", "api"], str, dict[str, list[str]]] | None = None
    for tag, value in zip(parts[1::2], parts[2::2], strict=True):
        if tag in ("PAN", "PRAN", "PAV", "PRAV"):
            if api is None or (tag.endswith("V") and not api[2]):
                raise ValueError(f"{where}: <{tag}> without the name that it belongs to.")
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
