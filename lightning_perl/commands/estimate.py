"""How much memory a run will take, before there is a GPU: the module's own acts under fake tensors."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_perl.batches import RatedBatch
from lightning_perl.commands.ledger import KINDS, Peak
from lightning_perl.commands.rehearsal import (
    Load,
    OnPolicyRehearsal,
    Peaks,
    SupervisedRehearsal,
    own_weights,
    rehearsal_of,
)
from lightning_perl.functional.sequences import position_ids
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.loading import TrunkDtype
from lightning_perl.models.roles import Layout, TrainedRole
from lightning_perl.models.shortcuts import Shortcuts
from lightning_perl.models.weightless import weightless
from lightning_perl.modules import PPO, SFT
from lightning_perl.modules.base import AdapterModule, default_optimizer
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.packaged import unpackaged
from lightning_perl.rollouts.sampling import SamplingSpec

GIB = 2**30
MOST_ROWS = 2**16
"""No search goes further."""
SECANTS = 8
"""Runs of a search before it halves what is left."""
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
ANY_TRUNK = "trunk"
"""Where no weights are read, no folder is asked for."""
PLAIN = "LoRA-SFT"
"""transformers' own loss and blocks, our LoRA layers: what the others are measured by."""
NOT_COUNTED = (
    "Not counted: CUDA's context, libraries' buffers and fragmentation, about 1 GiB. A card of 24 GB holds "
    "what fits --budget 23GB."
)


def parse_bytes(text: str) -> int:
    """Bytes of ``24GiB``, ``80 GB`` or ``500MiB``.

    Raises:
        ValueError: It is no such thing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"--budget must be a size such as 24GiB or 80GB, got {text!r}.")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** "_KMGT".index(found[2].upper()))


@dataclass(frozen=True)
class LlamaSizes:
    """A Llama by its sizes, for those who have no configuration file.

    Args:
        hidden_size: Width.
        layers: Decoder blocks.
        heads: Attention heads.
        kv_heads: Heads of keys and values; None as many as heads.
        intermediate_size: Width of the MLP.
        vocabulary_size: Rows of the embedding and of the LM head, which are two matrices.
    """

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    vocabulary_size: int
    kv_heads: int | None = None

    def config(self) -> LlamaConfig:
        """As transformers has it."""
        return LlamaConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads or self.heads,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocabulary_size,
            max_position_embeddings=2**20,
            tie_word_embeddings=False,
        )


def architecture_from(source: str) -> PreTrainedConfig:
    """The configuration of a model folder, a ``config.json``, or a hub name. No weights are read.

    Raises:
        ValueError: There is none, transformers does not know it, or it is no decoder's.
    """
    where = Path(unpackaged(source)).expanduser()
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(where) if where.exists() else source
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"estimate: no architecture found in {source!r} ({str(error).splitlines()[0]}). Give "
            "--architecture the folder or config.json of a decoder, or a hub name, or give its sizes "
            "(--hidden_size, --layers, --heads, --intermediate_size, --vocabulary_size)."
        ) from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"estimate: {source!r} is a {config.model_type}, which is no decoder.")
    return config


class PlainLoss(SupervisedRehearsal):
    """Fine-tuning with transformers' own loss, on the logits of all positions."""

    def loss(self, batch: RatedBatch) -> Tensor:
        """Cross-entropy as transformers computes it from labels."""
        trunk = self.module.trunk
        labels = batch.ids.masked_fill(~batch.response_mask, -100)
        with trunk.training_pass(), trunk.switch.use(self.module.adapter):
            output = trunk.model(
                input_ids=batch.ids,
                attention_mask=batch.attention_mask.long(),
                position_ids=position_ids(batch.attention_mask),
                labels=labels,
                use_cache=False,
            )
        loss: Tensor = output.loss
        return loss


class PeftLayers(PlainLoss):
    """The same with PEFT's own LoRA layers, which cast and keep their inputs in fp32."""

    def loss(self, batch: RatedBatch) -> Tensor:
        """The same loss."""
        for _, layer in self.module.trunk.adapters.layers():
            # Ours hangs on the instance.
            vars(layer).pop("forward", None)
        return super().loss(batch)


