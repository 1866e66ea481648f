"""A trunk of 24 words, batches for it, and trainers that leave nothing outside a folder."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.optim import Optimizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lightning_perl.batches import PromptBatch, RatedBatch
from lightning_perl.functional.masked import masked_mean
from lightning_perl.functional.sequences import pad_left, pad_right
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.heads import ScalarHead, save_heads
from lightning_perl.models.trunk import Trunk
from lightning_perl.modules import PPO
from lightning_perl.modules.base import AdapterModule, Stats
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.modules.sft import SFT
from lightning_perl.modules.supervised import Supervised
from lightning_perl.rollouts.rollout import Experience, Rollout, Scored
from lightning_perl.rollouts.sampling import Asked, Phase, RolloutEngine, SamplingSpec, untold

Method = TypeVar("Method", bound=OnPolicy)
WORDS = 24
HIDDEN = 16
LORA = LoraSpec(rank=2, alpha=4.0)
SAMPLING = SamplingSpec(max_new_tokens=6)
NO_CLIP = 1e9


def save_tokenizer(folder: Path) -> None:
    """``<pad>`` 0, ``<bos>`` 1, ``<eos>`` 2, then ``w3`` to ``w23``."""
    words = ["<pad>", "<bos>", "<eos>", *(f"w{number}" for number in range(3, WORDS))]
    vocabulary = {word: number for number, word in enumerate(words)}
    words_only = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words_only.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words_only, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(str(folder))


def save_trunk(
    folder: Path, family: str = "llama", hidden: int = HIDDEN, spread: float = 0.2
) -> Path:
    """Writes a random trunk without a reward head; a quarter of its words end a response.

    A small ``spread`` of the weights leaves the last state close to the last word's embedding.
    """
    torch.manual_seed(7)
    model: PreTrainedModel
    if family == "gpt2":
        # GPT-2's own dropout of 0.1 stays in the config: the library has to switch it off.
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=WORDS, n_positions=64, n_embd=hidden, n_layer=2, n_head=2)
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=WORDS,
                hidden_size=hidden,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                initializer_range=spread,
            )
        )
        # Logits of some size whatever the spread, or nothing could be preferred.
        model.lm_head.weight.data *= 0.2 / spread
    model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id = 0, 1, 2
    generation = model.generation_config
    if generation is not None:
        generation.eos_token_id = [2, 17, 18, 19, 20, 21]
        generation.pad_token_id, generation.bos_token_id = 0, 1
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def with_head(trunk: Path, folder: Path, head: ScalarHead | None = None) -> Path:
    """Copies a trunk's folder and puts a reward head beside it."""
    shutil.copytree(trunk, folder)
    save_heads(folder, {"reward": ScalarHead(HIDDEN, seed=3) if head is None else head})
    return folder


def prompts(count: int, seed: int = 0, longest: int = 7) -> PromptBatch:
    """Prompts of mixed lengths."""
    draw = random.Random(seed)
    rows = [[draw.randrange(3, 20) for _ in range(draw.randint(1, longest))] for _ in range(count)]
    ids, mask = pad_left(rows, 0)
    return PromptBatch(ids, mask, torch.arange(count) + 100 * seed)


def rated(count: int, seed: int = 0, pairs: int = 0, imitate: bool | None = None) -> RatedBatch:
    """Rows of mixed lengths: ``2 * pairs`` rows stand in pairs, the others carry thumbs.

    Thumbs-up and chosen rows are imitated unless ``imitate`` decides for all.
    """
    draw = random.Random(seed)
    rows = [[draw.randrange(3, WORDS) for _ in range(draw.randint(4, 9))] for _ in range(count)]
    ids, mask = pad_right(rows, 0)
    response_mask = mask.clone()
    for row in range(count):
        response_mask[row, : draw.randint(2, 3)] = False
    chosen = torch.arange(count) % 2 == 0
    labelled = torch.arange(count) >= 2 * pairs
    return RatedBatch(
        ids=ids,
        attention_mask=mask,
        response_mask=response_mask,
        prompt_tokens=2,
        imitate=chosen if imitate is None else torch.full((count,), imitate),
        label=chosen.float(),
        labelled=labelled,
        pairs=torch.arange(2 * pairs).view(-1, 2),
        row=torch.arange(count) + 100 * seed,
        turns=torch.arange(count) % 3 + 1,
    )


