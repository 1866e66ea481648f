"""How public preference data writes its rows: each dialect says what it looks like, and reads a row as our own.

A dialect is a function from a row to rows in the names of `PreferenceDataModule`'s columns. It changes names and
nesting, and leaves texts and messages to :mod:`lightning_perl.data.messages`. Where no answer was preferred, it
says ``tie``. The first dialect that a row looks like reads it; :func:`flat` reads all others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, TypeAlias

from lightning_perl.data.messages import reading, transcript
from lightning_perl.data.reading import parse_json
from lightning_perl.data.rows import EMPTY_PROMPT, BadRow

AnyRow: TypeAlias = Mapping[str, Any]
OwnRow: TypeAlias = dict[str, Any]

#: What a column of ours is called elsewhere; the house's own name comes first.
ALIASES = {
    "prompt": "prompt question instruction query user_input user_prompt orig_instruction context_messages "
    "trajectory",
    "chosen": "chosen chosen_response preferred preferred_response preferred_output better response_j pos_resp "
    "pos accepted",
    "rejected": "rejected rejected_response rejected_messages dispreferred dispreferred_response "
    "non_preferred_output worse response_k neg_resp neg",
    "response": "response completion output answer reply",
    "messages": "messages conversations conversation dialog",
    "label": "label kto_tag thumb thumbs_up is_safe",
    "rating": "rating",
    "system": "system system_prompt system_message",
    "input": "input context",
    "history": "history",
    "tie": "tie",
    "margin": "margin",
    "weight": "weight sample_weight",
    "first": "first",
    "second": "second",
    "preference": "preference",
    "answers": "answers",
    "scores": "scores",
    "ranks": "ranks",
}
NAMES = tuple(ALIASES)
#: Those that say what an answer, or a row, is worth.
MARKS = frozenset({"label", "rating", "preference", "scores", "ranks", "weight"})
_ALIASES = {name: aliases.split() for name, aliases in ALIASES.items()}
_VERDICT = re.compile(
    r"(?:\A|[_.-])(labels?|ratings?|scores?|rewards?|ranks?|ranking|preference|preferred|winner|choice|verdict|"
    r"votes?|upvotes?|thumbs?|feedback|ties?|margin|strength|helpfulness|correctness|coherence|complexity|"
    r"verbosity|toxicity|harmlessness|honesty|quality|safer?|chosen|rejected|better|worse|best|worst|liked?|dislikes?|"
    r"reactions?|stars?|grade|good|bad|kto|(?:in)?correct(?:ed|ions?)?|revis(?:ed|ions?)|edited|passed|"
    r"flagged|harmful|toxic|unsafe)(?:\Z|[_.-])",
    re.IGNORECASE,
)
#: What may stand before the side in a verdict: "model_a", "response 1", "2.0".
_SIDE = re.compile(
    r"(?:(?:the )?(?:\w+[ _-])?(?:assistant|model|response|answer|output|completion|summary|choice|option|text)"
    r"[ _-]?)?([a-z]|first|second|\d+)(?:\.0)?"
)
_STEMS = "response answer output completion summary generation conversation conv orig_response human_ref reply"
_SUFFIXES = (("0", "1"), ("1", "2"), ("a", "b"), ("A", "B"))
_AB = [
    (f"{stem}{dash}{first}", f"{stem}{dash}{second}", first, second)
    for stem in _STEMS.split()
    for dash in ("_", "", "-")
    for first, second in _SUFFIXES
]
_VERDICTS = (
    "preference better_response_id winner choice preferred preferred_response human_preference orig_preference "
    "verdict selected better chosen label"
)
#: Verdicts that are below 0 where the first answer is better, and above where the second is.
_SIGNED = ("preference_strength", "overall_preference")
#: Where the higher one is better: of an answer's column, or of what the column ends with.
_SCORES = "score_{1} score{1} rating_{1} rating{1} {0}_score {0}_rating winner_model_{1}"


@lru_cache(maxsize=1024)
def _verdict_keys(keys: tuple[str, ...]) -> tuple[str, ...]:
    # userRating is read as user_Rating.
    return tuple(key for key in keys if _VERDICT.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key)))


def verdict_keys(row: AnyRow) -> list[str]:
    """Returns the columns of a row that say by their name that they hold a verdict, and are not empty."""
    return [key for key in _verdict_keys(tuple(row)) if row[key] not in (None, "", [])]


@lru_cache(maxsize=1024)
def _names(keys: tuple[str, ...]) -> dict[str, list[str]]:
    """Returns the columns that may be ours by their name."""
    found = {}
    for name, aliases in _ALIASES.items():
        here = [alias for alias in aliases if alias in keys]
        if here:
            # The house's own name comes first, but for prompts: the other one may be what the answer is about.
            found[name] = here[:1] if here[0] == name != "prompt" else here
    return found


def flat(row: AnyRow) -> list[OwnRow]:
    """Returns the row with our names for its columns; refuses two that could both be one of ours and differ."""
    own = {}
    for name, columns in _names(tuple(row)).items():
        filled = [column for column in columns if row[column] is not None]
        filled = [column for column in filled if row[column] != ""] or filled[:1]
        if any(row[column] != row[filled[0]] for column in filled[1:]):
            raise BadRow(
                f"ambiguous columns: the columns {filled} could each be the {name}. Name one in data.columns: "
                f"{{{name}: {filled[0]}}}."
            )
        if filled:
            own[name] = row[filled[0]]
    return [own]


def value_at(row: Any, path: str) -> Any:  # noqa: ANN401
    """Returns the value of a column, or of a dotted path such as ``info.posts.0.text``; None without it."""
    if isinstance(row, Mapping) and path in row:
        return row[path]
    head, dot, last = path.rpartition(".")
    if dot:
        return value_at(value_at(row, head), last)
    here = isinstance(row, list) and path.isdigit() and int(path) < len(row)
    return row[int(path)] if here else None


def side_of(verdict: object, first: str = "first", second: str = "second") -> int | None:
    """Returns 0 or 1 for the preferred one of two answers, whose columns end with these words, and None for a tie.

    Letters mean the first and the second answer whatever their columns are called; numbers only where the columns
    are numbered so.
    """
    said = str(verdict).strip().lower()
    if re.match(r"(?:tied?|both|neither|equal|same|none)(?![a-z])", said):
        return None
    match = _SIDE.fullmatch(said)
    last = match[1] if match else ""
    for side, names in enumerate(((first, "a", "first"), (second, "b", "second"))):
        if last in {name.lower() for name in names} and not isinstance(verdict, bool):
            return side
    raise BadRow(
        f"unclear preference: preference {verdict!r} does not say which of two answers is better. Write first, "
        "second or tie (or read the row with data.read_row)."
    )


def _judged(
    first: object, second: object, side: int | None, *verdict: str, **more: object
) -> list[OwnRow]:
    """Returns a pair, or a tie; ``verdict`` names the columns that said which answer is better."""
    if side not in (0, 1, None):
        raise BadRow(f"unclear preference: {list(verdict)} must say 0 or 1.")
    better, worse = (second, first) if side else (first, second)
    tie = {"tie": True} if side is None else {}
    return [{"chosen": better, "rejected": worse, "read": verdict, **more, **tie}]


def _by_scores(scores: Iterable[object]) -> int | None:
    one, other = numbers = [float(str(score)) for score in scores]
    if not all(map(math.isfinite, numbers)):
        raise BadRow(f"unclear preference: two scores must be finite numbers, got {numbers}.")
    return None if one == other else int(other > one)


def two_answers(row: AnyRow) -> list[OwnRow]:
    """Two answers side by side, and a column that says which is better."""
    sides = (names for names in _AB if names[0] in row and names[1] in row)
    one, other, first, second = next(sides, ("first", "second", "first", "second"))
    own = _shared({key: value for key, value in row.items() if key not in (one, other)})
    answers = row[one], row[other]
    third = other.removesuffix(second) + {"1": "2", "2": "3", "b": "c", "B": "C"}.get(second, "3")
    if row.get(third) is not None:
        raise BadRow(
            f"several answers: there is a third answer, {third!r}, which would not be read. Name the answers and "
            "their scores or ranks in data.columns (answers, scores or ranks), or read the row with "
            "data.read_row."
        )
    for key in _SIGNED:
        if row.get(key) is not None:
            strength = float(row[key])
            return _judged(*answers, _by_scores((-strength, strength)), key, **own)
    for key in _VERDICTS.split():
        if row.get(key) is not None:
            return _judged(*answers, side_of(row[key], first, second), key, **own)
    for form in _SCORES.split():
        columns = form.format(one, first), form.format(other, second)
        if None not in (scores := [row.get(column) for column in columns]):
            return _judged(*answers, _by_scores(scores), *columns, **own)
    return [{"first": answers[0], "second": answers[1], "sides": (first, second), **own}]


def _shared(row: AnyRow) -> OwnRow:
    """Returns what is read of a row beside its answers."""
    names = ("prompt", "system", "input", "history", "messages", "tie", "margin")
    return {name: value for name, value in flat(row)[0].items() if name in names}


def _comparison(row: AnyRow) -> list[OwnRow]:
    """OpenAI's summaries: two of a post or an article, of which a person chose one."""
    one, other = (summary["text"] for summary in row["summaries"])
    return _judged(one, other, int(row["choice"]), "choice", prompt=post_prompt(row["info"]))


