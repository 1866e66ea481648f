"""Fixtures that every test may use: no network, no hub."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Tiny products are slower on many threads, above all where tests run side by side. The variable is for
# the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Once more before every test: the scripts under benchmarks/ set their own number."""
    torch.set_num_threads(1)


_LINES = [
    "User: can I get an espresso please",
    'Agent: call get_menu_items {"query": "espresso"}',
    'API: get_menu_items {"items": [{"menu_item_id": "espresso-0001", "name": "Espresso"}]}',
    "Agent: Sure, how many shots would you like?",
    "User: I would like two tickets for the movie tonight",
]


def save_tokenizer(folder: Path, bos: bool = True) -> Path:
    """Writes a byte-level BPE tokenizer of at most 400 tokens and returns its folder."""
    special = ["<pad>", "<bos>", "<eos>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_LINES, trainer)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>" if bos else None,
        eos_token="<eos>",
    )
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny byte-level BPE tokenizer: ``<pad>`` 0, ``<bos>`` 1, ``<eos>`` 2."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


TinyTrunk = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_trunk(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> TinyTrunk:
    """Call ``tiny_trunk(family="llama", seed=0, **config)``: a read-only model folder, made once.

    It holds a random two-block model, the tokenizer of `tokenizer_dir` and a reward head.
    """
    # Loading transformers' models takes a while; tests that need no model should not wait for it.
    from tests.models.families import save_tiny_trunk

    made: dict[str, Path] = {}

    def make(family: str = "llama", seed: int = 0, **changes: object) -> Path:
        key = repr((family, seed, sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            made[key] = save_tiny_trunk(folder, tokenizer_dir, family, seed, **changes)
        return made[key]

    return make
