"""Rows as public data sets and other trainers write them; the table of `docs/data.md` names these tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_perl.data import PreferenceDataModule
from lightning_perl.data.rows import Item, Pair, Row

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
    "dolly": ({"instruction": "Tea?", "context": "", "response": "Yes."}, None),
    "guanaco": ({"text": "### Human: Tea?### Assistant: Yes."}, None),
    "chatml_text": (
        {"text": "<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"},
        None,
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
    (item,) = read([row], tokenizer_dir)
    assert isinstance(item, Row)
    assert texts(item) == ("Yes.", ["Tea?"])
    assert (item.label, item.imitate) == (label, label != 0.0)
