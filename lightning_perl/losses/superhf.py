"""SuperHF (2310.16763): imitate the best response, and stay near the reference."""

from __future__ import annotations

from torch import Tensor

from lightning_perl.functional.masked import masked_row_sums


def anchored_cross_entropy(
    logprobs: Tensor,
    divergence: Tensor,
    response_mask: Tensor,
    kl_coef: float,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """``xent(y) + kl_coef * KL(reference || pi)``, each a token mean of one response, and a mean over responses.

    The KL is over the whole vocabulary, so it is never negative and the authors' ``max(KL, 0)`` changes nothing.

    Args:
        logprobs: Log-probabilities of the policy being trained. Shape: ``(B, R)``.
        divergence: KL(reference || pi) at every token. Shape: ``(B, R)``.
        response_mask: Shape: ``(B, R)``, bool.
        kl_coef: The paper's beta.
        denominator: Responses of the whole minibatch. None: ``B``.

    Returns:
        Loss and the mean KL per token, shape ``()`` each.
    """
    lengths = response_mask.sum(1).clamp(min=1)
    responses = len(lengths) if denominator is None else denominator
    cross_entropy = (masked_row_sums(-logprobs, response_mask) / lengths).sum() / responses
    kl = (masked_row_sums(divergence, response_mask) / lengths).sum() / responses
    return cross_entropy + kl_coef * kl, kl.detach()