class Estimate(NamedTuple):
    """What was found for one run.

    Attributes:
        peaks: Of each phase.
        micro_batch_size: The largest that fits the budget; None where nobody asked.
        rollout_rows: The most prompts sampled at once that fit; None also where nothing is sampled.
    """

    peaks: Peaks
    micro_batch_size: int | None = None
    rollout_rows: int | None = None

    @property
    def peak(self) -> Peak:
        """The largest."""
        return max(self.peaks.values(), key=lambda peak: peak.total)


def highest(peaks: Peaks) -> int:
    """Bytes at the highest of some peaks."""
    return max(peak.total for peak in peaks.values())


def largest(bytes_of: Callable[[int], int], budget: int, known: Mapping[int, int]) -> int:
    """The most rows whose peak is within the budget; it and one row more have been run.

    Peaks grow nearly as ``held + rows * slope``, so secants find the place in three or four runs; a bracket
    keeps them honest where peaks do not.

    Args:
        bytes_of: Peak with so many rows; does not fall as rows grow.
        budget: Bytes.
        known: Peaks that are known, at least of 0 rows (what is always held) and of one other number.

    Returns:
        0 where not even one row fits; `MOST_ROWS` where that many do.
    """
    seen = dict(known)
    if seen[0] > budget:
        return 0
    while True:
        good = max(rows for rows, peak in seen.items() if peak <= budget)
        bad = min((rows for rows, peak in seen.items() if peak > budget), default=MOST_ROWS + 1)
        if bad - good == 1:
            return good
        rows = (good + bad) // 2
        (near, peak), (far, other) = sorted(seen.items(), key=lambda one: abs(one[1] - budget))[:2]
        # Peaks that do not grow say nothing, and a secant that has not arrived by now will not.
        if peak != other and len(seen) < SECANTS:
            rows = near + math.floor((budget - peak) * (near - far) / (peak - other))
        rows = min(max(rows, good + 1), bad - 1)
        seen[rows] = bytes_of(rows)


def estimate(
    rehearsal: OnPolicyRehearsal | SupervisedRehearsal, budget: int | None = None
) -> Estimate:
    """Peaks of a train batch, and the largest sizes that fit a budget.

    Raises:
        ValueError: The budget does not hold what there is before the first row.
    """
    peaks = rehearsal.peaks()
    if budget is None:
        return Estimate(peaks)
    held = rehearsal.ledger.total
    if held > budget:
        raise ValueError(
            f"--budget {budget / GIB:.2f} GiB is less than the {held / GIB:.2f} GiB that weights, adapters "
            "and optimizer hold before the first row is read. Use a layout with fewer trunks, a smaller "
            "rank, trunk_dtype bfloat16 with LoRA, or a smaller trunk."
        )
    if isinstance(rehearsal, SupervisedRehearsal):
        known = {0: held, rehearsal.load.rows: highest(peaks)}
        return Estimate(
            peaks, largest(lambda rows: highest(rehearsal.step_peaks(rows)), budget, known)
        )
    micro = rehearsal.module.micro_batch_size
    known = {0: held, micro: highest(rehearsal.update_peaks(micro))}
    rows = rehearsal.load.rows
    return Estimate(
        peaks,
        largest(lambda rows: highest(rehearsal.update_peaks(rows)), budget, known),
        largest(
            lambda rows: highest(rehearsal.rollout_peaks(rows)),
            budget,
            {0: held, rows: peaks["rollout"].total},
        ),
    )


class Comparison(NamedTuple):
    """A run beside the one that was asked for.

    Attributes:
        make: Makes its module.
        rehearsal: How that is run.
        load: At which lengths, and how many rows.
    """

    make: Callable[[], AdapterModule]
    rehearsal: Callable[[Any, Load], OnPolicyRehearsal | SupervisedRehearsal]
    load: Load


class Settings(NamedTuple):
    """What runs that are compared have in common.

    Attributes:
        lora: Of every adapter.
        dtype: Of the trunks; those that are tuned whole are float32.
        checkpointing: Which training passes are computed again in backward; of a list, supervised runs take
            that they are.
        attention: transformers' ``attn_implementation``.
        micro_batch_size: Rows of a forward and backward.
        load: Of the run that was asked for.
        optimizer: Makes the optimizer.
        shortcuts: Which work is saved, but in `PLAIN` ways.
        minibatch_size: Of PPO.
        score_batch_size: Of PPO.
    """

    lora: LoraSpec
    dtype: TrunkDtype
    checkpointing: bool | list[TrainedRole]
    attention: str | None
    micro_batch_size: int
    load: Load
    optimizer: OptimizerCallable = default_optimizer(1e-4)
    shortcuts: Shortcuts = Shortcuts()
    minibatch_size: int | None = None
    score_batch_size: int | None = None


