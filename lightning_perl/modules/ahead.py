"""A rollout that is begun before it is learned from, with the policy as it is at its beginning.

Shapes: ``B`` rollouts, ``R`` response tokens.
"""

from __future__ import annotations

from collections.abc import Callable
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
        weights: Of the adapter that samples, on the CPU; none where the trainer samples itself.
        rollout: Waits for the rollout. None: not begun, as a checkpoint has it.
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
            raise RuntimeError("A rollout is waited for that was not begun.")
        return Drawn(self.rollout(), None if self.greedy is None else self.greedy())

    def stored(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"batch": self.batch, "weights": self.weights}


def begin(module: Updating, batch: PromptBatch | MixedBatch, number: int, greedy: bool) -> Ahead:
    """Begin rollout ``number`` of a module with its policy as it is, and greedy responses if they are wanted."""
    seat, elsewhere = module.roles.seats["policy"], module.rollout_engine.elsewhere
    weights = module.policy_trunk.adapters.kept(seat.adapter) if elsewhere else {}
    ahead = Ahead(batch, weights)
    likeliest = replace(module.sampling, temperature=0.0)
    with module.phase("rollout"):
        if greedy:
            ahead = ahead._replace(greedy=module.started(ahead.prompts, number, sampling=likeliest))
        rollout = module.started(ahead.prompts, number, samples=module.samples)
    return ahead._replace(rollout=rollout)


def begin_again(module: Updating, ahead: Ahead, number: int, greedy: bool) -> Ahead:
    """Begin what a checkpoint was waiting for, with the policy as it was then."""
    batch = module.transfer_batch_to_device(ahead.batch, module.device, 0)
    adapter = module.roles.seats["policy"].adapter
    with module.policy_trunk.adapters.holding(adapter, ahead.weights):
        return begin(module, batch, number, greedy)


def require_ours(module: Updating, ahead: Ahead, rollout: Rollout, logprobs: Tensor) -> None:
    """Let the engine refuse what another policy sampled than should have.

    Args:
        module: Who asked for the rollout.
        ahead: What was begun.
        rollout: What came of it.
        logprobs: Those of the policy as it is now. Where it has learned since, some rows of each server are read
            again with the policy as it was. Shape: ``(B, R)``.
    """
    adapters, adapter = module.policy_trunk.adapters, module.roles.seats["policy"].adapter
    if rollout.servers is not None and not adapters.equal(adapter, ahead.weights):
        by_server = [
            (rollout.servers == one).nonzero()[:, 0]
            for one in range(int(rollout.servers.max()) + 1)
        ]
        some = torch.cat([rows[: module.score_batch_size] for rows in by_server])
        rollout = rollout.rows(some)._replace(samples=1)
        with adapters.holding(adapter, ahead.weights):
            answers = module.ask(rollout, ["policy"], module.sampling.temperature)
        logprobs = given(answers.policy)
    module.rollout_engine.require_ours(rollout, logprobs)
