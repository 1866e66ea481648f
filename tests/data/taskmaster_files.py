"""Tiny made-up files in the true layout of the Taskmaster corpora."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

GREETING = {"role": "agent", "text": "Welcome to the Coffee Bar."}
MENU_CALL = {"role": "agent", "api": {"get_menu_items": {"query": "espresso"}}}
MENU = {"role": "api", "response": {"get_menu_items": {"items": ["é"]}}}


def rated(context: list[Any], generation: object, reward: object = 1.0) -> dict[str, Any]:
    return {
        "conversation_id": "dlg-0",
        "context": json.dumps(context),
        "generation": json.dumps(generation),
        "reward": reward,
    }


def user(text: str) -> dict[str, str]:
    return {"role": "user", "text": text}


def agent(text: str) -> dict[str, str]:
    return {"role": "agent", "text": text}


def annotation(name: str, value: str, context: str) -> dict[str, str]:
    return {"name": name, "value": value, "context": context}


def dialog(number: int) -> dict[str, Any]:
    return {
        "conversation_id": f"dlg-{number}",
        "vertical": "Coffee",
        "scenario": "one",
        "instructions": None,
        "utterances": [
            {
                "index": 0,
                "speaker": "user",
                "text": f"latte number {number} please",
                "segments": [],
                "annotations": [
                    annotation("api_call", "get_menu_items", "api_call_0"),
                    annotation("request", '{"query":"latte"}', "api_call_0"),
                    annotation("api_response", "get_menu_items", "api_response_0"),
                    annotation("response", '{"ok":true}', "api_response_0"),
                    annotation("api_call", "show_menu", "api_call_1"),
                    annotation("api_response", "show_menu", "api_response_1"),
                    annotation("response", '{"ok": tru', "api_response_1"),
                ],
            },
            {"speaker": "assistant", "text": "Done.", "annotations": []},
            {"speaker": "user", "text": "thanks", "annotations": []},
        ],
    }


def write(file: Path, rows: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(rows).encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def thumbs(dialogs: int = 20) -> list[dict[str, Any]]:
    rows = []
    for number in range(dialogs):
        start = [GREETING, user(f"espresso number {number}")]
        rows.append(rated(start, MENU_CALL))
        rows.append(rated([*start, MENU_CALL, MENU], agent(f" Sure, {number}.\n"), 0.0))
    return rows


def save_corpora(folder: Path, dialogs: int = 40) -> Path:
    """Writes demonstrations and rated turns for both tasks; returns the folder."""
    write(folder / "taskmaster-coffee/data/data_00.json.gz", [dialog(n) for n in range(dialogs)])
    write(folder / "taskmaster-coffee/reward/reward_00.json.gz", thumbs(dialogs))
    write(folder / "taskmaster-ticketing/reward/reward_00.json.gz", thumbs(dialogs))
    file = folder / "taskmaster-ticketing/sft/train-aa.tsv"
    file.parent.mkdir(parents=True)
    lines = (f"<U>ticket {n} please<C>\t<A>Which theater?\tdlg-{n}\n" for n in range(dialogs))
    file.write_text("".join(lines), encoding="utf-8")
    return folder
