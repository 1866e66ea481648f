"""A pairwise LoRA reward model on HH harmless pairs: pairs per second and peak memory, one JSON line.

    python benchmarks/reward.py --data_dir ../shared/data [--bf16 1] [--full 1] [--share 0]

A random Llama (8 layers, hidden 512), LoRA of rank 16 on all linear layers; the first 96 transcripts as they
stand, with EOS, those above 512 tokens left out. Batches of 8 pairs, each one optimizer step. The warm-up runs
on other rows, then every named row is timed. ``--bf16 0``: all fp32. ``--bf16 1``: trunk and products in
bf16, adapters, head and moments fp32. ``--micro``: pairs per forward and backward. ``--share 0``: prompts are
read twice. ``--full 1``: the whole trunk is tuned.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import tempfile
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_perl.data.loaders import ResumableLoader
from lightning_perl.data.rows import RatedExample, RatedRow, collate_rated
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.modules import RewardModel
from lightning_perl.modules.supervised import Supervised

VOCABULARY = 8192
WARM_UP_STEPS = 3


def arguments(about: str | None, **more: int) -> argparse.Namespace:
    """The flags, all integers but the folder; ``more`` are a script's own."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    sizes = {
        "hidden": 512, "layers": 8, "heads": 8, "rank": 16, "threads": 2, "bf16": 0,
        "batch": 8, "steps": 12, "max_length": 512, "micro": 8, "share": 1, **more,
    }  # fmt: skip
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--attention", help="transformers' attn_implementation")
    parser.add_argument("--data_dir", type=Path, default=Path("../shared/data"))
    return parser.parse_args()


def harmless_rows(data_dir: Path) -> list[dict[str, str]]:
    """HH harmless-base pairs as ``{"chosen", "rejected"}`` transcripts."""
    with gzip.open(data_dir / "hh-harmless-base" / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def byte_tokenizer(rows: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the chosen transcripts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((row["chosen"] for row in rows), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def random_trunk(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    """A random Llama in a folder."""
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=int(args.hidden * 2.75),
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def encoded(
    rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[RatedExample]:
    """Pairs of whole transcripts with EOS; the score is read there."""
    pairs = []
    for number, row in enumerate(rows):
        sides = []
        for text in (row["chosen"], row["rejected"]):
            ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            counts = [False] * (len(ids) - 1) + [True]
            sides.append(RatedRow(ids, counts, imitate=False, label=None, row=number))
        if max(len(side.ids) for side in sides) <= max_length:
            pairs.append(RatedExample(tuple(sides)))
    return pairs


class Clock(Callback):
    """When training began and when the last batch was done; making a trainer is not timed."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the clock."""
        self.began = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Wait for the device, then look again."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ended = time.perf_counter()


def fit(module: Supervised, pairs: list[RatedExample], args: argparse.Namespace) -> float:
    """Train one epoch; seconds from its first batch to its last."""
    loader = ResumableLoader(pairs, args.micro, collate_rated)
    clock = Clock()
    trainer = Trainer(
        callbacks=[clock],
        max_epochs=1,
        accelerator="auto",
        devices=1,
        logger=False,
        accumulate_grad_batches=args.batch // args.micro,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return clock.ended - clock.began


def print_report(
    name: str, module: Supervised, args: argparse.Namespace, pairs: int, seconds: float
) -> None:
    """Print one JSON line with the peers' keys."""
    flags = {key: str(value) if key == "data_dir" else value for key, value in vars(args).items()}
    report = {
        "peer": f"lightning-perl {name}",
        "pairs_per_second": pairs / seconds,
        "pairs": pairs,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "trunk_dtype": str(module.trunk.dtype),
        "adapter_dtype": str(next(p for p in module.parameters() if p.requires_grad).dtype),
        **flags,
    }
    if torch.cuda.is_available():
        report["peak_cuda_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps(report))


def main() -> None:
    """Warm up, train on the named rows, print what it cost."""
    args = arguments(__doc__, full=0)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = harmless_rows(args.data_dir)
    tokenizer = byte_tokenizer(rows)
    named = args.batch * args.steps
    with tempfile.TemporaryDirectory() as folder:
        module = RewardModel(
            random_trunk(args, tokenizer, Path(folder) / "trunk"),
            lora=None if args.full else LoraSpec(rank=args.rank, alpha=2 * args.rank),
            share_prompts=bool(args.share),
            trunk_dtype="bfloat16" if args.bf16 else "float32",
            attention=args.attention,
        )
    module.configure_callbacks = list  # type: ignore[method-assign]  # nothing to hand over
    fit(module, encoded(rows[named : named + 8 * WARM_UP_STEPS], tokenizer, args.max_length), args)
    pairs = encoded(rows[:named], tokenizer, args.max_length)
    seconds = fit(module, pairs, args)
    print_report("RewardModel", module, args, len(pairs), seconds)


if __name__ == "__main__":
    main()
