"""Hydra-RLHF's two forms of PPO: the layout filled in."""

from __future__ import annotations

from typing import ClassVar

from lightning_perl.models.roles import Layout
from lightning_perl.modules.ppo import PPO


class HydraPPO(PPO):
    """Hydra-PPO (2309.00754): actor and critic are adapters on one frozen Hydra-SFT trunk.

    Reference and reward are the same trunk with adapters off, read in one pass. Arguments as `PPO`;
    ``trunk`` is what `HydraSFT` wrote, and ``reward`` stays empty.
    """

    own_layout: ClassVar[Layout] = "hydra"
    layouts: ClassVar[tuple[Layout, ...]] = ("hydra",)


class JointHydraPPO(PPO):
    """J-Hydra-PPO (2309.00754): one adapter for actor and critic, one pass for both.

    Fastest, and unstable in the paper (below SFT): an option, not the default. Arguments as `PPO`.
    """

    own_layout: ClassVar[Layout] = "joint_hydra"
    layouts: ClassVar[tuple[Layout, ...]] = ("joint_hydra",)
