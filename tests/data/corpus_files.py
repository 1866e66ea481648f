"""Tiny made-up files in the true layouts of the preference and summarization corpora."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def transcript(*turns: str) -> str:
    r"""Turns of a human and an assistant, the human first: ``\n\nHuman: a\n\nAssistant: b``."""
    tags = ("Human", "Assistant")
    return "".join(f"\n\n{tags[place % 2]}: {turn}" for place, turn in enumerate(turns))


def hh(number: int) -> dict[str, str]:
    start = (f"can you bake bread {number}", "Yes.", "How?")
    return {
        "chosen": transcript(*start, "Flour, water, heat."),
        "rejected": transcript(*start, "No idea."),
    }


def scored(number: int) -> dict[str, Any]:
    row = hh(number)
    # The chosen one is not always the first.
    sides = [(row["chosen"], 1.0), (row["rejected"], 0.0)][:: 1 if number % 2 else -1]
    return {"text": [text for text, _ in sides], "score": [score for _, score in sides]}


def shp(number: int, comment: int = 0) -> dict[str, Any]:
    return {
        "post_id": f"p{number}",
        "domain": "askbaking_train",
        "upvote_ratio": 0.98,
        "history": f"Why did loaf {number} burn?",
        "c_root_id_A": "a",
        "c_root_id_B": "b",
        "created_at_utc_A": 2,
        "created_at_utc_B": 1,
        "score_A": 9 if number % 2 else 3,
        "score_B": 3 if number % 2 else 9,
        "human_ref_A": f"Too hot, {comment}." if number % 2 else "Eh.",
        "human_ref_B": "Eh." if number % 2 else f"Too hot, {comment}.",
        "labels": number % 2,
        "seconds_difference": 1.0,
        "score_ratio": 3.0 if comment else 1.5,
    }


def post(number: int) -> dict[str, str]:
    return {
        "id": f"t3_{number}",
        "subreddit": "tea",
        "title": f"Cup {number}",
        "post": f"I drank cup {number}.\n\nIt was hot.",
        "summary": f"Cup {number} was hot.",
    }


def comparison(number: int, choice: int = 0, split: str = "train") -> dict[str, Any]:
    row = post(number)
    summary = row.pop("summary")
    return {
        "info": row,
        "summaries": [
            {"text": f" {summary}", "policy": "ref", "note": None},
            {"text": " I drank.", "policy": "sup4", "note": "unclear"},
        ],
        "choice": choice,
        "worker": "w",
        "batch": "batch3",
        "split": split,
        "extra": {"confidence": 8},
    }


def human(number: int) -> dict[str, str]:
    row = post(number)
    return {
        "id": row["id"],
        "title": row["title"],
        "post": row["post"],
        "preferred_summary": f" {row['summary']}",
        "rejected_summary": " I drank.",
    }


def judged(number: int, preferred: str = "ours") -> dict[str, str]:
    row = post(number)
    return {
        "": str(number),
        "Unnamed: 0": str(number),
        "query": f"SUBREDDIT: r/tea\n\nTITLE: {row['title']}\n\nPOST: {row['post']}\n\nTL;DR:",
        "postprocessed_response": "  I drank.",
        "reference_responses": f"  {row['summary']}",
        "preferred": preferred,
        "explanation": "Clearer." if preferred else "",
        "shuffled_index": "0" if preferred else "",
    }


def dialogue(number: int, several: bool = False) -> dict[str, str]:
    row = {
        "fname": f"dev_{number}",
        "dialogue": f"#Person1#: Tea {number}?\n#Person2#: Please.",
    }
    names = ("summary1", "summary2", "summary3") if several else ("summary",)
    return row | dict.fromkeys(names, f"#Person2# wants tea {number}.")


def write_lines(file: Path, rows: Sequence[object]) -> Path:
    """Writes JSON lines, compressed where the name says so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def write_csv(file: Path, rows: Sequence[dict[str, str]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    file.write_text(text.getvalue(), encoding="utf-8", newline="")
    return file


def save_corpora(folder: Path, rows: int = 24) -> Path:
    """Writes every corpus of this module, and tables for PreferenceDataModule; returns the folder."""
    numbers = range(rows)
    for split, shift in (("train", 0), ("test", rows)):
        write_lines(
            folder / f"harmless-base/{split}.jsonl.gz", [hh(shift + number) for number in numbers]
        )
    write_lines(folder / "hh-helpful-base/test.jsonl.gz", [scored(number) for number in numbers])
    for place, split in enumerate(("train", "validation", "test")):
        write_lines(
            folder / f"shp/askbaking/{split}.json",
            [shp(place * rows + number, comment=1) for number in numbers],
        )
    write_lines(folder / "tldr/oai1b_judged.jsonl.gz", [judged(number) for number in numbers])
    write_lines(folder / "tldr-human/sample_train.jsonl.gz", [human(number) for number in numbers])
    write_lines(folder / "comparisons/batch3.json", [comparison(number) for number in numbers])
    write_lines(folder / "dialogsum/dialogsum.dev.jsonl.gz", [dialogue(n) for n in numbers])
    test = [dialogue(rows + number, several=True) for number in numbers]
    write_lines(folder / "dialogsum/dialogsum.test.jsonl.gz", test)
    chats = [{"conversation": f"CONVERSATION:\n#Person1#: tea {n}?\n\nTL;DR:"} for n in numbers]
    write_lines(folder / "bolt.jsonl", chats)
    pairs = [
        {"prompt": f"say {number}", "chosen": f"it is {number}", "rejected": "no"}
        for number in range(rows)
    ]
    write_lines(folder / "pairs.jsonl", pairs)
    ui = [{"context": f"open item {n}", "action": f"tap {n}", "correct": n % 2} for n in numbers]
    write_lines(folder / "ui_automation.jsonl", ui)
    view = [
        {"question": f"why {n}?", "answer": f"some say {n}", "rating": n % 5 + 1} for n in numbers
    ]
    write_lines(folder / "neutral_viewpoint.jsonl", view)
    return folder
