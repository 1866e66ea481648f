"""Functions run by several processes at once, each with the environment that a launcher gives."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

LIMIT = 180.0
Launched = Callable[[int, int], dict[str, str]]
"""The environment that a launcher gives, by rank and number of ranks."""


def torchrun(rank: int, count: int) -> dict[str, str]:
    """The environment of a rank that torchrun starts on one node."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": count}
    named = {"LOCAL_WORLD_SIZE": count, "TORCHELASTIC_RUN_ID": "tests"} | ranks
    return {key: str(value) for key, value in named.items()}


def srun(rank: int, count: int) -> dict[str, str]:
    """The environment of a task that srun starts on one node."""
    ranks = {"PROCID": rank, "LOCALID": rank, "NODEID": 0, "NTASKS": count, "NNODES": 1}
    ranks["NTASKS_PER_NODE"] = count
    named = {"JOB_ID": 1, "JOB_NAME": "tests", "NODELIST": "127.0.0.1"} | ranks
    return {f"SLURM_{key}": str(value) for key, value in named.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(
    rank: int,
    count: int,
    launched: Launched,
    port: int,
    folder: Path,
    function: Callable[..., Any],
    given: tuple[Any],
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= launched(rank, count)
    try:
        torch.save(function(*given), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def on_ranks(
    count: int,
    folder: Path,
    function: Callable[..., Any],
    *given: Any,
    launched: Launched = torchrun,
) -> list[Any]:
    """What a function returns on each of several forked ranks; they may take `LIMIT` seconds together."""
    folder.mkdir(parents=True)
    processes: Any = torch.multiprocessing
    arguments = (count, launched, free_port(), folder, function, given)
    workers = processes.start_processes(_work, arguments, count, join=False, start_method="fork")
    end = time.monotonic() + LIMIT
    try:
        while not workers.join(timeout=1.0):
            assert time.monotonic() < end, "the ranks wait for each other"
    except torch.multiprocessing.ProcessRaisedException:  # type: ignore[attr-defined]
        errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
        raise AssertionError("\n".join(errors)) from None
    finally:
        for process in workers.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]
