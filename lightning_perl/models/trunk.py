"""A decoder that all roles stand on: the only file that loads models.

Shapes: ``B`` rows, ``T`` tokens, ``H`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache

from lightning_perl.functional.logprobs import chunked_logprobs, frozen_head_logprobs
from lightning_perl.functional.packing import Packing, attention_bias, pack, plan, unpack
from lightning_perl.functional.sequences import position_ids
from lightning_perl.models.adapters import OFF, Adapters, AdapterSwitch
from lightning_perl.models.attention import attend_by_products
from lightning_perl.models.cache import cache_argument, only_states, preallocate
from lightning_perl.models.flops import FlopCount
from lightning_perl.models.lean_blocks import make_lean
from lightning_perl.models.quantization import (
    Quantization,
    loading_config,
    prepare,
    quantization_of,
    require_quantizable,
)
from lightning_perl.models.shortcuts import Shortcuts, chosen
from lightning_perl.models.weightless import architecture, stand_in_tokenizer

TrunkDtype = Literal["float32", "bfloat16", "float64"]
MANIFEST_FILE = "manifest.json"
LOGITS_AT_ONCE = 2**24
"""Positions times vocabulary: 64 MiB in fp32."""
FULL_LAYERS = {"full_attention", "attention"}
LOCAL_LAYERS = {"sliding_attention", "chunked_attention"}
"""Layers that look back a number of tokens only; a mask of ours replaces that."""
DENSE_ATTENTION = {"eager", "sdpa"}
"""Kernels that take a mask of ours. Flash attention would index past its rows by it, which no `except`
catches on a GPU; flex attention crashes."""
REFUSALS = (ValueError, RuntimeError, NotImplementedError, TypeError, IndexError)
"""What families say to a mask that they cannot read."""
NO_BF16_TUNING = (
    "A trunk that is tuned whole must be float32, got bfloat16: most steps of a usual learning rate are "
    "smaller than a bf16 weight can move, and would be lost. Use trunk_dtype float32, or LoRA, whose weights "
    "are fp32 over a bf16 trunk."
)


class Trunk(nn.Module):
    """Any decoder ``AutoModelForCausalLM``, its adapters, and the switch between them.

    It runs only inside ``with trunk.switch.use(...)``; `Roles` does that.

    Args:
        model: The decoder. Its dropout must be 0 (`load_trunk` sees to it).
        tokenizer: Its tokenizer.
        checkpointing: Compute each block's activations again in backward, in training passes only.
        source: Where it came from, for messages and manifests.
        shortcuts: Save work whose result is known or not needed. False: save none, for comparison.

    Raises:
        ValueError: Trunk and head together do not give the model's own logits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        checkpointing: bool = False,
        source: str = "",
        shortcuts: bool | Shortcuts = True,
    ) -> None:
        super().__init__()
        self.shortcuts = chosen(shortcuts)
        self.model = model
        self.tokenizer = tokenizer
        self.source = source
        # Who says how turns become tokens: folder (or data) to template.
        self.templates: dict[str, str] = {}
        self.switch = AdapterSwitch()
        if self.shortcuts.lean_blocks:
            make_lean(model)
        # Shapes without values (see `weightless`): nothing can be compared.
        self.weightless = model.device.type == "meta"
        # Shapes alone stand for a run on CUDA, where attention by products is never taken.
        if self.shortcuts.short_attention and not self.weightless:
            attend_by_products(model)
        self.adapters = Adapters(model, self.switch, self.shortcuts.fused_adapters)
        # Each read of the trunk is one pass; tests and benchmarks count them.
        self.passes = 0
        self.flops = FlopCount(model, self.adapters)
        self._transform = LogitTransform(model.config)
        self._packs: dict[int, bool] = {}
        # Found out by the first rollout, see `recording`.
        self.recordable: bool | None = None
        if checkpointing:
            options = {"use_reentrant": False, "context_fn": self.switch.pinned}
            if hasattr(model, "activation_checkpointing_enable"):
                model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
            else:
                # The older name, for the last transformers that runs on Python 3.10.
                model.gradient_checkpointing_enable(options)  # type: ignore[no-untyped-call]
        model.train(False)
        if not self.weightless:
            self._compare_with_own_forward()

    @property
    def lm_head(self) -> nn.Linear:
        """Hidden states to raw logits, the weight of shape ``(V, H)``."""
        head: nn.Linear = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return head

    @property
    def hidden_size(self) -> int:
        """``H``, what a head reads."""
        return self.lm_head.weight.shape[1]

    @property
    def vocabulary_size(self) -> int:
        """``V``, rows of the LM head."""
        return self.lm_head.weight.shape[0]

    @property
    def window(self) -> int | None:
        """Longest row in tokens that the trunk has positions for; None where it says nothing."""
        config = self._text_config()
        # GPT-2 writes it as n_positions.
        key = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        positions: int | None = config.to_dict().get(key)
        return positions

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a response: the tokenizer's EOS and those of the generation config."""
        ids: set[int] = set()
        for value in (self.tokenizer.eos_token_id, self._generation_eos()):
            ids.update(value if isinstance(value, list) else [value] if value is not None else [])
        return tuple(sorted(ids))

    @property
    def pad_id(self) -> int:
        """What fills masked columns; any id the embedding knows would do."""
        pad = self.tokenizer.pad_token_id
        # A [PAD] may be added to the tokenizer without a row in the embedding.
        return int(pad) if pad is not None and pad < self.vocabulary_size else 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the trunk's own weights."""
        return self.lm_head.weight.dtype

    @property
    def rounding(self) -> float:
        """Of matrix products, relative; in float32 that of TF32 where it is allowed."""
        if self.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            return 2.0**-10
        return torch.finfo(self.dtype).eps

    @property
    def quantization(self) -> Quantization | None:
        """How the linear layers are kept; None where they are in the trunk's dtype."""
        kinds = (quantization_of(module) for module in self.model.modules())
        return next((kind for kind in kinds if kind is not None), None)

    def _text_config(self) -> PreTrainedConfig:
        return self.model.config.get_text_config(decoder=True)

    def _generation_eos(self) -> int | list[int] | None:
        generation = self.model.generation_config
        if generation is None:
            return None
        eos: int | list[int] | None = generation.eos_token_id
        return eos

    def forward(self, ids: Tensor, attention_mask: Tensor, cache: Cache | None = None) -> Tensor:
        """Last hidden states, what the heads read.

        Args:
            ids: Shape: ``(B, T)``, or ``(B, 1)`` for the next token if ``cache`` holds the others.
            attention_mask: True on real tokens, the cached ones included. Shape: ``(B, T_total)``.
            cache: Keys and values so far; it grows.

        Returns:
            Shape: ``(B, T, H)``, in the trunk's dtype.
        """
        # Raises outside a role, also where there are no adapters.
        self._count(ids.numel(), attention_mask.shape[1])
        mask: Tensor | None = attention_mask.long()
        if cache is not None and ids.shape[1] == 1 and only_states(cache):
            # Mamba would lay the whole mask over the one token. Padding has entered no state.
            mask = None
        # Always passed: GPT-2 with left padding is off by several nats without.
        positions = position_ids(attention_mask)[:, -ids.shape[1] :]
        output = self.model.base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=cache is not None,
            **{self._cache_argument: cache},
        )
        # Mamba-2 gives fp32 whatever its weights are, and casts before its head.
        hidden: Tensor = output.last_hidden_state.to(self.dtype)
        return hidden

    def _count(self, tokens: int, keys: int) -> None:
        self.flops.read(tokens, keys, self.switch.current)
        self.passes += 1

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Passes inside the block are trials, and not counted."""
        passes, flops = self.passes, self.flops.total
        try:
            yield
        finally:
            self.passes, self.flops.total = passes, flops

    def packed(self, ids: Tensor, attention_mask: Tensor, packing: Packing) -> Tensor:
        """What `forward` gives for these rows, with what they share read once.

        Where that cannot be had (see `packs`), the rows are read one by one after all.

        Args:
            ids: Rows padded on the right. Shape: ``(B, T)``.
            attention_mask: Shape: ``(B, T)``, bool.
            packing: Their plan.

        Returns:
            Shape: ``(B, T, H)``, in the trunk's dtype.
        """
        if not self.packs(ids.shape[1]):
            separate: Tensor = self(ids, attention_mask)
            return separate
        return self._packed(ids, attention_mask, packing)

    def _packed(self, ids: Tensor, attention_mask: Tensor, packing: Packing) -> Tensor:
        lines = pack(ids, attention_mask, packing)
        self._count(lines.ids.numel(), packing.columns)
        output = self.model.base_model(
            input_ids=lines.ids,
            attention_mask=attention_bias(lines.owner, self.dtype),
            position_ids=lines.position_ids,
            use_cache=False,
        )
        return unpack(output.last_hidden_state, packing, ids.shape[1])

    def packs(self, tokens: int) -> bool:
        """Whether rows of up to ``tokens`` tokens may be packed: tried out, once per power of two.

        Some families refuse a mask of ours (ALiBi), read it otherwise, or attend through a sliding
        window, which it replaces; some are no transformers. Where the configuration says so, it is
        believed: in bfloat16 a window that is missed by a few tokens is less than rounding may be. Else
        two rows that share half their tokens are read both ways, at least as long as those in question.
        """
        if self.model.config._attn_implementation not in DENSE_ATTENTION:
            return False
        if tokens > self._longest_packed:
            return False
        length = 32
        while length < tokens:
            length *= 2
        if length not in self._packs:
            longest = length if self.window is None else min(length, self.window)
            shorter = length == 32 or self.packs(length // 2)
            self._packs[length] = shorter and self._packs_exactly(longest)
        return self._packs[length]

    def takes_masks(self, tokens: int) -> bool:
        """Whether a mask of ours can say who sees whom in rows of up to ``tokens`` tokens.

        `packs` tries long rows out; where nothing is packed, the configuration and a short trial will do.
        """
        return tokens <= self._longest_packed and self.packs(min(tokens, 32))

    @cached_property
    def _longest_packed(self) -> float:
        """Tokens of the longest row that may be packed, as far as the configuration says."""
        values = self._text_config().to_dict()
        # GPT-Neo has its own name for them, and counts its windows in columns.
        layers = set(values.get("layer_types") or values.get("attention_layers") or ())
        if layers - FULL_LAYERS - LOCAL_LAYERS:
            # Convolutions and recurrences run on from one row into the next.
            return 0
        if layers and layers <= FULL_LAYERS:
            return math.inf
        spans = (values.get("sliding_window"), values.get("attention_chunk_size"))
        return min((span for span in spans if span), default=math.inf)

    def _packs_exactly(self, tokens: int) -> bool:
        if self.weightless:
            # What the configuration allows.
            return True
        drawn = torch.Generator().manual_seed(0)
        rows = torch.randint(self.vocabulary_size, (2, tokens), generator=drawn)
        rows[1, : tokens // 2] = rows[0, : tokens // 2]
        packing = plan([rows.tolist()], self.model.device)
        ids = rows.to(self.model.device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        with torch.no_grad(), self.switch.use(OFF), self.uncounted():
            try:
                ours = self._packed(ids, mask, packing).double()
                own = self(ids, mask).double()
            # No memory for rows that are longer than any in question counts as well.
            except REFUSALS:
                return False
        # Rounding in other kernels; a wrong mask or position is off by tens of percent.
        allowed = torch.finfo(self.dtype).eps ** 0.5
        return bool((ours - own).norm() <= allowed * own.norm())

    def fingerprint(self) -> str:
        """A hash of some of the trunk's own weights, the same in every dtype it is loaded in.

        Quantized ones have other values, and so another hash.
        """
        digest = hashlib.sha256()
        for key, value in sorted(self.adapters.own_weights().items()):
            digest.update(key.encode())
            some = value.detach().flatten()[:256].to("cpu", torch.bfloat16)
            digest.update(some.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]

    def project(self, hidden: Tensor) -> Tensor:
        """Logits as the model's own forward gives them. Shape: ``(..., H)`` to ``(..., V)``."""
        self.flops.project(hidden, self.lm_head.weight)
        return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden)
        return self._transform(logits)

    def step(self, ids: Tensor, bias: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Logits of each row's next token, of nothing but tensors that may stay where they are.

        It is not counted: it may be recorded, and played again by somebody who calls `count_step`.

        Args:
            ids: The token that is read. Shape: ``(B, 1)``.
            bias: Added to attention scores. Shape: ``(B, 1, 1, K)``.
            positions: Of the token in its row. Shape: ``(B, 1)``.
            cache: Shows ``K`` tokens, this one included.

        Returns:
            Shape: ``(B, V)``.
        """
        output = self.model.base_model(
            input_ids=ids,
            attention_mask=bias,
            position_ids=positions,
            use_cache=True,
            **{self._cache_argument: cache},
        )
        return self._logits(output.last_hidden_state[:, -1])

    def count_step(self, rows: int, keys: int) -> None:
        """Count a `step`.

        Args:
            rows: ``B``.
            keys: Tokens that each may look at.
        """
        self.flops.step(rows, keys, self.switch.current, self.lm_head.weight)
        self.passes += 1

    def logprobs(
        self, states: Tensor, targets: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of tokens and entropies of their distributions, in nats.

        Never more than `LOGITS_AT_ONCE` logits exist. Under a frozen LM head the entropies have no
        gradient.

        Args:
            states: Hidden states that predict the targets. Shape: ``(B, R, H)``.
            targets: Shape: ``(B, R)``, int64.
            temperature: Divides the logits.

        Returns:
            Shape: ``(B, R)`` each, at least fp32.
        """
        chunk_tokens = max(1, LOGITS_AT_ONCE // self.vocabulary_size)
        trained = any(parameter.requires_grad for parameter in self.lm_head.parameters())
        once = self.shortcuts.frozen_head and not (trained and torch.is_grad_enabled())
        of_chunks = frozen_head_logprobs if once else chunked_logprobs
        return of_chunks(states, targets, self.project, temperature, chunk_tokens)

    def empty_cache(self, tokens: int) -> Cache:
        """Keys and values of nothing yet, for rows that grow up to ``tokens``.

        Sliding-window layers keep their window only, and grow as transformers has it.
        """
        cache = DynamicCache(config=self.model.config)
        if self.shortcuts.preallocated_cache:
            preallocate(cache, tokens)
        return cache

    @cached_property
    def _cache_argument(self) -> str:
        return cache_argument(self.model.base_model)

    def require_cache(self) -> None:
        """Read two rows with and without a cache, and compare.

        Raises:
            ValueError: The family does not keep what it reads the way other families of transformers do,
                so that sampled tokens would be those of another distribution.
        """
        if self.weightless:
            return
        ids, mask = self._two_rows()
        with torch.no_grad(), self.switch.use(OFF), self.uncounted():
            whole = self.project(self(ids, mask)[:, -1])
            cache = self.empty_cache(8)
            self(ids[:, :6], mask[:, :6], cache)
            self(ids[:, 6:7], mask[:, :7], cache)
            cached = self.project(self(ids[:, 7:], mask, cache)[:, -1])
        # Other kernels for one token than for many, and recurrences that round a lot.
        if not near(cached, whole, self.rounding, 0.4):
            raise ValueError(
                f"{self.source or 'The model'} ({type(self.model).__name__}): its logits are others when "
                "a row is read token by token behind a cache, so it cannot be sampled from here. It can be "
                "tuned by SFT, HydraSFT and RewardModel."
            )

    @contextmanager
    def training_pass(self, checkpointed: bool = True) -> Iterator[None]:
        """Train mode inside the block, which is where transformers checkpoints activations.

        Args:
            checkpointed: False: keep them in this pass, though the trunk was loaded for checkpointing.
        """
        was_training = self.model.training
        self.model.train(checkpointed)
        try:
            yield
        finally:
            self.model.train(was_training)

    def _two_rows(self) -> tuple[Tensor, Tensor]:
        """Ids of 8 tokens and their mask, the second row padded on the left."""
        ids = torch.arange(8, device=self.model.device).expand(2, 8) % self.vocabulary_size
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, :3] = False
        return ids, mask

    def _compare_with_own_forward(self) -> None:
        ids, mask = self._two_rows()
        with torch.no_grad(), self.switch.use(OFF), self.uncounted():
            ours = self.project(self(ids, mask))[mask].double()
            own = self.model(
                input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask)
            ).logits[mask]
        own = own.double()
        if not bool(own.isfinite().all()):
            raise ValueError(
                f"{self.source or 'The model'} ({type(self.model).__name__}): its own logits in "
                f"{self.dtype} are not finite on a row with padding on the left. Are its weights "
                "finite? Gemma 2 can do float32 and bfloat16 only: transformers masks it in fp32."
            )
        difference = float((ours - own).abs().max())
        # Two roads through the same kernels: only rounding of the last operation may differ.
        allowed = 8 * torch.finfo(self.dtype).eps * max(1.0, float(own.abs().max()))
        if not difference <= allowed:
            raise ValueError(
                f"{self.source or 'The model'} ({type(self.model).__name__}): trunk + LM head differ "
                f"from the model's own logits by {difference:.3g} (allowed {allowed:.3g}). This family "
                "changes its logits in a way that LogitTransform does not know; add it there."
            )

    def agree_on_template(self, template: str, said_by: str) -> None:
        """Note how turns become tokens, for the manifests; all who say it must say the same.

        Args:
            template: Name of the rendering, for example ``plain-1``.
            said_by: A folder whose manifest names it, or ``data``.

        Raises:
            ValueError: Somebody said another one before.
        """
        for other, said in self.templates.items():
            if said != template:
                raise ValueError(
                    f"{said_by} has the template {template!r}, {other} has {said!r}: the model would "
                    "read turns written as it never saw them. Set data.chat_template as it was there "
                    "(false for plain-1, true for chat-..., with that tokenizer), or train that stage "
                    'again with this one. To change templates on purpose, take "template" out of the '
                    f"folder's {MANIFEST_FILE}."
                )
        self.templates[said_by] = template

    @property
    def named_template(self) -> dict[str, str]:
        """What a manifest says of the template; empty where nobody said."""
        return {"template": next(iter(self.templates.values()))} if self.templates else {}

    @property
    def named_quantization(self) -> dict[str, str]:
        """What a manifest says of the quantization that was trained on; empty where there is none."""
        return {"quantization": self.quantization} if self.quantization else {}

    def save(self, folder: Path, adapter: str | None, manifest: dict[str, Any]) -> None:
        """Write a transformers folder with tokenizer and manifest, ``adapter`` merged into it.

        Merging happens once, here, in full precision; the model itself is not changed. A quantized trunk
        is written dense, as a folder that loads anywhere: the adapter is merged into the values that it
        was trained on, not into those of before (see `Adapters.merged`).
        """
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.adapters.merged(adapter)
        self._plain_model().save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)
        dtypes = {str(value.dtype).removeprefix("torch.") for value in weights.values()}
        about = {
            "kind": "trunk",
            "from": self.source,
            "dtype": sorted(dtypes),
            "pad_id": self.pad_id,
            "stop_ids": list(self.stop_ids),
            **self.named_template,
            **self.named_quantization,
            **manifest,
        }
        (folder / MANIFEST_FILE).write_text(json.dumps(about, indent=2) + "\n")

    def _plain_model(self) -> PreTrainedModel:
        """The model, or where it is quantized one of its shapes that is not, without any weights."""
        if self.quantization is None:
            return self.model
        config = copy.deepcopy(self.model.config)
        del config.quantization_config
        with torch.device("meta"):
            plain: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=self.dtype
            )
        plain.generation_config = self.model.generation_config
        return plain


def near(some: Tensor, other: Tensor, rounding: float, power: float) -> bool:
    """Whether logits are the same but for rounding.

    A constant that all logits of a position share changes no distribution, and may be as large as to hide
    what does (GPT-2's are near -100): it is taken off, and only its own rounding allowed.

    Args:
        some: Shape: ``(..., V)``.
        other: Shape: ``(..., V)``.
        rounding: `Trunk.rounding`.
        power: Of it, what the difference may be relative to the rest.
    """
    some, other = some.double(), other.double()
    spread = other - other.mean(-1, keepdim=True)
    off = some - other
    off = off - off.mean(-1, keepdim=True)
    return bool(off.norm() <= rounding**power * spread.norm() + rounding / 2 * other.norm())


class LogitTransform:
    """What a family does to its logits after the LM head.

    Cohere multiplies by ``logit_scale``, Granite divides by ``logits_scaling``, Gemma 2 caps.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        values = config.get_text_config(decoder=True).to_dict()
        self.scale: float = values.get("logit_scale") or 1.0
        self.divisor: float = values.get("logits_scaling") or 1.0
        self.cap: float | None = values.get("final_logit_softcapping")

    def __call__(self, logits: Tensor) -> Tensor:
        """Shape kept."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


def model_source(source: str) -> str:
    """What transformers should be asked for: an existing folder's path, or a hub name.

    Raises:
        FileNotFoundError: A path that is no model folder.
    """
    if architecture() is not None:
        # The folder may not exist yet; it is not read.
        return source
    path = Path(source).expanduser()
    # A hub name is OWNER/NAME; where OWNER is a folder here, a path was meant.
    looks_like_path = (
        source.startswith((".", "/", "~")) or source.count("/") != 1 or path.parent.is_dir()
    )
    if looks_like_path and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"trunk: {source} is no model folder (no config.json there). Give the folder that an "
            "earlier stage wrote (RUN/trunk), a transformers folder, or a hub name like Qwen/Qwen2-0.5B."
        )
    return str(path) if path.exists() else source


def without_dropout(config: PreTrainedConfig) -> None:
    """Set every dropout probability of a configuration, and of those inside it, to 0."""
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            without_dropout(value)
        elif isinstance(value, float) and "drop" in key:
            setattr(config, key, 0.0)


def load_trunk(
    source: str,
    dtype: TrunkDtype = "float32",
    checkpointing: bool = False,
    attention: str | None = None,
    quantization: Quantization | None = None,
    shortcuts: bool | Shortcuts = True,
) -> Trunk:
    """A trunk from a transformers folder or a hub name, every dropout 0.

    Dropout is switched off by its probabilities, not by eval mode: transformers checkpoints
    activations in train mode only, and train mode would turn GPT-2's and OPT's dropout back on.

    Args:
        source: Folder or hub name of a decoder with an LM head.
        dtype: Of the trunk's weights and matrix products.
        checkpointing: Recompute activations in training passes.
        attention: transformers' ``attn_implementation``; None leaves it to transformers.
        quantization: Keep the linear layers in 4 bits (nf4, double quantization) or 8 bits (int8), by
            bitsandbytes; LM head and embeddings stay in ``dtype``. It is done here, on the CPU. None: all
            in ``dtype``.
        shortcuts: Save work whose result is known or not needed. False: save none, for comparison.

    Raises:
        ValueError: fp16, an unknown dtype or quantization, or weights that are stored quantized.
        ImportError: bitsandbytes is asked for and not installed.
        FileNotFoundError: A path that is no model folder.
    """
    if dtype == "float16":  # type: ignore[comparison-overlap]  # YAML can say it all the same
        raise ValueError(
            "trunk_dtype float16 is refused: RL ratios over- and underflow in fp16 and adapters turn "
            "to NaN within a few updates. Use bfloat16 (same memory) or float32."
        )
    if dtype not in ("float32", "bfloat16", "float64"):
        raise ValueError(f"trunk_dtype must be float32, bfloat16 or float64, got {dtype!r}.")
    if quantization is not None:
        require_quantizable(quantization, dtype)
    shapes = architecture()
    if shapes is not None:
        if quantization is not None:
            raise ValueError(
                f"quantization {quantization}: a trunk of shapes alone cannot be quantized. Leave it out, and "
                "take the saved bytes of the linear layers off what is found for the trunk."
            )
        without_dropout(shapes)
        bare = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            shapes, dtype=getattr(torch, dtype), attn_implementation=attention
        )
        return Trunk(bare, stand_in_tokenizer(shapes), checkpointing, source, shortcuts)
    where = model_source(source)
    try:
        config = AutoConfig.from_pretrained(where)
    except OSError as error:
        raise FileNotFoundError(
            f"trunk: {source} is no folder here, and no hub name that could be read "
            f"({str(error).splitlines()[0]})."
        ) from error
    _require_dense(source, config)
    without_dropout(config)
    model = _load_model(where, config, getattr(torch, dtype), attention, quantization)
    tokenizer = AutoTokenizer.from_pretrained(where)
    trunk = Trunk(model, tokenizer, checkpointing, source, shortcuts)
    _note_template(Path(where), trunk)
    return trunk


def _load_model(
    where: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attention: str | None,
    quantization: Quantization | None,
) -> PreTrainedModel:
    if quantization is None:
        dense: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            where, config=config, dtype=dtype, attn_implementation=attention
        )
        return dense
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        where,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        quantization_config=loading_config(quantization, dtype),
        # Else transformers takes the GPU where there is one; here the trainer moves things.
        device_map={"": "cpu"},
    )
    if prepare(model, dtype) == 0:
        raise ValueError(
            f"trunk: transformers found nothing to quantize in {where} ({type(model).__name__}): its linear "
            "layers are of a class of their own. Leave `quantization` out."
        )
    return model


def _require_dense(source: str, config: PreTrainedConfig) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"trunk: {source} is stored quantized (quantization_config in its config.json). Its layers have "
            "other products than those that adapters are tested on here. Give the folder or hub name of the "
            "full-precision weights, and set quantization: nf4 or int8."
        )


def _note_template(folder: Path, trunk: Trunk) -> None:
    path = folder / MANIFEST_FILE
    template = json.loads(path.read_text()).get("template") if path.is_file() else None
    if template is not None:
        trunk.agree_on_template(template, str(folder))


def write_adapter_manifest(folder: Path, trunk: Trunk) -> None:
    """Say beside an adapter which trunk it was trained on."""
    about = {
        "kind": "adapter",
        "trunk": trunk.source,
        "trunk_fingerprint": trunk.fingerprint(),
        "stop_ids": list(trunk.stop_ids),
        **trunk.named_template,
        **trunk.named_quantization,
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(about, indent=2) + "\n")


def require_trunk_of(folder: Path, trunk: Trunk) -> None:
    """Refuse an adapter that its manifest says was trained on other weights.

    Raises:
        ValueError: The fingerprints differ, or the tokens that end a response or the templates do.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file() or trunk.weightless:
        return
    about = json.loads(path.read_text())
    if "trunk_fingerprint" in about:
        _require_same_quantization(path, about.get("quantization"), trunk)
    mine = {"trunk_fingerprint": trunk.fingerprint(), "stop_ids": list(trunk.stop_ids)}
    for key, value in mine.items():
        if about.get(key, value) != value:
            raise ValueError(
                f"{folder} was trained on another trunk ({about.get('trunk')}): its {key} is "
                f"{about[key]}, that of {trunk.source} is {value}. Give the trunk that `RewardModel` was "
                "trained on, or train the reward model again on this one."
            )
    _note_template(folder, trunk)


def _require_same_quantization(manifest: Path, trained: str | None, trunk: Trunk) -> None:
    if trained != trunk.quantization:
        raise ValueError(
            f"{manifest.parent} was trained on a trunk with quantization {trained}, {trunk.source} is loaded "
            f"with {trunk.quantization}: other values under the adapter, other scores. Set quantization as "
            f"it was there, or train it again. To use it all the same, take trunk_fingerprint out of {manifest}."
        )
