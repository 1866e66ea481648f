"""Texts and message lists as people write them, read as turns."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from lightning_perl.data.reading import parse_json
from lightning_perl.data.rows import EMPTY_PROMPT, BadRow, Turn, blank, same

_Role = Literal["system", "user", "agent", "api"]
_NAMES: dict[_Role, str] = {
    "system": "system developer",
    "user": "user human prompter instruction input",
    "agent": "assistant agent gpt chatgpt bot model ai response function_call",
    "api": "tool function observation ipython",
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}
# A list of messages that somebody wrote into a cell: as JSON, as Python or as numpy prints it.
_WRITTEN = re.compile(r"""\s*(\[\s*)?\{\s*["'](role|from|content|value|text)["']\s*:""")
# How dialogs are written as one text; a text is a dialog where it begins with such a tag of a user or a system.
_TAGS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?:\A|\n\n)(Human|Assistant|\ASystem):",
        r"(?:\A|\n)(prompter|assistant):",
        r"(?:\A|\n)\s*(User|USER|Assistant|ASSISTANT|System|SYSTEM):",
        r"\s*### ?(Human|User|Assistant|System|Instruction|Response):",
        r"<\|im_start\|>(system|user|assistant)\n",
        r"<\|(system|user|prompter|assistant)\|>",
    )
)
_ENDS = re.compile(r"(?:<\|(?:im_end|endoftext|end)\|>|</s>)\s*\Z")
_EXPECTED = 'a list of {"role": "system" | "user" | "assistant" | "tool", "content": text} messages'


def wrong_type(column: str, expected: str, got: object) -> BadRow:
    """Returns the bad row of a value that is not what its column holds."""
    return BadRow(
        f"wrong type: {column} must be {expected}, got {type(got).__name__} ({str(got)[:40]!r})."
    )


@contextmanager
def reading(kind: str, fix: str = "Is it the right file? Download it again") -> Iterator[None]:
    """Makes a bad row of what cannot be read, as it is not what a row of this kind has."""
    try:
        yield
    except BadRow:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise BadRow(
            f"broken row: looks like a row of {kind!r}, but cannot be read so ({type(error).__name__}: {error}). "
            f"{fix}, or set on_bad_row: reject."
        ) from error


def unpacked(value: object, column: str) -> object:
    """Returns the messages that a text, an array or a single message stands for; other values as they are."""
    if isinstance(value, Mapping):
        # OpenAI's input, WebGPT's question.
        inner = value.get("messages", value.get("full_text", value))
        return [value] if _role_and_words(value) else inner
    if isinstance(value, list):
        return [turn for message in value for turn in _question_and_answer(message)]
    if not isinstance(value, str):
        return value
    if _WRITTEN.match(value):
        return _read_cell(value, column)
    return transcript(value) or value


def _question_and_answer(message: object) -> list[object]:
    """Returns a message, or the two of a question with its answer."""
    match message:
        case {"input": str(asked), "output": str(answered)} | [str(asked), str(answered)]:
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [message]


def _read_cell(text: str, column: str) -> list[Any]:
    try:
        value = parse_json(text)
    except json.JSONDecodeError:
        try:
            # numpy prints no commas between the elements of an array.
            value = ast.literal_eval(re.sub(r"\}\s*\n\s*\{", "}, {", text.strip()))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise BadRow(
                f"broken messages: {column} begins like a list of messages, but is neither JSON nor Python: "
                f"{text[:40]!r}. Write the cell as JSON."
            ) from None
    return value if isinstance(value, list) else [value]


def transcript(text: str) -> list[dict[str, str]] | None:
    """Returns the messages of a dialog that is written as one text; None where it is none."""
    start = text.lstrip()
    for tag in _TAGS:
        first = tag.match(start)
        if first is None or _ROLES[first[1].lower()] == "agent":
            continue
        _, *parts = tag.split(start)
        said = zip(parts[::2], parts[1::2], strict=True)
        return [
            {"role": name.lower(), "content": _ENDS.sub("", words).strip()} for name, words in said
        ]
    return None


def turns_of(value: object, column: str) -> tuple[Turn, ...]:
    """Returns the turns of a list of messages, whatever its keys and roles are called."""
    value = unpacked(value, column)
    if not isinstance(value, list) or not value:
        raise wrong_type(column, _EXPECTED, value)
    return tuple(_turn(message, column) for message in value)


def weights_of(value: object, column: str) -> list[bool]:
    """Returns which messages are to be imitated, as ``weight``, ``train`` or ``loss`` says; nothing is 1."""
    messages: Any = unpacked(value, column)
    weights = [
        next((message[key] for key in ("weight", "train", "loss") if key in message), 1)
        for message in messages
    ]
    for weight in weights:
        if weight not in (0, 1, None):
            raise wrong_type(f"the weight of a message in {column}", "0 or 1", weight)
    return [weight != 0 for weight in weights]


