"""Rows, roles and slow references that the tests of models and rollouts share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_perl.functional.sequences import Sequences
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.heads import ScalarHead, save_heads
from lightning_perl.models.loading import load_trunk
from lightning_perl.models.roles import Layout, Role, Roles
from lightning_perl.models.trunk import Trunk

ROLES: tuple[Role, ...] = ("policy", "value", "reference", "reward")
SPEC = LoraSpec(rank=3, alpha=6.0)
LENGTHS = ((5, 7), (2, 13), (11, 1), (7, 9))
"""(prompt, response) tokens of the rows: one response of one token, rows past a window of 8."""


def texts(lengths: tuple[tuple[int, int], ...] = LENGTHS, seed: int = 3) -> list[list[int]]:
    """Random token ids of prompt + response, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(50, 260, (prompt + response,), generator=generator).tolist()
        for prompt, response in lengths
    ]


def padded(
    lengths: tuple[tuple[int, int], ...] = LENGTHS,
    rows: tuple[int, ...] | None = None,
    left: int = 0,
    right: int = 0,
    pad: int = 0,
) -> Sequences:
    """Rows as a rollout pads them: prompts to the left, responses to the right.

    Args:
        lengths: Prompt and response tokens per row.
        rows: Which rows; all by default.
        left: Additional padding columns in front.
        right: And behind.
        pad: What stands in them.
    """
    chosen = tuple(range(len(lengths))) if rows is None else rows
    every = texts(lengths)
    before = max(lengths[row][0] for row in chosen) + left
    after = max(lengths[row][1] for row in chosen) + right
    ids = torch.full((len(chosen), before + after), pad)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for line, row in enumerate(chosen):
        start = before - lengths[row][0]
        ids[line, start : start + len(every[row])] = torch.tensor(every[row])
        mask[line, start : start + len(every[row])] = True
    return Sequences(ids, mask, mask[:, before:])


def build(folder: Path, layout: Layout = "hydra", **options: Any) -> Roles:
    """Roles with adapters that do something: every trained B is far from 0."""
    roles = Roles(layout, str(folder), options.pop("lora", SPEC), **options)
    train(roles)
    return roles


def train(roles: Roles, seed: int = 9, size: float = 0.2) -> None:
    """Give every trainable parameter of adapters and value head a random push."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in roles.named_parameters():
            if parameter.requires_grad and ("lora_" in name or "head" in name):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(size * noise.to(parameter.dtype))


def write_reward(folder: Path, trunk: Path, spec: LoraSpec, seed: int, bias: float) -> Trunk:
    """Write what `RewardModel` writes, but for the manifest: a trained adapter and its head. Returns its trunk."""
    judge = load_trunk(str(trunk))
    judge.adapters.add("reward", spec, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in judge.adapters.parameters("reward"):
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
    judge.adapters.save("reward", folder, judge.source)
    head = ScalarHead(judge.hidden_size, seed)
    head.bias.data.fill_(bias)
    save_heads(folder, {"reward": head})
    return judge


def own_weights(roles: Roles) -> dict[str, Tensor]:
    """Copies of all weights of the trunks, without adapters."""
    return {
        name: parameter.detach().clone()
        for name, parameter in roles.trunks.named_parameters()
        if "lora_" not in name
    }


def loss(roles: Roles, sequences: Sequences, role: Role) -> Tensor:
    """Some loss on one trained role's answers; every position weighs differently."""
    answers = roles.answer(sequences, (role,))
    found = answers.policy if role == "policy" else answers.value
    if found is None:
        raise RuntimeError(f"{role} did not answer.")
    weights = torch.linspace(0.5, 2, found.shape[1], dtype=found.dtype)
    return (found * weights * sequences.response_mask).pow(2).sum() / found.shape[1]


def backward(objective: Tensor) -> None:
    """``objective.backward()``, which torch has no types for."""
    objective.backward()  # type: ignore[no-untyped-call]


def gradients(roles: Roles) -> dict[str, Tensor]:
    """Copies of every gradient there is, by name."""
    return {
        name: parameter.grad.clone()
        for name, parameter in roles.named_parameters()
        if parameter.grad is not None
    }
