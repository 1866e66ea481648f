"""How several processes are started for a module: by Lightning's DDP, without its wrapper around the module."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

ALLOWED = ("auto", "SingleDeviceStrategy", "DDPStrategy")
REASONS = {
    "FSDPStrategy": "it wraps the module, and takes no optimizer that is stepped by hand",
    "DeepSpeedStrategy": "it steps the optimizer itself, and gathers weights for every pass",
    "ModelParallelStrategy": "it saves sharded checkpoints, and here adapters and heads are whole on every rank",
}
"""What is wrong with strategies that people ask for."""


def require_plain_ranks(strategy: str) -> None:
    """Refuse a strategy that wraps the module or steps for it, by its name, before anything is made.

    Args:
        strategy: Lightning's short name of it, or the name or path of its class.

    Raises:
        MisconfigurationException: It is neither one device nor Lightning's DDP.
    """
    # Some of these cannot even be made where their packages or devices are missing.
    name = strategy.split(".")[-1]
    if name in StrategyRegistry:
        name = StrategyRegistry[name]["strategy"].__name__
    if name not in ALLOWED:
        raise MisconfigurationException(
            f"trainer.strategy {name} cannot train these modules: {REASONS.get(name, 'it is not known here')}. "
            "Leave it at auto (or ddp), with trainer.devices and trainer.num_nodes: the ranks share out each "
            "batch and sum gradients once a step. See docs/scale.md."
        )


def unwrap(trainer: Trainer) -> None:
    """Keep DDP's launcher and processes without its wrapper, and give every rank the same batches.

    The wrapper would sum gradients in the middle of a step that has several backward passes.
    """
    # Every rank logs what all rows gave.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.* when logging on epoch level")
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy.configure_ddp = lambda: None  # type: ignore[method-assign]
        trainer._accelerator_connector.use_distributed_sampler = False
        # In validation and tests DDP would send the first rank's weights to all. Frozen ones are read by each.
        module: Any = trainer.lightning_module
        frozen = [name for name, weight in module.named_parameters() if not weight.requires_grad]
        module._ddp_params_and_buffers_to_ignore = frozen
