"""The first rows of the packaged coffee orders, as lists of rows for ``PreferenceDataModule``."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from typing import Any

from lightning_perl.packaged import unpackaged


def orders(name: str, count: int) -> list[dict[str, Any]]:
    """Returns the first rows of ``prompts_train``, ``rated_val`` and so on."""
    path = unpackaged(f"packaged:quickstart/orders/{name}.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, count)]


def prompt_data(train: int = 8, val: int = 2, batch_size: int = 4) -> dict[str, Any]:
    """Returns the ``data`` of a configuration with a few prompts."""
    arguments = {
        "train": orders("prompts_train", train),
        "val": orders("prompts_val", val),
        "rows": "prompts",
        "batch_size": batch_size,
        "max_tokens": 300,
        "max_response_tokens": 32,
    }
    return {"class_path": "PreferenceDataModule", "init_args": arguments}
