"""Rows as public data sets and other trainers write them; the table of `docs/data.md` names these tests."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer

from lightning_perl.batches import RatedBatch
from lightning_perl.data import PreferenceDataModule
from lightning_perl.data.dialects import DIALECTS, dialect_of
from lightning_perl.data.own_rows import Columns
from lightning_perl.data.rows import BadRow, Item, Pair, Row, Turn
from lightning_perl.modules import DPO, RewardModel
from tests.modules import tiny

ASK = [{"role": "user", "content": "Tea?"}]
YES, NO = ({"role": "assistant", "content": text} for text in ("Yes.", "No."))
HUMAN, GOOD, POOR = (
    {"from": name, "value": text}
    for name, text in (("human", "Tea?"), ("gpt", "Yes."), ("gpt", "No."))
)
HH = "\n\nHuman: Tea?\n\nAssistant: "
ARENA = {"prompt": '["Tea?"]', "response_a": '["No."]', "response_b": '["Yes."]'}
WON = {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}
SUMMARIES = {"summaries": [{"text": "No."}, {"text": "Yes."}], "choice": 1}
TREE = {"role": "prompter", "text": "Tea?", "replies": [
    {"role": "assistant", "text": text, "rank": rank, "replies": []} for text, rank in (("No.", 1), ("Yes.", 0))
]}  # fmt: skip
SCORED = [{"text": "No.", "pm_score": 1}, {"text": "Yes.", "pm_score": 4}]

# Of each format a row in which the answer "Yes." to "Tea?" was preferred to "No.".
PAIRS: dict[str, dict[str, Any]] = {
    "trl_preference": {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."},
    "trl_conversational": {"prompt": ASK, "chosen": [YES], "rejected": [NO]},
    "trl_implicit_prompt": {"chosen": [*ASK, YES], "rejected": [*ASK, NO]},
    "hh_rlhf": {"chosen": f"{HH}Yes.", "rejected": f"{HH}No."},
    "full_hh_rlhf": {"prompt": HH, "response": "Yes.", "chosen": "Yes.", "rejected": "No."},
    "ultrafeedback_binarized": {
        "prompt": "Tea?", "chosen": [*ASK, YES], "rejected": [*ASK, NO], "messages": [*ASK, YES],
        "score_chosen": 8.0, "score_rejected": 2.0,
    },
    "llama_factory_dpo": {"instruction": "Tea?", "input": "", "chosen": "Yes.", "rejected": "No."},
    "llama_factory_sharegpt_dpo": {"conversations": [HUMAN], "chosen": GOOD, "rejected": POOR},
    "axolotl_chat_template_dpo": {"messages": ASK, "chosen": YES, "rejected": NO},
    "orca_dpo": {"system": "", "question": "Tea?", "chosen": "Yes.", "rejected": "No."},
    "stack_exchange_paired": {"question": "Tea?", "response_j": "Yes.", "response_k": "No."},
    "ms_swift": {"messages": [*ASK, YES], "rejected_response": "No."},
    "ms_swift_messages": {"messages": [*ASK, YES], "rejected_messages": [*ASK, NO]},
    "positive_and_negative": {"query": "Tea?", "pos": ["Yes."], "neg": ["No."]},
    "step_dpo": {"prompt": "Tea?", "initial_reason_steps": "", "chosen": "Yes.", "rejected": "No."},
    "openai_preference": {
        "input": {"messages": ASK}, "preferred_output": [YES], "non_preferred_output": [NO],
    },
    "colossalai": {"context": [{"from": "human", "content": "Tea?"}], "chosen": [YES], "rejected": [NO]},
    "ultrainteract": {"trajectory": [HUMAN], "chosen": "Yes.", "rejected": "No."},
    "ultrafeedback": {
        "instruction": "Tea?",
        "completions": [{"response": "No.", "overall_score": 3}, {"response": "Yes.", "overall_score": 9}],
    },
    "nectar": {"prompt": HH, "answers": [{"answer": "Yes.", "rank": 1.0}, {"answer": "No.", "rank": 7.0}]},
    "stack_exchange_preferences": {"question": "Tea?", "answers": SCORED},
    "gpt4_comparisons": {
        "user_input": "Tea?",
        "responses_and_scores": [{"response": "Yes.", "score": 9}, {"response": "No.", "score": 4}],
    },
    "distilabel": {"instruction": "Tea?", "generations": ["No.", "Yes."], "ratings": [1.0, 5.0]},
    "text_and_score": {"text": [f"{HH}Yes.", f"{HH}No."], "score": [1.0, 0.0]},
    "helpsteer3": {"context": ASK, "response1": "Yes.", "response2": "No.", "overall_preference": -2},
    "nemo_ranked": {
        "context": ASK,
        "completions": [{"rank": 0, "completion": [YES]}, {"rank": 1, "completion": [NO]}],
    },
    "helpsteer2_preference": {
        "prompt": "Tea?", "response_1": "No.", "response_2": "Yes.", "preference_strength": 3,
    },
    "unified_feedback": {
        "conv_A": [*ASK, NO], "conv_B": [*ASK, YES], "conv_A_rating": 0.0, "conv_B_rating": 1.0,
    },
    "pku_safe_rlhf": {
        "prompt": "Tea?", "response_0": "No.", "response_1": "Yes.", "better_response_id": 1,
        "safer_response_id": 0,
    },
    "alpaca_farm": {"instruction": "Tea?", "input": "", "output_1": "Yes.", "output_2": "No.", "preference": 1},
    "chatbot_arena": {
        "conversation_a": [*ASK, NO], "conversation_b": [*ASK, YES], "winner": "model_b",
    },
    "arena_kaggle": ARENA | WON,
    "shp": {
        "history": "Tea?", "human_ref_A": "No.", "human_ref_B": "Yes.", "labels": 0, "score_A": 2, "score_B": 9,
    },
    "webgpt": {
        "question": {"full_text": "Tea?", "dataset": "eli5"},
        "answer_0": "Yes.", "score_0": 0.5, "answer_1": "No.", "score_1": -0.5,
    },
    "prometheus": {
        "instruction": "Tea?", "response_A": "No.", "response_B": "Yes.", "orig_preference": "B",
    },
    "openai_comparisons": {"info": {"article": "Tea?"}, **SUMMARIES},
    "openassistant_tree": {"message_tree_id": "1", "prompt": TREE},
    "argilla": {
        "fields": {"prompt": "Tea?", "response_1": "No.", "response_2": "Yes."},
        "responses": {"preference": [{"value": "response_2", "status": "submitted"}]},
    },
    "argilla_ranking": {
        "fields": {"prompt": "Tea?", "response-1": "No.", "response-2": "Yes."},
        "responses": {"ranking": [{"value": [
            {"value": "response-1", "rank": 2}, {"value": "response-2", "rank": 1},
        ]}]},
    },
    "own_columns": {"prompt": "Tea?", "first": "No.", "second": "Yes.", "preference": "second"},
    "own_ranks": {"prompt": "Tea?", "answers": ["No.", "Yes."], "ranks": [2, 1]},
}  # fmt: skip

# Of each format a row, its label (None: a demonstration), and whether it is to be imitated.
ANSWERS: dict[str, tuple[dict[str, Any], float | None]] = {
    "trl_prompt_completion": ({"prompt": "Tea?", "completion": "Yes."}, None),
    "trl_unpaired": ({"prompt": "Tea?", "completion": "Yes.", "label": False}, 0.0),
    "openai_chat": ({"messages": [*ASK, YES]}, None),
    "kto_messages": ({"messages": [*ASK, YES], "label": False}, 0.0),
    "alpaca": ({"instruction": "Tea?", "input": "", "output": "Yes."}, None),
    "llama_factory_history": (
        {"instruction": "Tea?", "input": "", "output": "Yes.", "history": []},
        None,
    ),
    "llama_factory_kto": (
        {"instruction": "Tea?", "input": "", "output": "Yes.", "kto_tag": True},
        1.0,
    ),
    "sharegpt": ({"conversations": [HUMAN, GOOD]}, None),
    "beavertails": ({"prompt": "Tea?", "response": "Yes.", "is_safe": False}, 0.0),
    "squad_like": ({"context": "", "question": "Tea?", "answer": "Yes."}, None),
    "question_and_answer_turns": ({"conversation": [{"input": "Tea?", "output": "Yes."}]}, None),
    "kto_dialogs": ({"prompt": "Tea?", "completion": [*ASK, YES], "label": True}, 1.0),
    "dolly": ({"instruction": "Tea?", "context": "", "response": "Yes."}, None),
    "guanaco": ({"text": "### Human: Tea?### Assistant: Yes."}, None),
    "chatml_text": (
        {"text": "<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"},
        None,
    ),
    "openai_axis": (
        {"info": {"article": "Tea?"}, "summary": {"text": "Yes.", "axes": {"overall": 7}}},
        1.0,
    ),
    "question_answer": ({"question": "Tea?", "answer": "Yes."}, None),
}


def read(train: Any, folder: Path, **options: Any) -> list[Item]:  # noqa: ANN401
    module = PreferenceDataModule(str(folder), train, val_fraction=0.0, **options)
    return module.read().train


def texts(row: Row) -> tuple[str, list[str]]:
    (answer,) = row.response
    return answer.text.strip(), [
        turn.text.strip().removesuffix("\n\nTL;DR:") for turn in row.context
    ]


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(tokenizer_dir: Path, name: str) -> None:
    (pair,) = read([PAIRS[name]], tokenizer_dir)
    assert isinstance(pair, Pair)
    assert (texts(pair.chosen), texts(pair.rejected)) == (("Yes.", ["Tea?"]), ("No.", ["Tea?"]))
    (prompt,) = read([PAIRS[name]], tokenizer_dir, rows="prompts")
    assert isinstance(prompt, Row)
    assert prompt.context == pair.chosen.context


@pytest.mark.parametrize("name", ANSWERS)
def test_answers(tokenizer_dir: Path, name: str) -> None:
    row, label = ANSWERS[name]
    (item,) = read([row], tokenizer_dir, rating_range=(1, 7))
    assert isinstance(item, Row)
    assert texts(item) == ("Yes.", ["Tea?"])
    assert (item.label, item.imitate) == (label, label != 0.0)


@pytest.mark.parametrize("scores", [(float("nan"), 0.9), (0.9, float("nan")), (float("inf"), 1.0)])
def test_scores_that_are_no_numbers_prefer_no_answer(
    scores: tuple[float, float], tokenizer_dir: Path
) -> None:
    row = {
        "prompt": "Tea?",
        "answer_a": "Yes.",
        "answer_b": "No.",
        "score_a": scores[0],
        "score_b": scores[1],
    }
    with pytest.raises(BadRow, match="two scores must be finite numbers"):
        read([row], tokenizer_dir)


def whole(question: str, answer: str) -> str:
    return f"{question}\n\nAssistant: {answer}"


SPOKEN: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "an answer begins with its prompt": (
        {"prompt": "Is tea hot?", "response": "Is tea hot? Yes."}, ["Is tea hot?"], ["Yes."],
    ),
    "both answers begin with the prompt": (
        {"prompt": "Q", "chosen": whole("Q", "Yes."), "rejected": whole("Q", "No.")}, ["Q"], ["Yes.", "No."],
    ),
    "a short prompt's words": ({"prompt": "Hi", "response": "Hi there!"}, ["Hi"], ["Hi there!"]),
    "one answer repeats the prompt's words": (
        {"prompt": "Q", "chosen": "Q is one.", "rejected": "No."}, ["Q"], ["Q is one.", "No."],
    ),
    "input": ({"instruction": "Cut.", "input": "A text.", "output": "A."}, ["Cut.\n\nA text."], ["A."]),
    "history": (
        {"query": "Milk?", "response": "Yes.", "history": [["Tea?", "No."]]}, ["Tea?", "No.", "Milk?"], ["Yes."],
    ),
    "system": ({"system": "Brief.", "prompt": "Q", "response": "A"}, ["Brief.", "Q"], ["A"]),
    "context": (
        {"context": ["A text.", "Another."], "question": "Q", "answer": "A"}, ["Q\n\nA text.\n\nAnother."],
        ["A"],
    ),
    "messages before the instruction": (
        {"context": [HUMAN, GOOD], "instruction": HUMAN | {"value": "Milk?"}, "chosen": GOOD, "rejected": POOR},
        ["Tea?", "Yes.", "Milk?"], ["Yes.", "No."],
    ),
    "a dialog beside its first question": (
        {"prompt": "Tea?", "completion": [*ASK, NO, *ASK, YES], "label": 1}, ["Tea?", "No.", "Tea?"], ["Yes."],
    ),
    "tags of a prompter": (
        {"prompt": "prompter: Tea?\nassistant: No.\nprompter: Q", "response": "A"}, ["Tea?", "No.", "Q"], ["A"],
    ),
    "answers that begin with their speaker": (
        {"prompt": "Q", "chosen": "Assistant: Yes.", "rejected": "Assistant: No."}, ["Q"], ["Yes.", "No."],
    ),
    "dialogs in cells beside their first question": (
        {
            "prompt": "Tea?",
            "chosen": json.dumps([*ASK, NO, *ASK, YES]), "rejected": json.dumps([*ASK, NO, *ASK, NO]),
        },
        ["Tea?", "No.", "Tea?"], ["Yes.", "No."],
    ),
    "answers that end with a mark": (
        {"prompt": "<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\n", "response": "Yes.<|im_end|>"},
        ["Tea?"], ["Yes."],
    ),
    "steps before the judged one": (
        {"prompt": "Q", "initial_reason_steps": "1. ", "chosen": "Yes.", "rejected": "No."}, ["Q"],
        ["1. Yes.", "1. No."],
    ),
    "an answer of weight 0": (
        {"messages": [*ASK, NO | {"weight": 0}, *ASK, YES | {"weight": 1}]}, ["Tea?", "No.", "Tea?"], ["Yes."],
    ),
    "calls of tools": (
        {"messages": [
            *ASK,
            {
                "role": "assistant", "content": None,
                "tool_calls": [{"function": {"name": "menu", "arguments": "{}"}}],
            },
            {"role": "tool", "name": "menu", "content": "[]"}, NO,
        ]},
        ["Tea?"], ["call menu {}", "menu []", "No."],
    ),
    "parts of a message": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Tea?"}]}, YES]}, ["Tea?"], ["Yes."],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOKEN)
def test_what_was_asked_and_what_was_answered(tokenizer_dir: Path, kind: str) -> None:
    row, asked, answered = SPOKEN[kind]
    (item,) = read([row], tokenizer_dir)
    sides = (item.chosen, item.rejected) if isinstance(item, Pair) else (item,)
    assert [turn.text for turn in sides[0].context] == asked
    assert [turn.text for side in sides for turn in side.response] == answered


def test_several_answers_become_pairs(tokenizer_dir: Path) -> None:
    row = {"prompt": "Q", "answers": list("abcd"), "scores": [1, 3, 3, "2.5"]}
    (pair,) = read([row], tokenizer_dir)
    assert isinstance(pair, Pair)
    assert (texts(pair.chosen)[0], texts(pair.rejected)[0]) == ("b", "a")
    pairs = read([row], tokenizer_dir, answer_pairs="all")
    said = [
        "".join(texts(side)[0] for side in (p.chosen, p.rejected))
        for p in pairs
        if isinstance(p, Pair)
    ]
    assert said == ["bd", "ba", "cd", "ca", "da"]
    row = {"prompt": "Q", "chosen": ["a", "b"], "rejected": "c"}
    assert len(read([row], tokenizer_dir, answer_pairs="all")) == 2


TIES: list[dict[str, Any]] = [
    {**PAIRS["trl_preference"], "tie": True},
    {**PAIRS["chatbot_arena"], "winner": "tie (bothbad)"},
    {**PAIRS["chatbot_arena"], "winner": "both_bad"},
    {**PAIRS["helpsteer2_preference"], "preference_strength": 0},
    {**PAIRS["distilabel"], "ratings": [3, 3]},
    ARENA | WON | {"winner_tie": 1},
]


def test_ties_are_left_out_and_counted(tokenizer_dir: Path) -> None:
    rows = [*TIES, {**PAIRS["trl_preference"], "tie": False}]
    module = PreferenceDataModule(str(tokenizer_dir), rows, val_fraction=0.0)
    module.setup()
    assert module.report.left_out == {"ties": len(TIES)}
    assert module.report.rows == len(rows)
    (prompt,) = read(rows, tokenizer_dir, rows="prompts")
    assert isinstance(prompt, Row)
    assert prompt.context == (Turn("user", "Tea?"),)


def test_a_strength_may_be_the_margin_of_a_pair(tokenizer_dir: Path) -> None:
    rows = [
        PAIRS["helpsteer2_preference"],
        {**PAIRS["helpsteer2_preference"], "prompt": "Q", "preference_strength": -1.5},
    ]
    columns: Columns = {"margin": "preference_strength"}
    module = PreferenceDataModule(
        str(tokenizer_dir), rows, columns=columns, val_fraction=0.0, bucket=False
    )
    module.setup()
    (batch,) = module.train_dataloader()
    assert isinstance(batch, RatedBatch)
    assert batch.margins is not None
    assert sorted(batch.margins.tolist()) == [1.5, 3.0]
    with pytest.raises(BadRow, match="margin -1 says that the rejected answer is the better"):
        read([{**PAIRS["trl_preference"], "margin": -1}], tokenizer_dir)


MARKED = {"prompt": "Q", "response": "A", "helpfulness": 4, "verbosity": "2"}


def test_attributes_are_chosen_weighted_or_refused(tokenizer_dir: Path) -> None:
    for column, label in (
        ("helpfulness", 1.0),
        ({"helpfulness": 0.5, "verbosity": 1.0}, 1.0),
        ("verbosity", 0.5),
    ):
        (row,) = read([MARKED], tokenizer_dir, columns={"rating": column}, rating_range=(0, 4))
        assert isinstance(row, Row)
        assert row.label == label
    with pytest.raises(
        BadRow, match="the column 'helpfulness' says how good the answer is, and would not"
    ):
        read([MARKED], tokenizer_dir)
    (row,) = read([MARKED], tokenizer_dir, columns={"rating": None})
    assert isinstance(row, Row)
    assert row.label is None


def test_verdicts_that_are_not_read_are_named(tokenizer_dir: Path) -> None:
    module = PreferenceDataModule(str(tokenizer_dir), [PAIRS["pku_safe_rlhf"]], val_fraction=0.0)
    module.read()
    assert module.report.unread == {"safer_response_id": 1}
    assert "columns not read: 1 safer_response_id" in str(module.report)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a number below 0": (
        {"prompt": "q", "response_0": "a", "response_1": "b", "label": -1},
        "preference -1 does not say",
    ),
    "a verdict in words": (
        {"prompt": "q", "response_a": "a", "response_b": "b", "preference": "not b"},
        "preference 'not b' does not say",
    ),
    "two prompts": (
        {"context": "c", "prompt": "q", "chosen": "a", "rejected": "b"},
        "'context' and another column could each be the prompt",
    ),
    "a third answer": (
        {"prompt": "q", "response_1": "a", "response_2": "b", "response_3": "c", "preference": 1},
        "there is a third answer, 'response_3'",
    ),
    "a reaction": (
        {"prompt": "q", "response": "a", "reaction": "dislike"},
        "'reaction' says how good the answer is",
    ),
    "a name in camel case": (
        {"prompt": "q", "response": "a", "userRating": 1},
        "'userRating' says how good the answer is",
    ),
    "no verdict": ({"prompt": "Q", "response_1": "A", "response_2": "B"}, "expected one of"),
    "a number that names no column": (
        {"prompt": "Q", "response_a": "A", "response_b": "B", "winner": 1},
        "preference 1 does not say which",
    ),
    "two columns for one": (
        {"question": "Q", "query": "R", "response": "A"},
        "could each be the prompt",
    ),
    "a broken cell": (
        {"prompt": "[{'role': 'user', 'content': 'Q}]", "response": "A"},
        "neither JSON nor",
    ),
    "an unrelated prompt": (
        {"prompt": "Which?", "chosen": [*ASK, YES], "rejected": [*ASK, NO]},
        r"leave it out with columns: \{prompt: null\}",
    ),
    "half a dialect": (
        {"info": {}, "summaries": [], "choice": 0},
        "looks like a row of 'openai_comparisons'",
    ),
    "a weight between": (
        {"messages": [*ASK, YES | {"weight": 0.5}]},
        "weight of a message in messages must be 0 or",
    ),
    "steps": (
        {"prompt": "Q", "completions": ["a"], "labels": [True]},
        "Labels of single steps are not learned: join the steps",
    ),
    "single messages": (
        {"text": "a", "role": "prompter", "parent_id": "1"},
        "These are single messages: read the file of whole trees",
    ),
    "an instruction beside a prompt": (
        {"prompt": "p", "instruction": "i", "chosen": "a", "rejected": "b"},
        r"could each be the prompt. Name one in data.columns: \{prompt: prompt\}",
    ),
    "a weight of the row": (
        {**PAIRS["trl_preference"], "weight": 0.5},
        r"'weight' weights the row, .*\{margin: weight\} .*\{weight: null\}",
    ),
    "answers without marks": (
        {"prompt": "q", "output": ["a", "b"]},
        "response holds 2 answers. Name them in data.columns as answers",
    ),
    "pictures": (
        {**PAIRS["trl_preference"], "images": ["a.png"]},
        "pictures and sounds are not read, and 'images' belongs to the question",
    ),
    "a correction": (
        {"question": "q", "answer": "a", "correction": "b"},
        "'correction' says how good the answer is",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_not_understood_is_refused(tokenizer_dir: Path, kind: str) -> None:
    row, words = WRONG[kind]
    with pytest.raises(BadRow, match=words):
        read([row], tokenizer_dir)


def test_a_column_can_be_left_out_or_lie_deeper(tokenizer_dir: Path) -> None:
    two = {
        "prompt": "p",
        "instruction": "i",
        "response1": "a",
        "response2": "b",
        "annotator": 2,
        "weight": 2,
    }
    columns: Columns = {"prompt": "instruction", "preference": "annotator", "margin": "weight"}
    (pair,) = read([two], tokenizer_dir, columns=columns)
    assert isinstance(pair, Pair)
    assert (texts(pair.chosen), pair.margin) == (("b", ["i"]), 2.0)
    row = {"prompt": "Which?", "chosen": [*ASK, YES], "rejected": [*ASK, NO]}
    (pair,) = read([row], tokenizer_dir, columns={"prompt": None})
    assert isinstance(pair, Pair)
    assert texts(pair.chosen) == ("Yes.", ["Tea?"])
    # A column that is mapped is not read as something else, too.
    (row_,) = read(
        [{"prompt": "Tea?", "label": "Yes."}], tokenizer_dir, columns={"response": "label"}
    )
    assert isinstance(row_, Row)
    assert (texts(row_), row_.label) == (("Yes.", ["Tea?"]), None)
    deep = {"said": {"by": [{"q": "Tea?"}], "to": "Yes."}}
    (row_,) = read([deep], tokenizer_dir, columns={"prompt": "said.by.0.q", "response": "said.to"})
    assert isinstance(row_, Row)
    assert texts(row_) == ("Yes.", ["Tea?"])


def by_hand(row: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]] | None:
    """A row as its owner reads it; also named by a YAML."""
    return (
        None
        if row["q"] == ""
        else {"prompt": row["q"], "response": row["a"], "label": row["a"] == "Yes."}
    )


def test_a_config_names_the_function(tokenizer_dir: Path) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(PreferenceDataModule, "data")
    rows = [{"q": "Tea?", "a": "Yes."}]
    function = {"class_path": f"{__name__}.by_hand"}
    columns = {"rating": {"a": 0.5}, "prompt": None}
    config = {
        "tokenizer": str(tokenizer_dir),
        "train": rows,
        "read_row": function,
        "columns": columns,
    }
    parsed = parser.parse_object({"data": config})
    module = parser.instantiate_classes(parsed).data
    assert module.train_sources[0].place == rows
    assert yaml.safe_load(parser.dump(parsed))["data"]["columns"] == columns


def test_a_function_reads_rows(tokenizer_dir: Path) -> None:
    rows = [{"q": "Tea?", "a": "Yes."}, {"q": "", "a": ""}]
    (row,) = read(rows, tokenizer_dir, read_row=by_hand)
    assert isinstance(row, Row)
    assert (texts(row), row.label) == (("Yes.", ["Tea?"]), 1.0)
    with pytest.raises(
        BadRow, match=r"data.train:1: read_row failed: data.read_row raised KeyError: 'q'"
    ):
        read([{"a": 1}], tokenizer_dir, read_row=by_hand)


def test_a_dialect_may_be_named(tokenizer_dir: Path) -> None:
    row = {"prompt": "Q", "response": "A", **PAIRS["alpaca_farm"]}
    assert dialect_of(tuple(row)) == "two_answers"
    with pytest.raises(ValueError, match=r"data.dialect: unknown 'trl'; there are"):
        read([row], tokenizer_dir, dialect="trl")
    with pytest.raises(BadRow, match="looks like a row of 'shp', but cannot be read so"):
        read([row], tokenizer_dir, dialect="shp")


def test_the_documentation_lists_every_format() -> None:
    table = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for name in (*PAIRS, *ANSWERS):
        assert f"[{name}]`" in table
    for name in DIALECTS:
        assert f"`{name}`" in table


def test_human_turns_decide_the_split(tokenizer_dir: Path) -> None:
    rows = [
        {"system": system, "prompt": f"Question {number}?{end}", "response": f"{system} {number}"}
        for number in range(20)
        for system, end in (("Brief.", ""), ("Kind.", " \n"))
    ]
    train, val, _ = PreferenceDataModule(str(tokenizer_dir), rows, val_fraction=0.3).read()
    groups = [{row.dialog for row in part if isinstance(row, Row)} for part in (train, val)]
    assert [len(group) for group in groups] == [14, 6]
    assert (len(train), len(val)) == (28, 12)


def test_a_reward_model_refuses_rows_without_verdicts(tmp_path: Path) -> None:
    rows = [{"prompt": f"w{number}", "response": "w5"} for number in (3, 4)]
    trunk = tiny.save_trunk(tmp_path / "trunk")
    for kind, words in ((RewardModel, "`label`, or with"), (DPO, "`chosen` and")):
        module = kind(str(trunk), lora=tiny.LORA)
        trainer, _ = tiny.quiet_trainer(tmp_path)
        refused = f"{kind.__name__} finds no row to learn a preference from among 1 tr.* rows with {words}"
        with pytest.raises(ValueError, match=refused):
            trainer.fit(module, datamodule=PreferenceDataModule(str(trunk), rows))
        assert trainer.global_step == 0


def test_rejected_rows_are_listed(tokenizer_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [
        *(PAIRS["trl_preference"] | {"prompt": f"{n}"} for n in range(4)),
        {"prompt": "Q", "response": ""},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    module = PreferenceDataModule(str(tokenizer_dir), str(file), on_bad_row="reject")
    module.setup()
    module.trainer = Trainer(default_root_dir=tmp_path, logger=False, enable_checkpointing=False)
    module.train_dataloader()
    with (tmp_path / "rejected_rows.csv").open(newline="", encoding="utf-8") as table:
        (listed,) = csv.DictReader(table)
    assert (listed["file"], listed["line"], listed["reason"]) == (str(file), "5", "empty answer")
    assert "Remove the row" in listed["message"]
