"""LoRA DPO on HH harmless pairs: pairs per second and peak memory, one JSON line.

    python benchmarks/dpo.py --data_dir ../shared/data [--bf16 1] [--share 0]

The trunk, LoRA and batches of ``reward.py``; the pairs whose prompts agree, prompt and answer with EOS cut to 512
tokens, as the peer cuts them; beta 0.1. Every step asks the reference, the same trunk with the adapter off. The
warm-up runs on other rows, then every named row is timed. ``--bf16 0``: all fp32. ``--bf16 1``: trunk and products
in bf16, adapters and moments fp32. ``--micro``: pairs per forward and backward. ``--share 0``: prompts twice.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from reward import (
    WARM_UP_STEPS,
    arguments,
    byte_tokenizer,
    fit,
    harmless_rows,
    print_report,
    random_trunk,
)
from rloo import ANSWER
from transformers import PreTrainedTokenizerFast

from lightning_perl.data.rows import RatedExample, RatedRow
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.modules import DPO


def encoded(
    rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[RatedExample]:
    """Pairs of answers to one prompt, with EOS."""
    pairs = []
    for number, row in enumerate(rows):
        cut = row["chosen"].rfind(ANSWER) + len(ANSWER)
        if not row["rejected"].startswith(row["chosen"][:cut]):
            continue
        prompt = tokenizer(row["chosen"][:cut])["input_ids"]
        sides = []
        for text in (row["chosen"][cut:], row["rejected"][cut:]):
            answer = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            counts = [False] * len(prompt) + [True] * len(answer)
            ids = [*prompt, *answer][:max_length]
            sides.append(RatedRow(ids, counts[:max_length], imitate=False, label=None, row=number))
        pairs.append(RatedExample(tuple(sides)))
    return pairs


def main() -> None:
    """Warm up, train on the named rows, print what it cost."""
    args = arguments(__doc__)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = harmless_rows(args.data_dir)
    tokenizer = byte_tokenizer(rows)
    with tempfile.TemporaryDirectory() as folder:
        module = DPO(
            random_trunk(args, tokenizer, Path(folder) / "trunk"),
            lora=LoraSpec(rank=args.rank, alpha=2 * args.rank),
            share_prompts=bool(args.share),
            trunk_dtype="bfloat16" if args.bf16 else "float32",
            attention=args.attention,
        )
    module.configure_callbacks = list  # type: ignore[method-assign]  # nothing to hand over
    pairs, named = encoded(rows, tokenizer, args.max_length), args.batch * args.steps
    fit(module, pairs[named : named + 8 * WARM_UP_STEPS], args)
    seconds = fit(module, pairs[:named], args)
    print_report("DPO", module, args, named, seconds)


if __name__ == "__main__":
    main()
