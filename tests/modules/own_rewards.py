"""A reward that is a plain function, to be named by its import path."""

from __future__ import annotations

from collections.abc import Sequence


def shortest_wins(
    prompts: Sequence[str], responses: Sequence[str], rows: Sequence[int]
) -> Sequence[float]:
    return [-float(len(response.split())) for response in responses]
