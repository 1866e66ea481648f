"""The trunks and rows that both trees of `golden.py` share, made by transformers alone."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

WORDS = 260
SHAPE = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STOPS = [2, *range(20, 80)]
"""A quarter of the vocabulary ends a response, so that lengths differ."""


def write_trunks(folder: Path) -> None:
    """Writes two Llamas and a GPT-2, each with a reward head, and rows of three kinds."""
    disable_progress_bar()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    bytes_only = Tokenizer(models.BPE(words, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    for seed, name in enumerate(("llama", "judge", "gpt2")):
        torch.manual_seed(seed)
        if name == "gpt2":  # its own dropout of 0.1 stays in the config
            gpt2 = GPT2Config(**SHAPE, n_positions=128, n_embd=16, n_layer=2, n_head=2)
            model: Any = GPT2LMHeadModel(gpt2)
        else:
            sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
            heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
            model = LlamaForCausalLM(LlamaConfig(**SHAPE, **sizes, **heads))
        model.generation_config.eos_token_id = STOPS
        model.save_pretrained(folder / name)
        special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
        PreTrainedTokenizerFast(tokenizer_object=bytes_only, **special).save_pretrained(
            folder / name
        )
        head = {"reward.weight": torch.randn(16) / 4, "reward.bias": torch.zeros(())}
        save_file(head, folder / name / "heads.safetensors", metadata={"format": "pt"})
    draw = random.Random(0)
    text = lambda: "".join(draw.choices("abcdefg ", k=draw.randint(1, 12))) + "."  # noqa: E731
    rows: dict[str, list[dict[str, object]]] = {"pairs": [], "thumbs": [], "demos": []}
    for number in range(14):
        prompt = f"{number} {text()}"
        for answer in range(2):  # a prompt that several rows share
            rows["thumbs"].append(
                {"prompt": prompt, "response": f"t{answer}{text()}", "label": answer}
            )
            rows["pairs"].append({"prompt": prompt, "chosen": "c" + text(), "rejected": text()})
        rows["demos"].append({"prompt": prompt, "response": "d" + text()})
    for kind, lines in rows.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the trunks and rows go")
    write_trunks(parser.parse_args().folder)
