"""Messages of other libraries that every run would show and that call for no action, hidden in this one place."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

WARNINGS = (
    # Lightning checks torch's LeafSpec in a way that torch has deprecated.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # Trunks stay in eval mode between training passes by design (see `Trunk.training_pass`).
    r"Found \d+ module\(s\) in eval mode at the start",
    # Checkpoints are written behind the update, as all that a run goes on with is.
    "Using ModelCheckpoint with manual optimization",
    # PEFT asks transformers by an old name.
    "`is_gradient_checkpointing` is deprecated",
)
"""How warnings begin."""
RECORDS = {
    "lightning.pytorch.utilities.rank_zero": (
        # Advertisements for packages of Lightning AI; there is no switch for them.
        "Tip: For seamless cloud",
        # A trainer that is used again has those of its last use.
        "The following callbacks returned in `LightningModule.configure_callbacks` will override",
    ),
    # PEFT imports bitsandbytes wherever it is installed, whatever is quantized.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
}
"""Words of log records, by logger."""


def _is_news(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in RECORDS[record.name])


def hush() -> None:
    """Hide them in this process."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in RECORDS:
        logging.getLogger(name).addFilter(_is_news)


@contextmanager
def no_progress_bars(wanted: bool = True) -> Iterator[None]:
    """Reads and writes files without transformers' bars."""
    shown = is_progress_bar_enabled()
    if wanted and shown:
        disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if wanted and shown:
            enable_progress_bar()  # type: ignore[no-untyped-call]
