"""Scalar heads: the reward head and the value head. They live outside PEFT and are two tensors.

Shapes: ``B`` rows, ``N`` positions, ``H`` hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_perl.functional.logprobs import at_least_fp32
from lightning_perl.models.weightless import architecture

HEADS_FILE = "heads.safetensors"


class ScalarHead(nn.Module):
    """One number per hidden state, computed and kept in at least fp32.

    Weights start from N(0, 1 / (H + 1)), the bias from 0 (2403.17031, detail 11).

    Args:
        hidden_size: ``H``.
        seed: Of the initial weights.
    """

    def __init__(self, hidden_size: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(hidden_size, generator=generator) / (hidden_size + 1) ** 0.5
        self.weight = nn.Parameter(drawn)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        """Shape: ``(..., H)`` to ``(...)``."""
        promoted = at_least_fp32(hidden)
        weight = self.weight.to(promoted.dtype)
        return F.linear(promoted, weight.unsqueeze(0)).squeeze(-1) + self.bias

    def fingerprint(self) -> str:
        """A hash of the head's values."""
        values = torch.cat([self.weight.detach(), self.bias.detach().reshape(1)])
        return hashlib.sha256(values.float().cpu().numpy().tobytes()).hexdigest()[:16]

    def clone_from(self, other: ScalarHead) -> None:
        """Take another head's values; the two stay two tensors."""
        with torch.no_grad():
            self.weight.copy_(other.weight)
            self.bias.copy_(other.bias)


def save_heads(folder: Path, heads: dict[str, ScalarHead]) -> None:
    """Write ``heads.safetensors`` with ``NAME.weight`` and ``NAME.bias`` per head."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, head in heads.items()
        for key, value in head.state_dict().items()
    }
    save_file(tensors, folder / HEADS_FILE, metadata={"format": "pt"})


def has_head(folder: Path, name: str) -> bool:
    """Whether `load_head` finds the head ``name`` there."""
    if architecture() is not None:
        return True
    path = folder / HEADS_FILE
    return path.is_file() and f"{name}.weight" in load_file(path)


def average(heads: Sequence[ScalarHead]) -> ScalarHead:
    """The head whose values are the mean of theirs."""
    head = ScalarHead(len(heads[0].weight))
    with torch.no_grad():
        head.weight.copy_(torch.stack([one.weight for one in heads]).mean(0))
        head.bias.copy_(torch.stack([one.bias for one in heads]).mean(0))
    return head


def load_head(folder: Path, name: str) -> ScalarHead:
    """The head ``name`` of a folder that `save_heads` wrote.

    Raises:
        ValueError: The folder has no such head.
    """
    shapes = architecture()
    if shapes is not None:
        return ScalarHead(shapes.get_text_config(decoder=True).hidden_size)
    path = folder / HEADS_FILE
    tensors = load_file(path) if path.is_file() else {}
    if f"{name}.weight" not in tensors:
        found = sorted({key.rsplit(".", 1)[0] for key in tensors}) if tensors else "no heads file"
        raise ValueError(
            f"{folder} has no {name} head (found: {found}). Train one first: `HydraSFT` writes "
            "RUN/trunk and `RewardModel` writes RUN/adapters/reward, both with a reward head beside "
            "the weights."
        )
    head = ScalarHead(tensors[f"{name}.weight"].shape[0])
    head.load_state_dict({"weight": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]})
    return head
