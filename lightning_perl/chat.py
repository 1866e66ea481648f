"""What a tokenizer's chat template does: how it writes turns, and how it begins and ends an answer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

# What apply_chat_template renders with and raises; torch brings it.
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

#: The day that templates which write today's date are given, so that prompts are the same on every day.
DAY = datetime(2026, 1, 1)
# A template's own name hides transformers' function of that name, which asks the clock.
_PINNED = "".join(
    [
        "{% macro strftime_now(format) %}{{ format",
        *(f"|replace('%{code}', '{DAY:%{code}}')" for code in "aAbBdejmxyYHIMSpFD"),
        " }}{% endmacro %}",
    ]
)
# No text has these characters (they are for private use), and no template changes them.
_QUESTION, _ANSWER = "\ue002", "\ue003"
_OPENING = re.compile(r"(<\w+>)\s*$")


def load_tokenizer(source: str, argument: str) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a folder or a hub name; ``argument`` names it in messages."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # tokenizers has no narrower one for a damaged file
        reason = str(error).partition("\n")[0][:200]
        raise ValueError(
            f"{argument}: no tokenizer could be loaded from {source!r}. Give the trunk's folder (it holds "
            f"tokenizer.json) or a hub name ({type(error).__name__}: {reason})."
        ) from error
    return tokenizer


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], prompt: bool = True
) -> str:
    """Returns the messages as the chat template writes them, as a ``prompt`` with the header of an answer."""
    template = _PINNED * _writes_date(tokenizer) + tokenizer.get_chat_template()
    try:
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=template, add_generation_prompt=prompt, tokenize=False
        )
    except TemplateError:
        raise
    except Exception as error:  # whatever a template's own Python comes to
        raise TemplateError(f"{type(error).__name__}: {error}") from error
    return str(text)


def _writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "strftime_now" in tokenizer.get_chat_template()


@dataclass(frozen=True)
class Ends:
    """How a chat template begins and ends an answer.

    Attributes:
        opening: The tag that the header of an answer opens, such as ``<think>``; empty if it opens none.
        closing: The tag that the answer then has to close; empty where the template knows no such tag.
        ending: What follows the answer, up to and including its first added token, such as ``<end_of_turn>``.
            Empty where there is none: then EOS ends an answer.
        stop: That token, or empty.
    """

    opening: str = ""
    closing: str = ""
    ending: str = ""
    stop: str = ""


def ends_of_answers(tokenizer: PreTrainedTokenizerBase) -> Ends:
    """Returns how the tokenizer's chat template begins and ends an answer, tried on a short one."""
    if not tokenizer.chat_template:
        return Ends()
    question = {"role": "user", "content": _QUESTION}
    answer = {"role": "assistant", "content": _ANSWER}
    try:
        header = _OPENING.search(rendered(tokenizer, [question]))
        behind = rendered(tokenizer, [question, answer], prompt=False).partition(_ANSWER)[2]
    except TemplateError:
        # It wants turns of another kind; those of the data are refused one by one if need be.
        return Ends()
    opening = header[1] if header else ""
    closing = f"</{opening[1:]}" if opening else ""
    closes = closing in tokenizer.get_chat_template()
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    names = sorted(filter(str.strip, added | set(tokenizer.all_special_tokens)), key=len)
    stop = re.search("|".join(map(re.escape, reversed(names))), behind) if names else None
    if stop is None:
        return Ends(opening, closing * closes)
    return Ends(opening, closing * closes, behind[: stop.end()], stop[0])


@dataclass(frozen=True)
class Headers:
    """What a chat template writes before turns, so that a prompt can be read without it.

    Attributes:
        first: Before the first turn, the names of turns by these texts. The template's own system turn, which it
            writes where the chat has none, is part of the user's.
        later: The same between turns.
        last: What follows the last turn where an answer is asked for.
    """

    first: dict[str, str]
    later: dict[str, str]
    last: str = ""

    def plain(self, text: str) -> str | None:
        """The prompt in lines (``User: ...``, ``Agent:``), as the plain template writes it; None for no chat."""
        starts = [start for start in self.first if text.startswith(start)]
        if not starts or not self.later:
            return None
        start = max(starts, key=len)
        between = sorted(self.later, key=len, reverse=True)
        chat = text[len(start) :].removesuffix(self.last)
        parts = re.split(f"({'|'.join(map(re.escape, between))})", chat)
        names = [self.first[start], *(self.later[part] for part in parts[1::2])]
        turns = zip(names, parts[::2], strict=True)
        return "\n".join([*(f"{name}: {turn.strip()}" for name, turn in turns), "Agent:"])


def headers_of(tokenizer: PreTrainedTokenizerBase) -> Headers:
    """Returns what the tokenizer's chat template writes before turns; nothing where it has no template."""
    question, answer = (
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER},
    )
    if not tokenizer.chat_template:
        return Headers({}, {})
    try:
        chat = _around(tokenizer, question, answer, question)
        first, later = {chat[0]: "User"}, {chat[1]: "Agent", chat[2]: "User"}
        with suppress(TemplateError):  # Some templates take no system turn.
            told = _around(tokenizer, {"role": "system", "content": _ANSWER}, question)
            first, later = {**first, told[0]: "System"}, {**later, told[1]: "User"}
    except (TemplateError, IndexError):
        return Headers({}, {})
    return Headers(first, later, chat[3]) if all([*first, *later]) else Headers({}, {})


def _around(tokenizer: PreTrainedTokenizerBase, *messages: dict[str, str]) -> list[str]:
    """Returns what a chat template writes around the contents."""
    return re.split(f"[{_QUESTION}{_ANSWER}]", rendered(tokenizer, messages))


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Names the tokenizer's chat template: all that decides how it writes rows.

    ``chat-`` and the start of the SHA-256 of its text; then the ending of answers where it is not EOS, and the
    day that is written where the template asks for today's.
    """
    # Some tokenizers have several templates by name; this is the one that is rendered.
    text = tokenizer.get_chat_template()
    ending = ends_of_answers(tokenizer).ending
    parts = [f"chat-{hashlib.sha256(text.encode()).hexdigest()[:8]}"]
    if ending not in ("", tokenizer.eos_token):
        parts.append(repr(ending))
    if _writes_date(tokenizer):
        parts.append(f"{DAY:%Y-%m-%d}")
    return " ".join(parts)
