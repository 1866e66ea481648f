"""The Lightning modules: one class per method."""

from lightning_perl.modules.dpo import DPO, IPO, RDPO
from lightning_perl.modules.grpo import GRPO
from lightning_perl.modules.inpo import INPO
from lightning_perl.modules.kto import KTO
from lightning_perl.modules.ppo import PPO, HydraPPO, JointHydraPPO
from lightning_perl.modules.raft import RAFT
from lightning_perl.modules.reinforce import Reinforce
from lightning_perl.modules.remax import ReMax
from lightning_perl.modules.reward_model import HydraSFT, RewardModel
from lightning_perl.modules.rloo import RLOO
from lightning_perl.modules.sft import SFT
from lightning_perl.modules.superhf import SuperHF

__all__ = [
    "DPO",
    "GRPO",
    "INPO",
    "IPO",
    "KTO",
    "PPO",
    "RAFT",
    "RDPO",
    "RLOO",
    "SFT",
    "HydraPPO",
    "HydraSFT",
    "JointHydraPPO",
    "ReMax",
    "Reinforce",
    "RewardModel",
    "SuperHF",
]
