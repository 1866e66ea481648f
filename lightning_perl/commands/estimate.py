"""``estimate``: how much memory a fit will take, before there is a GPU."""

from __future__ import annotations

import json
import math
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple, get_args

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_perl.commands.ledger import KINDS, Peak
from lightning_perl.commands.rehearsal import (
    Load,
    OnPolicyRehearsal,
    Peaks,
    SupervisedRehearsal,
    rehearsal_of,
)
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.roles import Layout
from lightning_perl.models.trunk import Trunk
from lightning_perl.models.weightless import weightless
from lightning_perl.modules import PPO, SFT
from lightning_perl.modules.base import AdapterModule
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.modules.supervised import Judging
from lightning_perl.packaged import unpackaged
from lightning_perl.rollouts.sampling import SamplingSpec

GIB = 2**30
MOST_ROWS = 2**16
"""The largest size that a search tries."""
SECANTS = 8
"""Runs of a search before it halves what is left."""
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
LORA_SFT = "SFT with LoRA"
NOT_COUNTED = (
    "Not counted: CUDA's context, libraries' buffers and fragmentation, about 1 GiB. A card of 24 GB holds "
    "what fits --budget 23GB. On a CPU under Linux the heap falls into holes, and a process may come to hold "
    "three times as much; MALLOC_MMAP_THRESHOLD_=1048576 THP_MEM_ALLOC_ENABLE=1 before the command takes less "
    "memory and more time."
)
SHAPE = (
    *("model_type", "hidden_size", "intermediate_size", "vocab_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
)
"""Two trunks take the same memory if these are equal."""


@dataclass(frozen=True)
class LlamaSizes:
    """The sizes of a Llama with an LM head of its own; without ``kv_heads`` it has as many as ``heads``."""

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    vocabulary_size: int
    kv_heads: int | None = None

    def config(self) -> LlamaConfig:
        """The configuration that transformers builds the model from."""
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


def add_arguments(parser: LightningArgumentParser) -> None:
    """What ``estimate`` takes beside the arguments of ``fit``."""
    parser.add_argument(
        "--architecture",
        type=str | None,
        default=None,
        help="A model folder, a config.json or a hub name, in place of the configuration's trunk. Only the "
        "architecture is read, never weights. Or give the sizes of a Llama: --hidden_size and so on.",
    )
    for size in fields(LlamaSizes):
        parser.add_argument(f"--{size.name}", type=int | None, default=None)
    parser.add_argument(
        "--pairs",
        type=bool | None,
        default=None,
        help="Whether the data's rows are preference pairs. By default they are for modules with a reward "
        "loss, unless the datamodule says that it has no pairs.",
    )
    parser.add_argument(
        "--budget",
        type=str | None,
        default=None,
        help="Such as 24GiB: also find the largest batches that fit.",
    )
    parser.add_argument(
        "--layouts",
        action="store_true",
        help="Also estimate PPO's layouts and supervised fine-tuning, at the same lengths.",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")


def run(config: Namespace, parser: LightningArgumentParser) -> None:
    """Print the estimate of a parsed command line."""
    make, architecture = partial(_make_module, config, parser), _architecture(config)
    options = (config.budget, config.layouts, config.json)
    print(report(make, architecture, load_of(config), *options))


def load_of(config: Namespace) -> Load:
    """Lengths and sizes as the data and the module, which must be one of this package, state them."""
    data, model = config.data.init_args, config.model.init_args
    module_class = resolve_name(config.model.class_path)
    if not (isinstance(module_class, type) and issubclass(module_class, AdapterModule)):
        raise ValueError(
            f"estimate runs this package's modules, and {config.model.class_path} is none of them."
        )
    prompt = data.max_tokens - data.max_response_tokens
    ranks = devices_of(config.trainer.devices) * config.trainer.num_nodes
    rows = -(-data.batch_size // ranks)
    if issubclass(module_class, OnPolicy):
        rows *= model.get("samples", 1)
        return Load(prompt, model.sampling.max_new_tokens, rows, ranks=ranks)
    pairs = config.pairs
    if pairs is None:
        data_class = resolve_name(config.data.class_path)
        pairs = issubclass(module_class, Judging) and getattr(data_class, "pairs", True)
    accumulated = (config.trainer.accumulate_grad_batches or 1) > 1
    return Load(prompt, data.max_response_tokens, rows, pairs, accumulated, ranks)


def devices_of(devices: object) -> int:
    """How many devices of a node ``trainer.devices`` names; one where that depends on the machine."""
    if isinstance(devices, list):
        return len(devices)
    return int(str(devices)) if str(devices).isdigit() else 1


def _make_module(config: Namespace, parser: LightningArgumentParser) -> AdapterModule:
    """The module alone, without what only a real run reads; rewards must have the policy's shape."""
    chosen = config.model.clone()
    chosen.init_args.pop("gold", None)
    rewards = chosen.init_args.get("reward")
    folders = [rewards] if isinstance(rewards, str) else rewards or []
    missing = [name for name in folders if not Path(unpackaged(name)).expanduser().exists()]
    if missing and len(folders) > 1:
        raise ValueError(
            f"estimate: {missing} of the {len(folders)} reward folders are not there, so their shapes are "
            "not known. Give folders that exist, or one that does not: it is taken to have the actor's shape."
        )
    if missing:
        chosen.init_args["reward"] = None
    for folder in set(folders) - set(missing):
        if (Path(unpackaged(folder)).expanduser() / "config.json").is_file():  # else an adapter
            _require_same_shape(folder, _architecture(config))
    with warnings.catch_warnings():
        # A module's own default optimizer is a function, which no config file can hold.
        warnings.filterwarnings("ignore", message=r"\s*Unable to serialize instance")
        module: AdapterModule = parser.instantiate(Namespace(model=chosen)).model  # type: ignore[no-untyped-call]
    return module


def _require_same_shape(reward: str, policy: PreTrainedConfig) -> None:
    """All trunks are estimated with one architecture."""
    both = (policy, architecture_from(reward))
    ours, theirs = ({name: getattr(config, name, None) for name in SHAPE} for config in both)
    if ours != theirs:
        raise ValueError(
            f"estimate knows one architecture for all trunks; that of the reward in {reward} is another: "
            f"{theirs}, got {ours} for the policy. Estimate it with a reward on a trunk of the policy's shape."
        )


def _architecture(config: Namespace) -> PreTrainedConfig:
    """The architecture of the sizes (all or none), of ``--architecture``, or of the trunk."""
    sizes = {size.name: config[size.name] for size in fields(LlamaSizes)}
    if all(value is None for value in sizes.values()):
        return architecture_from(config.architecture or config.model.init_args.trunk)
    needed = (size.name for size in fields(LlamaSizes) if size.default is MISSING)
    missing = [f"--{name}" for name in needed if sizes[name] is None]
    if missing or config.architecture:
        raise ValueError(
            "estimate: give --architecture, or all sizes of a Llama without it"
            + (f"; missing {', '.join(missing)}." if missing else ".")
        )
    return LlamaSizes(**sizes).config()


def architecture_from(source: str) -> PreTrainedConfig:
    """The configuration of a decoder's folder, ``config.json``, or hub name. No weights are read."""
    path = Path(unpackaged(source)).expanduser()
    place = str(path) if path.exists() else source
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(place)
    except Exception as error:  # each family's configuration refuses in its own way
        raise ValueError(
            f"estimate: no architecture found in {source!r} ({str(error).partition(chr(10))[0]}). Give "
            "--architecture the folder or config.json of a decoder, or a hub name, or give its sizes "
            "(--hidden_size, --layers, --heads, --intermediate_size, --vocabulary_size)."
        ) from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"estimate: {source!r} is a {config.model_type}, which is no decoder.")
    return config


def parse_bytes(text: str) -> int:
    """Bytes of ``24GiB``, ``80 GB`` or ``500MiB``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"--budget must be a size such as 24GiB or 80GB, got {text!r}.")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** "_KMGT".index(match[2].upper()))


class Estimate(NamedTuple):
    """The peaks of one run, and the largest sizes that fit a budget; None without one or without a rollout."""

    peaks: Peaks
    micro_batch_size: int | None = None
    rollout_rows: int | None = None

    @property
    def phase(self) -> str:
        """The phase with the largest peak."""
        return max(self.peaks, key=lambda phase: self.peaks[phase].total)

    @property
    def peak(self) -> Peak:
        """The largest peak."""
        return self.peaks[self.phase]


def estimate(
    rehearsal: OnPolicyRehearsal | SupervisedRehearsal, budget: int | None = None
) -> Estimate:
    """Peaks of a train batch, and the largest sizes that fit a budget."""
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
    largest_sizes = {}
    for name, (own, act) in rehearsal.sizes().items():

        def bytes_of(rows: int, act: Callable[[int], None] = act) -> int:
            return highest(rehearsal.peaks(lambda: act(rows)))

        largest_sizes[name] = largest(bytes_of, budget, {0: held, own: bytes_of(own)})
    return Estimate(peaks, **largest_sizes)


def highest(peaks: Peaks) -> int:
    """Bytes of the highest peak."""
    return max(peak.total for peak in peaks.values())


def largest(bytes_of: Callable[[int], int], budget: int, known: Mapping[int, int]) -> int:
    """The most rows whose peak is within the budget: 0 where not even one fits, `MOST_ROWS` at most.

    Peaks grow nearly as ``held + rows * slope``, so secants arrive in three or four runs; the bracket around
    them keeps the result exact where peaks do not. ``known`` are peaks by rows, that of 0 rows among them.
    """
    peaks = dict(known)
    if peaks[0] > budget:
        return 0
    while True:
        good = max(rows for rows, peak in peaks.items() if peak <= budget)
        bad = min((rows for rows, peak in peaks.items() if peak > budget), default=MOST_ROWS + 1)
        if bad - good == 1:
            return good
        rows = (good + bad) // 2
        nearest = sorted(peaks.items(), key=lambda item: abs(item[1] - budget))
        (near, peak), (far, other) = nearest[:2]
        # Equal peaks have no slope, and a secant that has not arrived by now will not.
        if peak != other and len(peaks) < SECANTS:
            rows = near + math.floor((budget - peak) * (near - far) / (peak - other))
        rows = min(max(rows, good + 1), bad - 1)
        peaks[rows] = bytes_of(rows)


Comparison = tuple[Callable[[], AdapterModule], Load]
"""What makes a module, and how much its train batch holds."""


def comparisons(module: AdapterModule, load: Load) -> dict[str, Comparison]:
    """PPO in all layouts and supervised fine-tuning, with a module's settings, lengths and micro-batch."""
    own, trunk = module.hparams, next(part for part in module.modules() if isinstance(part, Trunk))
    # A pair is two rows to those that know no pairs.
    rows = load.rows * (2 if load.pairs else 1)
    load = load._replace(rows=rows, pairs=False, accumulated=False)
    micro, sampling = rows, SamplingSpec(load.response_tokens)
    if isinstance(module, OnPolicy):
        micro, sampling = module.micro_batch_size, module.sampling
    shared: dict[str, Any] = {"trunk": "trunk", "optimizer": module._make_optimizer}
    shared |= {name: own[name] for name in ("attention", "shortcuts", "checkpointing")}
    # What is tuned whole is not quantized, and float32.
    frozen: dict[str, Any] = {
        name: own[name] for name in ("trunk_dtype", "quantization", "trunk_sharding")
    }
    lora = next(iter(trunk.adapters.specs.values()), LoraSpec())
    sft = shared | {"checkpointing": bool(own["checkpointing"])}
    ppo = shared | {"sampling": sampling, "lora": lora, "micro_batch_size": micro}
    ppo |= {name: own[name] for name in ("minibatch_size", "score_batch_size") if name in own}
    runs: dict[str, Comparison] = {
        LORA_SFT: (partial(SFT, **sft, **frozen, lora=lora), load._replace(rows=micro)),
        "full SFT": (partial(SFT, **sft, lora=None), load._replace(rows=micro)),
    }
    for layout in LAYOUTS:
        settings = ppo if layout == "full" else ppo | frozen
        runs[f"PPO {layout}"] = (partial(PPO, **settings, layout=layout), load)
    return runs


def compare(
    config: PreTrainedConfig, runs: Mapping[str, Comparison], budget: int | None
) -> dict[str, Estimate | None]:
    """The estimate of each run; None where a budget does not even hold its weights."""
    estimates: dict[str, Estimate | None] = {}
    for name, (make, load) in runs.items():
        with weightless(config):
            module = make()
        rehearsal = rehearsal_of(module, load)
        too_large = budget is not None and rehearsal.ledger.total > budget
        estimates[name] = None if too_large else estimate(rehearsal, budget)
    return estimates


def report(
    make: Callable[[], AdapterModule],
    config: PreTrainedConfig,
    load: Load,
    budget: str | None = None,
    layouts: bool = False,
    as_json: bool = False,
) -> str:
    """What ``python -m lightning_perl estimate`` prints of the module that ``make`` makes inside `weightless`."""
    start = time.perf_counter()
    limit = None if budget is None else parse_bytes(budget)
    with weightless(config):
        module = make()
    rehearsal = rehearsal_of(module, load)
    own = estimate(rehearsal, limit)
    others = compare(config, comparisons(module, load), limit) if layouts else {}
    on_policy = module if isinstance(module, OnPolicy) else None
    facts: dict[str, Any] = {
        "module": type(module).__name__,
        "layout": on_policy and on_policy.roles.layout,
        "model_type": config.model_type,
        "parameters": sum(weight.numel() for weight in rehearsal.trunks[0].bare),
        "load": {
            **load._asdict(),
            "micro_batch_size": on_policy.micro_batch_size if on_policy else load.rows,
        },
        **numbers(own),
        "budget_gib": None if limit is None else limit / GIB,
        "layouts": {name: other and numbers(other) for name, other in others.items()} or None,
        "seconds": time.perf_counter() - start,
    }
    return json.dumps(facts) if as_json else _as_text(facts, own, others, budget)


def _as_text(
    facts: dict[str, Any], own: Estimate, others: Mapping[str, Estimate | None], budget: str | None
) -> str:
    load = facts["load"]
    shared = "" if load["ranks"] == 1 else f" on each of {load['ranks']} devices"
    lines = [
        f"{facts['module']} on {facts['model_type']} of {facts['parameters'] / 1e9:.2f}B parameters, "
        f"{load['prompt_tokens']} + {load['response_tokens']} tokens, {load['rows']} "
        f"{'pairs' if load['pairs'] else 'rows'} a batch{shared}, {load['micro_batch_size']} at once; GiB at "
        "each phase's peak:",
        phase_table(own),
        NOT_COUNTED,
    ]
    if budget is not None:
        rollout = own.rollout_rows
        fits = own.peak.total <= parse_bytes(budget)
        lines.append(
            f"Largest in {budget}: {own.micro_batch_size} rows at once in training"
            + ("" if rollout is None else f", {rollout} responses at once in a rollout")
            + ("." if fits else "; the run as configured does not fit.")
        )
    if others:
        title = "With the same settings and lengths; what is tuned whole is in float32:"
        lines += ["", title, comparison_table(others, budget is not None)]
    return "\n".join([*lines, f"{facts['seconds']:.0f} s"])


def phase_table(run: Estimate) -> str:
    """The phases of a run, in GiB by kind."""
    shown = [kind for kind in KINDS if any(peak.kinds.get(kind) for peak in run.peaks.values())]
    lines = [f"{'phase':<10}{'peak':>9}" + "".join(f"{kind:>12}" for kind in shown)]
    for phase, peak in run.peaks.items():
        kinds = "".join(f"{peak.kinds[kind] / GIB:>12.2f}" for kind in shown)
        lines.append(f"{phase:<10}{peak.total / GIB:>9.2f}{kinds}")
    return "\n".join(lines)


def comparison_table(runs: Mapping[str, Estimate | None], fitted: bool) -> str:
    """Runs side by side."""
    reference = runs.get(LORA_SFT)
    head = f"{'run':<18}{'peak GiB':>9}{'x LoRA-SFT':>12}  {'in':<10}"
    lines = [head + (f"{'micro-batch':>12}{'rollout':>9}" if fitted else "")]
    for name, run in runs.items():
        if run is None:
            lines.append(f"{name:<18}{'over':>9}{'':>12}  its weights alone pass the budget")
            continue
        ratio = f"{run.peak.total / reference.peak.total:.2f}" if reference else ""
        line = f"{name:<18}{run.peak.total / GIB:>9.2f}{ratio:>12}  {run.phase:<10}"
        if fitted:
            line += f"{run.micro_batch_size:>12}{'' if run.rollout_rows is None else run.rollout_rows:>9}"
        lines.append(line)
    return "\n".join(lines)


def numbers(run: Estimate) -> dict[str, Any]:
    """The JSON object of a run, in GiB."""

    def in_gib(peak: Peak) -> dict[str, Any]:
        kinds = {kind: size / GIB for kind, size in peak.kinds.items()}
        return {"peak_gib": peak.total / GIB, "kinds_gib": kinds}

    return {
        "peak_gib": run.peak.total / GIB,
        "phases": {phase: in_gib(peak) for phase, peak in run.peaks.items()},
        "largest_micro_batch_size": run.micro_batch_size,
        "largest_rollout_batch_size": run.rollout_rows,
    }
