"""The Lightning modules: one class per method."""

from lightning_perl.modules.ppo import PPO, HydraPPO, JointHydraPPO
from lightning_perl.modules.reinforce import Reinforce
from lightning_perl.modules.reward_model import HydraSFT, RewardModel
from lightning_perl.modules.rloo import RLOO
from lightning_perl.modules.sft import SFT

__all__ = [
    "PPO",
    "RLOO",
    "SFT",
    "HydraPPO",
    "HydraSFT",
    "JointHydraPPO",
    "Reinforce",
    "RewardModel",
]
