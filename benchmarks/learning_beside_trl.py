"""What is learned beside TRL 1.12.0's PPO: the same policy, reward, prompts and settings, equal episodes.

    python benchmarks/learning_beside_trl.py --trl .venv-trl112/bin/python

The quickstart's trunk and reward head, 1,024 episodes in batches of 64, two epochs of minibatches of 32, rank 16,
learning rate 3e-3, three seeds. TRL gets the reward model as the classifier that ``export --role reward --merge``
writes, and its value model begins as that, as ours does. Held-out prompts are answered with the same noise by both
policies and scored by the reward head and by gold, the true quality. Writes
``benchmarks/reports/learning_beside_trl.md``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from bakeoff import BATCH, METHODS, SEEDS, TRUNK, judged, policy, prompts
from perl_reward import read, spread
from record import table, write_study
from safetensors.torch import load_file
from small_trunk import adam, fitted, run_missing

from lightning_perl.commands.export import export
from lightning_perl.models.adapters import LoraSpec

REPORT = Path("benchmarks/reports/learning_beside_trl.md")
EPISODES, RATE = 1024, 3e-3
LORA = LoraSpec(16, alpha=16.0)
PEER = Path(__file__).with_name("trl_ppo_learning.py")


def prepare(root: Path) -> None:
    """What the peer reads: trunk, classifier and the prompts in our order."""
    if not (root / "trunk").exists():
        shutil.copytree(TRUNK, root / "trunk")
    if not (root / "reward").exists():
        export(Path(TRUNK), root / "reward", "reward", merge=True)
    for seed in SEEDS:
        data, asked = prompts(batch_size=BATCH, seed=seed), list[list[int]]()
        data.setup()
        for batch in data.train_dataloader():
            asked += [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]
            if len(asked) >= EPISODES:
                break
        (root / f"prompts_{seed}.json").write_text(json.dumps(asked[:EPISODES]))


def ours(seed: int) -> dict[str, Any]:
    """Hydra-PPO."""
    make, settings, _ = METHODS["PPO, hydra"]
    options = settings | {"seed": seed, "optimizer": adam(RATE), "score_batch_size": 64}
    module = policy(make, max_episodes=EPISODES, **options)
    data = prompts(batch_size=BATCH, seed=seed)
    data.setup()
    with tempfile.TemporaryDirectory() as folder:
        fitted(module, data, 1, [], limit_val_batches=0, default_root_dir=folder)
    tensors = module.policy_trunk.adapters.tensors("actor")
    return {"name": "lightning-perl"} | judged(tensors, LORA, held_out=True)


def theirs(root: Path, python: str, seed: int) -> dict[str, Any]:
    """TRL's policy, judged by us."""
    subprocess.run([python, str(PEER), str(root.resolve()), str(seed)], check=True)
    stored = load_file(root / f"trl_{seed}" / "adapter_model.safetensors")
    tensors = {key.removeprefix("base_model.model."): value for key, value in stored.items()}
    return {"name": "TRL 1.12.0"} | judged(tensors, LORA, held_out=True)


def write_report(root: Path) -> None:
    """The table."""
    runs, keys = read(root / "runs"), ("score", "gold", "kl", "response_tokens", "win_rate")
    rows = []
    for name in dict.fromkeys(run["name"] for run in runs):
        mine = [run for run in runs if run["name"] == name]
        rows.append([name, str(len(mine)), *(spread([run[key] for run in mine]) for key in keys)])
    head = ["", "seeds", "learned reward", "gold", "KL, nats", "tokens", "wins"]
    write_study(REPORT, "PPO beside TRL's: what is learned", __doc__, table(head, rows))


def main() -> None:
    """Run what is missing, then write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trl", required=True, help="Python of an environment with trl==1.12.0")
    parser.add_argument("--root", type=Path, default=Path("runs/beside_trl"))
    args = parser.parse_args()
    args.root.mkdir(parents=True, exist_ok=True)
    prepare(args.root)
    work = {
        args.root / f"runs/trl_{seed}.json": partial(theirs, args.root, args.trl, seed)
        for seed in SEEDS
    }
    work |= {args.root / f"runs/ours_{seed}.json": partial(ours, seed) for seed in SEEDS}
    run_missing(work, 1)
    write_report(args.root)


if __name__ == "__main__":
    main()
