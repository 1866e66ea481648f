"""SuperHF: supervised fine-tuning on the best of a superbatch, kept near the reference."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lightning_perl.arguments import NonNegative, TwoOrMore
from lightning_perl.losses.superhf import anchored_cross_entropy
from lightning_perl.modules.base import Stats
from lightning_perl.modules.evaluation import given
from lightning_perl.modules.selecting import Selecting
from lightning_perl.modules.updating import MinibatchSize, PolicyAnswers
from lightning_perl.rollouts.rollout import Experience


class SuperHF(Selecting):
    """Supervised human feedback (2310.16763): cross-entropy on the best response, plus KL(reference || policy).

    The KL is taken over the whole vocabulary at every token of the response, which costs a forward pass of the
    reference in every update.

    Args:
        trunk: Folder of the SFT or Hydra-SFT trunk, or a hub name.
        samples: Responses per prompt, the paper's superbatch.
        kl_coef: Weight of the KL (the authors' code: 0.23).
    """

    full_kl: ClassVar[bool] = True

    def __init__(
        self, trunk: str, samples: TwoOrMore = 32, kl_coef: NonNegative = 0.23, **settings: Any
    ) -> None:
        super().__init__(trunk, samples=samples, **settings)
        self.kl_coef = kl_coef

    def policy_loss(
        self, answers: PolicyAnswers, experience: Experience, size: MinibatchSize
    ) -> tuple[Tensor, Stats]:
        """Cross-entropy and KL, a mean over responses."""
        loss, kl = anchored_cross_entropy(
            answers.logprobs,
            given(answers.divergence),
            experience.sequences.response_mask,
            self.kl_coef,
            size.episodes,
        )
        return loss, {"reference_kl": kl}
