"""Trunks and heads of shapes alone: nothing is read, and nothing takes memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

_architecture: ContextVar[PreTrainedConfig | None] = ContextVar("architecture", default=None)


@contextmanager
def weightless(config: PreTrainedConfig) -> Iterator[None]:
    """Build every trunk inside the block from ``config``, on the meta device, until `materialize` gives it memory.

    No folder is read, nor need it exist. Nothing is compared: no trunk with its own forward, no adapter with its
    trunk.
    """
    token = _architecture.set(config)
    try:
        with torch.device("meta"):
            yield
    finally:
        _architecture.reset(token)


def architecture() -> PreTrainedConfig | None:
    """A copy of the configuration that `weightless` was given; None outside of it."""
    config = _architecture.get()
    return None if config is None else copy.deepcopy(config)


def stand_in_tokenizer(config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """A tokenizer that knows only the end of text."""
    eos = config.get_text_config(decoder=True).eos_token_id
    number = eos[0] if isinstance(eos, list) else eos or 0
    words = Tokenizer(models.WordLevel({"<eos>": number}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words, eos_token="<eos>", pad_token="<eos>"
    )


def materialize(module: nn.Module) -> None:
    """Give every meta tensor of a module memory on the CPU; fake memory inside a ``FakeTensorMode``.

    Tied weights stay tied, which ``Module.to_empty`` would part.
    """
    made: dict[int, torch.Tensor] = {}

    def allocated(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
        return made[id(tensor)]

    for part in module.modules():
        # Some families also keep a tensor as a plain attribute.
        for held in cast(list[dict[str, Any]], [part._parameters, part._buffers, vars(part)]):
            meta = [name for name, value in held.items() if getattr(value, "is_meta", False)]
            held.update({name: allocated(held[name]) for name in meta})
