"""Runs a module's own train batch of the largest size under fake tensors and records its memory.

Nothing is computed and no memory is taken: `FakeTensorMode` gives every operation's result its shape alone.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Generic, NamedTuple, TypeVar, cast
from unittest.mock import patch

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache
from transformers.integrations import moe

from lightning_perl.batches import PromptBatch, RatedBatch
from lightning_perl.commands.ledger import CUDA_BLOCK, HOST, Ledger, Peak, PhaseLedger
from lightning_perl.data.rows import RatedExample, RatedRow, collate_rated
from lightning_perl.functional import logprobs
from lightning_perl.models.sharding import decoder_blocks
from lightning_perl.models.trunk import Trunk
from lightning_perl.models.weightless import materialize
from lightning_perl.modules.actor_critic import ActorCritic
from lightning_perl.modules.base import AdapterModule
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.modules.safety import clip_by_group
from lightning_perl.modules.supervised import Supervised
from lightning_perl.optim import HostAdamW
from lightning_perl.rollouts.rollout import Rollout

BLOCK = re.compile(r"(^|\.)\d+(\.[^.]+)?$")
"""Names of decoder blocks and of their parts, such as layers.3 and layers.3.self_attn."""
Peaks = dict[str, Peak]
"""The peak of each phase."""


class Load(NamedTuple):
    """How much a train batch holds: its longest prompt and response, and its rows (a pair counts as one).

    ``accumulated``: gradients of earlier supervised batches are held already. ``ranks``: of so many devices these
    are one's rows.
    """

    prompt_tokens: int
    response_tokens: int
    rows: int
    pairs: bool = False
    accumulated: bool = False
    ranks: int = 1


AnyModule = TypeVar("AnyModule", bound=AdapterModule)


class Rehearsal(ABC, Generic[AnyModule]):
    """A module of fake tensors and its optimizer, watched by a ledger.

    The module was made inside `weightless`. With a block of `CUDA_BLOCK` (see `Ledger`) the optimizer and the
    losses run as they do on CUDA.
    """

    def __init__(self, module: AnyModule, load: Load, block: int = CUDA_BLOCK) -> None:
        window, tokens = module.window, load.prompt_tokens + load.response_tokens
        if window is not None and tokens > window:
            raise ValueError(
                f"Rows may be {tokens} tokens long ({load.prompt_tokens} of the prompt, "
                f"{load.response_tokens} of the response), but the trunk has positions for {window} only."
            )
        if isinstance(module, ActorCritic):
            module.critic_warmup = 0  # After it more is learned at once.
        self.module = module
        self.load = load
        self.trunks = [part for part in module.modules() if isinstance(part, Trunk)]
        self.ledger = Ledger(self.trunks[0].vocabulary_size, block)
        self._mode = FakeTensorMode()
        self._on_cuda = block == CUDA_BLOCK
        # Modules report their phases to their trainer's callbacks; nothing else of a trainer is needed.
        listener = PhaseLedger(self.ledger, self.before)
        module._trainer = cast(Trainer, SimpleNamespace(callbacks=[listener]))
        with self._running():
            materialize(module)
            self._mark_weights()
            self.optimizer = optimizer_of(module)
            for group in self.optimizer.param_groups:
                # As PyTorch's optimizers run on CUDA by default: one call for all parameters.
                if self._on_cuda and group.get("foreach", True) is None and not group.get("fused"):
                    group["foreach"] = True
            if isinstance(self.optimizer, HostAdamW):
                self.optimizer.host = HOST
            self._first_step()

    @abstractmethod
    def learn(self) -> None:
        """Run everything of a train batch from its first phase to its optimizer step."""

    @abstractmethod
    def sizes(self) -> dict[str, tuple[int, Callable[[int], None]]]:
        """What a budget may be spent on: names, the load's own sizes, and what to run with other sizes."""

    def before(self, phase: str) -> None:
        """Called as a phase begins."""

    def peaks(self, act: Callable[[], None] | None = None) -> Peaks:
        """The peak of each phase of what is run: by default a train batch that is not the run's first."""
        self.ledger.peaks.clear()
        with self._running():
            (act or self.learn)()
        return dict(self.ledger.peaks)

    @contextmanager
    def _running(self) -> Iterator[None]:
        kept = logprobs.CACHED
        if self._on_cuda:
            # CUDA computes a chunk's log-probabilities at once, not as many rows as fit a CPU's cache.
            logprobs.CACHED = sys.maxsize

        def grouped(_: Tensor, weight: Tensor, offs: Tensor) -> bool:
            # PyTorch knows the shapes of grouped products (experts) in bfloat16 only, transformers' own all.
            return weight.dtype == torch.bfloat16

        known = patch.object(moe, "_can_use_grouped_mm", grouped, create=True)
        try:
            with known, self._mode, self.ledger:
                yield
        except (DynamicOutputShapeException, DataDependentOutputException) as error:
            raise ValueError(
                f"estimate: {self.trunks[0].named} computes what depends on values ({error.func}), and only "
                "shapes are known here. Measure a batch with fit --dry-run."
            ) from error
        finally:
            logprobs.CACHED = kept

    def _mark_weights(self) -> None:
        for trunk in self.trunks:
            self.ledger.mark([*trunk.parameters(), *trunk.buffers()], "trunk")
            if self.module.trunk_sharding is not None:
                self._take_apart(trunk)
        frozen = {id(weight) for trunk in self.trunks for weight in trunk.bare}
        rest = (weight for weight in self.module.parameters() if id(weight) not in frozen)
        self.ledger.mark(rest, "adapters")
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._mark_gradient)  # type: ignore[no-untyped-call]

    def _take_apart(self, trunk: Trunk) -> None:
        """Count a piece of each block, none where they rest on the host; and two whole blocks.

        One of these runs, and the next is put together meanwhile.
        """
        names = decoder_blocks(trunk.model)
        own = {id(weight) for weight in trunk.bare}
        blocks = [
            [weight for weight in trunk.model.get_submodule(name).parameters() if id(weight) in own]
            for name in names
        ]
        parts = math.inf if self.module.trunk_sharding == "offload" else self.load.ranks
        whole = max(sum(weight.numel() for weight in block) for block in blocks)
        self._gathered = torch.empty(2 * whole, dtype=trunk.dtype)
        self.ledger.mark([self._gathered], "trunk")
        for block in blocks:
            self.ledger.mark(block, "trunk", parts)

    def _mark_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.ledger.mark([parameter.grad], "gradients")

    def _hold_gradients(self, groups: Iterable[dict[str, Any]]) -> None:
        for group in groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
                self._mark_gradient(parameter)

    def _first_step(self) -> None:
        """Let the optimizer make its moments, which every later train batch holds."""
        self._hold_gradients(self.optimizer.param_groups)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for state in self.optimizer.state.values():
            moments = (value for value in state.values() if isinstance(value, Tensor))
            self.ledger.mark(moments, "optimizer")


