"""Where the random generators of a process stand, as a checkpoint holds it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def standing() -> dict[str, Any]:
    """States of all generators: torch's, CUDA's, Python's and NumPy's, which a Python reward may draw from."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        # Checkpoints are read with weights_only, which knows no arrays.
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
    }


def put_back(states: dict[str, Any]) -> None:
    """Let the generators go on from there; CUDA's on as many devices only."""
    torch.set_rng_state(states["cpu"].cpu())
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    if "python" in states:  # checkpoints of older releases have none
        random.setstate(states["python"])
        name, keys, *rest = states["numpy"]
        np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
