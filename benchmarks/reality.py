"""The same train batch with real tensors on the CPU, which an estimate is compared with."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedConfig

from lightning_perl.batches import PromptBatch, RatedBatch
from lightning_perl.commands.rehearsal import Load, optimizer_of, prompts_of, rated_of
from lightning_perl.models.weightless import materialize, weightless
from lightning_perl.modules.base import AdapterModule
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.modules.safety import clip_by_group
from lightning_perl.modules.supervised import Supervised

Made = TypeVar("Made", bound=AdapterModule)


def real_peak(make: Callable[[], AdapterModule], config: PreTrainedConfig, load: Load) -> int:
    """The most that a module with random weights holds in its second train batch, in bytes.

    Args:
        make: Makes the module.
        config: Of its trunks; small, for it is run.
        load: What a train batch holds. Every second row has one token of padding.
    """
    module = real_module(make, config)
    optimizer = optimizer_of(module)
    train(module, load, optimizer)
    gc.collect()
    states = (value for state in optimizer.state.values() for value in state.values())
    moments = (value for value in states if isinstance(value, Tensor))
    held = held_bytes([*module.parameters(), *module.buffers(), *moments])
    return held + allocator_peak(lambda: train(module, load, optimizer))


def real_module(make: Callable[[], Made], config: PreTrainedConfig) -> Made:
    """A module with random weights and no folder behind it."""
    with weightless(config):
        module = make()
    materialize(module)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0, 0.02, generator=drawn)
    return module


def train(module: AdapterModule, load: Load, optimizer: Optimizer) -> None:
    """One train batch, as `training_step` has it but for logs and checks."""
    if isinstance(module, OnPolicy):
        ids, mask, row = prompts_of(load.rows, load.prompt_tokens)
        mask[1::2, 0] = False
        rollout = module.collect(PromptBatch(ids, mask, row), 0, early_exit=False)
        # Whole responses, whatever was drawn.
        rollout = rollout._replace(response_mask=torch.ones_like(rollout.response_mask))
        scored = module.score(rollout, values=not module.values_come_later)
        scored, value_stats = module.values_of(rollout, scored)
        if module.greedy_baseline:
            # As large as one that is read off greedy answers, which are collected and scored before.
            scored = scored._replace(baseline=scored.scores)
        experience, _ = module.experience(rollout, scored)
        module.update(experience, optimizer, first_value_stats=value_stats)
    elif isinstance(module, Supervised):
        batch = rated_of(load, load.rows)
        batch.attention_mask[1::2, -1] = False
        _step(module, batch, optimizer)


def _step(module: Supervised, batch: RatedBatch, optimizer: Optimizer) -> None:
    with module.trunk.training_pass():
        loss, _ = module.objective(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    clip_by_group(optimizer, {})
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def allocator_peak(act: Callable[[], object]) -> int:
    """The most that a real program on the CPU holds beyond what it held at its start, in bytes.

    Read off the allocator's events in PyTorch's profiler: what kernels need for themselves included.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        act()
    results = cast(Any, profile.profiler).kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes), default=0)


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """What tensors hold, each storage counted once."""
    return sum(
        {
            tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors
        }.values()
    )