def settings_of(rehearsal: OnPolicyRehearsal | SupervisedRehearsal) -> Settings:
    """Those of a run, for its comparisons."""
    module, load = rehearsal.module, rehearsal.load
    trunk = rehearsal.trunks()[0]
    specs = list(trunk.adapters.specs.values())
    dtypes = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
        torch.float64: "float64",
    }
    # A pair is two rows to those that know no pairs.
    rows = load.rows * (2 if load.pairs else 1)
    return Settings(
        specs[0] if specs else LoraSpec(),
        cast(TrunkDtype, dtypes[trunk.dtype]),
        module.hparams["checkpointing"],
        trunk.model.config._attn_implementation,
        module.micro_batch_size if isinstance(module, OnPolicy) else rows,
        load._replace(rows=rows, pairs=False, accumulated=False),
        module._make_optimizer,
        trunk.shortcuts,
        module.hparams.get("minibatch_size"),
        module.hparams.get("score_batch_size"),
    )


def comparisons(settings: Settings) -> dict[str, Comparison]:
    """All layouts of PPO, and supervised fine-tuning in four ways, at equal lengths and micro-batch."""
    lora, dtype, load = settings.lora, settings.dtype, settings.load
    own_blocks = replace(settings.shortcuts, lean_blocks=False)

    def ppo(layout: Layout) -> Callable[[], AdapterModule]:
        return lambda: PPO(
            ANY_TRUNK,
            layout=layout,
            lora=lora,
            sampling=SamplingSpec(load.response_tokens),
            micro_batch_size=settings.micro_batch_size,
            minibatch_size=settings.minibatch_size,
            score_batch_size=settings.score_batch_size,
            trunk_dtype="float32" if layout == "full" else dtype,
            checkpointing=settings.checkpointing,
            attention=settings.attention,
            shortcuts=settings.shortcuts,
            optimizer=settings.optimizer,
        )

    def sft(
        adapter: LoraSpec | None, shortcuts: Shortcuts = settings.shortcuts
    ) -> Callable[[], AdapterModule]:
        return lambda: SFT(
            ANY_TRUNK,
            lora=adapter,
            trunk_dtype=dtype if adapter else "float32",
            checkpointing=bool(settings.checkpointing),
            attention=settings.attention,
            shortcuts=shortcuts,
            optimizer=settings.optimizer,
        )

    batch = load._replace(rows=settings.micro_batch_size)
    supervised = {
        PLAIN: Comparison(sft(lora, own_blocks), PlainLoss, batch),
        "LoRA-SFT, PEFT's layers": Comparison(sft(lora, own_blocks), PeftLayers, batch),
        "SFT with LoRA (ours)": Comparison(sft(lora), SupervisedRehearsal, batch),
        "full SFT": Comparison(sft(None), SupervisedRehearsal, batch),
    }
    layouts = {f"PPO {name}": Comparison(ppo(name), OnPolicyRehearsal, load) for name in LAYOUTS}
    return supervised | layouts


def compare(
    config: PreTrainedConfig, runs: Mapping[str, Comparison], budget: int | None
) -> dict[str, Estimate | None]:
    """What each run takes; None where a budget does not even hold its weights."""
    found: dict[str, Estimate | None] = {}
    for name, run in runs.items():
        with weightless(config):
            module = run.make()
        rehearsal = run.rehearsal(module, run.load)
        tight = budget is not None and rehearsal.ledger.total > budget
        found[name] = None if tight else estimate(rehearsal, budget)
    return found


def table(one: Estimate) -> str:
    """The phases of a run, in GiB by kind."""
    shown = [kind for kind in KINDS if any(peak.kinds.get(kind) for peak in one.peaks.values())]
    lines = [f"{'phase':<10}{'peak':>9}" + "".join(f"{kind:>12}" for kind in shown)]
    for phase, peak in one.peaks.items():
        kinds = "".join(f"{peak.kinds[kind] / GIB:>12.2f}" for kind in shown)
        lines.append(f"{phase:<10}{peak.total / GIB:>9.2f}{kinds}")
    return "\n".join(lines)


