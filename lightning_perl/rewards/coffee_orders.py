"""The true quality of an answer to a made-up coffee order."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_perl.data.coffee_orders import Order, parse_order, quality
from lightning_perl.rewards.function import RewardFunction


class CoffeeOrderQuality(RewardFunction):
    r"""The gold reward of :class:`~lightning_perl.data.coffee_orders.CoffeeOrdersDataModule`.

    It reads the order out of the prompt's last user turn, so it needs nothing but the texts. See
    :func:`~lightning_perl.data.coffee_orders.parts` for what it rewards.

    Args:
        scale: What a perfect answer scores; garbage scores 0.

    Example:
        >>> gold = CoffeeOrderQuality()
        >>> prompt = "Agent: Hi!User: can i get a large oat latte\nAgent:"
        >>> gold([prompt], [" Sure thing, a large oat latte. Anything else?"], [0])
        [1.0]
    """

    def __init__(self, scale: float = 1.0) -> None:
        if not scale > 0:
            raise ValueError(f"CoffeeOrderQuality.scale must be above 0, got {scale}.")
        self.scale = scale

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[int]
    ) -> Sequence[float]:
        """Returns each response's quality times ``scale``.

        Args:
            prompts: Decoded prompts by the plain turn template.
            responses: Decoded answers.
            rows: Not used.

        Raises:
            ValueError: A prompt's last user turn is no coffee order.
        """
        return [
            self.scale * quality(_order_of(prompt, row), response)
            for prompt, response, row in zip(prompts, responses, rows, strict=True)
        ]


def _order_of(prompt: str, row: int) -> Order:
    said = prompt.rpartition("User:")[2].removesuffix("Agent:")
    order = parse_order(said)
    if order is None:
        raise ValueError(
            f"CoffeeOrderQuality: no single coffee order in prompt {row}, which ends "
            f"{said[-80:]!r}. It judges answers to CoffeeOrdersDataModule alone: use its data, or "
            "leave out gold."
        )
    return order
