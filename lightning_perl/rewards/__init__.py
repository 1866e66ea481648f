"""Rewards that are Python functions, beside the learned one."""

from lightning_perl.rewards.function import RewardFunction, checked_scores
from lightning_perl.rewards.verifiable import (
    Brevity,
    ExactAnswer,
    MatchesPattern,
    RepeatsPrompt,
    ValidJson,
)

__all__ = [
    "Brevity",
    "ExactAnswer",
    "MatchesPattern",
    "RepeatsPrompt",
    "RewardFunction",
    "ValidJson",
    "checked_scores",
]
