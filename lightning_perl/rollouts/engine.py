"""Where responses are sampled: in this process, or elsewhere.

Shapes: ``B`` prompts, ``k`` responses to each, ``R`` response tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

from torch import Tensor

from lightning_perl.batches import PromptBatch
from lightning_perl.models.trunk import Trunk
from lightning_perl.ranks import largest
from lightning_perl.rollouts.rollout import Rollout, Scored, joined
from lightning_perl.rollouts.sampling import SamplingSpec, Watch, row_uniforms, sample

Phase = Callable[[str], AbstractContextManager[None]]
"""Makes a context that tells callbacks of a phase of that name."""


def untold(phase: str) -> AbstractContextManager[None]:
    """A phase that nobody hears of."""
    return nullcontext()


class Asked(NamedTuple):
    """What is to be sampled. The noise of a response comes from (seed, rollout, row, sample) and nothing else.

    Attributes:
        prompts: This rank's share of the prompts, ``B`` of them.
        spec: How tokens are drawn.
        seed: Seed of the run.
        rollout: Number of the rollout.
        samples: Responses per prompt, ``k``.
        early_exit: See `rollouts.sampling.sample`, as for ``watch``, which servers leave out.
    """

    prompts: PromptBatch
    spec: SamplingSpec
    seed: int
    rollout: int
    samples: int = 1
    early_exit: bool = True
    watch: Watch | None = None

    def repeated(self) -> PromptBatch:
        """A prompt per response, those of one prompt next to each other."""
        return PromptBatch(*(part.repeat_interleave(self.samples, 0) for part in self.prompts))


class RolloutEngine:
    """Samples the responses of a rollout, with the trainer's own trunk unless a subclass does it elsewhere.

    Attributes:
        elsewhere: Whether log-probabilities of a rollout are another program's, so that the trainer reads its rows
            again.
        overlap: How many rollouts are sampled while an earlier one is learned from, 0 or 1.
    """

    elsewhere = False
    overlap = 0

    def sample(self, trunk: Trunk, adapter: str, asked: Asked, phase: Phase = untold) -> Rollout:
        """``B k`` responses of a trunk with one of its adapters (or `OFF`), with their log-probabilities."""
        spec, repeated = asked.spec, asked.repeated()
        uniforms = row_uniforms(
            asked.seed, asked.rollout, asked.prompts.row, spec.max_new_tokens, asked.samples
        )
        size = spec.batch_size or len(repeated.row)
        slices = [slice(start, start + size) for start in range(0, len(repeated.row), size)]
        # Ranks may share the trunk's blocks, so each draws as often as the one with the most rows.
        (rounds,) = largest([len(slices)])
        with trunk.switch.use(adapter), trunk.switch.at_rest():
            parts = [
                sample(
                    trunk,
                    PromptBatch(*(part[rows] for part in repeated)),
                    spec,
                    uniforms[rows],
                    asked.early_exit,
                    asked.watch,
                )
                for rows in (slices * rounds)[:rounds]
            ]
            rollout = joined(parts[: len(slices)], trunk.pad_id)
        return rollout._replace(samples=asked.samples)

    def start(
        self, trunk: Trunk, adapter: str, asked: Asked, phase: Phase = untold
    ) -> Callable[[], Rollout]:
        """Start to `sample`, if the engine can while something else happens; else the returned function samples.

        It gives the rollout; all ranks call it.
        """
        return partial(self.sample, trunk, adapter, asked, phase)

    def require_served(self, trained_trunk: bool, quantization: str | None) -> None:
        """Refuse a policy that it cannot sample from, before weights are loaded."""

    def begin(self, trunk: Trunk, longest: int) -> None:
        """Refuse what can be seen before the first step; rows have up to ``longest`` tokens."""

    def mismatch(self, rollout: Rollout, logprobs: Tensor) -> dict[str, Tensor]:
        """Refuse a rollout whose log-probabilities are not the policy's own; what to log of their difference."""
        return {}

    def weighted(self, rollout: Rollout, scored: Scored) -> Scored:
        """The scores, with the weights of tokens that another policy sampled than the one that learns."""
        return scored

    def close(self) -> None:
        """Leave nothing behind."""
