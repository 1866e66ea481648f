"""Splits by group that depend on the rows alone: the same on every machine, whatever the seed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable


def stable_hash(text: str) -> str:
    """Returns a hash that is the same on every machine and in every run."""
    # Half a surrogate pair is refused where the row is encoded, by file and line.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def assign_folds(groups: Iterable[str], folds: int) -> dict[str, int]:
    """Assigns every group a fold; all folds get about as many rows.

    The largest group goes first, to the fold with the fewest rows so far; ties go by a stable hash.
    So folds depend on the rows alone, never on a seed.

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
    """Returns a stable choice of ``round(fraction * groups)`` groups.

    At least one, where one can be spared: a checkpoint callback that watches a validation loss
    stops a run without any.

    Args:
        groups: Group names; repetitions do not count.
        fraction: From 0 to 1; 0 chooses none.
    """
    ordered = sorted(set(groups), key=stable_hash)
    least = int(fraction > 0 and len(ordered) > 1)
    return set(ordered[: max(least, round(fraction * len(ordered)))])
