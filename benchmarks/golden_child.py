"""Runs the cases of `golden.py` in one tree: python golden_child.py FOLDER {before,after,old} ONLY.

Trains, validates, tests and predicts every case, and writes all numbers to FOLDER/SIDE.pt; ``old`` tests from the
checkpoints of ``before``. Only names that both trees have may stand here: classes are looked up where they live.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden import Values, flat
from golden_cases import Case, cases, named, shortcuts
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from safetensors.torch import load_file


class Recorder(DummyLogger, Callback):
    """Keeps every metric and the gradients before each step; adapters get weights as after long training."""

    save_dir = None

    def __init__(self, kept: dict[str, Any]) -> None:
        super().__init__()
        self.kept, self.steps, self.stirred = kept, 0, False

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """By key and step; a key may come several times."""
        for key, value in metrics.items():
            self.kept.setdefault("metrics", {}).setdefault(f"{key} at {step}", []).append(value)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:  # noqa: ANN401
        """Gradients by name."""
        gradients = {name: weight.grad for name, weight in pl_module.named_parameters()}
        self.kept.setdefault("gradients", {})[self.steps] = dict(flat(gradients))
        self.steps += 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:  # noqa: ANN401
        """After the first batch every trained LoRA ``B`` moves."""
        generator = torch.Generator().manual_seed(1)
        for name, weight in [] if self.stirred else sorted(pl_module.named_parameters()):
            if "lora_B" in name and weight.requires_grad:
                noise = torch.randn(weight.shape, generator=generator)
                weight.data.add_(0.1 * noise.to(weight.dtype))
        self.stirred = True


def built(case: Case, work: Path, runs: Path) -> tuple[Any, Any]:
    """Module and datamodule; ``NAME/...`` in trunk and reward are found below ``runs``."""
    name, kinds, given = case
    arguments = {"trunk": "llama", "lora": named("LoraSpec")(rank=2, alpha=4.0), **given}

    def folder(short: str) -> str:
        run, _, below = short.partition("/")
        return str(runs / run / "version_0" / below if below else work / run)

    for key in ("trunk", "reward"):
        value = arguments.get(key)
        if isinstance(value, list):
            arguments[key] = [folder(short) for short in value]
        elif value is not None:
            arguments[key] = folder(value)
    for key in ("reward_function", "gold"):
        if key in arguments:
            arguments[key] = named("Brevity")(words=1, price=0.1)
    prompts = kinds == ("demos",)
    if prompts:
        arguments["sampling"] = named("SamplingSpec")(max_new_tokens=7, temperature=0.8)
    arguments["shortcuts"] = shortcuts(
        arguments.get("shortcuts", True), arguments.get("trunk_dtype")
    )
    arguments["optimizer"] = lambda weights: torch.optim.AdamW(weights, lr=3e-3)
    data = named("PreferenceDataModule")(
        tokenizer=arguments["trunk"],
        train=[str(work / f"{kind}.jsonl") for kind in kinds],
        val_fraction=0.3,
        rows="prompts" if prompts else "rated",
        batch_size=6,
        max_tokens=64,
        max_response_tokens=24,
    )
    return named(name)(**arguments), data


def run(name: str, case: Case, work: Path, side: str) -> Values:
    """All numbers of a case by name."""
    kept: dict[str, Any] = {}
    torch.manual_seed(0)
    random.seed(0)  # its state and NumPy's are in checkpoints
    np.random.seed(0)
    runs = work / ("before" if side == "old" else side)
    module, data = built(case, work, runs)
    recorder, root = Recorder(kept), runs / name
    trainer = Trainer(
        default_root_dir=root, max_epochs=2, accelerator="cpu", logger=recorder, callbacks=[recorder],
        log_every_n_steps=1, num_sanity_val_steps=0, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    if side == "old":
        return dict(flat({"test": trainer.test(module, data, root / "c.ckpt", verbose=False)}))
    trainer.fit(module, data)
    trainer.save_checkpoint(root / "c.ckpt")
    kept["checkpoint"] = torch.load(root / "c.ckpt", weights_only=False)
    kept["validate"] = trainer.validate(module, data, verbose=False)
    kept["test"] = trainer.test(module, data, verbose=False)
    if case[0] != "SFT":
        kept["predictions"] = trainer.predict(module, data)
    for path in sorted(root.rglob("*")):
        if path.suffix == ".safetensors":
            kept[str(path.relative_to(root))] = load_file(path)
        elif path.suffix == ".json":
            kept[str(path.relative_to(root))] = json.loads(path.read_text().replace(str(runs), ""))
    return dict(flat(kept))


def main() -> None:
    """Run the cases, write what they gave."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path, help="what golden_rows.py wrote")
    parser.add_argument("side", choices=("before", "after", "old"))
    parser.add_argument("only", help="cases whose name contains this")
    args = parser.parse_args()
    work, side, only = args.work, args.side, args.only
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found = {}
    for name, case in cases().items():
        if only in name or name.startswith("RewardModel ") or name == "HydraSFT":
            try:
                found[name] = run(name, case, work, side)
            except Exception as error:
                if only:
                    raise
                found[name] = {"failed": f"{side}: {type(error).__name__}: {error}"}
    torch.save(found, work / f"{side}.pt")


if __name__ == "__main__":
    main()
