"""A small trunk from scratch: a tokenizer trained on a corpus, and a Llama with random weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lightning_perl.arguments import Count, CountOrZero
from lightning_perl.data.base import ConversationDataModule
from lightning_perl.data.rows import Splits
from lightning_perl.packaged import unpackaged
from lightning_perl.whole import require_new


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer of the quickstart's kind: a byte-level BPE with ``<pad>``, ``<bos>`` and ``<eos>``."""
    kind: Any = AutoTokenizer.from_pretrained(unpackaged("packaged:quickstart/trunk"))
    trained: PreTrainedTokenizerBase
    trained = kind.train_new_from_iterator(texts, vocabulary_size, show_progress=False)
    return trained


def training_texts(splits: Splits) -> Iterator[str]:
    """Every turn of the training rows, as the turn template writes it."""
    for item in splits.train:
        for row in item.rows:
            for turn in (*row.context, *row.response):
                yield f"{turn.role.capitalize()}: {turn.text}\n"


def new_trunk(
    folder: Path,
    data: ConversationDataModule,
    vocabulary_size: Count = 4096,
    hidden_size: Count = 256,
    layers: Count = 6,
    heads: Count = 4,
    window: Count = 1024,
    seed: CountOrZero = 0,
) -> None:
    """Write an untrained Llama and a tokenizer trained on the data's training texts.

    Args:
        folder: Where the transformers folder is written; it must not exist yet.
        data: The data whose training rows the tokenizer is trained on; its own ``tokenizer`` is not read.
        vocabulary_size: Number of the tokenizer's entries.
        hidden_size: Width of the hidden states.
        layers: Number of decoder blocks.
        heads: Number of attention heads.
        window: Longest row in tokens.
        seed: Seed of the weights.
    """
    require_new(folder)
    if hidden_size % (2 * heads):
        raise ValueError(
            f"hidden_size must be a multiple of 2 * heads = {2 * heads}, got {hidden_size}: each head turns "
            "pairs of numbers by their position."
        )
    texts = list(training_texts(data.read()))
    if not texts:
        raise ValueError(
            f"data: no training row to train a tokenizer on (a stream is not read). What was read:\n{data.report}"
        )
    tokenizer = train_tokenizer(texts, vocabulary_size)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=window,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{folder}: {millions:.1f}M parameters, {len(tokenizer)} tokens, window {window}")
