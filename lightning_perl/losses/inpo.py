"""INPO (2407.00617): a step of no-regret learning against oneself."""

from __future__ import annotations

from torch import Tensor


def inpo(
    log_odds: Tensor,
    reference_log_odds: Tensor,
    old_log_odds: Tensor,
    eta: float,
    tau: float,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """``(h - 1 / (2 eta))^2``, ``h = d log pi - tau / eta d log ref - (eta - tau) / eta d log pi_t``.

    ``d`` is the better response minus the worse one; log-probabilities are sums over tokens.

    Args:
        log_odds: ``log pi(y_w) - log pi(y_l)`` of the policy being trained. Shape: ``(K,)``.
        reference_log_odds: Of the reference. Shape: ``(K,)``.
        old_log_odds: Of the policy that sampled, ``pi_t``. Shape: ``(K,)``.
        eta: Step size of the round; the larger, the smaller a step.
        tau: Weight of the KL to the reference, above 0 and below ``eta``.
        denominator: Pairs of the whole minibatch. None: ``K``.

    Returns:
        Mean loss and mean ``h``, shape ``()`` each.
    """
    anchor = (tau * reference_log_odds + (eta - tau) * old_log_odds) / eta
    h = log_odds - anchor
    pairs = max(len(h), 1) if denominator is None else denominator
    return ((h - 1 / (2 * eta)) ** 2).sum() / pairs, h.detach().sum() / pairs
