"""Every datamodule on the command line: all keys with type, default and text, and slips refused."""

from __future__ import annotations

import re
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
}
CORPUS = SHARED | {"on_bad_row": "reject", "val_fraction": 0.1}
OWN: dict[str, Any] = {
    "train": "a.jsonl",
    "val": None,
    "test": None,
    "val_fraction": 0.1,
    "columns": None,
    "rating_range": None,
    "streaming": False,
    "shuffle_block": 4096,
    "chat_template": False,
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
    "HarmlessnessDataModule": CORPUS | {"data_dir": "a", "test_fraction": 0.1},
    "HelpfulnessDataModule": CORPUS
    | {"data_dir": "a", "test_fraction": 0.1, "corpus": "hh", "min_score_ratio": 1.0},
    "SummarizationDataModule": CORPUS
    | {"data_dir": "a", "test_fraction": 0.1, "corpus": "tldr", "max_tokens": 640},
    "TaskmasterDataModule": CORPUS | {"data_dir": "a"} | TASKMASTER,
}
GIVEN = {"train", "data_dir"}


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    """Exit status and everything printed by `fit` with these arguments."""
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *arguments])
    output = capsys.readouterr()
    return stopped.value.code, output.out + output.err


def given(name: str) -> list[str]:
    key = (GIVEN & KEYS[name].keys()).pop()
    return ["--model", "SFT", "--model.trunk", "t", "--data", name, f"--data.{key}", "a"]


def test_every_datamodule_is_here() -> None:
    public = {name for name in lightning_perl.data.__all__ if name in KEYS}
    abstract = {"ConversationDataModule", "CorpusDataModule"}
    assert public == set(lightning_perl.data.__all__) - abstract


@pytest.mark.parametrize("name", KEYS)
def test_help_has_every_key_with_type_default_and_text(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, text = printed(capsys, "--data.help", name)
    assert code == 0
    entries = re.split(r"^  --data\.", text.partition("Help for")[2], flags=re.M)[1:]
    keys = {re.split(r"\W", entry)[0]: " ".join(entry.split()) for entry in entries}
    assert keys.keys() == KEYS[name].keys() | {"tokenizer"}
    for key, value in KEYS[name].items():
        default = "null" if value is None else str(value)
        end = r"\(required, type: .+\)" if key in GIVEN else rf"\(type: .+, default: {default}\)"
        assert re.search(rf" [A-Z`].*\w.*\. {end}$", keys[key]), keys[key]


@pytest.mark.parametrize("name", KEYS)
def test_the_saved_config_has_every_key(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = printed(capsys, *given(name), "--print_config")
    assert code == 0
    saved = yaml.safe_load(text)["data"]["init_args"]
    assert saved == KEYS[name] | dict.fromkeys(GIVEN & KEYS[name].keys(), "a")


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize(
    ("key", "value"), [("batchsize", "4"), ("batch_size", "many"), ("on_bad_row", "ignore")]
)
def test_a_misspelt_or_mistyped_key_is_refused(
    name: str, key: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = printed(capsys, *given(name), f"--data.{key}", value)
    assert code == 2
    assert key in text.partition("error:")[2]