def post_prompt(info: AnyRow) -> str:
    """Returns the prompt for a summary of a Reddit post or an article, in the format of OpenAI's release."""
    if info.get("article"):
        return f"{info['article']}\n\nTL;DR:"
    if not str(info.get("post") or "").strip():
        raise BadRow(EMPTY_PROMPT)
    heads = {"SUBREDDIT: r/": "subreddit", "TITLE: ": "title", "POST: ": "post"}
    lines = [f"{head}{info[key].strip()}" for head, key in heads.items() if info.get(key)]
    return "\n\n".join([*lines, "TL;DR:"])


def _axis(row: AnyRow) -> list[OwnRow]:
    """OpenAI's rated summaries: the overall mark, from 1 to 7."""
    summary = row["summary"]
    rated = {"response": summary["text"], "rating": summary["axes"].get("overall")}
    return [{"prompt": post_prompt(row["info"]), **rated}]


def _shp(row: AnyRow) -> list[OwnRow]:
    """Stanford's SHP: ``labels`` is 1 where the answer A is better, 0 where B is."""
    side = 1 - int(row["labels"])
    return _judged(row["human_ref_A"], row["human_ref_B"], side, "labels", prompt=row["history"])


def _arena(row: AnyRow) -> list[OwnRow]:
    """Chatbot Arena as Kaggle had it: JSON lists of the prompts and of both models' answers."""
    cells = [row[key] for key in ("prompt", "response_a", "response_b")]
    asked, *said = (parse_json(cell) if isinstance(cell, str) else cell for cell in cells)
    one, other = ([*zip(asked, answers, strict=True)] for answers in said)
    side = None if int(row["winner_tie"]) else int(row["winner_model_b"])
    return _judged(one, other, side, "winner_model_a", "winner_model_b", "winner_tie")


