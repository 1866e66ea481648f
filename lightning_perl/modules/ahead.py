"""A rollout that is started before it is learned from, with the policy as it is then.

Shapes: ``B`` rollouts, ``R`` response tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_perl.batches import MixedBatch, PairBatch, PromptBatch, RatedBatch
from lightning_perl.functional.packing import Packing
from lightning_perl.modules.evaluation import given
from lightning_perl.modules.updating import Updating
from lightning_perl.rollouts.rollout import Rollout

# Checkpoints are read with weights_only.
torch.serialization.add_safe_globals([PromptBatch, MixedBatch, RatedBatch, PairBatch, Packing])


class Drawn(NamedTuple):
    """What was sampled.

    Attributes:
        rollout: The responses.
        greedy: The policy's likeliest response to each prompt, where they are a baseline.
    """

    rollout: Rollout
    greedy: Rollout | None


class Ahead(NamedTuple):
    """A rollout on its way.

    Attributes:
        batch: The prompts, perhaps with texts beside them.
        weights: Of the adapter that samples, on the CPU. Empty: as the adapter is when sampling starts.
        rollout: Waits for the rollout. None: not started, as a checkpoint has it.
        greedy: Waits for the policy's likeliest responses, where they are a baseline.
    """

    batch: PromptBatch | MixedBatch
    weights: dict[str, Tensor]
    rollout: Callable[[], Rollout] | None = None
    greedy: Callable[[], Rollout] | None = None

    @property
    def prompts(self) -> PromptBatch:
        """The prompts, ``B / samples`` of them."""
        return self.batch.prompts if isinstance(self.batch, MixedBatch) else self.batch

    @property
    def texts(self) -> RatedBatch | PairBatch | None:
        """What is learned beside the responses."""
        return self.batch.texts if isinstance(self.batch, MixedBatch) else None

    def wait(self) -> Drawn:
        """What was sampled, once it is there."""
        if self.rollout is None:
            raise RuntimeError("A rollout is waited for that was not started.")
        return Drawn(self.rollout(), None if self.greedy is None else self.greedy())

    def stopped(self) -> Ahead:
        """The same, not started."""
        return Ahead(self.batch, self.weights)

    def stored(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"batch": self.batch, "weights": self.weights}


def note(module: Updating, batch: PromptBatch | MixedBatch) -> Ahead:
    """A rollout for the policy as it is now, not started."""
    adapter = module.roles.seats["policy"].adapter
    elsewhere = module.rollout_engine.elsewhere
    return Ahead(batch, module.policy_trunk.adapters.kept(adapter) if elsewhere else {})


def start(module: Updating, ahead: Ahead, number: int, greedy: bool) -> Ahead:
    """Start rollout ``number`` with the policy that it was noted for, and greedy responses if they are wanted."""
    batch = module.transfer_batch_to_device(ahead.batch, module.device, 0)
    ahead = ahead._replace(batch=batch) if ahead.weights else note(module, batch)
    likeliest = replace(module.sampling, temperature=0.0)
    with _as_it_was(module, ahead):
        if greedy:
            ahead = ahead._replace(greedy=module.start(ahead.prompts, number, sampling=likeliest))
        rollout = module.start(ahead.prompts, number, samples=module.samples)
    return ahead._replace(rollout=rollout)


def sampled_logprobs(module: Updating, ahead: Ahead, rollout: Rollout, logprobs: Tensor) -> Tensor:
    """Our log-probabilities of the policy that should have sampled.

    Args:
        module: Who asked for the rollout.
        ahead: What was started.
        rollout: What came of it.
        logprobs: Those of the policy as it is now; where it has learned since, the rollout is read once more.
            Shape: ``(B, R)``, as what is returned.
    """
    adapters, adapter = module.policy_trunk.adapters, module.roles.seats["policy"].adapter
    if not ahead.weights or adapters.equal(adapter, ahead.weights):
        return logprobs
    with _as_it_was(module, ahead):
        return given(module.ask(rollout, ["policy"], module.sampling.temperature).policy)


def _as_it_was(module: Updating, ahead: Ahead) -> AbstractContextManager[None]:
    adapters, adapter = module.policy_trunk.adapters, module.roles.seats["policy"].adapter
    if not ahead.weights or adapters.equal(adapter, ahead.weights):
        return nullcontext()
    return adapters.holding(adapter, ahead.weights)
