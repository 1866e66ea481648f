"""Printing on consoles that cannot show every character."""

from __future__ import annotations

import sys


def show(text: str, end: str = "\n") -> None:
    """Print a text; what the console's encoding lacks becomes a question mark instead of an error."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end=end, flush=True)