def _role_and_words(message: object) -> tuple[object, object] | None:
    """Returns who speaks in a message, and its words; None for what is no message."""
    if not isinstance(message, Mapping):
        return None
    role = next((message[key] for key in ("role", "from", "speaker") if key in message), None)
    words = next((message[key] for key in ("content", "value", "text") if key in message), None)
    return None if role is None else (role, words)


def _turn(message: Any, column: str) -> Turn:  # noqa: ANN401
    role, words = _role_and_words(message) or (None, None)
    speaker = _ROLES.get(str(role).lower())
    if speaker is None:
        raise wrong_type(column, _EXPECTED, message)
    parts = words if isinstance(words, list) else [words]
    texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    called = message.get("tool_calls") or []
    calls = [_call(call, column) for call in (called if isinstance(called, list) else [called])]
    texts = [text for text in texts if text is not None or not calls] + calls
    if not all(isinstance(text, str) for text in texts):
        raise wrong_type(column, _EXPECTED, message)
    if speaker == "api" and message.get("name"):
        return Turn("api", f"{message['name']} {' '.join(texts)}")
    return Turn(speaker, "\n".join(texts))


def _call(call: object, column: str) -> str:
    """Returns a call of a tool as the other corpora write it: ``call get_menu {"query": "tea"}``."""
    match call:
        case {"function": {"name": str(name), "arguments": arguments}} | {
            "name": str(name),
            "arguments": arguments,
        }:
            said = arguments if isinstance(arguments, str) else json.dumps(arguments)
            return f"call {name} {said}"
    raise wrong_type(f"tool_calls in {column}", '{"function": {"name", "arguments"}}', call)


def prompt_of(value: object) -> tuple[Turn, ...]:
    """Returns the turns of a prompt: a text, or messages."""
    value = unpacked(value, "prompt")
    if isinstance(value, list):
        turns = turns_of(value, "prompt")
        # A prompt may end with the tag of the answer.
        opened = len(turns) > 1 and turns[-1].role == "agent" and not turns[-1].text.strip()
        turns = turns[:-1] if opened else turns
    elif isinstance(value, str):
        turns = (Turn("user", value),)
    else:
        raise wrong_type("prompt", "a string or a list of messages", value)
    if all(blank(turn.text) for turn in turns):
        raise BadRow(EMPTY_PROMPT)
    return turns


def answer_of(value: object, column: str, prompt: tuple[Turn, ...]) -> Turn:
    """Returns an answer: a text, or an assistant message that may follow the messages of the prompt.

    The encoder refuses an empty one, as prompts alone need none.
    """
    value = unpacked(value, column)
    if isinstance(value, list):
        if all(isinstance(text, str) for text in value):
            raise BadRow(
                f"several answers: {column} holds {len(value)} answers. Name them in data.columns as answers, "
                "and what they are worth as scores or ranks."
            )
        turns = turns_of(value, column)
        follows = not turns[:-1] or same(turns[:-1]) == same(prompt)
        if turns[-1].role != "agent" or not follows:
            raise BadRow(
                f"wrong type: {column} must be one assistant message, or it after the messages of the prompt, "
                f"got the roles {[turn.role for turn in turns]}. Where prompt is not what they begin with, leave "
                "it out with columns: {prompt: null}."
            )
        value = turns[-1].text
    if not isinstance(value, str):
        raise wrong_type(column, "a string or one assistant message", value)
    return Turn("agent", value)


LONG_PROMPT = 8
"""Words of a prompt that no answer begins with by chance."""
_AGENT_TAG = re.compile(r"\s*(?:(?:### ?)?(?:Assistant|ASSISTANT|Response):|<\|assistant\|>)\s*")


def without_prompt(answers: list[str], prompt: str) -> list[str] | None:
    """Returns answers without the prompt or speaker that all begin with, or a mark that ends one; else None."""
    asked, said = prompt.strip(), [_ENDS.sub("", answer).strip() for answer in answers]
    # An answer may well begin with the words of a short prompt: "Hi", "Hi there".
    long = "\n" in asked or asked.endswith(("?", ":")) or len(asked.split()) >= LONG_PROMPT
    rests = [words.removeprefix(asked) for words in said]
    held = all(
        rest[:1].isspace() and rest != words for rest, words in zip(rests, said, strict=True)
    )
    if held and (long or all(map(_AGENT_TAG.match, rests))):
        said = [rest.strip() for rest in rests]
    tags = [tag.end() for words in said if (tag := _AGENT_TAG.match(words))]
    if len(tags) == len(said):
        said = [words[tag:] for words, tag in zip(said, tags, strict=True)]
    return None if said == [answer.strip() for answer in answers] else said