def comparison_table(found: Mapping[str, Estimate | None], fitted: bool) -> str:
    """Runs side by side."""
    reference = found.get(PLAIN)
    head = f"{'run':<28}{'peak GiB':>9}{'x LoRA-SFT':>12}  {'in':<10}"
    lines = [head + (f"{'micro-batch':>12}{'rollout':>9}" if fitted else "")]
    for name, one in found.items():
        if one is None:
            lines.append(f"{name:<28}{'over':>9}{'':>12}  its weights alone pass the budget")
            continue
        ratio = f"{one.peak.total / reference.peak.total:.2f}" if reference else ""
        phase = max(one.peaks, key=lambda phase: one.peaks[phase].total)
        line = f"{name:<28}{one.peak.total / GIB:>9.2f}{ratio:>12}  {phase:<10}"
        if fitted:
            line += f"{one.micro_batch_size:>12}{'' if one.rollout_rows is None else one.rollout_rows:>9}"
        lines.append(line)
    return "\n".join(lines)


def as_json(one: Estimate) -> dict[str, Any]:
    """Numbers for machines, in GiB."""
    return {
        "peak_gib": one.peak.total / GIB,
        "phases": {
            phase: {
                "peak_gib": peak.total / GIB,
                "kinds_gib": {kind: size / GIB for kind, size in peak.kinds.items()},
            }
            for phase, peak in one.peaks.items()
        },
        "largest_micro_batch_size": one.micro_batch_size,
        "largest_rollout_batch_size": one.rollout_rows,
    }


def report(
    make: Callable[[], AdapterModule],
    config: PreTrainedConfig,
    load: Load,
    budget: str | None = None,
    layouts: bool = False,
    as_object: bool = False,
) -> str:
    """What ``python -m lightning_perl estimate`` prints.

    Args:
        make: Makes the module; called inside `weightless`.
        config: The trunk's architecture.
        load: What a train batch holds.
        budget: Such as ``24GiB``: also look for the largest batches that fit.
        layouts: Also estimate all layouts and ways of fine-tuning.
        as_object: One JSON object instead of tables.

    Raises:
        ValueError: A budget that cannot be read or does not hold the weights, a module that cannot be
            estimated, or rows longer than the trunk has positions for.
    """
    begun = time.perf_counter()
    limit = None if budget is None else parse_bytes(budget)
    with weightless(config):
        module = make()
    rehearsal = rehearsal_of(module, load)
    found = estimate(rehearsal, limit)
    settings = settings_of(rehearsal)
    others = compare(config, comparisons(settings), limit) if layouts else {}
    name = type(module).__name__
    micro = module.micro_batch_size if isinstance(module, OnPolicy) else load.rows
    parameters = sum(one.numel() for one in own_weights(rehearsal.trunks()[0]))
    seconds = time.perf_counter() - begun
    if as_object:
        return json.dumps(
            {
                "module": name,
                "layout": module.roles.layout if isinstance(module, OnPolicy) else None,
                "model_type": config.model_type,
                "parameters": parameters,
                "load": load._asdict() | {"micro_batch_size": micro},
                **as_json(found),
                "budget_gib": None if limit is None else limit / GIB,
                "layouts": {key: one and as_json(one) for key, one in others.items()} or None,
                "seconds": seconds,
            }
        )
    lines = [
        f"{name} on {config.model_type} of {parameters / 1e9:.2f}B parameters, {load.prompt_tokens} + "
        f"{load.response_tokens} tokens, {load.rows} {'pairs' if load.pairs else 'rows'} a batch, "
        f"{micro} at once; GiB at each phase's peak:",
        table(found),
        NOT_COUNTED,
    ]
    if limit is not None:
        lines.append(_fitting(found, budget, limit))
    if others:
        lora = settings.lora
        lines += [
            "",
            f"At equal lengths and {settings.micro_batch_size} rows at once; LoRA of rank {lora.rank} on "
            f"{_named(lora.targets)}, what is tuned whole in float32:",
            comparison_table(others, limit is not None),
        ]
    return "\n".join([*lines, f"{seconds:.0f} s"])


def _named(targets: tuple[str, ...]) -> str:
    return ", ".join(targets) or "all linear layers"


def _fitting(found: Estimate, budget: str | None, limit: int) -> str:
    what = f"Largest in {budget}: {found.micro_batch_size} rows at once in training"
    if found.rollout_rows is not None:
        what += f", {found.rollout_rows} prompts at once in a rollout"
    return what + ("." if found.peak.total <= limit else "; the run as configured does not fit.")
