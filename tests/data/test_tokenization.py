from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_perl.chat import headers_of
from lightning_perl.data import tokenization
from lightning_perl.data.rows import BadRow, Row, Turn
from lightning_perl.data.tokenization import PLAIN, Encoded, TurnEncoder, template_of

USER = Turn("user", "an espresso please")
CALL = Turn("agent", 'call get_menu_items {"query": "espresso"}')
API = Turn("api", 'get_menu_items {"items": []}')
SORRY = Turn("agent", "Sorry, we have none.")


@pytest.fixture
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    return loaded


def row(context: tuple[Turn, ...], *response: Turn) -> Row:
    return Row(context, response, None, True, "dialog", "rows.jsonl:7")


def encode(tokenizer: PreTrainedTokenizerBase, row: Row, *limits: int) -> Encoded:
    return TurnEncoder(tokenizer).encode(row, *limits)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, context: Sequence[Turn], limit: int
) -> list[int]:
    return TurnEncoder(tokenizer).encode_prompt(context, limit).ids


def text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


def counted(tokenizer: PreTrainedTokenizerBase, ids: list[int], mask: list[bool]) -> str:
    return text(tokenizer, [token for token, counts in zip(ids, mask, strict=True) if counts])


def test_golden_ids_of_a_whole_row(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode(tokenizer, row((Turn("user", "an"),), Turn("agent", "no")), 64, 16)
    pieces = ["<bos>", "User", ":", "Ġan", "Ċ", "Agent", ":", "Ġ", "n", "o", "<eos>"]
    assert tokenizer.convert_ids_to_tokens(encoded.ids) == pieces
    assert encoded.response_mask == [False] * 7 + [True] * 4
    assert encoded.ids[0] == 1
    assert encoded.ids[-1] == 2
    assert encoded.cut_turns == 0


def test_a_dialog_reads_back_and_only_the_agents_words_count(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    encoded = encode(tokenizer, row((USER,), CALL, API, SORRY), 256, 32)
    assert text(tokenizer, encoded.ids) == (
        "<bos>User: an espresso please\n"
        'Agent: call get_menu_items {"query": "espresso"}<eos>'
        'API: get_menu_items {"items": []}\n'
        "Agent: Sorry, we have none.<eos>"
    )
    assert counted(tokenizer, *encoded[:2]) == (
        ' call get_menu_items {"query": "espresso"}<eos> Sorry, we have none.<eos>'
    )


def test_a_context_is_what_a_demonstration_trained_on(tokenizer: PreTrainedTokenizerBase) -> None:
    dialog = encode(tokenizer, row((USER,), CALL, API, SORRY), 256, 128)
    rated = encode(tokenizer, row((USER, CALL, API), SORRY), 256, 128)
    prompt = encode_prompt(tokenizer, (USER, CALL, API), 128)
    assert rated.ids == dialog.ids
    assert rated.ids[: rated.response_mask.index(True)] == prompt
    # Cut alike, too.
    context = (USER, CALL, API, SORRY, USER)
    rated = encode(tokenizer, row(context, Turn("agent", "no")), 96, 40)
    assert rated.cut_turns > 0
    assert rated.ids[: rated.response_mask.index(True)] == encode_prompt(tokenizer, context, 56)


def test_bos_special_tokens_and_white_space(tokenizer: PreTrainedTokenizerBase) -> None:
    # Text that spells a special token stays text.
    prompt = encode_prompt(tokenizer, (Turn("user", " say <eos> now\n"),), 64)
    assert tokenizer.eos_token_id not in prompt
    assert text(tokenizer, prompt) == "<bos>User: say <eos> now\nAgent:"
    padded = row((USER,), Turn("agent", f"  {SORRY.text}\n"))
    assert encode(tokenizer, padded, 64, 32) == encode(tokenizer, row((USER,), SORRY), 64, 32)
    assert text(tokenizer, encode_prompt(tokenizer, (), 8)) == "<bos>Agent:"
    tokenizer.bos_token = None
    assert text(tokenizer, encode_prompt(tokenizer, (), 8)) == "Agent:"


def test_long_prompts_lose_whole_turns_on_the_left(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [
        turn for n in range(43) for turn in (Turn("user", f"u{n}"), Turn("agent", f"a{n}"))
    ] + [USER]
    encoder = TurnEncoder(tokenizer)
    whole = encoder.encode_prompt(turns, 10_000)
    assert whole.cut_turns == 0
    for limit in range(20, 120, 7):
        prompt = encoder.encode_prompt(turns, limit)
        kept = turns[prompt.cut_turns :]
        assert prompt.ids == encoder.encode_prompt(kept, 10_000).ids
        assert len(prompt.ids) <= limit
        one_more = encoder.encode_prompt(turns[prompt.cut_turns - 1 :], 10_000)
        assert len(one_more.ids) > limit


def test_a_system_turn_survives_the_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = (Turn("system", "Be kind."), USER, SORRY, USER)
    full = len(encode_prompt(tokenizer, turns, 1000))
    cut = encode_prompt(tokenizer, turns, full - 1)
    assert text(tokenizer, cut).startswith("<bos>System: Be kind.\nAgent: Sorry")


def test_long_demonstrations_are_cut_at_a_turn_border_at_the_end(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    dialog = row((USER,), CALL, API, SORRY, USER, SORRY)
    whole = encode(tokenizer, dialog, 1000, 32)
    encoded = encode(tokenizer, dialog, len(whole.ids) - 1, 32)
    assert encoded.cut_turns == 2
    assert encoded.ids == whole.ids[: len(encoded.ids)]
    assert text(tokenizer, encoded.ids).endswith("Sorry, we have none.<eos>")
    assert encoded.response_mask[-1]


@pytest.mark.parametrize(
    ("bad", "limits", "words"),
    [
        (row((USER,), Turn("agent", "  ")), (64, 16), r"empty answer"),
        (row((USER,), SORRY, USER, Turn("agent", "")), (64, 16), r"empty answer"),
        (row((USER,)), (64, 16), r"no answer.*rows: prompts"),
        (
            row((USER,), Turn("agent", "long " * 20)),
            (128, 16),
            r"the answer takes \d+ tokens with its EOS, the limit is 16",
        ),
        (
            row((Turn("user", "long " * 20),), SORRY),
            (64, 32),
            r"prompt longer than the window: its last turn takes \d+ tokens, the "
            r"limit is 32 \(max_tokens - max_response_tokens\). Raise max_tokens",
        ),
        (
            row((USER,), Turn("agent", "long " * 40), USER, SORRY),
            (64, 32),
            r"the first answer of the dialog does not fit into 64 tokens",
        ),
    ],
)
def test_bad_rows_say_where_what_and_how_to_go_on(
    tokenizer: PreTrainedTokenizerBase, bad: Row, limits: tuple[int, int], words: str
) -> None:
    with pytest.raises(BadRow, match=words):
        encode(tokenizer, bad, *limits)


def test_the_chat_template_renders_prompts_and_the_answer_stays_bare(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        TurnEncoder(tokenizer, chat_template=True)
    tokenizer.chat_template = (
        "<bos>{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    encoder = TurnEncoder(tokenizer, chat_template=True)
    encoded = encoder.encode(row((USER, SORRY, USER), Turn("agent", "no")), 128, 16)
    assert text(tokenizer, encoded.ids) == (
        "<bos>[user]an espresso please<eos>[assistant]Sorry, we have none.<eos>"
        "[user]an espresso please<eos>[assistant]no<eos>"
    )
    assert encoded.ids.count(1) == 1
    assert counted(tokenizer, *encoded[:2]) == "no<eos>"
    short = encoder.encode_prompt((USER, SORRY, USER), 40)
    assert short.cut_turns == 2
    with pytest.raises(BadRow, match=r"a chat template needs at least one turn"):
        encoder.encode_prompt((), 40)
    # No template says API turns, and many refuse a role that they do not know.
    asked = text(tokenizer, encoder.encode_prompt((USER, CALL, API), 128).ids)
    assert asked.endswith('<eos>[user]API: get_menu_items {"items": []}<eos>[assistant]')


ROLE = "{{ 'model' if m.role == 'assistant' else m.role }}"
END = "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
#: Templates of the kinds that people have; <|turn> and <|end> are added tokens.
TEMPLATES = {
    "another end": "<bos>{% for m in messages %}<|turn>" + ROLE + "\n{{ m.content | trim }}<|end>\n"
    "{% endfor %}" + END,
    "EOS": "<bos>{% for m in messages %}<|turn>"
    + ROLE
    + "\n{{ m.content }} <eos>{% endfor %}"
    + END,
    "no end": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "thoughts": "{% for m in messages %}<|turn>"
    + ROLE
    + "\n{{ m.content.split('</think>')[-1] }}<|end>"
    "{% endfor %}{% if add_generation_prompt %}<|turn>model\n<think>\n{% endif %}",
}


@pytest.fixture
def chatting(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn>", "<|end>"]})
    return tokenizer


@pytest.mark.parametrize(
    ("kind", "ending", "dialog"),
    [
        (
            "another end",
            "<|end>",
            "<|turn>model\nyes<|end>\n<|turn>user\nan<|end>\n<|turn>model\nno<|end>",
        ),
        ("EOS", " <eos>", "<|turn>model\nyes <eos><|turn>user\nan <eos><|turn>model\nno <eos>"),
        ("no end", "<eos>", "assistant: yes\nuser: an\nno<eos>"),
        (
            "thoughts",
            "<|end>",
            "<|turn>model\nyes<|end><|turn>user\nan<|end><|turn>model\n<think>\nno<|end>",
        ),
    ],
)
def test_an_answer_ends_as_the_chat_template_ends_it(
    chatting: PreTrainedTokenizerBase, kind: str, ending: str, dialog: str
) -> None:
    chatting.chat_template = TEMPLATES[kind]
    encoder = TurnEncoder(chatting, chat_template=True)
    assert encoder.ending == ending
    turns = Turn("user", "an"), Turn("agent", "yes"), Turn("user", "an"), Turn("agent", "no ")
    context = encoder.encode_prompt(turns[:3], 128).ids
    single = encoder.encode(row(turns[:3], turns[3]), 160, 32)
    assert single.ids[: len(context)] == context
    assert counted(chatting, *single[:2]) == f"no{ending}"
    # An answer to learn is what the next prompt has of it, so a dialog counts every answer once.
    answer = encoder.encode(row(turns[:1], turns[1]), 160, 32)
    whole = encoder.encode(row(turns[:1], *turns[1:]), 160, 32)
    assert text(chatting, whole.ids).endswith(dialog)
    rewrites = kind in ("no end", "thoughts")
    assert counted(chatting, *whole[:2]) == ("" if rewrites else f"yes{ending}") + f"no{ending}"
    assert (context[: len(answer.ids)] == answer.ids) != rewrites
    assert list(encoder.notes.values()) == ([3, 1] if kind == "thoughts" else [1] * rewrites)
    if not rewrites:
        assert whole.ids == single.ids
        cut = encoder.encode(row(turns[:1], *turns[1:]), len(whole.ids) - 1, 8)
        assert (cut.ids, cut.cut_turns) == (answer.ids, 2)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_prompt_is_read_without_its_template(
    chatting: PreTrainedTokenizerBase, kind: str
) -> None:
    chatting.chat_template = TEMPLATES[kind]
    encoder, headers = TurnEncoder(chatting, chat_template=True), headers_of(chatting)
    turns = (Turn("user", "an\nan"), Turn("agent", "yes"), Turn("user", "no"))
    asked = text(chatting, encoder.encode_prompt(turns, 128).ids)
    assert headers.plain(asked) == "User: an\nan\nAgent: yes\nUser: no\nAgent:"
    told = (Turn("system", "an"), turns[2])
    system = text(chatting, encoder.encode_prompt(told, 128).ids)
    assert headers.plain(system) == "System: an\nUser: no\nAgent:"
    # The plain template's text, and a template that writes the contents alone, are no chats.
    assert headers.plain("User: an\nAgent:") is None
    chatting.chat_template = "{{ messages[0].content }}"
    assert headers_of(chatting).plain("an") is None


def test_a_thought_that_the_prompt_opens_is_not_opened_twice(
    chatting: PreTrainedTokenizerBase,
) -> None:
    chatting.chat_template = TEMPLATES["thoughts"]
    encoder = TurnEncoder(chatting, chat_template=True)
    thought = Turn("agent", "<think>\nhm\n</think>\nno")
    encoded = encoder.encode(row((Turn("user", "an"),), thought), 160, 64)
    assert text(chatting, encoded.ids) == (
        "<|turn>user\nan<|end><|turn>model\n<think>\nhm\n</think>\nno<|end>"
    )
    assert not encoder.notes


def test_todays_date_is_pinned_and_part_of_the_name(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}"
    encoder = TurnEncoder(tokenizer, chat_template=True)
    assert text(tokenizer, encoder.encode_prompt((USER,), 64).ids).startswith("01 Jan 2026an esp")
    assert encoder.template.endswith(" 2026-01-01")


def test_a_chat_template_that_refuses_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    # As Gemma's: no system turn, the user begins, and turns alternate.
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[model]{% endif %}"
    )
    encoder = TurnEncoder(tokenizer, chat_template=True)
    whole = encoder.encode_prompt((USER, SORRY, USER), 400)
    assert whole.cut_turns == 0
    # One turn less would fit, but it would begin with the answer.
    short = encoder.encode_prompt((USER, SORRY, USER), len(whole.ids) - 1)
    assert short.cut_turns == 2
    assert text(tokenizer, short.ids) == "[user]an espresso please[model]"
    # A greeting before the first question is cut.
    assert encoder.encode_prompt((SORRY, USER, SORRY, USER), 400) == whole._replace(cut_turns=1)
    for turns in ((USER, USER, SORRY, USER), (Turn("system", "Be brief."), USER)):
        with pytest.raises(BadRow, match=r".* refuses the turns .*must alternate"):
            encoder.encode_prompt(turns, 400)


def test_a_chat_template_that_loses_words(tokenizer: PreTrainedTokenizerBase) -> None:
    loop = "{% for m in messages %}[{{ m.role }}]#{% endfor %}"
    system = Turn("system", "Be brief.")
    for written, role in (
        ("", "user"),
        ("{{ m.content[:9] }}", "user"),
        ("{% if m.role != 'system' %}{{ m.content }}{% endif %}", "system"),
    ):
        tokenizer.chat_template = loop.replace("#", written)
        encoder = TurnEncoder(tokenizer, chat_template=True)
        with pytest.raises(BadRow, match=f"^lost in the chat template: .* the {role}'s turn"):
            encoder.encode_prompt((*[system] * (role == "system"), USER), 400)
    users = "{% if m.role == 'user' %}{{ m.content }}{% endif %}"
    tokenizer.chat_template = loop.replace("#", users)
    encoder = TurnEncoder(tokenizer, chat_template=True)
    encoder.encode_prompt((USER, SORRY, USER), 400)
    assert sum(encoder.notes.values()) == 1
    tokenizer.chat_template = "{{ messages[0].content + 1 }}"
    with pytest.raises(BadRow, match=r"^refused by the chat template: .*TypeError"):
        TurnEncoder(tokenizer, chat_template=True).encode_prompt((USER,), 400)


def test_a_chat_template_keeps_spelled_special_tokens_as_text(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = (
        "<bos>{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<eos>{% endfor %}"
    )
    encoder = TurnEncoder(tokenizer, chat_template=True)
    turns = (
        Turn("user", " <eos> a <bos><pad>b<eos>"),
        Turn("agent", "c \ue0000\ue001 d <eos>"),
        Turn("user", "none"),
    )
    ids = encoder.encode_prompt(turns, 256).ids
    assert text(tokenizer, ids) == (
        "<bos>[user]<eos> a <bos><pad>b<eos><eos>"
        "[assistant]c \ue0000\ue001 d <eos><eos>[user]none<eos>"
    )
    # Only the template's own: one at the start, one after each turn.
    assert [token for token in ids if token < 3] == [1, 2, 2, 2]
    honest = str(tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False))
    assert encoder.encode_prompt((Turn("user", "q"),), 64).ids == tokenizer.encode(honest)
    answer = encoder.encode(row((Turn("user", "q"),), Turn("agent", "a<eos>b")), 64, 16)
    assert answer.ids.count(2) == 2


@pytest.mark.parametrize("bad", [Turn("user", "a\ud800"), Turn("agent", "a\ud800")])
def test_half_a_surrogate_pair_is_a_bad_row(tokenizer: PreTrainedTokenizerBase, bad: Turn) -> None:
    context = (bad, USER)
    words = rf"half a surrogate pair, '\\ud800', at character 1 of the {bad.role} "
    with pytest.raises(BadRow, match=words):
        encode(tokenizer, row(context, SORRY), 64, 16)
    with pytest.raises(BadRow, match=words):
        encode(tokenizer, row((USER,), SORRY, bad, SORRY), 256, 16)
    whole = row((Turn("user", "\U0001f600"),), SORRY)
    assert "\U0001f600" in text(tokenizer, encode(tokenizer, whole, 64, 32).ids)


@pytest.mark.parametrize("answer", ["no", ":", "\n", "'s here", "gent", "123"])
@pytest.mark.parametrize("chat", [False, True])
def test_the_prompts_ids_do_not_depend_on_the_answer(
    tokenizer: PreTrainedTokenizerBase, answer: str, chat: bool
) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}A"
    encoder = TurnEncoder(tokenizer, chat)
    prompt = encoder.encode_prompt((USER,), 64).ids
    agent = Turn("agent", f"x{answer}" if not answer.strip() else answer)
    encoded = encoder.encode(row((USER,), agent), 96, 32)
    assert encoded.ids[: len(prompt)] == prompt
    assert encoded.response_mask == [place >= len(prompt) for place in range(len(encoded.ids))]
    whole = tokenizer.encode(text(tokenizer, encoded.ids), add_special_tokens=False)
    # The test bites: encoded at once, some of these would be joined with what stands before.
    if chat and answer == "gent":
        assert whole != encoded.ids


def test_the_template_has_a_name(tokenizer: PreTrainedTokenizerBase) -> None:
    assert TurnEncoder(tokenizer).template == template_of(None) == PLAIN == "plain-1"
    tokenizer.chat_template = "{{ messages }}"
    name = template_of(tokenizer)
    assert TurnEncoder(tokenizer, chat_template=True).template == name
    # The first hex digits of the text's SHA-256; printf '{{ messages }}' | sha256sum.
    assert name == "chat-f24189f0"
    tokenizer.chat_template = "{{ messages }} "
    assert template_of(tokenizer) != name
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"has no EOS token, so no answer could end. Set one"):
        TurnEncoder(tokenizer)


def test_an_encoder_remembers_so_many_texts(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "MOST_CACHED", 10)
    encoder = TurnEncoder(tokenizer)
    for number in range(50):
        turns = (Turn("user", f"word {number}"),)
        assert encoder.encode_prompt(turns, 64).ids == encode_prompt(tokenizer, turns, 64)
    cache = encoder._text.cache_info()  # type: ignore[attr-defined]
    # The header of the next turn is said every time.
    assert (cache.hits, cache.currsize) == (49, 10)
