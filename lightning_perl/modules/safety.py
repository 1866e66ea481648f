"""Checks that stop a run before it measures the wrong thing: ranges, equal log-probabilities, fingerprints."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_perl.models.roles import Roles

POSITIVE = 1e-12
"""Lower end of a range that leaves 0 out."""


def require_in_range(ranges: Mapping[str, tuple[float, float, float]]) -> None:
    """Refuse a ``(value, low, high)`` whose value is not between the other two.

    Raises:
        ValueError: With the name, the range and the value.
    """
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}.")


def ratio_tolerance(dtype: torch.dtype, sampled: bool) -> float:
    """Mean absolute log-ratio per token that rounding alone explains.

    Args:
        dtype: Dtype of the trunk.
        sampled: Whether the old log-probabilities were kept while sampling, one token at a time behind a
            cache, instead of read with all other tokens of the row.
    """
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        # TF32 has bfloat16's digits in its products and more between them.
        return 2e-2
    close = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    return 1e-1 if sampled and dtype == torch.bfloat16 else close


def require_equal_logprobs(gap: Tensor, allowed: float, problem: str, cause: str) -> None:
    """Refuse log-probabilities that should be equal and differ by more than rounding.

    Args:
        gap: Mean absolute difference per token, in nats. Shape: ``()``.
        allowed: What rounding explains, see `ratio_tolerance`.
        problem: What it means.
        cause: Where the user should look.

    Raises:
        RuntimeError: With all of these.
    """
    if not float(gap) <= allowed:
        raise RuntimeError(
            f"{problem}: mean |difference of log-probabilities| is {float(gap):.3g} per token, rounding "
            f"explains {allowed:.0e}. {cause}"
        )


def fingerprints(roles: Roles) -> dict[str, str]:
    """Hashes of the weights behind reference and reward, which no training may move."""
    hashes = {"reference trunk": roles.trunk("reference").fingerprint()}
    for judge in roles.judges:
        hashes[f"{judge} trunk"] = roles.trunk(judge).fingerprint()
        hashes[f"{judge} head"] = roles.reward_head(judge).fingerprint()
    return hashes


def require_unmoved(roles: Roles, before: Mapping[str, str], since: str) -> None:
    """Refuse to go on where reference or reward have other weights than before.

    Args:
        roles: Who answers now.
        before: Earlier `fingerprints`.
        since: When they were taken, for the message.

    Raises:
        RuntimeError: With the names of what has moved.
    """
    moved = [name for name, value in fingerprints(roles).items() if before.get(name) != value]
    if moved:
        raise RuntimeError(
            f"{moved} has other weights than {since}, so scores and KL are measured "
            "against something else. Was it trained, merged into, or exchanged in its folder?"
        )
