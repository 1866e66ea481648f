"""What every corpus's golden test asserts: rows become the documented text, and back."""

from __future__ import annotations

from collections import defaultdict

import pytest

from lightning_perl.data import ConversationDataModule
from lightning_perl.data.rows import BadRow, Row
from lightning_perl.data.tokenization import Encoded

TAGS = {"system": "System", "user": "User", "api": "API"}


def assert_golden(module: ConversationDataModule, row: Row, encoded: Encoded) -> None:
    """The plain template, EOS at the end, and the response's tokens are the answer's words."""
    decode = module.tokenizer.decode
    assert encoded.cut_turns == 0
    prompt = "<bos>"
    for turn in row.context:
        words = turn.text.strip()
        prompt += (
            f"Agent: {words}<eos>" if turn.role == "agent" else f"{TAGS[turn.role]}: {words}\n"
        )
    (answer,) = (turn.text.strip() for turn in row.response)
    assert decode(encoded.ids) == f"{prompt}Agent: {answer}<eos>"
    assert encoded.ids[-1] == module.tokenizer.eos_token_id
    ids = zip(encoded.ids, encoded.response_mask, strict=True)
    assert decode([number for number, counts in ids if counts]) == f" {answer}<eos>"


def rejected_lines(
    module: ConversationDataModule, monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[int]]:
    """Returns a dict that fills, while the module reads, with the lines rejected for each reason."""
    lines: dict[str, list[int]] = defaultdict(list)
    count = module.bad_row

    def bad_row(where: str, message: str) -> None:
        count(where, message)
        reason = BadRow(message).reason
        lines[reason] = sorted([*lines[reason], int(where.rpartition(":")[2])])

    monkeypatch.setattr(module, "bad_row", bad_row)
    return lines
