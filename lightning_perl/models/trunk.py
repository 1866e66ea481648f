"""A decoder that all roles share: hidden states, logits and log-probabilities."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.pytorch_utils import Conv1D

from lightning_perl.functional.logprobs import (
    chunked_divergence,
    chunked_logprobs,
    frozen_head_logprobs,
)
from lightning_perl.functional.packing import Packing, attention_bias, pack, plan, unpack
from lightning_perl.functional.sequences import position_ids
from lightning_perl.models.adapters import OFF, Adapters
from lightning_perl.models.lean_layers import (
    AdapterSwitch,
    make_lean,
    preallocate,
    reach_of_layers,
)
from lightning_perl.models.quantization import Quantization, quantization_of
from lightning_perl.models.shortcuts import Shortcuts, chosen
from lightning_perl.models.twin import small_twin

LOGITS_AT_ONCE = 2**24
"""Largest number of logits (positions times vocabulary) that exist at a time: 64 MiB in fp32."""
PROBE_STRIDE = 7919
LINEAR = (nn.Linear, Conv1D)
DENSE_ATTENTION = {"eager", "sdpa"}
"""Attention kernels that take a 4-D mask. Flash attention would end the process on a GPU, flex attention crash."""
REFUSALS = (ValueError, RuntimeError, TypeError, LookupError, AttributeError, AssertionError)
"""What families raise for rows, a mask or a cache that they cannot use."""
TRIED = 32
"""Most tokens of the rows that packing is tried on."""
ROUNDING = 1e-4
"""Relative difference of states in float32 that rounding explains."""


class Trunk(nn.Module):
    """A decoder (any ``AutoModelForCausalLM``), its adapters, and the switch between them.

    It runs only inside ``with trunk.switch.use(...)``, which `Roles` enters.

    Args:
        model: The decoder. Its dropout must be 0, as `load_trunk` sets it.
        tokenizer: Its tokenizer.
        checkpointing: Recompute each block's activations in backward, in training passes only.
        source: Folder or hub name of the model, for messages and manifests.
        shortcuts: See `load_trunk`.

    Attributes:
        passes: Forward passes so far.
        flops: Model FLOPs of these passes and of their backwards, see `_count` and `_count_logits`.
        templates: Name of the chat template, by the folder (or ``data``) that names it.
        sharding: How the blocks are sharded, see `sharding`; None where they are whole.
        recordable: Whether decoding steps can be recorded as a CUDA graph; None before the first rollout.
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
        if model.base_model is model:
            # Llama 4's prefix is of a part that only its model with vision has.
            model.base_model_prefix = "model"
        self.model = model
        self.tokenizer = tokenizer
        self.source = source
        self.templates: dict[str, str] = {}
        self.switch = AdapterSwitch()
        if self.shortcuts.lean_blocks:
            make_lean(model)
        # Shapes without values (see `weightless`): nothing can be compared.
        self.weightless = model.device.type == "meta"
        self.adapters = Adapters(model, self.switch, self.shortcuts.fused_adapters)
        # A list, so that nn.Module does not register them again.
        self._linear = [m for m in model.base_model.modules() if isinstance(m, LINEAR)]
        self._adapter_weights = {OFF: 0}
        self._transform = LogitTransform(model.config)
        self.sharding: str | None = None
        self._fingerprint: str | None = None
        self.recordable: bool | None = None
        if checkpointing and not model.supports_gradient_checkpointing:
            raise ValueError(
                f"{self.named}: checkpointing is set, but this family cannot compute activations again. Set it "
                "to false."
            )
        if checkpointing:
            options = {"use_reentrant": False, "context_fn": self.switch.pinned}
            if hasattr(model, "activation_checkpointing_enable"):
                model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
            else:
                # Its name in older releases of transformers 5.
                model.gradient_checkpointing_enable(options)  # type: ignore[no-untyped-call]
        model.train(False)
        self.passes = self.flops = 0
        if not self.weightless:
            self._compare_with_own_forward()
            self.passes = self.flops = 0

    @property
    def lm_head(self) -> nn.Linear:
        """Hidden states to raw logits. Its weight has the shape ``(V, H)``."""
        return cast(nn.Linear, self.model.get_output_embeddings())  # type: ignore[no-untyped-call]

    @property
    def hidden_size(self) -> int:
        """``H``."""
        return self.lm_head.weight.shape[1]

    @property
    def vocabulary_size(self) -> int:
        """``V``."""
        rows = self.lm_head.weight.shape[0]
        return rows if self._transform.words is None else min(rows, self._transform.words)

    @property
    def window(self) -> int | None:
        """Tokens of the longest row that the trunk has positions for; None if its configuration has no limit."""
        config = self._text_config()
        # GPT-2 calls it n_positions.
        key = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        return cast(int | None, config.to_dict().get(key))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a response: the tokenizer's EOS and those of the generation config."""
        also: int | list[int] | None = getattr(self.model.generation_config, "eos_token_id", None)
        ids = [self.tokenizer.eos_token_id, *(also if isinstance(also, list) else [also])]
        return tuple(sorted({number for number in ids if number is not None}))

    @property
    def pad_id(self) -> int:
        """The id in masked columns; any id that has an embedding will do."""
        pad = self.tokenizer.pad_token_id
        # A [PAD] may be added to the tokenizer without a row in the embedding.
        return int(pad) if pad is not None and pad < self.vocabulary_size else 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the trunk's own weights."""
        return self.lm_head.weight.dtype

    @property
    def quantization(self) -> Quantization | None:
        """How the linear layers are quantized; None where they are in the trunk's dtype."""
        return next((quantization_of(layer) for layer in self.adapters.quantized.values()), None)

    @property
    def named(self) -> str:
        """Source and class of the model, for messages."""
        return f"{self.source or 'The trunk'} ({type(self.model).__name__})"

    @property
    def bare(self) -> list[nn.Parameter]:
        """The trunk's own weights, without its adapters'."""
        return [weight for name, weight in self.named_parameters() if ".lora_" not in name]

    def _text_config(self) -> PreTrainedConfig:
        return self.model.config.get_text_config(decoder=True)

    def forward(self, ids: Tensor, attention_mask: Tensor, cache: Cache | None = None) -> Tensor:
        """Last hidden states, which LM head and scalar heads read. Shape: ``(B, T, H)``, in the trunk's dtype.

        Args:
            ids: Shape: ``(B, T)``, or ``(B, 1)`` for the next token if ``cache`` holds the others.
            attention_mask: True on real tokens, the cached ones included. Shape: ``(B, T_total)``.
            cache: Keys and values of earlier tokens; the new tokens' are added.
        """
        # Raises outside a role, also where there are no adapters.
        adapter = self.switch.current
        mask: Tensor | None = attention_mask.long()
        if cache is not None and ids.shape[1] == 1:
            # Mamba keeps states alone and would lay the whole mask over the one token. Padding entered no state.
            keys = any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
            mask = mask if keys else None
        hidden = self._read(ids, mask, position_ids(attention_mask)[:, -ids.shape[1] :], cache)
        self._count(ids.numel(), attention_mask.shape[1], adapter, hidden.requires_grad)
        return hidden

    def _read(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache | None = None
    ) -> Tensor:
        # Positions are always passed: without them GPT-2 with left padding is off by several nats.
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

    @cached_property
    def _flop_sizes(self) -> tuple[int, int]:
        """Weights of the linear layers, and widths of all heads of all layers."""
        # A quantized layer packs several weights into an element: its sizes say how many there are.
        weights = sum(
            m.in_features * m.out_features if isinstance(m, nn.Linear) else m.weight.numel()
            for m in self._linear
        )
        config = self._text_config()
        heads = getattr(config, "num_attention_heads", None)
        heads = heads if isinstance(heads, int) else 0
        width = vars(config).get("head_dim") or config.hidden_size // max(heads, 1)
        return weights, config.num_hidden_layers * heads * width

    def _count(self, tokens: int, keys: int, adapter: str, backward: bool) -> None:
        """Count a pass of ``N`` tokens, padding included, each attending to ``K``, and its backward with it.

        PaLM's closed form (2204.02311, App. B): forward ``2 N W + 4 N K A``, backward ``2 N (W + W_trained) +
        8 N K A``, with ``W`` weights of the linear layers, the adapter's included, and ``A`` widths of all heads.
        Recomputation is not counted, and a causal mask does not halve attention. Embeddings, norms, scalar heads,
        experts, convolutions and recurrences are left out.
        """
        self.passes += 1
        if adapter not in self._adapter_weights:
            weights = self.adapters.parameters(adapter)
            self._adapter_weights[adapter] = sum(weight.numel() for weight in weights)
        own, widths = self._flop_sizes
        low_rank, attention = self._adapter_weights[adapter], tokens * keys * widths
        self.flops += 2 * tokens * (own + low_rank) + 4 * attention
        if backward:
            trained = own if self._linear[0].weight.requires_grad else low_rank
            self.flops += 2 * tokens * (own + low_rank + trained) + 8 * attention

    def _count_logits(self, positions: int, backward: bool) -> None:
        """Count the LM head's ``2 C V H`` for ``C`` positions, again for each operand that gets a gradient."""
        weight = self.lm_head.weight
        gradients = (backward + weight.requires_grad) * torch.is_grad_enabled()
        self.flops += 2 * positions * weight.numel() * (1 + gradients)

    def packed(self, ids: Tensor, attention_mask: Tensor, packing: Packing) -> Tensor:
        """What `forward` gives for these rows; a prompt that rows share is computed once if the trunk `packs`.

        Values at padding mean nothing. Shape: ``(B, T)`` to ``(B, T, H)``.
        """
        if not self.packs(ids.shape[1]):
            separate: Tensor = self(ids, attention_mask)
            return separate
        return self._packed(ids, attention_mask, packing)

    def _packed(self, ids: Tensor, attention_mask: Tensor, packing: Packing) -> Tensor:
        adapter = self.switch.current
        lines = pack(ids, attention_mask, packing)
        bias = attention_bias(lines.group, lines.owner, self.dtype)
        hidden = self._read(lines.ids, bias, lines.position_ids)
        self._count(lines.ids.numel(), packing.columns, adapter, hidden.requires_grad)
        return unpack(hidden, packing, ids.shape[1])

    def packs(self, tokens: int) -> bool:
        """Whether a 4-D mask works for rows of up to ``tokens`` tokens, and with it packing."""
        return tokens <= self._longest_masked

    @cached_property
    def _longest_masked(self) -> float:
        """Tokens of the longest row that a 4-D mask works for.

        By structure: flash and flex attention take none, convolutions and recurrences would run from one row
        into the next, and a sliding window is replaced by the mask. By a trial on a twin: some families refuse
        such a mask (ALiBi) or read it differently. Without weights the best is assumed.
        """
        dense = self.model.config._attn_implementation in DENSE_ATTENTION
        if not dense or self.model._is_stateful:
            return 0
        reach = reach_of_layers(self.model.config)
        return reach if reach and (self.weightless or self._twin_can["pack"]) else 0

    @cached_property
    def _twin_can(self) -> dict[str, bool]:
        """Whether the family reads packed rows, rows token by token with a cache, and padded rows."""
        trials = {
            "pack": Trunk._packs_rightly,
            "cache": Trunk._caches_rightly,
            "pad": Trunk._pads_rightly,
        }
        return dict(zip(trials, self.on_twin(*trials.values()), strict=True))

    def on_twin(self, *trials: Callable[[Trunk], bool]) -> list[bool]:
        """Whether trials of the family's abilities succeed in float32, where no rounding hides what is wrong.

        On a `small_twin`, or where the family allows none on a copy of the trunk itself.
        """
        small = small_twin(self.model)
        if small is None:
            twin = copy.deepcopy(self).to("cpu", torch.float32)
        else:
            twin = Trunk(small, self.tokenizer, shortcuts=self.shortcuts)

        def succeeds(trial: Callable[[Trunk], bool]) -> bool:
            try:
                return trial(twin)
            except REFUSALS:
                return False

        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.no_grad(), twin.switch.use(OFF):
                return [succeeds(trial) for trial in trials]
        finally:
            torch.set_float32_matmul_precision(before)

    def _packs_rightly(self) -> bool:
        """Whether two rows that share half their tokens give packed what they give separately."""
        tokens = int(min(TRIED, reach_of_layers(self.model.config)))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocabulary_size, (2, tokens), generator=generator)
        ids[1, : tokens // 2] = ids[0, : tokens // 2]
        mask = torch.ones_like(ids, dtype=torch.bool)
        return nearly_equal(self._packed(ids, mask, plan([ids.tolist()])), self(ids, mask))

    def fingerprint(self) -> str:
        """A hash of some of the trunk's own weights: the same in every dtype, another one if quantized."""
        if self._fingerprint is not None:
            return self._fingerprint
        digest = hashlib.sha256()
        for key, value in sorted(self.adapters.own_weights().items()):
            digest.update(key.encode())
            sample = value.detach().flatten()[:256].to("cpu", torch.bfloat16)
            digest.update(sample.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]

    def keep_in_mind(self) -> None:
        """Find out what needs whole weights, before the blocks are sharded."""
        self._fingerprint = self.fingerprint()
        _ = self._longest_masked, self._flop_sizes

    def project(self, hidden: Tensor) -> Tensor:
        """Logits as the model's own forward gives them. Shape: ``(..., H)`` to ``(..., V)``."""
        self._count_logits(hidden.numel() // hidden.shape[-1], hidden.requires_grad)
        return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._transform(self.lm_head(hidden))

    def step(self, ids: Tensor, bias: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Logits of each row's next token, shape ``(B, V)``, from tensors alone: the step can be recorded.

        Whoever runs or replays it calls `count_step`.

        ``ids`` are each row's newest tokens and ``positions`` theirs, shape ``(B, 1)``; ``bias`` is added to
        attention scores, shape ``(B, 1, 1, K)`` for the ``K`` tokens that ``cache`` shows.
        """
        return self._logits(self._read(ids, bias, positions, cache)[:, -1])

    def count_step(self, rows: int, keys: int) -> None:
        """Count a `step` of ``rows`` rows, each attending to ``keys`` tokens."""
        self._count(rows, keys, self.switch.current, backward=False)
        self._count_logits(rows, backward=False)

    def logprobs(
        self,
        states: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
        entropy: bool = True,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of ``targets`` and, if asked for, entropies, in nats, from states that predict them.

        At most `LOGITS_AT_ONCE` logits exist at a time. Under a frozen LM head the entropies have a gradient only
        with ``entropy_gradient``, for which the logits are computed again in backward.
        Shape: ``(B, R, H)`` and ``(B, R)`` to ``(B, R)`` each, at least fp32.
        """
        trained = any(parameter.requires_grad for parameter in self.lm_head.parameters())
        again = (trained or entropy_gradient) and torch.is_grad_enabled()
        once = self.shortcuts.frozen_head and not again
        of_chunks = frozen_head_logprobs if once else chunked_logprobs
        self._count_logits(targets.numel(), states.requires_grad)
        return of_chunks(states, targets, self._logits, temperature, self._chunk_tokens, entropy)

    def divergence(
        self, states: Tensor, other: Trunk, other_states: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """KL(other || this trunk) of the distributions that states predict, in nats, at least fp32.

        Shape: ``(B, R, H)`` each to ``(B, R)``.
        """
        for trunk, hidden in ((self, states), (other, other_states)):
            trunk._count_logits(hidden[..., 0].numel(), hidden.requires_grad)
        heads = (self._logits, other._logits)
        return chunked_divergence(states, other_states, *heads, temperature, self._chunk_tokens)

    @property
    def _chunk_tokens(self) -> int:
        return max(1, LOGITS_AT_ONCE // self.vocabulary_size)

    def empty_cache(self, tokens: int) -> Cache:
        """An empty cache for rows of up to ``tokens`` tokens; sliding-window layers keep their window only."""
        cache = DynamicCache(config=self.model.config)
        preallocate(cache, tokens)
        return cache

    @cached_property
    def _cache_argument(self) -> str:
        """What the decoder calls its cache: ``cache`` since transformers 5.24, and another name before."""
        accepted = inspect.signature(self.model.base_model.forward).parameters
        return next((k for k in ("cache", "cache_params") if k in accepted), "past_key_values")

    def require_cache(self) -> None:
        """Refuse a trunk whose logits differ with a cache, or with padding.

        It would not score the distribution it samples from.
        """
        reads = {"cache": "is read token by token with a cache", "pad": "is padded"}
        failed = (
            [] if self.weightless else [r for key, r in reads.items() if not self._twin_can[key]]
        )
        if failed:
            raise ValueError(
                f"{self.named}: its logits differ when a row {' or '.join(failed)}, so it cannot "
                "be sampled from. It can be tuned by SFT, HydraSFT and RewardModel."
            )

    def _caches_rightly(self) -> bool:
        """Whether a row's last states are the same read at once and, behind a cache, token by token."""
        ids, mask = self.two_rows()
        whole, cache = self(ids, mask)[:, 6:], self.empty_cache(8)
        self(ids[:, :6], mask[:, :6], cache)
        states = [self(ids[:, [at]], mask[:, : at + 1], cache) for at in (6, 7)]
        return nearly_equal(torch.cat(states, 1), whole)

    def _pads_rightly(self) -> bool:
        """Whether a row's states are the same alone and beside a longer row, padded on both sides."""
        ids, mask = self.two_rows(TRIED)
        mask[1, -4:] = False
        real = slice(3, -4)
        return nearly_equal(self(ids, mask)[1:, real], self(ids[1:, real], mask[1:, real]))

    @contextmanager
    def training_pass(self, checkpointed: bool = True) -> Iterator[None]:
        """Train mode for adapter dropout and, if ``checkpointed``, for what recomputes activations in backward.

        Nothing else is put into train mode, where routers draw and some layers read weights past their adapters.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        for name, module in self.model.named_modules():
            recomputes = checkpointed and getattr(module, "gradient_checkpointing", False)
            module.training = bool(recomputes) or ".lora_dropout." in name
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    def probe(self, tokens: int = 16) -> Tensor:
        """A row of ids to compare two models on. Shape: ``(1, tokens)``.

        They are spread over the vocabulary: the first ids are often special tokens that nobody trained, on which
        rounding in bfloat16 alone may change every logit (SmolLM2: by 35 of 36).
        """
        ids = torch.arange(tokens, device=self.model.device).unsqueeze(0)
        return ids * PROBE_STRIDE % self.vocabulary_size

    def two_rows(self, tokens: int = 8) -> tuple[Tensor, Tensor]:
        """Ids and mask for trials, the second row padded on the left. Shape: ``(2, tokens)`` each."""
        ids = torch.arange(tokens, device=self.model.device).expand(2, -1) % self.vocabulary_size
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, :3] = False
        return ids, mask

    def _require_causal(self, first: Tensor, last: Tensor) -> None:
        """Refuse states that differ by what comes after them."""
        if (first - last).norm() > torch.finfo(self.dtype).eps ** 0.75 * first.norm():
            raise ValueError(
                f"{self.named}: its tokens see those that come after them, so it is no decoder. Give a causal "
                "language model."
            )

    def _compare_with_own_forward(self) -> None:
        ids, mask = (torch.cat([rows, rows[:1]]) for rows in self.two_rows())
        # The first row once more, with another last token, which no state before it may see.
        ids[-1, -1] = ids[0, 0]
        try:
            with self.switch.use(OFF), torch.no_grad():
                hidden = self.adapters.watch(lambda: self(ids, mask))
                ours = self.project(hidden)[mask].double()
                output = self.model(
                    input_ids=ids,
                    attention_mask=mask.long(),
                    position_ids=position_ids(mask),
                    use_cache=False,
                )
        except REFUSALS as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(
                f"{self.named}: it cannot read rows of {ids.shape[1]} tokens, one of them padded on the left "
                f"({reason}). Give a decoder of text that takes ids, a mask and positions."
            ) from error
        self._require_causal(hidden[0, :-1].float(), hidden[-1, :-1].float())
        own = output.logits[mask].double()
        if not bool(own.isfinite().all()):
            raise ValueError(
                f"{self.named}: its own logits in {self.dtype} are not finite on a row with padding on the "
                "left. Are its weights finite? Gemma 2 can do float32 and bfloat16 only: transformers masks it "
                "in fp32."
            )
        difference = float((ours - own).abs().max())
        # The same kernels compute both; only the last operation may round differently.
        allowed = 8 * torch.finfo(self.dtype).eps * max(1.0, float(own.abs().max()))
        if not difference <= allowed:
            raise ValueError(
                f"{self.named}: trunk + LM head differ from the model's own logits by {difference:.3g} (allowed "
                f"{allowed:.3g}). This family changes its logits in a way that LogitTransform does not know; "
                "add it there."
            )


def nearly_equal(states: Tensor, expected: Tensor) -> bool:
    """Whether states in float32 are equal but for the rounding of other kernels."""
    return bool((states - expected).norm() <= ROUNDING * expected.norm())


class LogitTransform:
    """What a family does to its logits after the LM head: Cohere multiplies, Granite divides, Gemma 2 caps.

    Falcon-H1 multiplies, Inkling divides, RecurrentGemma and xLSTM cap by other names; HyperCLOVA X multiplies by
    Granite's. Inkling's head has rows behind the last word, whose logits are dropped.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        text = config.get_text_config(decoder=True)

        def first(*names: str) -> float | None:
            return next((value for name in names if (value := getattr(text, name, None))), None)

        self.scale = first("logit_scale", "lm_head_multiplier") or 1.0
        self.divisor = first("logits_scaling", "logits_mup_width_multiplier") or 1.0
        self.words: int | None = getattr(text, "unpadded_vocab_size", None)
        self.cap = first("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
        if text.model_type == "hyperclovax":
            self.scale, self.divisor = self.divisor, 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        """The transformed logits, same shape."""
        logits = logits if self.words is None else logits[..., : self.words]
        logits = logits if self.scale == 1.0 else logits * self.scale
        logits = logits if self.divisor == 1.0 else logits / self.divisor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits
