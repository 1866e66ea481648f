"""LoRA adapters on a trunk, and the switch between them: the only file that imports PEFT.

PEFT builds the layers and defines the file format. Its ``set_adapter`` and ``disable_adapter`` are not used:
they set ``requires_grad`` of the other adapters to False, so that a second role's gradient is lost without an
error. Here the layers ask one `AdapterSwitch` which adapter to apply, and no flag or mode changes with the role.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_perl.arguments import Count, FractionBelowOne, Positive, Text, require_allowed
from lightning_perl.models.lean_layers import OFF as OFF
from lightning_perl.models.lean_layers import AdapterSwitch, adapted_linear
from lightning_perl.models.quantization import dense, quantization_of, stored_transposed
from lightning_perl.models.weightless import architecture
from lightning_perl.whole import read_json, read_tensors

if TYPE_CHECKING:  # PEFT takes a second to import, which --help need not wait for
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

ATTENTION = "attention"
"""Target that stands for every linear layer of the blocks' attention, whatever the family calls it."""
PEFT_PREFIX = "base_model.model."
"""What PEFT puts before a module's name in an adapter file."""
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
NOT_PLAIN = {
    "use_dora": "DoRA's norms of whole weights leave the fused layers nothing to fuse",
    "init_lora_weights": "PiSSA, OLoRA and LoftQ change the trunk's weights, and with them the reference",
    "rank_pattern": "one rank holds for all layers",
    "alpha_pattern": "one alpha holds for all layers",
    "alora_invocation_tokens": "an adapter holds for all tokens",
}
"""PEFT's settings that change what an adapter computes but no tensor's name, and why they are refused."""
NUMBER = re.compile(r"\b\d+\b")
"""The number of a block or an expert in a layer's name."""
PLAIN_STARTS = (True, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the trunk's weights alone."""


@dataclass(frozen=True)
class LoraSpec:
    """A low-rank adapter (2106.09685): ``W x + alpha / rank * B A x``.

    DoRA, PiSSA, OLoRA and LoftQ are not offered (see `NOT_PLAIN`).

    Args:
        rank: Inner size of the adapter. Hydra-RLHF uses 128, PERL 1 to 16.
        alpha: Scale of the adapter. The size of its steps is proportional to
            ``learning_rate * alpha / rank``; DeepSpeed-Chat's learning rates assume ``alpha = 1``.
        targets: Names of the linear layers that get an adapter, matched against the end of the
            module's name; ``attention`` stands for all linear layers of the attention, whatever
            the family calls them. Empty: every linear layer inside the decoder's blocks, except those
            that PEFT has no LoRA for, or on which none could learn (the log names them).
        dropout: Dropout probability on the adapter's input, in supervised training only. RL refuses it,
            since the first ratio must be exactly 1.
        rslora: Scale the adapter by ``alpha / sqrt(rank)`` (rsLoRA, 2312.03732), so that a high rank learns
            as fast as a low one. PEFT's files and servers call it ``use_rslora``.
    """

    rank: Count = 16
    alpha: Positive = 16.0
    targets: tuple[Text, ...] = ()
    dropout: FractionBelowOne = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        """What ``B A x`` is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def __post_init__(self) -> None:
        """Refuse what cannot mean anything; a list, as YAML gives it, becomes a tuple, which can be hashed."""
        require_allowed(type(self), vars(self))
        object.__setattr__(self, "targets", tuple(self.targets))


def _weights(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    return cast(Tensor, layer.lora_A[adapter].weight), cast(Tensor, layer.lora_B[adapter].weight)


class Adapters:
    """The LoRA adapters of one trunk.

    Args:
        model: The bare model. It is changed in place, and adding an adapter freezes its own weights.
        switch: Says which adapter applies.
        fused: See `adapted_linear`.
    """

    def __init__(self, model: nn.Module, switch: AdapterSwitch, fused: bool = True) -> None:
        self.model = model
        self.fused = fused
        self.switch = switch
        self.specs: dict[str, LoraSpec] = {}
        # Found on the bare model: later PEFT's own layers would match too.
        self.quantized = {n: layer for n, layer in model.named_modules() if quantization_of(layer)}
        every = linear_layers_in_blocks(model)
        self._linear_names = _kept_by_peft(model, every)
        self._lost = [name for name in every if name not in self._linear_names]
        self._idle: list[str] = []
        self._transposed = any(stored_transposed(module) for module in model.modules())

    @cached_property
    def _every(self) -> list[str]:
        """Ends of the names of all layers that get an adapter where no targets are named."""
        names = [name for name in self._linear_names if not _weight_read_directly(self.model, name)]
        return _taken_by_peft(self.model, shortest_ends(self.model, names))

    def watch(self, run: Callable[[], Tensor]) -> Tensor:
        """What ``run``, a pass of the bare model, gives. Layers on which no adapter could learn get none.

        A router's weight may be read past its layer, and an indexer that only picks runs without gradients. Layers
        whose names differ in numbers alone are judged together, since few tokens reach few of the experts.
        """
        learning: set[str] = set()

        def note(kind: str, *_: object) -> None:
            if torch.is_grad_enabled():
                learning.add(kind)

        kinds = {name: NUMBER.sub("#", name) for name in self._linear_names}
        modules = dict(self.model.named_modules())
        hooks = [modules[n].register_forward_hook(partial(note, kinds[n])) for n in kinds]
        try:
            with torch.enable_grad():
                result = run()
        finally:
            for hook in hooks:
                hook.remove()
        self._idle = [name for name in kinds if kinds[name] not in learning]
        self._linear_names = [name for name in kinds if kinds[name] in learning]
        return result.detach()

    def add(self, name: str, spec: LoraSpec, seed: int, trainable: bool = True) -> None:
        """Add a fresh adapter, which changes nothing yet: ``A`` is drawn from ``seed``, ``B`` is zero.

        Its weights are at least fp32, whatever the trunk's dtype.
        """
        from peft import inject_adapter_in_model

        targets = self._resolve(spec.targets)
        if not spec.targets and not self.specs:
            self._name_what_is_left_out()
        others = [weight for other in self.specs for weight in self.parameters(other)]
        trained = {id(weight) for weight in others if weight.requires_grad}
        with warnings.catch_warnings():
            # Several adapters on one trunk is what this class is for.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(self._config(spec, targets), self.model, name)
        self.specs[name] = spec
        self._initialise(name, seed)
        if trainable:
            trained |= {id(weight) for weight in self.parameters(name)}
        # PEFT decides anew what is trainable when an adapter is added; here it is set once.
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    def _config(self, spec: LoraSpec, targets: list[str], **about: Any) -> LoraConfig:
        from peft import LoraConfig

        return LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,  # type: ignore[arg-type]  # PEFT divides it, any number will do
            lora_dropout=spec.dropout,
            use_rslora=spec.rslora,
            target_modules=targets,
            fan_in_fan_out=self._transposed,
            **about,
        )

    def _initialise(self, name: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _, layer in self.layers():
            cast(Any, layer).forward = partial(adapted_linear, layer, self.switch, self.fused)
            if name not in layer.lora_A:
                continue
            down, up = _weights(layer, name)
            base = cast(Tensor, layer.get_base_layer().weight)
            dtype = torch.promote_types(base.dtype, torch.float32)
            drawn = torch.empty(down.shape)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            down.data = drawn.to(down.device, dtype)
            up.data = torch.zeros_like(up, dtype=dtype)

    def _name_what_is_left_out(self) -> None:
        names = [*self._linear_names, *self._lost, *self._idle]
        left = {n.rsplit(".", 1)[-1] for n in names if not set(_ends(n)) & set(self._every)}
        if left:
            rank_zero_info(
                f"LoRA on all linear layers leaves out {', '.join(sorted(left))} of some blocks: PEFT has no "
                "plain LoRA for them in this family, or they are not called with a gradient."
            )

    def _resolve(self, targets: tuple[str, ...]) -> list[str]:
        """Ends of layer names for PEFT; without targets, those of every linear layer."""
        if not targets:
            return self._every
        ends = {target: self._ends_of(target) for target in targets}
        unmatched = [target for target in targets if not ends[target]]
        if unmatched:
            raise ValueError(
                f"lora.targets: {unmatched} matches no linear layer of this trunk; "
                f"its decoder blocks have {self._every}."
            )
        return [end for target in ends for end in ends[target]]

    def _ends_of(self, target: str) -> list[str]:
        """The ends of layer names that a target stands for; none where it matches no layer."""
        if target != ATTENTION:
            # A stored adapter may have layers that no text passes, such as those of a vision tower.
            known = (*self._linear_names, *self._idle)
            return [target] if any(target in _ends(name) for name in known) else []
        # The last two parts of the name: GPT-2's mlp.c_proj is no attention.
        ends = {
            ".".join(name.rsplit(".", 2)[-2:])
            for name in self._linear_names
            if any("attn" in part or "attention" in part for part in name.split(".")[:-1])
        }
        return sorted(ends)

    def layers(self) -> Iterator[tuple[str, LoraLayer]]:
        """Name and layer of every linear layer that carries adapters."""
        from peft.tuners.lora import LoraLayer

        named = self.model.named_modules()
        return ((name, module) for name, module in named if isinstance(module, LoraLayer))

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's weights under the keys of PEFT's files, without its prefix."""
        tensors: dict[str, nn.Parameter] = {}
        for layer_name, layer in self.layers():
            if name in layer.lora_A:
                for key, weight in zip("AB", _weights(layer, name), strict=True):
                    tensors[f"{layer_name}.lora_{key}.weight"] = cast(nn.Parameter, weight)
        return tensors

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The adapter's weights."""
        return list(self.tensors(name).values())

    def fingerprint(self, name: str) -> str:
        """A hash of the adapter's values."""
        digest = hashlib.sha256()
        for weight in self.parameters(name):
            digest.update(weight.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def copy(self, source: str, target: str) -> None:
        """Overwrite the weights of ``target`` with the values of ``source``, whose layers are the same."""
        with torch.no_grad():
            for values, parameter in zip(
                self.parameters(source), self.parameters(target), strict=True
            ):
                parameter.copy_(values)

    def kept(self, name: str) -> dict[str, Tensor]:
        """A copy of the adapter's weights on the CPU, under the keys of `tensors`."""
        return {
            key: weight.detach().to("cpu", copy=True) for key, weight in self.tensors(name).items()
        }

    def equal(self, name: str, weights: Mapping[str, Tensor]) -> bool:
        """Whether the adapter has these weights."""
        tensors = self.tensors(name).items()
        return all(torch.equal(weight.cpu(), weights[key]) for key, weight in tensors)

    @contextmanager
    def holding(self, name: str, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The adapter with other weights inside of the block, and with its own again after it."""
        own, tensors = self.kept(name), self.tensors(name)

        @torch.no_grad()
        def give(values: Mapping[str, Tensor]) -> None:
            for key, weight in tensors.items():
                weight.copy_(values[key])

        try:
            give(weights)
            yield
        finally:
            give(own)

    def save(self, name: str, folder: Path, base: str) -> None:
        """Write a plain PEFT folder whose ``base_model_name_or_path`` is ``base``."""
        folder.mkdir(parents=True, exist_ok=True)
        spec = self.specs[name]
        about = {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": True}
        config = self._config(spec, self._resolve(spec.targets), **about)
        config.save_pretrained(str(folder))
        tensors = {
            PEFT_PREFIX + key: parameter.detach().cpu().contiguous()
            for key, parameter in self.tensors(name).items()
        }
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def load(self, name: str, folder: Path, seed: int = 0, trainable: bool = True) -> None:
        """Add an adapter from a PEFT folder; one that is none or does not fit this trunk is refused."""
        self.add(name, self._spec_of(folder), seed, trainable)
        _read(folder, self.tensors(name))

    def load_average(
        self, name: str, folders: Sequence[Path], seed: int = 0, trainable: bool = True
    ) -> None:
        """Add one adapter that is the exact mean of the adapters of several PEFT folders (see `mixture`)."""
        self.add(name, mixed_spec([self._spec_of(folder) for folder in folders]), seed, trainable)
        if architecture() is None:
            tensors, count = self.tensors(name), len(folders)
            dtype = next(iter(tensors.values())).dtype
            source = f"The mean of {' and '.join(map(str, folders))}"
            _fill(tensors, mixture(folders, [1 / count] * count, dtype), source)

    def _spec_of(self, folder: Path) -> LoraSpec:
        """Rank, scale and targets of a stored adapter that fits this trunk."""
        spec = stored_spec(folder)
        try:
            self._resolve(spec.targets)
        except ValueError as error:
            raise ValueError(
                f"{folder} does not fit this trunk. Was it trained on another model? {error}"
            ) from error
        return spec

    def own_weights(self) -> dict[str, Tensor]:
        """The model's weights as stored, under their bare names; codes where they are quantized."""
        quantized = tuple(f"{name}." for name in self.quantized)
        bare = {
            key.replace(".base_layer.", "."): value
            for key, value in self.model.state_dict().items()
            if ".lora_" not in key
        }
        # A quantized layer's scales and code tables are left out.
        kept = (".weight", ".bias")
        return {k: v for k, v in bare.items() if k.endswith(kept) or not k.startswith(quantized)}

    def merged(self, name: str | None) -> dict[str, Tensor]:
        """The model's weights under their bare names, with adapter ``name``, if any, added in at least fp32.

        Quantized weights are made dense, so that the sum is what was trained; merged into the weights before
        quantization it would be another model.
        """
        deltas = {
            f"{layer_name}.weight": cast(Any, layer).get_delta_weight(name)
            for layer_name, layer in self.layers()
            if name is not None and name in layer.lora_A
        }
        weights = {}
        for bare, stored in self.own_weights().items():
            quantized = self.quantized.get(bare.removesuffix(".weight"))
            value = dense(quantized) if quantized else stored
            if bare in deltas:
                value = value.to(torch.promote_types(value.dtype, deltas[bare].dtype))
                value = value + deltas[bare]
            turned = quantized is not None and stored_transposed(quantized)
            weights[bare] = value.T.contiguous() if turned else value
        return weights


def stored_spec(folder: Path) -> LoraSpec:
    """Rank, scale and targets of an adapter in a PEFT folder; one that is none is refused."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no adapter folder: it has no adapter_config.json. Give the folder that "
            "a run wrote, for example RUN/adapters/reward."
        )
    config = read_json(path)
    settings = {key: config[key] for key in NOT_PLAIN if config.get(key)}
    if settings.get("init_lora_weights") in PLAIN_STARTS:
        del settings["init_lora_weights"]
    reasons = [f"{key} is {value!r}, but {NOT_PLAIN[key]}" for key, value in settings.items()]
    if config.get("peft_type") != "LORA":
        reasons.append(f"peft_type is {config.get('peft_type')!r}")
    if reasons:
        raise ValueError(f"{path}: only plain LoRA adapters can be loaded: {'; '.join(reasons)}.")
    if isinstance(config.get("target_modules"), str):
        raise ValueError(
            f"{path}: target_modules is the pattern {config['target_modules']!r}; write it "
            "as a list of layer names, as this library's own adapters have it."
        )
    try:
        # PEFT keeps the targets as a set and writes it in any order.
        targets = tuple(sorted(config["target_modules"]))
        return LoraSpec(
            config["r"], config["lora_alpha"], targets, rslora=bool(config.get("use_rslora"))
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not say what r, lora_alpha and target_modules are ({type(error).__name__}: {error}). "
            "Copy the folder again."
        ) from error


def trunk_of(folder: Path) -> str:
    """The trunk that a PEFT folder names as its base; empty where it names none."""
    return str(read_json(folder / CONFIG_FILE).get("base_model_name_or_path") or "")


def name_trunk(folder: Path, trunk: str) -> None:
    """Let a PEFT folder name this trunk as its base."""
    path = folder / CONFIG_FILE
    config = read_json(path) | {"base_model_name_or_path": trunk}
    path.write_text(json.dumps(config, indent=2) + "\n")


def mixed_spec(specs: Sequence[LoraSpec]) -> LoraSpec:
    """The shape of a `mixture`: the ranks added up, scale 1, on every layer that one of them has."""
    rank = sum(spec.rank for spec in specs)
    return LoraSpec(rank, float(rank), tuple(sorted({t for spec in specs for t in spec.targets})))


def mixture(
    folders: Sequence[Path], weights: Sequence[float], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The exact weighted sum of stored adapters as one adapter: its tensors under PEFT's keys.

    The product of summed ``B`` and summed ``A`` is no sum of the ``w_i s_i B_i A_i``, ``s_i`` being the scales.
    So they are concatenated, ``[w_1 s_1 B_1, ..., w_k s_k B_k] [A_1; ...; A_k]``, zeros standing for a layer that
    an adapter lacks.

    Args:
        folders: PEFT folders.
        weights: A weight for each.
        dtype: Dtype of the tensors. None: as stored, at least float32.
    """
    specs = [stored_spec(folder) for folder in folders]
    rank = mixed_spec(specs).rank
    mixed: dict[str, Tensor] = {}
    start = 0
    for folder, spec, weight in zip(folders, specs, weights, strict=True):
        for key, stored in read_tensors(folder / WEIGHTS_FILE).items():
            part = {"lora_A.weight": 0, "lora_B.weight": 1}.get(key[-len("lora_A.weight") :])
            shape = list(stored.shape)
            if part is None or len(shape) != 2 or shape[part] != spec.rank:
                raise ValueError(f"{folder}: {key} of shape {shape} is no matrix of plain LoRA.")
            shape[part] = rank
            kept = dtype or torch.promote_types(stored.dtype, torch.float32)
            whole = mixed.setdefault(key, torch.zeros(shape, dtype=kept))
            if list(whole.shape) != shape:
                raise ValueError(
                    f"{folder}: {key} has the shape {list(stored.shape)}, which does not fit {folders[0]}. Only "
                    "adapters of one trunk can be mixed."
                )
            block = whole.narrow(part, start, spec.rank).copy_(stored)
            block.mul_(weight * spec.scale if part else 1.0)
        start += spec.rank
    return mixed


def _read(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copy an adapter folder's weights into tensors with the same keys and shapes."""
    if architecture() is None:
        _fill(tensors, read_tensors(folder / WEIGHTS_FILE), str(folder))


def _fill(tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor], source: str) -> None:
    """Copy stored weights into tensors with the same keys and shapes; others are refused."""
    wanted = {PEFT_PREFIX + key: tensor for key, tensor in tensors.items()}
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    misshapen = [
        f"{key} {tuple(stored[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in stored and stored[key].shape != tensor.shape
    ]
    if missing or extra or misshapen:
        raise ValueError(
            f"{source} does not fit this trunk: {len(missing)} tensors missing ({missing[:3]}), {len(extra)} "
            f"unknown ({extra[:3]}), {len(misshapen)} of another shape ({misshapen[:1]}). Was it trained on "
            "another model?"
        )
    if broken := [key for key in wanted if not bool(stored[key].isfinite().all())]:
        raise ValueError(f"{source} has weights that are not finite, the first in {broken[0]}.")
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(stored[key])


def shortest_ends(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The shortest ends of these modules' names that are no other module's: mostly their last parts."""
    wanted = set(names)
    others = {end for name, _ in model.named_modules() if name not in wanted for end in _ends(name)}
    return sorted(
        {next((end for end in _ends(name) if end not in others), name) for name in wanted}
    )


def _ends(name: str) -> list[str]:
    """``c``, ``b.c``, ``a.b.c`` of ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def _weight_read_directly(model: nn.Module, name: str) -> bool:
    """Whether Mamba or AltUp read a layer's weight past its adapter, without calling it, at least in training."""
    parent, _, last = name.rpartition(".")
    mixer, parts = model.get_submodule(parent), ("A_log", "conv1d", "in_proj")
    past = last in ("x_proj", "dt_proj", "out_proj")
    return last == "correction_coefs" or (past and all(hasattr(mixer, part) for part in parts))


def _taken_by_peft(model: nn.Module, ends: list[str]) -> list[str]:
    """Those of the names that PEFT puts plain LoRA on.

    Where a family has experts, PEFT takes ``gate_proj`` for the experts' weights, though linear layers of a
    shared expert or of a dense block have that name too.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    taken = []
    for end in ends:
        try:
            LoraModel._check_target_module_compatiblity(
                cast(Any, None), LoraConfig(), cast(Any, model), end.rsplit(".", 1)[-1]
            )
        except ValueError:
            continue
        taken.append(end)
    config = LoraConfig(target_modules=taken)
    convert_peft_config_for_transformers(config, model, None)
    return sorted(set(taken) & set(config.target_modules or ()))


def _kept_by_peft(model: nn.Module, names: list[str]) -> list[str]:
    """Those of the layers whose adapters PEFT finds again in a file.

    It renames the keys of families whose layers once had other names, and may rename those of today as well.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers,
    )

    keys = {name: f"{PEFT_PREFIX}{name}.lora_A.weight" for name in names}
    stored = dict.fromkeys(keys.values(), torch.zeros(1, 1, device="cpu"))
    found = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), stored, "default")
    return [name for name, key in keys.items() if key in found]


def linear_layers_in_blocks(model: nn.Module) -> list[str]:
    """Names of the linear layers in decoder blocks: those with a number, as in ``model.layers.3.mlp.up_proj``.

    Without routers of experts that give several tensors (Llama 4, PhiMoE), and DeepSeek-V4's products in groups.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and any(part.isdigit() for part in name.split("."))
        and not any(word in type(module).__name__ for word in ("Router", "Grouped"))
    ]