class OnPolicyRehearsal(Rehearsal[OnPolicy]):
    """Rollout, scoring and update.

    One micro-batch stands for all. Where a step has several, it finds the gradients of those before it; and
    where the critic's first pass comes before the update, the actor finds the critic's. Only the first and the
    last token of a rollout are sampled: the prompts' forward, and the most keys and values there are.
    """

    _accumulate = False

    def learn(self) -> None:
        """A rollout batch."""
        module, rows = self.module, self.load.rows
        kept = module.samples_learned
        prompts = (module.minibatch_size or rows * self.load.ranks) // kept
        minibatch = min(-(-prompts // self.load.ranks) * kept, rows)
        learned = min(module.micro_batch_size, minibatch)
        self.rollout(self._sampled_rows)
        self.update(min(module.score_batch_size, rows), learned, accumulate=learned < minibatch)

    @property
    def _sampled_rows(self) -> int:
        """Responses that are sampled at once."""
        return min(self.load.rows, self.module.sampling.batch_size or self.load.rows)

    def before(self, phase: str) -> None:
        """Hold the gradients that earlier micro-batches left, and the critic's where it comes first."""
        groups = self.optimizer.param_groups
        own = [group for group in groups if group["name"] == phase]
        if phase == "actor" and self.module.values_come_later:
            self._hold_gradients(group for group in groups if group["name"] != phase)
        if phase == "critic":
            for parameter in (weight for group in own for weight in group["params"]):
                parameter.grad = None
        if self._accumulate:
            self._hold_gradients(own)

    def sizes(self) -> dict[str, tuple[int, Callable[[int], None]]]:
        """Rows of a micro-batch, as a part of a larger step, and rows of a rollout.

        Scoring reads as many rows as learning, unless the module has a ``score_batch_size`` of its own.
        """
        micro, scored = self.module.micro_batch_size, self.module.score_batch_size

        def update(rows: int) -> None:
            self.update(rows if scored == micro else scored, rows, accumulate=True)

        sizes: dict[str, tuple[int, Callable[[int], None]]] = {"micro_batch_size": (micro, update)}
        if not self.module.rollout_engine.elsewhere:
            sizes["rollout_rows"] = (self._sampled_rows, self.rollout)
        return sizes

    def rollout(self, rows: int) -> None:
        """Sample the first token of every response, then its last; every row reads its own prompt.

        Nothing is sampled here where servers do it.
        """
        module, load, ledger = self.module, self.load, self.ledger
        if module.rollout_engine.elsewhere:
            return
        spec = replace(
            module.sampling, max_new_tokens=load.response_tokens, stop=(), batch_size=None
        )
        body = module.policy_trunk.model.base_model
        with module.phase("rollout"), _marking_cache(body, ledger):
            with suppress(_EnoughSampled), _at_second_forward(body, _stop_sampling):
                prompts = prompts_of(rows, load.prompt_tokens)
                module.collect(prompts, 0, sampling=spec, early_exit=False)
            if load.response_tokens < 2:
                return
            # The last token comes from a prompt that is longer by all tokens before it: its cache is the same.
            # The forward of that long prompt does not happen in a run.
            prompts = prompts_of(rows, load.prompt_tokens + load.response_tokens - 2)
            spec = replace(spec, max_new_tokens=2)
            with ExitStack() as unwatched, _at_second_forward(body, unwatched.close):
                unwatched.enter_context(ledger.unwatched())
                module.collect(prompts, 0, sampling=spec, early_exit=False)

    def update(self, scored_rows: int, learned_rows: int, accumulate: bool) -> None:
        """Score rows in one pass, and learn from rows in one micro-batch; ``accumulate``: not the first one."""
        module, samples = self.module, self.module.samples
        # Whole groups of responses to one prompt, of which some may be learned from.
        groups = max(-(-scored_rows // samples), -(-learned_rows // module.samples_learned))
        rollout = self._rollout(groups * samples)
        sizes: dict[str, int | None] = {"minibatch_size": None, "epochs": 1}
        sizes |= {"score_batch_size": scored_rows, "micro_batch_size": learned_rows}
        kept = {name: getattr(module, name) for name in sizes}
        vars(module).update(sizes)
        self._accumulate = accumulate
        try:
            with module.phase("score"):
                scored = module.score(rollout, by_length=False)
                if module.greedy_baseline:
                    scored = scored._replace(baseline=scored.scores)
            experience, _ = module.experience(rollout, scored)
            learned = -(-learned_rows // module.samples_learned) * module.samples_learned
            piece = experience.rows(torch.arange(learned))
            # A batch of texts has as many rows at once; their number changes no peak.
            texts = rated_of(self.load, learned_rows) if module.lm_weight else None
            module.update(piece, self.optimizer, by_length=False, texts=texts)
        finally:
            vars(module).update(kept)

    def _rollout(self, rows: int) -> Rollout:
        prompts = prompts_of(rows, self.load.prompt_tokens)
        responses = prompts_of(rows, self.load.response_tokens)
        sampled_logprobs = self.module.shortcuts.sampled_logprobs
        return Rollout(
            prompts.ids,
            prompts.mask,
            responses.ids,
            responses.mask,
            torch.ones(rows, dtype=torch.bool),
            prompts.row,
            torch.zeros_like(responses.ids, dtype=torch.float32) if sampled_logprobs else None,
            samples=self.module.samples,
        )


class SupervisedRehearsal(Rehearsal[Supervised]):
    """Forward, backward and step of one batch."""

    def learn(self) -> None:
        """A batch."""
        self.step(self.load.rows)

    def before(self, phase: str) -> None:
        """Hold the gradients that earlier batches left."""
        if self.load.accumulated and phase == "forward":
            self._hold_gradients(self.optimizer.param_groups)

    def sizes(self) -> dict[str, tuple[int, Callable[[int], None]]]:
        """Rows of the batch."""
        return {"micro_batch_size": (self.load.rows, self.step)}

    def step(self, rows: int) -> None:
        """As Lightning does it with automatic optimization, and `Supervised.optimizer_step` after it."""
        module = self.module
        batch = rated_of(self.load, rows)
        with module.phase("forward"):
            loss = self.loss(batch)
        with module.phase("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        with module.phase("optimizer"):
            clip_by_group(self.optimizer, {})
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def loss(self, batch: RatedBatch) -> Tensor:
        """The module's own objective in a training pass."""
        with self.module.trunk.training_pass():
            return self.module.objective(batch)[0]


def rehearsal_of(
    module: AdapterModule, load: Load, block: int = CUDA_BLOCK
) -> OnPolicyRehearsal | SupervisedRehearsal:
    """The rehearsal of a module that was made inside `weightless`."""
    if isinstance(module, OnPolicy):
        return OnPolicyRehearsal(module, load, block)
    if isinstance(module, Supervised):
        return SupervisedRehearsal(module, load, block)
    raise ValueError(
        f"estimate knows on-policy and supervised modules, but {type(module).__name__} is neither."
    )


def prompts_of(rows: int, tokens: int) -> PromptBatch:
    """Prompts without padding."""
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    return PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(rows))


def rated_of(load: Load, items: int) -> RatedBatch:
    """The longest rows or pairs, all to imitate and to judge; single rows have a label."""
    prompt = [0] * load.prompt_tokens
    mask = [False] * load.prompt_tokens + [True] * load.response_tokens
    rows = tuple(
        RatedRow(prompt + [word] * load.response_tokens, mask, True, None if load.pairs else 1.0, 0)
        for word in ((1, 2) if load.pairs else (1,))
    )
    return collate_rated([RatedExample(rows)] * items)


def optimizer_of(module: AdapterModule) -> Optimizer:
    """The module's own optimizer, without a trainer."""
    configured = module.configure_optimizers()
    optimizer: Optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    return optimizer


class _EnoughSampled(Exception):
    """Ends a rollout before its second forward."""


def _stop_sampling() -> None:
    raise _EnoughSampled


def _at_second_forward(body: nn.Module, act: Callable[[], None]) -> RemovableHandle:
    """Call ``act`` before the trunk's second forward from now on."""
    forwards = itertools.count(1)

    def before(*_: object) -> None:
        if next(forwards) == 2:
            act()

    return body.register_forward_pre_hook(before)


def _marking_cache(body: nn.Module, ledger: Ledger) -> ExitStack:
    """Count keys and values as the cache's, block by block, until the result is closed."""

    def mark(_: object, args: object, kwargs: dict[str, Any], output: object) -> None:
        for cache in kwargs.values():
            # Recurrent layers keep a state instead.
            for layer in cache.layers if isinstance(cache, Cache) else ():
                kept = (getattr(layer, "keys", None), getattr(layer, "values", None))
                ledger.mark((one for one in kept if isinstance(one, Tensor)), "cache")

    hooks = ExitStack()
    for name, part in body.named_modules():
        if BLOCK.search(name):
            hooks.enter_context(part.register_forward_hook(mark, with_kwargs=True))
    return hooks
