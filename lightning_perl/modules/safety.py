"""Checks that stop a run or leave out a step: equal log-probabilities, fingerprints, finite gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_perl.models.roles import Roles


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


def fingerprints(roles: Roles) -> dict[str, str]:
    """Hashes of the weights behind reference and reward, which no training may move."""
    trunks = {role: roles.trunk(role) for role in ("reference", *roles.judges)}
    known = {trunk: trunk.fingerprint() for trunk in set(trunks.values())}
    hashes = {f"{role} trunk": known[trunk] for role, trunk in trunks.items()}
    return hashes | {
        f"{judge} head": roles.reward_head(judge).fingerprint() for judge in roles.judges
    }


PATIENCE = 3
"""Steps in a row with a non-finite gradient after which training stops."""


class FiniteGuard:
    """Says whether a step may be taken, and gives up when it may not `PATIENCE` times in a row."""

    def __init__(self) -> None:
        self.skipped = 0
        self.in_a_row = 0

    def __call__(self, norms: Mapping[str, Tensor]) -> bool:
        """Look at the gradient norms before clipping.

        Raises:
            RuntimeError: `PATIENCE` steps in a row were not finite.
        """
        broken = [name for name, norm in norms.items() if not bool(torch.isfinite(norm))]
        if not broken:
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= PATIENCE:
            raise RuntimeError(
                f"The gradients of {broken} were not finite {self.in_a_row} times in a row; nothing was "
                "learned from those steps. Look at the scores (a reward that is inf or NaN), at the learning "
                "rate, and at trunk_dtype."
            )
        return False


def require_trainable(optimizer: Optimizer) -> None:
    """Refuse a step over parameters that somebody has frozen meanwhile.

    Raises:
        RuntimeError: A parameter of the optimizer no longer requires a gradient.
    """
    for group in optimizer.param_groups:
        frozen = sum(not parameter.requires_grad for parameter in group["params"])
        if frozen:
            raise RuntimeError(
                f"{frozen} parameters of the group {group.get('name')!r} no longer require gradients. Was "
                "PEFT's set_adapter or disable_adapter called on the trunk? Use `with roles(...)`."
            )


def clip_by_group(optimizer: Optimizer, limits: Mapping[str, float]) -> dict[str, Tensor]:
    """Clip the gradient norm of each parameter group, or of all that share a name, on its own.

    Args:
        optimizer: An optimizer whose groups carry names.
        limits: Largest norm by group name; groups that are not named are measured only.

    Returns:
        Norms before clipping, by group name.
    """
    named: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        named.setdefault(group["name"], []).extend(group["params"])
    return {
        name: nn.utils.clip_grad_norm_(weights, limits.get(name, float("inf")))
        for name, weights in named.items()
    }