def _swift(row: AnyRow) -> list[OwnRow]:
    """ms-swift: the last message is the better answer, the worse one stands beside the dialog."""
    (own,) = flat(row)
    messages = own.pop("messages")
    return [own | {"prompt": messages[:-1], "chosen": messages[-1:]}]


def _step(row: AnyRow) -> list[OwnRow]:
    """Step-DPO: the steps before the one that was judged begin both answers."""
    steps = row["initial_reason_steps"]
    return flat({**row, **{side: f"{steps}{row[side]}" for side in ("chosen", "rejected")}})


def _answer_objects(row: AnyRow) -> list[OwnRow]:
    """UltraFeedback, Nectar, StackExchange, NeMo and others: a list of answers with scores or ranks."""
    column = next(key for key in _OBJECTS if key in row)
    answers = row[column]
    if not isinstance(answers, list) or not all(isinstance(answer, Mapping) for answer in answers):
        return flat(row)
    texts = ("response", "answer", "text", "completion", "content", "output")
    marks_of = ("overall_score", "score", "pm_score", "rating", "rank")
    text = next((key for key in texts if all(key in answer for answer in answers)), None)
    mark = next((key for key in marks_of if all(key in answer for answer in answers)), None)
    if text is None or mark is None:
        raise BadRow(
            f"several answers: {column} holds answers without one of {list(texts)} or without one of "
            f"{list(marks_of)}. Read the row with data.read_row."
        )
    rest = {key: value for key, value in row.items() if key != column}
    marks = {"ranks" if mark == "rank" else "scores": [answer[mark] for answer in answers]}
    return [_shared(rest) | {"answers": [answer[text] for answer in answers], **marks}]


def _parallel(row: AnyRow) -> list[OwnRow]:
    """Distilabel and others: a list of answers beside a list of their ratings."""
    column = next(
        key for key in ("generations", "responses", "completions", "text", "answers") if key in row
    )
    marks = next(key for key in ("ratings", "scores", "score", "ranks", "rank") if key in row)
    kind = "ranks" if "rank" in marks else "scores"
    return [_shared(row) | {"answers": row[column], kind: row[marks], "read": (marks,)}]


