"""Printing on consoles that cannot show every character."""

from __future__ import annotations

import re
import sys

COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that tell a terminal to do something, or that turn the direction of the text behind them."""


def show(text: str, end: str = "\n") -> None:
    """Print a text; what the console's encoding lacks becomes a question mark instead of an error.

    Models and data write such texts, so what a terminal would obey is spelt out.
    """
    text = COMMANDS.sub(lambda found: repr(found[0])[1:-1], text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end=end, flush=True)
