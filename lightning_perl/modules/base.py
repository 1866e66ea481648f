"""The base of every module: optimizer, adapter-only checkpoints, phases, and handing over by folder."""

from __future__ import annotations

import math
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.cli import ReduceLROnPlateau as WatchingPlateau
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import PreTrainedTokenizerBase

from lightning_perl.arguments import AtLeastOne, Checked, CountOrZero
from lightning_perl.batches import Bounded, MixedBatch, PairBatch, PromptBatch, RatedBatch
from lightning_perl.callbacks.console import count_trained
from lightning_perl.callbacks.cuda_memory import MemoryPreflight
from lightning_perl.callbacks.handover import Handover, Resume
from lightning_perl.callbacks.run_folder import claim
from lightning_perl.callbacks.samples import PredictionWriter, SkippedBatches
from lightning_perl.callbacks.wandb_summary import WandbSummary, wandb_loggers
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.heads import ScalarHead
from lightning_perl.models.loading import TrunkDtype
from lightning_perl.models.manifest import agree_on_template
from lightning_perl.models.quantization import Quantization
from lightning_perl.models.roles import TrainedRole
from lightning_perl.models.sharding import TrunkSharding, shard
from lightning_perl.models.shortcuts import Shortcuts, chosen
from lightning_perl.models.trunk import Trunk
from lightning_perl.optim import HostAdamW
from lightning_perl.phases import Phased
from lightning_perl.ranks import everyones, require_same, take_from_first
from lightning_perl.rollouts.sampling import SamplingSpec

# From Python a module's specs are pickled into its checkpoints, which are read with weights_only.
torch.serialization.add_safe_globals([LoraSpec, SamplingSpec, Shortcuts])


def default_optimizer(learning_rate: float) -> OptimizerCallable:
    """AdamW without weight decay, every value written; epsilon 1e-5 (2403.17031, detail 17).

    Fused: the step makes no copies of all weights, as PyTorch's default on CUDA does. A lambda, so that another
    optimizer chosen in YAML inherits none of these values.
    """
    values = {"betas": (0.9, 0.999), "eps": 1e-5, "weight_decay": 0.0, "fused": True}
    return lambda params: torch.optim.AdamW(params, lr=learning_rate, **values)  # type: ignore[arg-type]


def require_rates(optimizer: OptimizerCallable) -> None:
    """Refuse an optimizer that cannot learn, by making one for a single weight.

    Raises:
        ValueError: A learning rate of 0, or a setting that is not finite or that the optimizer refuses.
    """
    try:
        group = optimizer([nn.Parameter(torch.zeros(1))]).param_groups[0]
    except ValueError as error:
        raise ValueError(f"model.optimizer: {error}") from error
    for name, value in group.items():
        if isinstance(value, float) and not (math.isfinite(value) and (name != "lr" or value > 0)):
            least = "above 0 and " if name == "lr" else ""
            raise ValueError(f"model.optimizer: {name} must be {least}finite, got {value}.")


NO_LORAPLUS = (
    "loraplus_lr_ratio is the ratio of two learning rates of an adapter, and none is trained here. Give lora (RL: "
    "another layout than full), or leave it out."
)
"""Refusal of LoRA+ without LoRA."""
Stats = dict[str, Tensor]
"""Named statistics of a step, detached."""
Backward = Callable[[Tensor], None]
"""``loss.backward()``, or Lightning's own under a strategy."""
STRATEGIES = ("auto", "SingleDeviceStrategy", "DDPStrategy")
REASONS = {
    "FSDPStrategy": "it wraps the module, and takes no optimizer that is stepped by hand",
    "DeepSpeedStrategy": "it steps the optimizer itself, and gathers weights for every pass",
    "ModelParallelStrategy": "it saves sharded checkpoints, and here adapters and heads are whole on every rank",
}
"""What is wrong with strategies that people ask for."""


