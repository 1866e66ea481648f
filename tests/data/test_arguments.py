"""Every datamodule's keys and defaults in a saved config; tests/test_arguments.py has their help and slips."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

import lightning_perl.data
from lightning_perl.cli import main

SHARED: dict[str, Any] = {
    "rows": "rated",
    "batch_size": 8,
    "val_batch_size": None,
    "max_tokens": 512,
    "max_response_tokens": 128,
    "bucket": True,
    "seed": 0,
    "num_workers": 0,
    "on_bad_row": "raise",
    "keep_conflicts": True,
    "chat_template": None,
}
CORPUS = SHARED | {"on_bad_row": "reject", "val_fraction": 0.1}
OWN: dict[str, Any] = {
    "train": "a.jsonl",
    "val": None,
    "test": None,
    "val_fraction": None,
    "columns": None,
    "dialect": None,
    "read_row": None,
    "answer_pairs": "best_worst",
    "rating_range": None,
    "streaming": False,
    "shuffle_block": 4096,
    "keep_conflicts": False,
}
TASKMASTER: dict[str, Any] = {
    "task": "coffee",
    "demonstrations": True,
    "thumbs": True,
    "max_demonstrations": None,
    "folds": 5,
    "fold": 0,
    "train_folds": None,
}
#: The value of every key, by class; `train` and `data_dir` have to be given.
KEYS = {
    "PreferenceDataModule": SHARED | OWN,
    "MixedDataModule": SHARED
    | OWN
    | {"texts": "b", "texts_batch_size": 8, "texts_settings": None, "rows": "prompts"}
    | {"texts_as": "demonstrations"},
    "HarmlessnessDataModule": CORPUS | {"data_dir": "a", "test_fraction": 0.1},
    "HelpfulnessDataModule": CORPUS
    | {"data_dir": "a", "test_fraction": 0.1, "corpus": "hh", "min_score_ratio": 1.0},
    "SummarizationDataModule": CORPUS
    | {"data_dir": "a", "test_fraction": 0.1, "corpus": "tldr", "max_tokens": 640},
    "TaskmasterDataModule": CORPUS | {"data_dir": "a"} | TASKMASTER,
}
GIVEN = {"train", "data_dir"}


def given(name: str) -> list[str]:
    key = (GIVEN & KEYS[name].keys()).pop()
    texts = ["--data.texts", "b"] if "texts" in KEYS[name] else []
    return ["--model", "SFT", "--model.trunk", "t", "--data", name, f"--data.{key}", "a", *texts]


def test_every_datamodule_is_here() -> None:
    public = {name for name in lightning_perl.data.__all__ if name in KEYS}
    abstract = {"ConversationDataModule", "CorpusDataModule"}
    assert public == set(lightning_perl.data.__all__) - abstract


@pytest.mark.parametrize("name", KEYS)
def test_the_saved_config_has_every_key(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *given(name), "--print_config"])
    assert stopped.value.code == 0
    saved = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert saved == KEYS[name] | dict.fromkeys(GIVEN & KEYS[name].keys(), "a")
