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

A tokenizer's own chat template takes the place of the plain one: turns are as it writes them, an API's turn is the
user's and begins with ``API:``, and an answer ends as the template ends it, with EOS only where it names no end.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lightning_perl.chat import Ends, ends_of_answers, name_of, rendered
from lightning_perl.data.rows import (
    EMPTY_PROMPT,
    BadRow,
    Item,
    Pair,
    PromptExample,
    RatedExample,
    RatedRow,
    Row,
    Turn,
    blank,
)

#: The name of the plain turn template. A change of a single id of it needs a new number.
PLAIN = "plain-1"
#: The plain turn template as a chat template, for those who read what was trained with it.
PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for turn in messages %}{% if turn.role == 'assistant' %}"
    "Agent: {{ turn.content | trim }}{{ eos_token }}{% else %}"
    "{{ {'system': 'System', 'tool': 'API'}.get(turn.role, 'User') }}: {{ turn.content | trim }}{{ '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}Agent:{% endif %}"
)
#: Texts whose ids an encoder remembers.
MOST_CACHED = 1 << 14
_TAGS = {"system": "System", "user": "User", "api": "API"}
# Stands for a special token that a text spells while a chat template renders that text.
_STAND_IN = re.compile("\ue000([0-9]+)\ue001")
_CHAT_ROLES = {"system": "system", "user": "user", "agent": "assistant", "api": "user"}


class Encoded(NamedTuple):
    """A row, or a prompt alone, as tokens.

    ``response_mask`` is True on the tokens of answers that count, EOS included; ``cut_turns`` did not fit.
    """

    ids: list[int]
    response_mask: list[bool]
    cut_turns: int


class _Written(NamedTuple):
    """A chat template's text of turns.

    In ``text`` numbers stand for the pieces in ``spelled``, which stay text where they spell special tokens;
    ``counting`` are those that are answers to learn.
    """

    text: str
    spelled: list[str]
    counting: set[int]

    @property
    def whole(self) -> str:
        """The text with what the numbers stand for."""
        return _STAND_IN.sub(lambda match: self.spelled[int(match[1])], self.text)


_Answer: TypeAlias = tuple[int, list[int], list[int]]


def example_of(
    item: Item, encoded: Sequence[Encoded], number: int, prompts: bool
) -> RatedExample | PromptExample:
    """Returns what a loader yields of a row or a pair whose first row has this number."""
    cut_turns = sum(row.cut_turns for row in encoded)
    if prompts:
        return PromptExample(encoded[0].ids, number, cut_turns)
    rows = tuple(
        RatedRow(row.ids, row.response_mask, side.imitate, side.label, place, len(side.context))
        for place, (row, side) in enumerate(zip(encoded, item.rows, strict=True), start=number)
    )
    margin = item.margin if isinstance(item, Pair) else 0.0
    return RatedExample(rows, cut_turns, margin)


