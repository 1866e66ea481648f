"""A price for words: against answers that grow because a learned reward likes length."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_perl.rewards.function import RewardFunction


class Brevity(RewardFunction):
    """0 up to ``words`` words, and minus ``price`` for every word more.

    Args:
        words: How long an answer may be for nothing.
        price: What each further word costs.

    Example:
        >>> Brevity(words=2, price=0.5)(["Hi"] * 2, ["Hello there", "Hello to all of you"], [0, 1])
        [0.0, -1.5]
    """

    def __init__(self, words: int, price: float = 0.1) -> None:
        if words < 0 or not price > 0:
            raise ValueError(
                f"Brevity: words must be at least 0 and price above 0, got {words} and {price}."
            )
        self.words = words
        self.price = price

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[int]
    ) -> Sequence[float]:
        """Returns each response's price, 0 or less.

        Args:
            prompts: Not used.
            responses: Decoded answers; words stand between white space.
            rows: Not used.
        """
        over = [max(0, len(response.split()) - self.words) for response in responses]
        return [-self.price * words if words else 0.0 for words in over]