class AdapterModule(Checked, Phased, ABC):
    """What all modules share. A checkpoint holds exactly what is trained, and the optimizer.

    Args:
        trunk_dtype: Dtype of the trunk's weights and matrix products. Adapters and heads stay float32. float16
            is not offered: ratios over- and underflow in it, and adapters turn to NaN.
        checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
            True: in every training pass. A list of roles (policy, value): only where those are trained.
        attention: transformers' ``attn_implementation``, such as sdpa, eager or flash_attention_2. None:
            transformers chooses.
        quantization: Keep the frozen trunk's linear layers in 4 bits (nf4, QLoRA's, 2305.14314) or 8 bits
            (int8) by bitsandbytes, the extra ``quantization``. LM head and embeddings stay in
            ``trunk_dtype``. Not where the whole trunk is trained. None: everything in ``trunk_dtype``.
        trunk_sharding: Where the decoder blocks of a frozen trunk are. ``shard``: a piece of each on every device,
            by FSDP2. ``offload``: in the host's memory, in pieces where there are several devices; a block is
            copied to the device for every pass, so draw many rollouts at once. None: whole on every device.
        shortcuts: Save work whose result is known or not needed. Results change by rounding at most; False
            does everything the plain way, for comparison.
        optimizer: Makes the one optimizer from the parameter groups.
        scheduler: Makes the learning-rate scheduler, which is stepped once per optimizer step (RL: once per
            rollout batch). None: the learning rates stay.
        loraplus_lr_ratio: How many times the learning rate of ``A`` every adapter's ``B`` gets (LoRA+, 2402.12354:
            about 16); PEFT's name for it. None: the same for both.
        seed: Seed of fresh adapters and heads, and in RL of sampling and shuffling.
    """

    rows: ClassVar[Literal["rated", "prompts"]]

    def __init__(
        self,
        trunk_dtype: TrunkDtype = "float32",
        checkpointing: bool | list[TrainedRole] = False,
        attention: str | None = None,
        quantization: Quantization | None = None,
        trunk_sharding: TrunkSharding | None = None,
        shortcuts: bool | Shortcuts = True,
        optimizer: OptimizerCallable = default_optimizer(1e-4),
        scheduler: LRSchedulerCallable | None = None,
        loraplus_lr_ratio: AtLeastOne | None = None,
        seed: CountOrZero = 0,
    ) -> None:
        require_rates(optimizer)
        super().__init__()
        # Lightning would begin anew. Here, since a filter holds in its process and pytest forgets it.
        warnings.filterwarnings("error", message=".*last.* is set, but there is no last checkpoint")
        self.trunk_dtype: TrunkDtype = trunk_dtype
        self.checkpointing = checkpointing
        self.attention = attention
        self.quantization: Quantization | None = quantization
        self.trunk_sharding: TrunkSharding | None = trunk_sharding
        if trunk_sharding is not None and quantization is not None:
            raise ValueError(
                f"trunk_sharding is {trunk_sharding} and quantization {quantization}: FSDP2 takes no codes of "
                "bitsandbytes apart. Give one of the two."
            )
        self.shortcuts = chosen(shortcuts)
        self.seed = seed
        # Callables and functions cannot be read back with weights_only; the values can.
        ignored = ["optimizer", "scheduler", "gold", "reward_function", "rollout_engine"]
        self.save_hyperparameters(ignore=ignored)
        self.strict_loading = False
        self._rng: dict[str, Any] | None = None
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        self.loraplus_lr_ratio = loraplus_lr_ratio

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimizer, each with ``name`` and ``params``, and ``lr`` where it differs."""

    @property
    @abstractmethod
    def window(self) -> int | None:
        """Longest row in tokens that the trunk has positions for; None where it does not say."""

    @abstractmethod
    def longest_row(self, data: Bounded) -> int:
        """Longest row in tokens that this module would make of the data's rows."""

    @abstractmethod
    def preflight(self, batch: Any, optimizer: Optimizer) -> None:  # noqa: ANN401 (of this module's kind)
        """Do what a batch of so many rows, all as long as they may be, would do, but for the step."""

    @abstractmethod
    def hand_over(self, folder: Path) -> Path | None:
        """Write what the next stage loads below ``folder``; its own folder there, where it is one."""

    def configure_optimizers(self) -> Any:  # noqa: ANN401 (a dozen forms, see Lightning)
        """One optimizer, so that ``global_step`` counts updates."""
        optimizer = self._make_optimizer(list(self._split_groups()))
        for group in optimizer.param_groups:
            group["lr"] *= group.pop("lr_ratio", 1.0)
        if self._make_scheduler is None:
            return optimizer
        given = [group["lr"] for group in optimizer.param_groups]
        scheduler = self._make_scheduler(optimizer)
        begun = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        scales = [begin / rate for begin, rate in zip(begun, given, strict=True)]
        if any(not math.isclose(scale, scales[0], rel_tol=1e-6) for scale in scales):
            names = [group["name"] for group in optimizer.param_groups]
            raise MisconfigurationException(
                f"model.scheduler sets the learning rates of {names} to {begun}, but they are {given}. Give it a "
                "list of rates in this order (OneCycleLR: max_lr), or use a scheduler that scales rates."
            )
        config = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, ReduceLROnPlateau):
            if not isinstance(scheduler, WatchingPlateau):
                raise MisconfigurationException(
                    "model.scheduler: torch's ReduceLROnPlateau does not say what it watches. Use class_path: "
                    "lightning.pytorch.cli.ReduceLROnPlateau and its monitor, such as val/loss."
                )
            config |= {"interval": "epoch", "monitor": scheduler.monitor}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _split_groups(self) -> Iterator[dict[str, Any]]:
        """The groups; with LoRA+ each as two of the same name, the second with the ``B`` of its adapters."""
        if self.loraplus_lr_ratio is None:
            yield from self.parameter_groups()
            return
        named = [(name, weight) for name, weight in self.named_parameters() if weight.requires_grad]
        ups = {id(weight) for name, weight in named if ".lora_B." in name}
        for group in self.parameter_groups():
            for up, ratio in ((False, 1.0), (True, self.loraplus_lr_ratio)):
                part = [weight for weight in group["params"] if (id(weight) in ups) == up]
                if part:
                    yield {**group, "params": part, "lr_ratio": ratio}

    def configure_callbacks(self) -> list[Callback]:
        """Every fit goes on where it stopped, and ends by handing over. Loggers have made no folder yet."""
        ours: list[Callback] = [Handover(), SkippedBatches(), Resume(), PredictionWriter()]
        given = [] if self._trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
        count_trained(given)
        if not any(isinstance(callback, MemoryPreflight) for callback in given):
            ours.insert(1, MemoryPreflight())
        if self._trainer is not None:
            claim(self.trainer)
            ours += [WandbSummary()] * any(wandb_loggers(self.trainer))
        return ours

    @classmethod
    def needed(cls, lora: LoraSpec | None) -> LoraSpec:
        """An adapter's shape that may not be None.

        Its type says so all the same: another class over one's YAML (``--model=DPO``) keeps ``lora`` then.
        """
        if lora is None:
            raise ValueError(
                f"{cls.__name__} has its reference in the trunk without the adapter, so lora cannot be null. Give "
                "its rank and alpha."
            )
        return lora

    @classmethod
    def refuse(cls, trainer: Trainer, rows: str | None, sharding: str | None = None) -> None:
        """Refuse a trainer's settings, and rows of another kind, before data is read and weights are loaded."""
        precision = trainer.precision
        if precision != "32-true":
            raise MisconfigurationException(
                f"trainer.precision must stay 32-true, got {precision!r}: Lightning would cast or autocast "
                "the adapters, whose weights, gradients and moments must be fp32. For bf16 matrix products "
                "set model.init_args.trunk_dtype: bfloat16."
            )
        require_plain_ranks(type(trainer.strategy).__name__)
        if sharding == "shard" and trainer.world_size == 1:
            raise MisconfigurationException(
                "model.trunk_sharding is shard, and there is one device only. Set trainer.devices, or "
                "trunk_sharding: offload, which keeps the blocks in the host's memory."
            )
        if trainer.overfit_batches:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "trainer.overfit_batches would exchange the loaders' samplers, by which a run resumes exactly. "
                "Use data with as few rows as shall be learned by heart, and more trainer.max_epochs."
            )
        if rows not in (None, cls.rows):
            raise ValueError(
                f"{cls.__name__} learns from {cls.rows}, but data.rows is {rows!r}. Set "
                f"data.init_args.rows: {cls.rows}."
            )

    def setup(self, stage: str) -> None:
        """Refuse trainer settings and data that would make the numbers wrong."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        rows = data.rows if isinstance(data, Bounded) else None
        self.refuse(self.trainer, rows, self.trunk_sharding)
        unwrap(self.trainer)
        if self.automatic_optimization and self.trainer.accumulate_grad_batches > 1:
            rank_zero_warn(
                "With accumulate_grad_batches every batch weighs the same, however many tokens or thumbs it "
                "has: the step is not quite that of one larger batch."
            )
        self.require_fitting(data)

    def configure_model(self) -> None:
        """Shard the trunks, before the trainer moves the module to its device."""
        for trunk in self._trunks:
            if self.trunk_sharding is not None and trunk.sharding is None:
                shard(trunk, self.trainer.strategy.root_device, self.trunk_sharding)

    def cpu(self) -> AdapterModule:
        """Stay where it is when a stage has ended, if a part of the trunk could not come along."""
        sharded = any(trunk.sharding for trunk in self._trunks)
        return self if sharded else super().cpu()

    def require_fitting(self, data: object) -> None:
        """Refuse data of another tokenizer or chat template, or with rows that the trunk has no positions for."""
        require_same_words(self._trunks[0], getattr(data, "tokenizer", None))
        # The template of one trunk's folder holds for the others, also where the data names none.
        templates = {by: name for trunk in self._trunks for by, name in trunk.templates.items()}
        if (template := getattr(data, "template", None)) is not None:
            templates["data"] = template
        for trunk in self._trunks:
            for by, name in templates.items():
                agree_on_template(trunk, name, by)
        window = self.window
        if not isinstance(data, Bounded) or window is None:
            return
        if (longest := self.longest_row(data)) > window:
            raise ValueError(
                f"Rows may be {longest} tokens long (data.max_tokens {data.max_tokens}, "
                f"data.max_response_tokens {data.max_response_tokens}), but the trunk has positions for "
                f"{window} only. Lower data.max_tokens (prompts are cut from the left) or "
                "sampling.max_new_tokens."
            )

    @cached_property
    def _trunks(self) -> list[Trunk]:
        return [module for module in self.modules() if isinstance(module, Trunk)]

    @property
    def flops(self) -> int:
        """Model FLOPs of all passes so far, each backward counted with its forward."""
        return sum(trunk.flops for trunk in self._trunks)

    @property
    def product_dtype(self) -> torch.dtype:
        """Dtype of the trunks' matrix products."""
        return self._trunks[0].dtype

    @property
    def held_out(self) -> str:
        """Prefix of keys logged on held-out rows: ``val``, or ``test`` in ``trainer.test``."""
        return "test" if self.trainer.testing else "val"

    def log_stats(self, stats: Mapping[str, Tensor | float], batch_size: int) -> None:
        """Log named statistics as means over rows."""
        for key, value in stats.items():
            self.log(key, value, batch_size=batch_size)

    def trainable_names(self) -> set[str]:
        """Keys of the state dict that are trained; tied weights under each of their names."""
        return {
            name
            for name, parameter in self.named_parameters(remove_duplicate=False)
            if parameter.requires_grad
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep exactly what is trained: a frozen trunk is never written again."""
        trainable = self.trainable_names()
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: state[key] for key in state if key in trainable}
        states = everyones(standing())
        checkpoint["rng"] = states if len(states) > 1 else states[0]
        checkpoint["trained_on"] = self._trained_on
        checkpoint["template"] = next(iter(self._trunks[0].templates.values()), None)

    @cached_property
    def _trained_on(self) -> dict[str, str]:
        """Shapes of the adapters, and fingerprints of the frozen trunks, heads and adapters that they need.

        Taken once, since what is frozen stays: `OnPolicy` looks after that.
        """
        about = {}
        for name, module in self.named_modules():
            if isinstance(module, Trunk | ScalarHead):
                own = module.bare if isinstance(module, Trunk) else module.parameters()
                if not any(weight.requires_grad for weight in own):
                    about[name] = module.fingerprint()
        for adapters in (trunk.adapters for trunk in self._trunks):
            for name, spec in adapters.specs.items():
                targets = ", ".join(spec.targets) or "all linear layers"
                scale = f"alpha {spec.alpha:g}{' (rsLoRA)' if spec.rslora else ''}"
                shape = f"rank {spec.rank}, {scale}, {targets}"
                trained = adapters.parameters(name)[0].requires_grad
                weights = "" if trained else f", weights {adapters.fingerprint(name)}"
                about[f"LoRA {name!r}"] = shape + weights
        return about

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose keys are not exactly those trained here, or that was trained on other weights.

        Raises:
            ValueError: It is another layout's, or another trunk's, or its adapters have another shape.
        """
        stored, trainable = set(checkpoint["state_dict"]), self.trainable_names()
        if stored != trainable:
            raise ValueError(
                f"The checkpoint does not fit {type(self).__name__}: missing "
                f"{sorted(trainable - stored)[:3]}, unknown {sorted(stored - trainable)[:3]} "
                f"({len(trainable - stored)} and {len(stored - trainable)} in all). It belongs to another "
                "layout, LoRA shape or trunk."
            )
        here, there = self._trained_on, checkpoint.get("trained_on", {})
        changed = [key for key in here if there.get(key, here[key]) != here[key]]
        if changed:
            settings = checkpoint.get("hyper_parameters", {})
            names = [f"{k} {settings[k]}" for k in ("trunk", "reward") if settings.get(k)]
            raise ValueError(
                f"The checkpoint does not fit {type(self).__name__}, it was trained on others: "
                + "; ".join(f"{key} is {here[key]}, there {there[key]}" for key in changed)
                + f". Give the trunk, reward and lora that it was trained with ({', '.join(names)}), or leave "
                "ckpt_path out."
            )
        own, state = dict(self.named_parameters(remove_duplicate=False)), checkpoint["state_dict"]
        misshapen = [key for key in sorted(stored) if state[key].shape != own[key].shape]
        if misshapen or "rng" not in checkpoint:
            what = f"other shapes, as of {misshapen[0]}" if misshapen else "no state of generators"
            raise ValueError(
                f"The checkpoint does not fit {type(self).__name__}: it has {what}. Was it written by another "
                "library, or changed?"
            )
        # Of one rank, or a list of several ranks'. A rank that is new goes on as the first does.
        states = checkpoint["rng"] if isinstance(checkpoint["rng"], list) else [checkpoint["rng"]]
        self._rng = states[self.global_rank if self.global_rank < len(states) else 0]

    def load_state_dict(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 (torch's own)
        """Do not report frozen weights as missing: they are in no checkpoint, and Lightning would list them."""
        keys, trainable = super().load_state_dict(*args, **options), self.trainable_names()
        keys.missing_keys[:] = [key for key in keys.missing_keys if key in trainable]
        return keys

    def on_train_start(self) -> None:
        """Move optimizer moments back to the host: Lightning loads a checkpoint's onto the device."""
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, HostAdamW):
                optimizer.rest()
        take_from_first(weight for weight in self.parameters() if weight.requires_grad)

    def require_batch(self, batch: object) -> None:
        """Refuse what a loader of the user's own yields, where it is no batch of this module's kind."""
        name, vocabulary = type(self).__name__, self._trunks[0].vocabulary_size
        if isinstance(batch, MixedBatch | PromptBatch | RatedBatch):
            parts = batch if isinstance(batch, MixedBatch) else (batch,)
            require_same(torch.cat([part.row for part in parts]), "rows")
        if self.rows == "prompts" and isinstance(batch, MixedBatch):
            texts = PairBatch if isinstance(batch.texts, PairBatch) else RatedBatch
            require_batch(batch.texts, texts, name, vocabulary)
            batch = batch.prompts
        kind = PromptBatch if self.rows == "prompts" else RatedBatch
        require_batch(batch, kind, name, vocabulary)

    def on_validation_batch_start(
        self, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Refuse a foreign batch."""
        self.require_batch(batch)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        """Refuse a foreign batch, and put generators where the checkpoint left them.

        Only adapter dropout and Python rewards use those. Not on loading: making a loader's iterator may draw
        numbers too.
        """
        self.require_batch(batch)
        if self._rng is not None:
            put_back(self._rng)
            self._rng = None


def require_batch(
    batch: object,
    kind: type[PromptBatch] | type[RatedBatch] | type[PairBatch],
    module: str,
    vocabulary: int,
) -> None:
    """Refuse a batch of another type, a mask that is not boolean, and ids that the trunk has not.

    Raises:
        TypeError: One of these; the message says how to make such batches.
    """
    if isinstance(batch, kind):
        parts = batch._asdict()
        masks = {name: part.dtype for name, part in parts.items() if "mask" in name}
        wrong = {name: dtype for name, dtype in masks.items() if dtype != torch.bool}
        largest = max(int(part.max()) for name, part in parts.items() if name.endswith("ids"))
        if not wrong and largest < vocabulary:
            return
        got = f"one whose masks are {wrong}" if wrong else f"one with the id {largest}"
    else:
        keys = f" with {sorted(map(str, batch))}" if isinstance(batch, Mapping) else ""
        got = f"{type(batch).__name__}{keys}"
    raise TypeError(
        f"{module} takes a {kind.__name__} (lightning_perl.batches: {', '.join(kind._fields)}) with boolean masks "
        f"and ids below {vocabulary}, got {got}. Return one from the DataLoader's collate_fn, or give rows as "
        "dicts to PreferenceDataModule(tokenizer, train=rows)."
    )


def require_same_words(trunk: Trunk, tokenizer: object) -> None:
    """Refuse data whose tokenizer has other words behind its ids than the trunk's."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or trunk.weightless:
        return
    own, words = trunk.tokenizer.get_vocab(), tokenizer.get_vocab()
    if tokenizer.pad_token not in own:
        words.pop(tokenizer.pad_token, None)  # one that was added, which no batch holds
    if words != own:
        raise ValueError(
            f"data.tokenizer has other words behind its ids than the tokenizer of {trunk.source}, which would "
            "read other texts. Give data the trunk as its tokenizer."
        )


def require_plain_ranks(strategy: str) -> None:
    """Refuse, by its name or class, what is neither one device nor Lightning's DDP, before anything is made."""
    # Some of these cannot even be made where their packages or devices are missing.
    name = strategy.split(".")[-1]
    if name in StrategyRegistry:
        name = StrategyRegistry[name]["strategy"].__name__
    if name not in STRATEGIES:
        raise MisconfigurationException(
            f"trainer.strategy {name} cannot train these modules: {REASONS.get(name, 'it is not known here')}. "
            "Leave it at auto (or ddp), with trainer.devices and trainer.num_nodes: the ranks share out each "
            "batch and sum gradients once a step. See docs/scale.md."
        )


def unwrap(trainer: Trainer) -> None:
    """Keep DDP's launcher and processes without its wrapper, and give every rank the same batches.

    The wrapper would sum gradients in the middle of a step that has several backward passes.
    """
    # Every rank logs what all rows gave.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.* when logging on epoch level")
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy.configure_ddp = lambda: None  # type: ignore[method-assign]
        trainer._accelerator_connector.use_distributed_sampler = False
        # In validation and tests DDP would send the first rank's weights to all. Frozen ones are read by each.
        module: Any = trainer.lightning_module
        frozen = [name for name, weight in module.named_parameters() if not weight.requires_grad]
        module._ddp_params_and_buffers_to_ignore = frozen


def standing() -> dict[str, Any]:
    """States of all generators: torch's, CUDA's, Python's and NumPy's, which a Python reward may draw from."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        # Checkpoints are read with weights_only, which knows no arrays.
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
    }


def put_back(states: dict[str, Any]) -> None:
    """Let the generators go on from there; CUDA's on as many devices only."""
    torch.set_rng_state(states["cpu"].cpu())
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    if "python" in states:  # checkpoints of older releases have none
        random.setstate(states["python"])
        name, keys, *rest = states["numpy"]
        np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