def template_of(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Names how turns become text and answers end; manifests store the name.

    ``plain-1`` for the plain turn template (None), else :func:`~lightning_perl.chat.name_of` the tokenizer's chat
    template. Another rule for EOS would need another name.
    """
    if tokenizer is None:
        return PLAIN
    if not tokenizer.chat_template:
        raise ValueError(
            f"chat_template=True, but the tokenizer {tokenizer.name_or_path!r} has no chat template. Use "
            "chat_template=False (the plain turn template) or another tokenizer."
        )
    return name_of(tokenizer)


class TurnEncoder:
    """Encodes turns by the plain template, or by the tokenizer's own chat template.

    Attributes:
        template: The name of the rendering, for manifests.
        ending: How an answer ends, as text.
        notes: What is worth knowing about rows that were encoded, counted.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: bool = False) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path!r} has no EOS token, so no answer could end. Set one "
                "before saving it: tokenizer.eos_token = '<eos>'."
            )
        self.template = template_of(tokenizer if chat_template else None)
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.notes: Counter[str] = Counter()
        self._ends = ends_of_answers(tokenizer) if chat_template else Ends()
        self.ending = self._ends.ending or str(tokenizer.eos_token)
        self._end: list[int] = [int(tokenizer.eos_token_id)]
        if self._ends.ending:
            self._end = tokenizer.encode(self._ends.ending, add_special_tokens=False)
        bos = tokenizer.bos_token_id
        self._start: list[int] = [] if bos is None else [int(bos)]
        # One object for each id, which all rows share: an integer takes four times the place of a reference.
        self._shared: dict[int, int] = {}
        # Dialogs share most of their turns: each rated row repeats the rows before it.
        self._text: Callable[[str], list[int]] = lru_cache(MOST_CACHED)(self._tokens)
        # The answers of a pair have one prompt.
        self._asked = lru_cache(1)(self.encode_prompt)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        # The longest first: one may begin like another. A text may spell a stand-in, too.
        names = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self._spelled = re.compile("|".join([*map(re.escape, names), _STAND_IN.pattern]))

    def _tokens(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [self._shared.setdefault(token, token) for token in ids]

    def _content(self, turn: Turn) -> list[int]:
        # A chat template ends its generation prompt where the answer's first letter belongs.
        text = turn.text.strip() if self.chat_template else f" {turn.text.strip()}"
        if self._ends.opening and text.startswith(self._ends.opening):
            text = text.removeprefix(self._ends.opening).lstrip()
        if self._ends.closing not in text:
            self.notes[f"answers without the {self._ends.closing} that the template waits for"] += 1
        return [*self._text(text), *self._end]

    def _turn(self, turn: Turn) -> list[int]:
        if turn.role == "agent":
            return [*self._text("Agent:"), *self._content(turn)]
        return self._text(f"{_TAGS[turn.role]}: {turn.text.strip()}\n")

    def encode_prompt(self, context: Sequence[Turn], max_prompt_tokens: int) -> Encoded:
        """Encodes a context and the header of the agent's next turn.

        Too long a context loses whole turns on the left; a system turn at its start stays. Where a chat template
        wants the user to begin, the agent's greeting is cut, and an answer whose question was cut goes with it.
        Raises :class:`BadRow` where nothing is left that fits, or the chat template refuses the turns.
        """
        _check_unicode(context)
        if context and all(blank(turn.text) for turn in context):
            raise BadRow(EMPTY_PROMPT)
        try:
            ids = self._prompt(context)
        except TemplateError as error:
            fixed = int(context[0].role == "system")
            if context[fixed:][:1] and context[fixed].role == "agent":
                asked = [*context[:fixed], *context[fixed + 1 :]]
                rest = self.encode_prompt(asked, max_prompt_tokens)
                return rest._replace(cut_turns=rest.cut_turns + 1)
            raise _refused(context, error) from error
        if len(ids) <= max_prompt_tokens:
            return Encoded(ids, [False] * len(ids), 0)
        return self._cut(context, max_prompt_tokens, len(ids))

    def _cut(self, context: Sequence[Turn], max_prompt_tokens: int, shortest: int) -> Encoded:
        """Encodes the longest end of a context that fits, found by bisection."""
        fixed = int(bool(context) and context[0].role == "system")
        turns = len(context) - fixed

        def kept(cut: int) -> tuple[int, list[int]] | None:
            # Many templates want the user to begin, and take the cut behind this one.
            for number in range(cut, turns):
                with suppress(TemplateError):
                    return number, self._prompt([*context[:fixed], *context[fixed + number :]])
            return None

        def fits(cut: int) -> bool:
            nonlocal shortest
            rest = kept(cut)
            shortest = shortest if rest is None else min(shortest, len(rest[1]))
            return rest is None or len(rest[1]) <= max_prompt_tokens

        rest = kept(bisect_left(range(turns), True, lo=min(1, turns), key=fits))
        if rest is None:
            raise BadRow(
                f"prompt longer than the window: its last turn takes {shortest} tokens, the limit is "
                f"{max_prompt_tokens} (max_tokens - max_response_tokens). Raise max_tokens, or set on_bad_row: "
                "reject."
            )
        return Encoded(rest[1], [False] * len(rest[1]), rest[0])

    def _prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Returns the turns and the header of an answer as tokens."""
        if self.chat_template:
            if not turns:
                raise BadRow("empty prompt: a chat template needs at least one turn.")
            written = self._written(turns, len(turns))
            return [token for ids, _ in self._pieces(written) for token in ids]
        return [
            *self._start,
            *(token for turn in turns for token in self._turn(turn)),
            *self._text("Agent:"),
        ]

    def _written(self, turns: Sequence[Turn], answers: int) -> _Written:
        """Returns the chat template's text of turns, in which those of the agent from ``answers`` on count.

        Where none counts, the text ends with the header of an answer.
        """
        spelled: list[str] = []
        counting: set[int] = set()

        def stand_in(text: str) -> str:
            spelled.append(text)
            return f"\ue000{len(spelled) - 1}\ue001"

        messages = []
        for number, turn in enumerate(turns):
            text = f"{_TAGS['api']}: " * (turn.role == "api") + turn.text.strip()
            if number >= answers and turn.role == "agent":
                counting.add(len(spelled))
                text = stand_in(text)
            else:
                text = self._spelled.sub(lambda match: stand_in(match[0]), text)
            messages.append({"role": _CHAT_ROLES[turn.role], "content": text})
        text = rendered(self.tokenizer, messages, prompt=not counting)
        self._look_for(messages, text)
        return _Written(text, spelled, counting)

    def _look_for(self, messages: Sequence[dict[str, str]], text: str) -> None:
        """Refuses a text that lacks what was asked; many templates cut the thoughts out of earlier answers."""
        lost = [message["role"] for message in messages if message["content"] not in text]
        asked = [role for role in lost if role != "assistant"]
        if asked:
            raise BadRow(
                f"lost in the chat template: the tokenizer's chat template does not write the {asked[0]}'s turn "
                "as it is. Use chat_template=False, leave such turns out, or set on_bad_row: reject."
            )
        if lost:
            self.notes["times the chat template wrote an earlier answer otherwise than it was"] += 1

    def _pieces(self, written: _Written) -> Iterator[tuple[list[int], bool]]:
        """Yields a chat template's text as tokens, and which of them are answers that count."""
        # The template writes its own special tokens, the leading one too, as text.
        for number, piece in enumerate(_STAND_IN.split(written.text)):
            if number % 2:
                yield self._text(written.spelled[int(piece)]), int(piece) in written.counting
            elif piece:
                yield self.tokenizer.encode(piece, add_special_tokens=False), False

    def encode(self, row: Row, max_tokens: int, max_response_tokens: int) -> Encoded:
        """Encodes a row's prompt and response.

        A single answer must fit ``max_response_tokens`` whole: cut, it would lose its EOS. A
        demonstrated dialog (more than one response turn) is cut at a turn border at its end. Raises
        :class:`BadRow` where the answer is empty or too long, or its prompt is.
        """
        if not row.response or row.response[0].role != "agent":
            raise BadRow("no answer of the assistant. Set rows: prompts for prompts alone.")
        if any(turn.role == "agent" and blank(turn.text) for turn in row.response):
            raise BadRow("empty answer. Remove the row, or set on_bad_row: reject.")
        _check_unicode(row.response)
        prompt = self._asked(row.context, max_tokens - max_response_tokens)
        if len(row.response) > 1:
            return self._encode_dialog(row, prompt, max_tokens, max_response_tokens)
        content = self._content(row.response[0])
        if len(content) > max_response_tokens:
            raise BadRow(
                f"answer longer than the window: the answer takes {len(content)} tokens with its EOS, the limit "
                f"is {max_response_tokens} (max_response_tokens). Cut, it would lose its EOS: raise "
                "max_response_tokens, or set on_bad_row: reject."
            )
        mask = prompt.response_mask + [True] * len(content)
        return Encoded([*prompt.ids, *content], mask, prompt.cut_turns)

    def _encode_dialog(
        self, row: Row, prompt: Encoded, max_tokens: int, max_response_tokens: int
    ) -> Encoded:
        answers = self._chat_answers if self.chat_template else self._plain_answers
        context = [turn for turn in row.context[:1] if turn.role == "system"]
        context += row.context[len(context) + prompt.cut_turns :]
        pieces = answers(context, row.response)
        if pieces is None:
            self.notes["dialogs whose last answer alone counts: the template rewrites others"] += 1
            *asked, last = (*row.context, *row.response)
            alone = replace(row, context=tuple(asked), response=(last,))
            return self.encode(alone, max_tokens, max_response_tokens)
        ids, mask = list(prompt.ids), list(prompt.response_mask)
        kept_turns = 0
        for number, before, answer in pieces:
            if len(ids) + len(before) + len(answer) > max_tokens:
                break
            ids += before + answer
            mask += [False] * len(before) + [True] * len(answer)
            kept_turns = number + 1
        if not kept_turns:
            raise BadRow(
                f"answer longer than the window: the first answer of the dialog does not fit into {max_tokens} "
                "tokens (max_tokens). Raise max_tokens, or set on_bad_row: reject."
            )
        return Encoded(ids, mask, prompt.cut_turns + len(row.response) - kept_turns)

    def _plain_answers(self, _: Sequence[Turn], response: Sequence[Turn]) -> list[_Answer]:
        """Returns the answers of a dialog: number of the turn, tokens since the last answer, its own tokens."""
        answers: list[_Answer] = []
        before: list[int] = []
        for number, turn in enumerate(response):
            if turn.role == "agent":
                # The prompt ends with the header of the first answer.
                header = self._text("Agent:") if number else []
                answers.append((number, before + header, self._content(turn)))
                before = []
            else:
                before += self._turn(turn)
        return answers

    def _chat_answers(
        self, context: Sequence[Turn], response: Sequence[Turn]
    ) -> list[_Answer] | None:
        """Returns the same; None where the chat template writes an answer otherwise once turns follow it."""
        agent = [number for number, turn in enumerate(response) if turn.role == "agent"]
        turns = [*context, *response[: agent[-1] + 1]]
        try:
            written = self._written(turns, len(context))
            asked = self._written(turns[:-1], len(turns))
        except TemplateError as error:
            raise _refused(turns, error) from error
        said = f"{asked.whole}{turns[-1].text.strip()}{self._ends.ending}"
        if not self._ends.ending or not written.whole.startswith(said):
            return None
        answers: list[_Answer] = []
        before: list[int] = []
        ended = True
        for ids, counts in self._pieces(written):
            if counts and ended:
                # The first answer's prompt is encoded already.
                answers.append((agent[len(answers)], before if answers else [], ids + self._end))
                before, ended = [], False
            elif ended:
                before += ids
            elif not counts and ids[: len(self._end)] == self._end:
                before, ended = ids[len(self._end) :], True
            else:
                return None
        return answers


def _refused(turns: Sequence[Turn], error: TemplateError) -> BadRow:
    return BadRow(
        "refused by the chat template: the tokenizer's chat template refuses the turns "
        f"{[turn.role for turn in turns]}: {error}. Write them as it wants them, use chat_template=False, or set "
        "on_bad_row: reject."
    )


def _check_unicode(turns: Sequence[Turn]) -> None:
    for turn in turns:
        try:
            turn.text.encode()
        except UnicodeEncodeError as error:
            raise BadRow(
                f"half a surrogate pair, {turn.text[error.start]!r}, at character {error.start} of the "
                f"{turn.role} turn: no valid Unicode. Write the character whole, or set on_bad_row: reject."
            ) from error
