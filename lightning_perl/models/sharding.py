"""Frozen trunks in pieces: a part of each decoder block on every rank, or all of them in the host's memory.

A block is put together right before it runs, forward or backward, and dropped after. Embeddings, LM head, adapters
and scalar heads stay whole. Nothing that is trained is ever in pieces.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from lightning_perl.models.adapters import linear_layers_in_blocks
from lightning_perl.models.trunk import Trunk

TrunkSharding = Literal["shard", "offload"]
NO_SHARDED_TUNING = (
    "trunk_sharding is for frozen trunks: gradients and moments of a trunk that is trained stay whole on every "
    "device. Give lora (and not layout full), or leave trunk_sharding out."
)


def decoder_blocks(model: nn.Module) -> list[str]:
    """Names of the decoder blocks, which have a number: ``model.layers.3``."""
    names = []
    for name in linear_layers_in_blocks(model):
        parts = name.split(".")
        number = next(place for place, part in enumerate(parts) if part.isdigit())
        names.append(".".join(parts[: number + 1]))
    return list(dict.fromkeys(names))


def shard(trunk: Trunk, device: torch.device, sharding: TrunkSharding) -> None:
    """Leave on this rank its piece of each block of a frozen trunk, on the device or in the host's memory.

    Every rank must then run the trunk equally often.
    """
    trunk.keep_in_mind()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    whole = set(trunk.parameters())
    blocks = [trunk.model.get_submodule(name) for name in decoder_blocks(trunk.model)]
    for block in blocks:
        whole -= {p for key, p in block.named_parameters() if ".lora_" not in key}
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    options: Any = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "ignored_params": whole,
        "offload_policy": offload if sharding == "offload" else OffloadPolicy(),
    }
    for weight in whole:
        weight.data = weight.data.to(device)
    for block in blocks:
        fully_shard(block, **options)
        # Whoever moves the module would take the pieces along.
        cast(Any, block)._apply = lambda function, recurse=True, block=block: block
    fully_shard(trunk.model.base_model, **options)
    trunk.sharding = sharding
