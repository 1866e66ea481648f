"""What a tokenizer's chat template does: how it writes turns, and how it begins and ends an answer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

# What apply_chat_template renders with and raises; torch brings it.
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

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


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], prompt: bool = True
) -> str:
    """Returns the messages as the chat template writes them, as a ``prompt`` with the header of an answer."""
    template = _PINNED * _writes_date(tokenizer) + tokenizer.get_chat_template()
    text = tokenizer.apply_chat_template(
        list(messages), chat_template=template, add_generation_prompt=prompt, tokenize=False
    )
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
    except (TemplateError, TypeError, ValueError):
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
