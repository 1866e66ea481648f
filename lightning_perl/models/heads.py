"""Scalar heads: the reward head and the value head. They live outside PEFT and share no weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_perl.functional.logprobs import at_least_fp32
from lightning_perl.models.weightless import architecture
from lightning_perl.whole import read_tensors

HEADS_FILE = "heads/heads.safetensors"
"""Not beside the weights: inference servers take every safetensors file there for weights."""


class ScalarHead(nn.Module):
    """One number per hidden state, computed and kept in at least fp32.

    Weights are drawn from N(0, 1 / (H + 1)) by ``seed``, the bias starts at 0 (2403.17031, detail 11).
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


def average(heads: Sequence[ScalarHead]) -> ScalarHead:
    """A head whose values are the mean of those of the heads."""
    mean = ScalarHead(len(heads[0].weight))
    states = [head.state_dict() for head in heads]
    mean.load_state_dict({key: torch.stack([s[key] for s in states]).mean(0) for key in states[0]})
    return mean


def save_heads(folder: Path, heads: dict[str, ScalarHead]) -> None:
    """Write ``heads/heads.safetensors`` with ``NAME.weight`` and ``NAME.bias`` per head."""
    (folder / HEADS_FILE).parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, head in heads.items()
        for key, value in head.state_dict().items()
    }
    save_file(tensors, folder / HEADS_FILE, metadata={"format": "pt"})


def _stored(folder: Path) -> dict[str, Tensor]:
    path = folder / HEADS_FILE
    if not path.is_file():  # where folders of 0.1 have it
        path = folder / "heads.safetensors"
    return read_tensors(path) if path.is_file() else {}


def has_head(folder: Path, name: str) -> bool:
    """Whether `load_head` finds the head ``name`` in a folder."""
    return architecture() is not None or f"{name}.weight" in _stored(folder)


def load_head(folder: Path, name: str) -> ScalarHead:
    """The head ``name`` of a folder that `save_heads` wrote; a folder without it is refused."""
    shapes = architecture()
    if shapes is not None:
        return ScalarHead(shapes.get_text_config(decoder=True).hidden_size)
    if not folder.is_dir():
        beside = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = get_close_matches(folder.name, beside, 1)
        raise ValueError(
            f"There is no folder {folder}{f'; did you mean {near[0]}?' if near else '.'}"
        )
    tensors = _stored(folder)
    if f"{name}.weight" not in tensors:
        found = sorted({key.rsplit(".", 1)[0] for key in tensors}) if tensors else "no heads file"
        raise ValueError(
            f"{folder} has no {name} head (found: {found}). Train one first: `HydraSFT` writes "
            "RUN/trunk and `RewardModel` writes RUN/adapters/reward, both with a reward head beside "
            "the weights."
        )
    stored = {key: tensors.get(f"{name}.{key}", torch.empty(0)) for key in ("weight", "bias")}
    sound = stored["weight"].dim() == 1 and stored["bias"].dim() == 0
    if not sound or not all(bool(value.isfinite().all()) for value in stored.values()):
        raise ValueError(
            f"{folder}: its {name} head is no vector of finite weights with a finite bias. Copy the folder again, "
            "or train it again."
        )
    head = ScalarHead(len(stored["weight"]))
    head.load_state_dict(stored)
    return head
