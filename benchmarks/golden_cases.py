"""What `golden.py` runs: a class, the kinds of its rows and its arguments, by names that both trees have."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

RL: dict[str, Any] = {
    "micro_batch_size": 2, "score_batch_size": 3, "max_grad_norm": 0.5, "head_learning_rate": 3e-3,
}  # fmt: skip
MINI: dict[str, Any] = {"minibatch_size": 4, "ppo_epochs": 2}
RATED: dict[str, Any] = {"margin": 0.1, "center_coef": 0.1, "head_learning_rate": 3e-2}
PLAIN: dict[str, Any] = {"shortcuts": False, "checkpointing": True}
F64, BF16 = {"trunk_dtype": "float64"}, {"trunk_dtype": "bfloat16"}
REWARDS = dict.fromkeys(("full", "lora", "dynamic_lora"), "judge")
REWARDS["perl"] = "RewardModel lm/adapters/reward"
EVERY = ("pairs", "thumbs", "demos")
Case = tuple[str, tuple[str, ...], dict[str, Any]]


def cases() -> dict[str, Case]:
    """Class, kinds of rows and arguments by name. ``CASE/...`` is in what a case above handed over."""
    found: dict[str, Case] = {
        "SFT full": ("SFT", EVERY, {"lora": None, "checkpointing": True}),
        "SFT lora": ("SFT", EVERY, {}),
        "SFT lora plain gpt2": ("SFT", EVERY, {"trunk": "gpt2", **PLAIN}),
        "SFT lora bfloat16": ("SFT", EVERY, BF16),
        "HydraSFT": ("HydraSFT", EVERY, {"lora": None, "reward_weight": 0.5, **RATED}),
        "HydraSFT lora float64": ("HydraSFT", EVERY, {"positive_weight": None, **RATED, **F64}),
        "HydraSFT plain": ("HydraSFT", EVERY, {"share_prompts": False, **RATED, **PLAIN}),
        "RewardModel lm": ("RewardModel", EVERY, {"lm_weight": 0.3, **RATED}),
        "RewardModel thumbs": ("RewardModel", ("thumbs",), {"normalize_scores": True}),
        "RewardModel full": ("RewardModel", ("pairs",), {"lora": None, **RATED, **F64}),
        "RewardModel plain": ("RewardModel", ("pairs",), {"share_prompts": False, **RATED, **PLAIN}),
        "RewardModel bfloat16": ("RewardModel", ("pairs",), {"checkpointing": True, **RATED, **BF16}),
    }  # fmt: skip
    for layout in ("full", "lora", "dynamic_lora", "perl", "hydra", "joint_hydra"):
        own = {"layout": layout, "reward": REWARDS.get(layout), **RL}
        found[f"PPO {layout}"] = ("PPO", ("demos",), {**own, **MINI})
        found[f"PPO {layout} plain"] = ("PPO", ("demos",), {**own, **PLAIN, "ppo_epochs": 1})
    hydra = {"layout": "hydra", **RL}
    perl = {"layout": "perl", "reward": REWARDS["perl"], **RL}
    ensemble = [REWARDS["perl"], "RewardModel thumbs/adapters/reward"]
    shaped = {"reward_function": True, "gold": True, "score_clip": 0.3, "missing_eos_penalty": 0.5}
    whole = {"whiten_advantages": False, "discount": 0.9, "missing_eos_score": -1.0, "kl_coef": 0.3}
    found |= {
        "PPO hydra float64": ("PPO", ("demos",), {**hydra, **MINI, **F64, "checkpointing": True}),
        "PPO perl float64": ("PPO", ("demos",), {**perl, **MINI, **F64}),
        "PPO hydra bfloat16": ("PPO", ("demos",), {**hydra, **MINI, **BF16}),
        "PPO lora bfloat16": ("PPO", ("demos",), {"layout": "lora", "reward": "judge", **RL, **BF16}),
        "PPO hydra gpt2": ("PPO", ("demos",), {**hydra, **MINI, "trunk": "gpt2"}),
        "PPO hydra shaped": ("PPO", ("demos",), {**hydra, **shaped, "checkpointing": ["value"]}),
        "PPO hydra whole": ("PPO", ("demos",), {**hydra, **whole, "max_episodes": 12}),
        "PPO function alone": ("PPO", ("demos",), {"learned_reward_weight": 0.0, **shaped, **RL}),
        "PPO perl minimum": ("PPO", ("demos",), {**perl, "reward": ensemble, "reward_ensemble": "minimum"}),
        "HydraPPO": ("HydraPPO", ("demos",), {"trunk": "HydraSFT/trunk", **RL, **MINI}),
        "JointHydraPPO": ("JointHydraPPO", ("demos",), {"trunk": "HydraSFT/trunk", **RL, **MINI}),
        "Reinforce": ("Reinforce", ("demos",), perl),
        "Reinforce hydra float64": ("Reinforce", ("demos",), {**hydra, **F64, "beta": 0.3}),
        "Reinforce plain": ("Reinforce", ("demos",), {**perl, **PLAIN, **shaped}),
    }  # fmt: skip
    return found


@cache
def named(name: str) -> Any:  # noqa: ANN401 (a class of either tree)
    """The object of this name, in whatever file of the package it stands; None where there is none."""
    package = importlib.import_module("lightning_perl")
    for info in pkgutil.walk_packages(package.__path__, "lightning_perl."):
        if not info.name.endswith("__main__"):
            module = importlib.import_module(info.name)
            if hasattr(module, name):
                return getattr(module, name)
    return None


def shortcuts(kept: bool, dtype: str | None) -> Any:  # noqa: ANN401 (Shortcuts of either tree, or a bool)
    """All shortcuts or none; in bfloat16 without the one for short attention, where there is one."""
    every = named("Shortcuts")
    fields = getattr(every, "__dataclass_fields__", {})
    if not kept:
        return every(**dict.fromkeys(fields, False)) if fields else False
    if dtype == "bfloat16" and "short_attention" in fields:
        return every(short_attention=False)
    return every() if fields else True
