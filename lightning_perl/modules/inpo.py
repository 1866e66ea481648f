"""INPO: own responses compared in pairs, round by round."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lightning_perl.arguments import Positive
from lightning_perl.functional.masked import masked_row_sums
from lightning_perl.losses.inpo import inpo
from lightning_perl.modules.base import Stats
from lightning_perl.modules.evaluation import given
from lightning_perl.modules.selecting import Selecting
from lightning_perl.modules.updating import MinibatchSize, PolicyAnswers
from lightning_perl.rollouts.rollout import Experience


class INPO(Selecting):
    """Iterative Nash policy optimization (2407.00617, Alg. 1).

    A round is a rollout batch: ``samples`` responses to each prompt are drawn from pi_t and scored, by the learned
    reward or a Python judge, and the best and the worst of a prompt make a pair. The policy is then regressed, for
    ``epochs`` passes, towards a log-odds of ``1 / (2 eta)`` above the mixture of reference and pi_t. Both are kept
    as log-probabilities, so that no second trunk is needed. A prompt whose responses score the same moves nothing.
    Pairs of the data (`MixedDataModule` with ``texts_as: pairs``) enter the regression beside them.

    Args:
        trunk: Folder of the SFT or Hydra-SFT trunk, or a hub name.
        eta: Step size of a round; the smaller, the larger the step (the paper: 0.0075, a log-odds of 66.7 nats).
        tau: Weight of the KL to the reference; above 0 and below ``eta``. None: a third of ``eta``.
    """

    samples_kept: ClassVar[int | None] = 2
    learns_pairs: ClassVar[bool] = True

    def __init__(
        self, trunk: str, eta: Positive = 0.0075, tau: Positive | None = None, **settings: Any
    ) -> None:
        tau = eta / 3 if tau is None else tau
        if tau >= eta:
            raise ValueError(f"tau must be below eta, got tau {tau} and eta {eta}.")
        super().__init__(trunk, **settings)
        self.eta, self.tau = eta, tau

    def policy_loss(
        self, answers: PolicyAnswers, experience: Experience, size: MinibatchSize
    ) -> tuple[Tensor, Stats]:
        """Squared distance from the target, a mean over pairs."""
        mask = experience.sequences.response_mask

        def log_odds(logprobs: Tensor) -> Tensor:
            better, worse = masked_row_sums(logprobs, mask).view(-1, 2).unbind(1)
            return better - worse

        loss, h = inpo(
            log_odds(answers.logprobs),
            log_odds(given(experience.reference)),
            log_odds(experience.old_logprobs),
            self.eta,
            self.tau,
            size.episodes / 2,
        )
        return loss, {"log_odds": h}