def _argilla(row: AnyRow) -> list[OwnRow]:
    """Argilla's exports: the fields of a record, and the first submitted value of each question."""
    values = {}
    for name, answers in (row.get("responses") or {}).items():
        given = [answer for answer in answers if answer.get("status") in (None, "submitted")]
        if given:
            values[name] = given[0]["value"]
    if not values:
        raise BadRow("no submitted response in this record. Set on_bad_row: reject.")
    fields = dict(row["fields"])
    ranking = next((value for value in values.values() if isinstance(value, list)), None)
    if ranking is None:
        return read({**fields, **values})
    answers = [fields.pop(entry["value"]) for entry in ranking]
    return [_shared(fields) | {"answers": answers, "ranks": [entry["rank"] for entry in ranking]}]


def _tree(row: AnyRow) -> list[OwnRow]:
    """OpenAssistant's trees: the ranked replies to every prompt of the tree."""
    rows: list[OwnRow] = []
    open_nodes: list[tuple[list[AnyRow], AnyRow]] = [([], row["prompt"])]
    while open_nodes:
        before, node = open_nodes.pop()
        said = [*before, {"role": node["role"], "content": node["text"]}]
        replies = node.get("replies") or []
        ranked = [reply for reply in replies if reply.get("rank") is not None]
        if node["role"] == "prompter" and len(ranked) > 1:
            texts = [reply["text"] for reply in ranked]
            rows.append(
                {"prompt": said, "answers": texts, "ranks": [reply["rank"] for reply in ranked]}
            )
        open_nodes += [(said, reply) for reply in replies]
    return rows


def _text(row: AnyRow) -> list[OwnRow]:
    """One text that holds a whole dialog with its speakers' tags."""
    own = flat(row)[0]
    messages = transcript(row["text"]) if isinstance(row["text"], str) else None
    return [own | {"messages": messages}] if messages else [own]


_LISTS = (
    "generations ratings",
    "responses scores",
    "responses ranks",
    "responses rank",
    "responses ratings",
    "completions scores",
    "answers ranks",
    "text score",
)
_OBJECTS = ("completions", "answers", "responses_and_scores", "responses")
_SWIFT = ("messages rejected_response", "messages rejected_messages")
#: By name, in the order in which they are tried: the columns that a row of this kind has, and its reader.
DIALECTS: dict[str, tuple[tuple[str, ...], Callable[[AnyRow], list[OwnRow]]]] = {
    "argilla": (("fields responses",), _argilla),
    "openassistant": (("message_tree_id prompt",), _tree),
    "openai_comparisons": (("info summaries choice",), _comparison),
    "openai_axis": (("info summary",), _axis),
    "shp": (("history human_ref_A human_ref_B labels",), _shp),
    "arena": (("prompt response_a response_b winner_model_b winner_tie",), _arena),
    "step_dpo": (("initial_reason_steps chosen rejected",), _step),
    "ms_swift": (_SWIFT, _swift),
    "parallel_lists": (_LISTS, _parallel),
    "answer_objects": (_OBJECTS, _answer_objects),
    "two_answers": (tuple(f"{one} {other}" for one, other, *_ in _AB), two_answers),
    "text": (("text",), _text),
}
_COLUMNS = [
    (name, frozenset(columns.split())) for name, kind in DIALECTS.items() for columns in kind[0]
]
_FIX = "Mend it, name its columns in data.columns, read it with data.read_row"


@lru_cache(maxsize=1024)
def dialect_of(keys: tuple[str, ...]) -> str | None:
    """Returns the name of the dialect that a row with these columns looks like; None for our own columns."""
    return next((name for name, columns in _COLUMNS if columns <= {*keys}), None)


def read(row: AnyRow, name: str | None = None) -> list[OwnRow]:
    """Returns what a row is in our own columns, read by the dialect of this name, or the one it looks like."""
    name = name or dialect_of(tuple(row))
    if name is None:
        return flat(row)
    with reading(name, _FIX):
        return DIALECTS[name][1](row)


def columns_of(row: AnyRow, name: str | None = None) -> set[str]:
    """Returns the columns by which a row is of a dialect."""
    name = name or dialect_of(tuple(row))
    alike = [columns for other, columns in _COLUMNS if other == name and columns <= row.keys()]
    return {column for columns in alike for column in columns}
