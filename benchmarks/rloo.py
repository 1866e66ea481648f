"""LoRA RLOO on HH harmless prompts with a length reward: completions per second, peak memory, one JSON line.

    python benchmarks/rloo.py --data_dir ../shared/data [--bf16 1] [--k 4]

A random Llama (8 layers, hidden 512), LoRA of rank 16 on all linear layers; prompts of up to 256 tokens, k
responses of up to 64 tokens to each, one optimizer step per batch of 16 responses. The first step is not timed.
``--bf16 0``: all fp32. ``--bf16 1``: trunk and products in bf16, adapters fp32. ``--micro``: responses per forward
and backward.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from ppo import Clock
from reward import byte_tokenizer, harmless_rows, random_trunk
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lightning_perl.batches import PromptBatch
from lightning_perl.functional.sequences import pad_left
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.modules import RLOO
from lightning_perl.rollouts.sampling import SamplingSpec

LONGEST_PROMPT = 256
ANSWER = "\n\nAssistant:"


def arguments() -> argparse.Namespace:
    """The flags, all integers but the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    sizes = {
        "hidden": 512, "layers": 8, "heads": 8, "rank": 16, "threads": 2, "bf16": 0,
        "batch": 16, "k": 4, "micro": 4, "response": 64, "steps": 3,
    }  # fmt: skip
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--attention", help="transformers' attn_implementation")
    parser.add_argument("--data_dir", type=Path, default=Path("../shared/data"))
    return parser.parse_args()


def length(
    prompts: Sequence[str], responses: Sequence[str], rows: Sequence[int]
) -> Sequence[float]:
    """The reward: characters of the response."""
    return [float(len(response)) for response in responses]


def prompt_ids(
    rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, count: int
) -> list[list[int]]:
    """Tokens of the first prompts that both answers of a pair share and that are short enough."""
    found = []
    for row in rows:
        prompt = row["chosen"][: row["chosen"].rfind(ANSWER) + len(ANSWER)]
        ids = tokenizer(prompt)["input_ids"]
        if row["rejected"].startswith(prompt) and len(ids) <= LONGEST_PROMPT:
            found.append(ids)
    return found[:count]


def main() -> None:
    """Train for a few steps and print what it cost."""
    args = arguments()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = harmless_rows(args.data_dir)
    tokenizer = byte_tokenizer(rows)
    with tempfile.TemporaryDirectory() as folder:
        module = RLOO(
            random_trunk(args, tokenizer, Path(folder) / "trunk"),
            layout="hydra",
            samples=args.k,
            lora=LoraSpec(rank=args.rank, alpha=2 * args.rank),
            sampling=SamplingSpec(max_new_tokens=args.response),
            learned_reward_weight=0.0,
            reward_function=length,
            micro_batch_size=args.micro,
            trunk_dtype="bfloat16" if args.bf16 else "float32",
            attention=args.attention,
        )
    size = args.batch // args.k
    prompts = prompt_ids(rows, tokenizer, size * (args.steps + 1))
    batches = [
        PromptBatch(*pad_left(prompts[start : start + size], 0), torch.arange(start, start + size))
        for start in range(0, len(prompts), size)
    ]
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
    module.configure_callbacks = list  # type: ignore[method-assign]  # nothing to hand over
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    seconds = (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)
    report = {
        "peer": "lightning-perl RLOO",
        "completions_per_second": args.batch / seconds,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "trunk_dtype": str(module.policy_trunk.dtype),
        "adapter_dtype": str(next(iter(module.roles.actor_parameters())).dtype),
        **{key: str(value) if key == "data_dir" else value for key, value in vars(args).items()},
    }
    if torch.cuda.is_available():
        report["peak_cuda_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps(report))


if __name__ == "__main__":
    main()
