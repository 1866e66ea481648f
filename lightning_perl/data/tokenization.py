r"""The one tokenization: the same ids in training, scoring and sampling.

The plain turn template, the same for every corpus (``<bos>`` only where the tokenizer has one)::

    <bos>User: an espresso please\n
    Agent: call get_menu_items {"query": "espresso"}<eos>
    API: get_menu_items {"items": []}\n
    Agent: Sorry, we have none.<eos>

Every agent turn ends with EOS, in contexts too, so a context is exactly what a demonstration trained on. No
newline follows an EOS. Each segment (a user or API turn with its tag, the header ``Agent:``, the content of an
agent turn) is encoded alone and the ids are joined, so the border between prompt and answer never depends on the
text on its other side. Text that spells a special token stays text. A prompt is ``context turns + Agent:``, a
response ``content + EOS``. Prompts may take ``max_tokens - max_response_tokens`` tokens, in rated rows too, so
that a policy is asked exactly what the reward model was shown.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple, TypeVar

# What apply_chat_template renders with and raises; torch brings it.
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lightning_perl.data.rows import (
    BadRow,
    BadRowHook,
    Item,
    Pair,
    PromptExample,
    RatedExample,
    RatedRow,
    Row,
    Turn,
)

T = TypeVar("T")
#: The name of the plain turn template. A change of a single id of it needs a new number.
PLAIN = "plain-1"
#: Texts whose ids an encoder remembers.
MOST_CACHED = 1 << 14
_TAGS = {"system": "System", "user": "User", "api": "API"}
# Stands for a special token that a text spells while a chat template renders that text.
_STAND_IN = re.compile("\ue000([0-9]+)\ue001")
_CHAT_ROLES = {"system": "system", "user": "user", "agent": "assistant"}


class Encoded(NamedTuple):
    """A row, or a prompt alone, as tokens.

    ``response_mask`` is True on the tokens of answers that count, EOS included; ``cut_turns`` did not fit.
    """

    ids: list[int]
    response_mask: list[bool]
    cut_turns: int


def example_of(
    item: Item, encoded: Sequence[Encoded], number: int, prompts: bool
) -> RatedExample | PromptExample:
    """Returns what a loader yields of a row or a pair whose first row has this number."""
    cut_turns = sum(row.cut_turns for row in encoded)
    if prompts:
        return PromptExample(encoded[0].ids, number, cut_turns)
    sides = (item.chosen, item.rejected) if isinstance(item, Pair) else (item,)
    rows = tuple(
        RatedRow(row.ids, row.response_mask, side.imitate, side.label, place, len(side.context))
        for place, (row, side) in enumerate(zip(encoded, sides, strict=True), start=number)
    )
    return RatedExample(rows, cut_turns)


def template_of(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Names how turns become text and answers end; manifests store the name.

    ``plain-1`` for the plain turn template (None), else ``chat-`` and the start of the SHA-256 of the tokenizer's
    chat template. Another rule for EOS would need another name.
    """
    if tokenizer is None:
        return PLAIN
    if not tokenizer.chat_template:
        raise ValueError(
            f"chat_template=True, but the tokenizer {tokenizer.name_or_path!r} has no chat "
            "template. Use chat_template=False (the plain turn template) or another tokenizer."
        )
    # Some tokenizers have several templates by name; this is the one that is rendered.
    text = tokenizer.get_chat_template()
    return f"chat-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class TurnEncoder:
    """Encodes turns by the plain template, or prompts by the tokenizer's own chat template.

    With ``chat_template`` the response is still the bare content and EOS, of a single agent turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: bool = False) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path!r} has no EOS token, so no answer could "
                "end. Set one before saving it: tokenizer.eos_token = '<eos>'."
            )
        #: The name of the rendering, for manifests.
        self.template = template_of(tokenizer if chat_template else None)
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._eos = int(tokenizer.eos_token_id)
        bos = tokenizer.bos_token_id
        self._start: list[int] = [] if bos is None else [int(bos)]
        # Dialogs share most of their turns: each rated row repeats the rows before it.
        self._text: Callable[[str], list[int]] = lru_cache(MOST_CACHED)(
            partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=True)
        )
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        # The longest first: one may begin like another. A text may spell a stand-in, too.
        names = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self._spelled = re.compile("|".join([*map(re.escape, names), _STAND_IN.pattern]))

    def _content(self, turn: Turn) -> list[int]:
        # A chat template ends its generation prompt where the answer's first letter belongs.
        lead = "" if self.chat_template else " "
        return [*self._text(f"{lead}{turn.text.strip()}"), self._eos]

    def _turn(self, turn: Turn) -> list[int]:
        if turn.role == "agent":
            return [*self._text("Agent:"), *self._content(turn)]
        return self._text(f"{_TAGS[turn.role]}: {turn.text.strip()}\n")

    def encode_prompt(self, context: Sequence[Turn], max_prompt_tokens: int) -> Encoded:
        """Encodes a context and the header of the agent's next turn.

        Too long a context loses whole turns on the left; a system turn at its start stays. Where a
        chat template wants the user to begin, an answer whose question was cut goes with it. Raises
        :class:`BadRow` where nothing is left that fits, or the chat template refuses the turns.
        """
        _check_unicode(context)
        fixed = list(context[:1]) if context and context[0].role == "system" else []
        turns = list(context[len(fixed) :])
        render = self._chat if self.chat_template else self._plain
        for cut in range(max(len(turns), 1)):
            try:
                ids = render([*fixed, *turns[cut:]])
            except TemplateError as error:
                # Many templates want the user to begin; what was cut so far ends before an answer.
                if cut:
                    continue
                raise BadRow(
                    "refused by the chat template",
                    "the tokenizer's chat template refuses the turns "
                    f"{[turn.role for turn in turns]}{' after a system turn' if fixed else ''}: {error}. Write "
                    "them as it wants them, use chat_template=False, or set on_bad_row: reject.",
                ) from error
            if len(ids) <= max_prompt_tokens:
                return Encoded(ids, [False] * len(ids), cut)
        raise BadRow(
            "prompt longer than the window",
            f"prompt longer than the window: its last turn takes {len(ids)} tokens, the "
            f"limit is {max_prompt_tokens} (max_tokens - max_response_tokens). Raise max_tokens, "
            "or set on_bad_row: reject.",
        )

    def _plain(self, turns: Sequence[Turn]) -> list[int]:
        ids = list(self._start)
        for turn in turns:
            ids += self._turn(turn)
        return ids + self._text("Agent:")

    def _chat(self, turns: Sequence[Turn]) -> list[int]:
        if not turns:
            raise BadRow("empty prompt", "a chat template needs at least one turn.")
        if any(turn.role == "api" for turn in turns):
            raise BadRow(
                "API turn in a chat template",
                "has an API turn, which a chat template cannot say. Use chat_template=False.",
            )
        spelled: list[str] = []

        def stand_in(match: re.Match[str]) -> str:
            spelled.append(match[0])
            return f"\ue000{len(spelled) - 1}\ue001"

        messages = [
            {"role": _CHAT_ROLES[turn.role], "content": self._spelled.sub(stand_in, turn.text)}
            for turn in turns
        ]
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        # The template writes its own special tokens, the leading one too, as text.
        ids: list[int] = []
        for number, piece in enumerate(_STAND_IN.split(str(text))):
            if number % 2:
                ids += self._text(spelled[int(piece)])
            elif piece:
                ids += self.tokenizer.encode(piece, add_special_tokens=False)
        return ids

    def encode(self, row: Row, max_tokens: int, max_response_tokens: int) -> Encoded:
        """Encodes a row's prompt and response.

        A single answer must fit ``max_response_tokens`` whole: cut, it would lose its EOS. A
        demonstrated dialog (more than one response turn) is cut at a turn border at its end. Raises
        :class:`BadRow` where the answer is empty or too long, or its prompt is.
        """
        _check_answers(row)
        _check_unicode(row.response)
        prompt = self.encode_prompt(row.context, max_tokens - max_response_tokens)
        if len(row.response) > 1:
            return self._encode_dialog(row, prompt, max_tokens)
        content = self._content(row.response[0])
        if len(content) > max_response_tokens:
            raise BadRow(
                "answer longer than the window",
                f"the answer takes {len(content)} tokens with its EOS, the limit "
                f"is {max_response_tokens} (max_response_tokens). Cut, it would lose its EOS: "
                "raise max_response_tokens, or set on_bad_row: reject.",
            )
        mask = prompt.response_mask + [True] * len(content)
        return Encoded([*prompt.ids, *content], mask, prompt.cut_turns)

    def encode_all(
        self,
        items: Iterable[tuple[T, Item]],
        max_tokens: int,
        max_response_tokens: int,
        prompts: bool,
        bad_row: BadRowHook,
        rejected: Counter[str],
    ) -> Iterator[tuple[T, Item, list[Encoded]]]:
        """Yields what stands beside an item, the item, and its rows, or its prompt alone, as tokens.

        Rows that do not fit or cannot be said go to ``bad_row``, and are counted in ``rejected``.
        """
        for beside, item in items:
            sides = (item.chosen, item.rejected) if isinstance(item, Pair) else (item,)
            try:
                if prompts:
                    limit = max_tokens - max_response_tokens
                    encoded = [self.encode_prompt(sides[0].context, limit)]
                else:
                    encoded = [self.encode(row, max_tokens, max_response_tokens) for row in sides]
            except BadRow as error:
                rejected[error.reason] += 1
                bad_row(error.reason, f"{sides[0].where}: {error}")
            else:
                yield beside, item, encoded

    def _encode_dialog(self, row: Row, prompt: Encoded, max_tokens: int) -> Encoded:
        if self.chat_template:
            raise BadRow(
                "dialog in a chat template",
                f"a response of {len(row.response)} turns under a chat template. Use "
                "chat_template=False, or give the last answer only.",
            )
        ids, mask = list(prompt.ids), list(prompt.response_mask)
        kept_tokens = kept_turns = 0
        for number, turn in enumerate(row.response):
            counts = turn.role == "agent"
            # The prompt ends with the header of the first answer.
            header = self._text("Agent:") if counts and number else []
            tokens = self._content(turn) if counts else self._turn(turn)
            ids += header + tokens
            mask += [False] * len(header) + [counts] * len(tokens)
            if len(ids) > max_tokens:
                break
            if counts:
                kept_tokens, kept_turns = len(ids), number + 1
        if not kept_turns:
            raise BadRow(
                "answer longer than the window",
                f"the first answer of the dialog does not fit into {max_tokens} "
                "tokens (max_tokens). Raise max_tokens, or set on_bad_row: reject.",
            )
        cut = prompt.cut_turns + len(row.response) - kept_turns
        return Encoded(ids[:kept_tokens], mask[:kept_tokens], cut)


def _check_answers(row: Row) -> None:
    if not row.response or row.response[0].role != "agent":
        raise BadRow(
            "no answer", "no answer of the assistant. Set rows: prompts for prompts alone."
        )
    if any(turn.role == "agent" and not turn.text.strip() for turn in row.response):
        raise BadRow("empty answer", "empty answer. Remove the row, or set on_bad_row: reject.")


def _check_unicode(turns: Sequence[Turn]) -> None:
    for turn in turns:
        try:
            turn.text.encode()
        except UnicodeEncodeError as error:
            raise BadRow(
                "half a surrogate pair",
                f"half a surrogate pair, {turn.text[error.start]!r}, at character {error.start} of the "
                f"{turn.role} turn: no valid Unicode. Write the character whole, or set on_bad_row: reject.",
            ) from error