class Batches:
    """A loader of ready batches whose position can be saved; a function of the epoch alone."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = list(batches)
        self.position = 0

    def __iter__(self) -> Iterator[Any]:
        if self.position >= len(self.batches):
            self.position = 0
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class TrainerFolder(NamedTuple):
    """A trainer and the folder of its run."""

    trainer: Trainer
    folder: Path


def quiet_trainer(root: Path, *callbacks: Callback, **options: Any) -> TrainerFolder:
    """A trainer on one CPU that logs into ``root/run/version_N``."""
    logger = CSVLogger(root, "run")
    settings: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": logger,
        "callbacks": list(callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    return TrainerFolder(Trainer(**{**settings, **options}), Path(logger.log_dir))


def fit(
    module: LightningModule,
    root: Path,
    batches: Sequence[Any],
    *callbacks: Callback,
    held_out: Sequence[Any] | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> TrainerFolder:
    """Trains on ready batches."""
    run = quiet_trainer(root, *callbacks, **options)
    validated = None if held_out is None else Batches(held_out)
    run.trainer.fit(module, Batches(batches), validated, ckpt_path=ckpt_path, weights_only=True)
    return run


def measured(
    module: LightningModule, root: Path, batches: Sequence[Any], stage: str = "validate"
) -> dict[str, float]:
    """What validation, or a test, logs of ready batches."""
    run = getattr(quiet_trainer(root).trainer, stage)
    (logged,) = run(module, Batches(batches), verbose=False)
    return dict(logged)


def batches_for(module: AdapterModule, count: int = 2) -> list[PromptBatch] | list[RatedBatch]:
    """Prompts, or rows of which none, two and four stand in pairs."""
    if isinstance(module, OnPolicy):
        return [prompts(4, seed) for seed in range(count)]
    return [rated(6, seed, pairs=seed % 3) for seed in range(count)]


def on_policy(kind: type[Method], trunk: Path, **options: Any) -> Method:
    """A method, float64 unless said otherwise, gradients unclipped."""
    settings: dict[str, Any] = {
        "lora": LORA,
        "sampling": SAMPLING,
        "micro_batch_size": 3,
        "max_grad_norm": NO_CLIP,
        "trunk_dtype": "float64",
    }
    return kind(str(trunk), **{**settings, **options})


def hydra(trunk: Path, **options: Any) -> PPO:
    """PPO on one trunk."""
    return on_policy(PPO, trunk, **{"layout": "hydra", "ppo_epochs": 1, **options})


def train_adapters(module: AdapterModule, seed: int = 0, scale: float = 0.3) -> None:
    """Gives every adapter a ``B`` that is not 0, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(scale * noise)


class Early(RolloutEngine):
    """Samples in this process what is learned from one batch later."""

    elsewhere = True
    overlap = 1

    def start(
        self, trunk: Trunk, adapter: str, asked: Asked, phase: Phase = untold
    ) -> Callable[[], Rollout]:
        rollout = self.sample(trunk, adapter, asked, phase)
        return lambda: rollout

    def mismatch(self, rollout: Rollout, logprobs: Tensor) -> dict[str, Tensor]:
        assert rollout.logprobs is not None
        return {"mismatch": masked_mean((logprobs - rollout.logprobs).abs(), rollout.response_mask)}

    def weighted(self, rollout: Rollout, scored: Scored) -> Scored:
        assert rollout.logprobs is not None
        return scored._replace(importance=(scored.logprobs - rollout.logprobs).exp())


def weights(module: LightningModule) -> dict[str, Tensor]:
    """A copy of every weight."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: LightningModule) -> set[str]:
    """Names of the weights that are not bit-equal any more."""
    after = module.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def assert_equal_moments(trainer: Trainer, other: Trainer) -> None:
    """Both optimizers hold the same tensors, bit for bit."""
    ours, theirs = (
        [value for state in one.optimizers[0].state.values() for value in state.values()
         if isinstance(value, Tensor)]
        for one in (trainer, other)
    )  # fmt: skip
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


def experienced(module: OnPolicy, prompts: PromptBatch) -> tuple[Rollout, Experience]:
    """The first rollout's responses to prompts, and what is learned from them."""
    rollout = module.collect(prompts, 0)
    experience, _ = module.experience(rollout, module.score(rollout))
    return rollout, experience


def rehearse(
    module: OnPolicy, experience: Experience, value_stats: Stats | None = None
) -> tuple[Stats, list[dict[str, Tensor]]]:
    """Statistics and each step's gradients (absent where there is none); no weight moves."""
    optimizer = torch.optim.SGD(module.parameter_groups(), lr=0.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    steps: list[dict[str, Tensor]] = []

    def record(*_: object) -> None:
        steps.append(
            {
                name: parameter.grad.clone()
                for name, parameter in module.named_parameters()
                if parameter.grad is not None
            }
        )

    optimizer.register_step_pre_hook(record)
    return module.update(experience, optimizer, first_value_stats=value_stats), steps


def gradients_of(module: Supervised, batch: RatedBatch) -> dict[str, Tensor]:
    """Gradients of one batch's objective."""
    with module.trunk.training_pass():
        module.objective(batch)[0].backward()  # type: ignore[no-untyped-call]
    found = {
        name: parameter.grad.clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    module.zero_grad(set_to_none=True)
    return found


def one_optimizer(module: AdapterModule) -> Optimizer:
    """The module's own optimizer, without a trainer."""
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, Optimizer)
    return optimizer


def steps_of(module: SFT | Supervised, batches: Sequence[RatedBatch]) -> list[float]:
    """Losses of plain torch training."""
    optimizer = one_optimizer(module)
    losses = []
    for batch in batches:
        with module.trunk.training_pass():
            loss, _ = module.objective(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
