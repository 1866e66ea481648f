"""Arguments that do not go together are refused by name, in every class, before a weight is loaded.

Values that a type rules out are swept in `tests.test_arguments`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from lightning_perl.data.base import ConversationDataModule
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.modules.actor_critic import ActorCritic
from lightning_perl.modules.base import AdapterModule
from lightning_perl.modules.inpo import INPO
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.modules.pairwise import Pairwise
from lightning_perl.modules.supervised import Supervised
from lightning_perl.rollouts.sampling import SamplingSpec
from tests.test_arguments import DATAMODULES, MODULES, adamw, declared


class Bad(NamedTuple):
    """Settings of every class below ``kind`` that has them, and how they are refused."""

    kind: type
    settings: dict[str, Any]
    words: str


def reward(prompts: object, responses: list[str], rows: object) -> list[float]:
    return [0.0 for _ in responses]


def only_sgd(params: Any) -> torch.optim.Optimizer:  # noqa: ANN401
    return torch.optim.SGD(params, lr=-1.0)


SHARDED = {"trunk_sharding": "offload"}
NO_LEARNED = {"learned_reward_weight": 0.0}
TABLE = [
    Bad(AdapterModule, {"optimizer": adamw(lr=0.0)}, "model.optimizer: lr must be above 0"),
    Bad(AdapterModule, {"optimizer": only_sgd}, "model.optimizer: Invalid learning rate"),
    Bad(AdapterModule, {**SHARDED, "quantization": "nf4"}, "trunk_sharding is offload and quanti"),
    Bad(
        Supervised, {"lora": None, "trunk_dtype": "bfloat16"}, "must be float32, got bfloat16|lora"
    ),
    Bad(Supervised, {"lora": None, "quantization": "int8"}, "quantiz|lora cannot be null"),
    Bad(Supervised, {"lora": None, **SHARDED}, "shard|lora cannot be null"),
    Bad(Supervised, {"lora": None, "loraplus_lr_ratio": 4.0}, "loraplus_lr_ratio|lora cannot be"),
    Bad(Supervised, {"normalize_scores": True, "lora": LoraSpec(), **SHARDED}, "normalize_scores"),
    Bad(Supervised, {"normalize_scores": True, "reward_weight": 0.0}, "reward_weight above 0"),
    Bad(Pairwise, {"lora": None}, "lora cannot be null"),
    Bad(OnPolicy, {"lora": None}, "lora cannot be null"),
    Bad(OnPolicy, {"lora": LoraSpec(dropout=0.1)}, "lora.dropout must be 0 in RL"),
    Bad(OnPolicy, {"sampling": SamplingSpec(top_p=0.9)}, "sampling .*top_p 0.9"),
    Bad(OnPolicy, {"sampling": SamplingSpec(top_k=4)}, "sampling .*top_k 4"),
    Bad(OnPolicy, {"sampling": SamplingSpec(temperature=0.0)}, "sampling .*temperature 0.0"),
    Bad(OnPolicy, NO_LEARNED, "learned_reward_weight is 0 and there is no reward_function"),
    Bad(
        OnPolicy,
        {**NO_LEARNED, "reward_function": reward, "reward_function_weight": 0.0},
        "learned_reward_weight is 0 and there is no reward_function with a weight",
    ),
    Bad(
        OnPolicy,
        {"missing_eos_score": -1.0, "missing_eos_penalty": 1.0},
        "missing_eos_score .* or missing_eos_penalty",
    ),
    Bad(OnPolicy, {"layout": "hydra", "reward": "r"}, "so `reward` must stay|is PPO with layout"),
    Bad(
        OnPolicy, {"layout": "lora", "reward": ["a", "b"]}, "one reward model, got 2|is PPO with l"
    ),
    Bad(
        OnPolicy,
        {"layout": "perl", "reward": "r", **NO_LEARNED, "reward_function": reward},
        "reward is r, but learned_reward_weight is 0|is PPO with layout",
    ),
    Bad(OnPolicy, {"layout": "full", "trunk_dtype": "bfloat16"}, "must be float32|is PPO with lay"),
    Bad(OnPolicy, {"layout": "full", "quantization": "nf4"}, "quantiz|is PPO with layout"),
    Bad(OnPolicy, {"layout": "full", **SHARDED}, "shard|is PPO with layout"),
    Bad(OnPolicy, {"layout": "full", "loraplus_lr_ratio": 4.0}, "loraplus_lr_ratio|is PPO with la"),
    Bad(
        ActorCritic, {"layout": "joint_hydra", "critic_warmup": 1}, "critic_warmup|is PPO with lay"
    ),
    Bad(INPO, {"micro_batch_size": 1}, "micro_batch_size must be at least 2"),
    Bad(INPO, {"tau": 1.0, "eta": 0.5}, "tau must be below eta, got tau 1.0 and eta 0.5"),
]
DATA = [
    Bad(
        ConversationDataModule,
        {"max_tokens": 8, "max_response_tokens": 8},
        "data.max_response_tokens",
    ),
    Bad(
        ConversationDataModule, {"rating_range": (5.0, 1.0)}, "data.rating_range must be the lowest"
    ),
    Bad(ConversationDataModule, {"columns": {"promt": "p"}}, r"data.columns: unknown \['promt'\]"),
    Bad(ConversationDataModule, {"dialect": "pirate"}, "data.dialect: unknown 'pirate'"),
    Bad(ConversationDataModule, {"streaming": True, "val_fraction": 0.1}, "data.streaming"),
    Bad(ConversationDataModule, {"fold": 5, "folds": 5}, "data.fold must be from 0 to"),
    Bad(
        ConversationDataModule, {"fold": 0, "train_folds": [0]}, "data.train_folds must be some of"
    ),
]
TRAINERS: list[tuple[dict[str, Any], str]] = [
    ({"precision": "bf16-mixed"}, "trainer.precision must stay 32-true"),
    ({"precision": "bf16-true"}, "trainer.precision must stay 32-true"),
    ({"overfit_batches": 1}, "trainer.overfit_batches"),
]


def cases() -> Iterator[tuple[type, dict[str, Any], str]]:
    """Every row of the tables with every class that has its keys."""
    for base, settings, words in [*TABLE, *DATA]:
        for kind in [*MODULES, *DATAMODULES]:
            if issubclass(kind, base) and settings.keys() <= declared(kind).keys():
                yield kind, settings, words
    for kind in MODULES:
        critic = issubclass(kind, ActorCritic)
        if issubclass(kind, OnPolicy) and not critic:
            yield kind, {"layout": "joint_hydra"}, "layout joint_hydra is one adapter for actor an"
            yield kind, {"checkpointing": ["value"]}, "checkpointing: .* no trained roles"
        # What learns from one response to a prompt cuts nothing apart.
        if "minibatch_size" in declared(kind) and kind.samples_kept != 1:
            yield kind, {"samples": 3, "minibatch_size": 5}, "minibatch_size must be a multiple of"


CASES = list(cases())


def test_the_sweep_is_wide() -> None:
    assert len(CASES) >= 200
    assert {kind for kind, *_ in CASES} == {*MODULES, *DATAMODULES}


@pytest.mark.parametrize(
    ("kind", "settings", "words"), CASES, ids=lambda part: getattr(part, "__name__", "-")
)
def test_what_does_not_go_together_is_refused(
    kind: Any,  # noqa: ANN401 (a class, to be called with anything)
    settings: dict[str, Any],
    words: str,
) -> None:
    # A trunk or a file that is not there would be the error, were it looked for first.
    places = dict.fromkeys(("trunk", "tokenizer", "train", "data_dir", "texts"), "nowhere")
    needed = {name: place for name, place in places.items() if name in declared(kind)}
    with pytest.raises(ValueError, match=words):
        kind(**needed, **settings)


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_trainers_and_rows_that_spoil_numbers_are_refused(kind: type[AdapterModule]) -> None:
    plain: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    for settings, words in TRAINERS:
        with pytest.raises(MisconfigurationException, match=words):
            kind.refuse(Trainer(**plain, **settings), None)
    other = {"rated": "prompts", "prompts": "rated"}[kind.rows]
    with pytest.raises(ValueError, match=f"Set data.init_args.rows: {kind.rows}"):
        kind.refuse(Trainer(**plain), other)
