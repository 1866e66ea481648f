"""Rollouts: prompts, the responses a policy gave, and how they are sampled."""

from lightning_perl.rollouts.sampling import RolloutEngine
from lightning_perl.rollouts.servers import VllmServers

__all__ = ["RolloutEngine", "VllmServers"]
