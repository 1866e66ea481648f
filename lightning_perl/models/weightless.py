"""Building trunks and heads of which only the shapes are wanted: nothing is read, nothing takes memory."""

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
    """Build every trunk inside the block from ``config``, on the meta device.

    No weights, tokenizers and head files are read, and their folders need not exist. What compares
    values (a trunk with its own forward, an adapter with its trunk) is left out. After the block
    `materialize` gives the module memory, or fake memory.
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
    """One that knows its end of text and nothing else."""
    eos = config.get_text_config(decoder=True).eos_token_id
    number = eos[0] if isinstance(eos, list) else eos or 0
    words = Tokenizer(models.WordLevel({"<eos>": number}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words, eos_token="<eos>", pad_token="<eos>"
    )


def materialize(module: nn.Module) -> None:
    """Give every meta tensor of a module memory on the CPU; fake memory inside a ``FakeTensorMode``.

    Tensors that are one stay one: ``Module.to_empty`` would part tied weights.
    """
    made: dict[int, torch.Tensor] = {}

    def of(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            made[id(tensor)] = (
                nn.Parameter(empty, tensor.requires_grad)
                if isinstance(tensor, nn.Parameter)
                else empty
            )
        return made[id(tensor)]

    for part in module.modules():
        # Some families also keep a tensor as a plain attribute.
        for held in cast(list[dict[str, Any]], [part._parameters, part._buffers, vars(part)]):
            for name, tensor in list(held.items()):
                if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                    held[name] = of(tensor)
