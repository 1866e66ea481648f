"""RAFT: supervised fine-tuning on the best of several own responses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_perl.arguments import Count
from lightning_perl.losses.language_modeling import cross_entropy
from lightning_perl.modules.base import Stats
from lightning_perl.modules.selecting import Selecting
from lightning_perl.modules.updating import MinibatchSize, PolicyAnswers
from lightning_perl.rollouts.rollout import Experience


class RAFT(Selecting):
    """Reward-ranked fine-tuning (2304.06767): cross-entropy on the best of ``samples`` responses to each prompt.

    The paper draws a stage of 2,048 prompts with 8 to 32 responses each and learns in two epochs: that is
    ``data.batch_size: 2048``, ``epochs: 2`` and a ``minibatch_size``, with ``sampling.batch_size`` for what fits
    into memory. The logits are divided by the sampling temperature in learning too.

    Args:
        trunk: Folder of the SFT or Hydra-SFT trunk, or a hub name.
        epochs: Passes over the kept responses of each rollout batch.
    """

    def __init__(self, trunk: str, epochs: Count = 2, **settings: Any) -> None:
        super().__init__(trunk, epochs=epochs, **settings)

    def policy_loss(
        self, answers: PolicyAnswers, experience: Experience, size: MinibatchSize
    ) -> tuple[Tensor, Stats]:
        """Cross-entropy, a mean over tokens."""
        mask = experience.sequences.response_mask
        return cross_entropy(answers.logprobs, mask, size.tokens), {}
