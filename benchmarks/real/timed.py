"""Four trainings on a model that can speak, timed, and their rows as text for the same trainings in TRL.

    python benchmarks/real/timed.py PPO --trunk runs/real/trunk --data_dir ../shared/data --rows runs/real/timed
    .venv-trl112/bin/python benchmarks/real/trl_timed.py PPO --trunk runs/real/trunk --rows runs/real/timed

`RewardModel` and `DPO`: batches of 8 pairs of HH harmless (256 + 128 tokens), 3 to warm up, then 4 that are timed.
`RLOO` (four answers to a prompt) and `PPO` (hydra, one epoch in one minibatch): batches of 16 answers of at most
48 tokens, 1 to warm up, then 2. LoRA of rank 16 on every linear layer; trunk and products in bf16, adapters fp32.
One JSON line, with the keys of the peer's. Compare them with ``benchmarks/side_by_side.py``; ``--rows`` is a
folder.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

import reward
from methods import asked, policy
from ppo import Clock
from reward_models import rows

from lightning_perl.batches import PromptBatch
from lightning_perl.data.rows import RatedExample
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.modules import DPO, PPO, RLOO, RewardModel

LORA = LoraSpec(16, alpha=32.0)
BATCH, STEPS = 8, 4
ANSWERS, ITERATIONS, SAMPLES = 16, 2, 4
KEYS = {
    "RewardModel": "pairs_per_second",
    "DPO": "pairs_per_second",
    "RLOO": "completions_per_second",
    "PPO": "episodes_per_second",
}


def quiet(module: Any) -> Any:  # noqa: ANN401 (any of the four)
    """The module without the callbacks that write files."""
    module.configure_callbacks = list
    return module


def pairwise(method: str, trunk: Path, data_dir: Path, folder: Path) -> tuple[float, Any]:
    """Pairs per second, and the module."""
    make = RewardModel if method == "RewardModel" else DPO
    module = quiet(make(str(trunk), lora=LORA, trunk_dtype="bfloat16"))
    data = rows("harmless", 0, 1.0, trunk, data_dir)
    warm_up = BATCH * reward.WARM_UP_STEPS
    pairs: list[RatedExample] = data._examples["train"][: warm_up + BATCH * STEPS]
    texts = []
    for pair in pairs:
        prompt = pair.rows[0].prompt
        chosen, rejected = (data.tokenizer.decode(side.ids[len(prompt) :]) for side in pair.rows)
        whole = {"prompt": data.tokenizer.decode(prompt), "chosen": chosen, "rejected": rejected}
        texts.append(whole)
    # The peer leaves its first step out: one batch more for it.
    (folder / "pairs.json").write_text(json.dumps(texts[warm_up - BATCH :]))
    flags = argparse.Namespace(batch=BATCH, micro=BATCH)
    reward.fit(module, pairs[:warm_up], flags)
    seconds = reward.fit(module, pairs[warm_up:], flags)
    return BATCH * STEPS / seconds, module


def on_policy(method: str, trunk: Path, data_dir: Path, folder: Path) -> tuple[float, Any]:
    """Answers per second, and the module."""
    if method == "RLOO":
        size, module = ANSWERS // SAMPLES, policy(trunk, RLOO, samples=SAMPLES, lora=LORA)
    else:
        size = ANSWERS
        module = policy(trunk, PPO, layout="hydra", ppo_epochs=1, lora=LORA)
    data = asked(trunk, data_dir, batch_size=size)
    data.setup()
    batches: list[PromptBatch] = list(islice(data.train_dataloader(), ITERATIONS + 1))
    texts = [
        data.tokenizer.decode(ids[mask])
        for batch in batches
        for ids, mask in zip(batch.ids, batch.mask, strict=True)
    ]
    (folder / f"{method}.json").write_text(json.dumps(texts))
    clock = Clock()
    trainer = Trainer(
        max_epochs=1,
        accelerator="auto",
        devices=1,
        logger=False,
        callbacks=[clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(quiet(module), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return ANSWERS * ITERATIONS / (clock.times[-1] - clock.times[0]), module


def main() -> None:
    """Train for a few steps and print what it cost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("method", choices=KEYS)
    parser.add_argument("--trunk", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    args.rows.mkdir(parents=True, exist_ok=True)
    acts = args.method in ("RLOO", "PPO")
    run = on_policy if acts else pairwise
    rate, module = run(args.method, args.trunk, args.data_dir, args.rows)
    trunk = module.policy_trunk if acts else module.trunk
    trained = next(weight for weight in module.parameters() if weight.requires_grad)
    report = {
        "peer": f"lightning-perl {args.method}",
        KEYS[args.method]: rate,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "trunk_dtype": str(trunk.dtype),
        "adapter_dtype": str(trained.dtype),
        "threads": args.threads,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
