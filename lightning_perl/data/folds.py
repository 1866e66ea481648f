"""Splits by group that depend on the rows alone: the same on every machine, whatever the seed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

from lightning_perl.data.rows import Item, first_row


def stable_hash(text: str) -> str:
    """Returns a hash that is the same on every machine and in every run."""
    # The encoder refuses half a surrogate pair later, naming file and line.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def assign_folds(groups: Iterable[str], folds: int) -> dict[str, int]:
    """Assigns every group a fold; all folds get about as many rows.

    The largest group goes first, to the fold with the fewest rows so far; ties go by a stable hash.

    Args:
        groups: One group name per row.
        folds: How many folds, at least 2.
    """
    sizes = Counter(groups)
    rows = [0] * folds
    assigned = {}
    for group in sorted(sizes, key=lambda name: (-sizes[name], stable_hash(name))):
        fold = rows.index(min(rows))
        assigned[group] = fold
        rows[fold] += sizes[group]
    return assigned


def hold_out(groups: Iterable[str], fraction: float) -> set[str]:
    """Returns a stable choice of ``round(fraction * groups)`` groups; repeated names count once.

    At least one, where one can be spared: a checkpoint callback that watches a validation loss
    stops a run without any. A fraction of 0 chooses none.
    """
    ordered = sorted(set(groups), key=stable_hash)
    least = int(fraction > 0 and len(ordered) > 1)
    return set(ordered[: max(least, round(fraction * len(ordered)))])


def held_out(items: Sequence[Item], fraction: float) -> tuple[list[Item], list[Item]]:
    """Returns the items that stay, and those of the dialogs that :func:`hold_out` chooses."""
    held = hold_out((first_row(item).dialog for item in items), fraction)
    return (
        [item for item in items if first_row(item).dialog not in held],
        [item for item in items if first_row(item).dialog in held],
    )
