"""Hydra-PPO on a random Llama: seconds per iteration and peak memory, one JSON line.

    python benchmarks/ppo.py [--bf16 1] [--layout hydra] [--iterations 3]

Prompts of 64 random ids, responses of 64 tokens, 16 episodes, 2 PPO epochs, micro-batch 4: four roles, every
one run. ``--bf16 0``: all fp32. ``--bf16 1``: trunk and products in bf16, adapters and heads fp32.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_perl.batches import PromptBatch
from lightning_perl.callbacks.speed import matmul_tflops
from lightning_perl.commands.new_trunk import train_tokenizer
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.heads import ScalarHead, save_heads
from lightning_perl.models.shortcuts import PLAIN, Shortcuts
from lightning_perl.modules import PPO
from lightning_perl.rollouts.sampling import SamplingSpec


def arguments() -> argparse.Namespace:
    """The flags, all integers but the layout."""
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {
        "hidden": 512, "layers": 8, "heads": 8, "rank": 16, "threads": 2, "bf16": 0, "vocab": 32000,
        "batch": 16, "micro": 4, "prompt": 64, "response": 64, "epochs": 2, "iterations": 3,
    }  # fmt: skip
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--layout", default="hydra")
    parser.add_argument("--attention", help="transformers' attn_implementation")
    parser.add_argument("--plain", action="store_true", help="no shortcut at all")
    return parser.parse_args()


def random_trunk(args: argparse.Namespace, folder: Path) -> Path:
    """A random Llama with a reward head, in a folder."""
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=int(args.hidden * 2.75),
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        vocab_size=args.vocab,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    train_tokenizer(["a tokenizer that this benchmark never uses"], 300).save_pretrained(folder)
    save_heads(folder, {"reward": ScalarHead(args.hidden)})
    return folder


class Clock(Callback):
    """The time, and the model's FLOPs so far, at the end of every iteration."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.flops: list[float] = []

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Wait for the device, then look at the clock."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.flops.append(float(pl_module.flops))  # type: ignore[arg-type]

    def median(self) -> float:
        """Median seconds per iteration, the first one left out."""
        steps = sorted(b - a for a, b in zip(self.times, self.times[1:], strict=False))
        return steps[len(steps) // 2]


def main() -> None:
    """Train for a few iterations and print what it cost."""
    args = arguments()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        module = PPO(
            str(random_trunk(args, Path(folder) / "trunk")),
            layout=args.layout,
            lora=LoraSpec(rank=args.rank, alpha=2 * args.rank),
            sampling=SamplingSpec(max_new_tokens=args.response),
            ppo_epochs=args.epochs,
            micro_batch_size=args.micro,
            trunk_dtype="bfloat16" if args.bf16 else "float32",
            attention=args.attention,
            shortcuts=PLAIN if args.plain else Shortcuts(),
        )
    ids = torch.randint(10, args.vocab, (args.iterations + 1, args.batch, args.prompt))
    batches = [
        PromptBatch(one, torch.ones_like(one, dtype=torch.bool), torch.arange(args.batch))
        for one in ids
    ]
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
    module.configure_callbacks = list  # type: ignore[method-assign]  # nothing to hand over
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    seconds = clock.median()
    trunk = module.policy_trunk
    # What was run, shortcuts counted as run; recomputation is no model FLOP.
    tflop = (clock.flops[-1] - clock.flops[0]) / (len(clock.flops) - 1) / 1e12
    peak = matmul_tflops(trunk.model.device, trunk.dtype)
    adapter = next(iter(module.roles.actor_parameters()))
    report = {
        "peer": f"lightning-perl {args.layout}",
        "seconds_per_iteration": seconds,
        "episodes_per_second": args.batch / seconds,
        "tflop_per_iteration": tflop,
        "matmul_tflops": peak,
        "share_of_matmul_peak": tflop / seconds / peak,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "trunk_dtype": str(trunk.dtype),
        "adapter_dtype": str(adapter.dtype),
        **vars(args),
    }
    if torch.cuda.is_available():
        report["peak_cuda_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps(report))


if __name__ == "__main__":
    main()
