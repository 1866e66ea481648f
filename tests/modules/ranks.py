"""Functions run by several processes at once, each with the environment that torchrun gives."""

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

LIMIT = 60.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(
    rank: int, count: int, port: int, folder: Path, function: Callable[..., Any], given: tuple[Any]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }
    try:
        torch.save(function(*given), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def on_ranks(count: int, folder: Path, function: Callable[..., Any], *given: Any) -> list[Any]:
    """What a function returns on each of several forked ranks; they may take `LIMIT` seconds together."""
    folder.mkdir(parents=True)
    processes: Any = torch.multiprocessing
    arguments = (count, _free_port(), folder, function, given)
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
