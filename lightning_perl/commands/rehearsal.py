"""A train batch of the largest size and the longest rows, run by a module's own acts under fake tensors.

Nothing here computes or holds a number: `FakeTensorMode` gives every operation's result its shape alone.
"""

from __future__ import annotations

import itertools
import logging
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from lightning_perl.batches import PromptBatch, RatedBatch
from lightning_perl.commands.ledger import CUDA_BLOCK, HOST, Ledger, Peak, PhaseLedger
from lightning_perl.functional import logprobs
from lightning_perl.functional.packing import Packing, plan
from lightning_perl.models.trunk import Trunk
from lightning_perl.models.weightless import materialize
from lightning_perl.modules.base import AdapterModule, clip_by_group
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.modules.supervised import Supervised
from lightning_perl.optim import HostAdamW
from lightning_perl.rollouts.rollout import Rollout

BLOCK = re.compile(r"(^|\.)\d+(\.[^.]+)?$")
Peaks = Mapping[str, Peak]
"""The peak of each phase."""


class Load(NamedTuple):
    """How much a train batch holds.

    Attributes:
        prompt_tokens: Of the longest prompt.
        response_tokens: Of the longest response.
        rows: Prompts of a rollout batch, or rows of a supervised batch (a pair counts as one).
        pairs: Whether supervised rows are pairs of answers to one prompt.
        accumulated: Whether supervised batches find the gradients of batches before them.
    """

    prompt_tokens: int
    response_tokens: int
    rows: int
    pairs: bool = False
    accumulated: bool = False


AnyModule = TypeVar("AnyModule", bound=AdapterModule)


class Rehearsal(ABC, Generic[AnyModule]):
    """A module made of fake tensors, its optimizer, and the ledger that watches both.

    Args:
        module: Made inside `weightless`.
        load: What a train batch holds.
        block: See `Ledger`; `CUDA_BLOCK` also runs the optimizer as it runs on CUDA, all parameters
            at once.

    Raises:
        ValueError: The rows are longer than the trunk has positions for.
    """

    def __init__(self, module: AnyModule, load: Load, block: int = CUDA_BLOCK) -> None:
        window, tokens = module.window, load.prompt_tokens + load.response_tokens
        if window is not None and tokens > window:
            raise ValueError(
                f"Rows may be {tokens} tokens long ({load.prompt_tokens} of the prompt, "
                f"{load.response_tokens} of the response), but the trunk has positions for {window} only."
            )
        self.module = module
        self.load = load
        self.ledger = Ledger(self.trunks()[0].vocabulary_size, block)
        self._mode = FakeTensorMode()
        self._on_cuda = block == CUDA_BLOCK
        module.trainer = _quiet_trainer(PhaseLedger(self.ledger, self.before))
        with self._running():
            materialize(module)
            self._mark_weights()
            self.optimizer = optimizer_of(module)
            if self._on_cuda:
                _all_at_once(self.optimizer)
            if isinstance(self.optimizer, HostAdamW):
                self.optimizer.host = HOST
            self._first_step()

    @abstractmethod
    def learn(self) -> None:
        """Everything of a train batch from its first phase to its optimizer step."""

    def before(self, phase: str) -> None:
        """Called as a phase begins."""

    def peaks(self) -> Peaks:
        """The peak of each phase of a train batch that is not the run's first."""
        return self._peaks_of(self.learn)

    def _peaks_of(self, act: Callable[[], None]) -> Peaks:
        self.ledger.peaks.clear()
        with self._running():
            act()
        return dict(self.ledger.peaks)

    @contextmanager
    def _running(self) -> Iterator[None]:
        with self._mode, self.ledger, _whole_chunks() if self._on_cuda else nullcontext():
            yield

    def _mark_weights(self) -> None:
        for trunk in self.trunks():
            self.ledger.mark([*trunk.parameters(), *trunk.buffers()], "trunk")
        whole = {id(one) for trunk in self.trunks() for one in own_weights(trunk)}
        rest = (one for one in self.module.parameters() if id(one) not in whole)
        self.ledger.mark(rest, "adapters")
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._mark_gradient)  # type: ignore[no-untyped-call]

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def _leave_gradients(self, groups: Iterable[dict[str, Any]]) -> None:
        for group in groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
                self._mark_gradient(parameter)

    def _mark_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.ledger.mark([parameter.grad], "gradients")

    def _first_step(self) -> None:
        """Let the optimizer make its moments, which every later peak has."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for state in self.optimizer.state.values():
            moments = (value for value in state.values() if isinstance(value, Tensor))
            self.ledger.mark(moments, "optimizer")

    def trunks(self) -> list[Trunk]:
        """The module's."""
        return [one for one in self.module.modules() if isinstance(one, Trunk)]


class OnPolicyRehearsal(Rehearsal[OnPolicy]):
    """Rollout, scoring and update.

    One micro-batch stands for all. Where a step has several, it finds the gradients of those before it; and
    where the critic begins a rollout's first step, the actor finds the critic's. Of a rollout the first
    token and the last are sampled: the prompts' reading, and the most keys and values there are.
    """

    _accumulate = False

    def learn(self) -> None:
        """A rollout batch."""
        module, rows = self.module, self.load.rows
        minibatch = min(module.minibatch_size or rows, rows)
        self.rollout(rows)
        self.update(
            min(module.score_batch_size, rows),
            min(module.micro_batch_size, minibatch),
            accumulate=module.micro_batch_size < minibatch,
        )

    def before(self, phase: str) -> None:
        """Gradients that earlier micro-batches have left, or the critic where it comes first."""
        own = [group for group in self._groups() if group["name"] == phase]
        others = [group for group in self._groups() if group["name"] != phase]
        if phase == "actor" and self.module.values_come_later:
            self._leave_gradients(others)
        if phase == "critic":
            for group in own:
                for parameter in group["params"]:
                    parameter.grad = None
        if self._accumulate:
            self._leave_gradients(own)

    def rollout_peaks(self, rows: int) -> Peaks:
        """The peak of a rollout of so many prompts."""
        return self._peaks_of(lambda: self.rollout(rows))

    def update_peaks(self, micro_batch_size: int) -> Peaks:
        """The peaks of scoring and learning with so many rows at once, a part of the step's.

        Scoring reads as many, where the module was not told how many it should.
        """
        scored = self.module.score_batch_size
        if scored == self.module.micro_batch_size:
            scored = micro_batch_size
        return self._peaks_of(lambda: self.update(scored, micro_batch_size, accumulate=True))

    def rollout(self, rows: int) -> None:
        """Sample the first token of every response, then its last."""
        module, load = self.module, self.load
        spec = replace(module.sampling, max_new_tokens=load.response_tokens, stop=())
        first, last = load.prompt_tokens, load.prompt_tokens + load.response_tokens - 2
        body, ledger = module.policy_trunk.model.base_model, self.ledger
        with module.phase("rollout"), _marked_cache(body, ledger):
            with _only_the_first_read(body):
                module.collect(prompts_of(rows, first), 0, sampling=spec, early_exit=False)
            if load.response_tokens < 2:
                return
            # The last token behind a prompt that is longer by all tokens before it: the same cache.
            spec = replace(spec, max_new_tokens=2)
            with _without_the_first_read(body, ledger):
                module.collect(prompts_of(rows, last), 0, sampling=spec, early_exit=False)

    def update(self, scored_rows: int, learned_rows: int, accumulate: bool) -> None:
        """Score some rows in one pass, and learn from some in one micro-batch.

        Args:
            scored_rows: Of the scoring pass.
            learned_rows: Of the micro-batch.
            accumulate: Whether there were micro-batches before this one.
        """
        module = self.module
        rollout = self._rollout(max(scored_rows, learned_rows))
        sizes = {
            "score_batch_size": scored_rows,
            "micro_batch_size": learned_rows,
            "minibatch_size": None,
            "epochs": 1,
        }
        kept = {name: getattr(module, name) for name in sizes}
        vars(module).update(sizes)
        self._accumulate = accumulate
        try:
            with module.phase("score"):
                scored = module.score(rollout, by_length=False)
            experience, _ = module.experience(rollout, scored)
            piece = experience.rows(torch.arange(learned_rows))
            module.update(piece, self.optimizer, by_length=False)
        finally:
            vars(module).update(kept)

    def _rollout(self, rows: int) -> Rollout:
        prompts = prompts_of(rows, self.load.prompt_tokens)
        responses = prompts_of(rows, self.load.response_tokens)
        kept = self.module.shortcuts.sampled_logprobs
        return Rollout(
            prompts.ids,
            prompts.mask,
            responses.ids,
            responses.mask,
            torch.ones(rows, dtype=torch.bool),
            prompts.row,
            torch.zeros_like(responses.ids, dtype=torch.float32) if kept else None,
        )


class _SeenEnough(Exception):
    """Leaves a rollout."""


@contextmanager
def _only_the_first_read(body: nn.Module) -> Iterator[None]:
    """Leave the block as the trunk is read for the second time."""
    reads = itertools.count()

    def before(*_: object) -> None:
        if next(reads) == 1:
            raise _SeenEnough

    with removing(body.register_forward_pre_hook(before)), suppress(_SeenEnough):
        yield


@contextmanager
def _without_the_first_read(body: nn.Module, ledger: Ledger) -> Iterator[None]:
    """Keep no peak before the trunk is read for the second time."""
    reads = itertools.count()

    with ExitStack() as away:

        def before(*_: object) -> None:
            if next(reads) == 1:
                away.close()

        away.enter_context(ledger.unwatched())
        with removing(body.register_forward_pre_hook(before)):
            yield


@contextmanager
def _marked_cache(body: nn.Module, ledger: Ledger) -> Iterator[None]:
    """Call keys and values what they are, block by block."""

    def mark(_: object, args: object, kwargs: dict[str, Any], output: object) -> None:
        # By its class: transformers 5.24 renamed the argument.
        for cache in kwargs.values():
            if isinstance(cache, Cache):
                ledger.mark(_keys_and_values(cache), "cache")

    with ExitStack() as hooks:
        for name, part in body.named_modules():
            # Blocks and their attention, whatever the family calls them: layers.3, layers.3.self_attn.
            if BLOCK.search(name):
                hooks.enter_context(removing(part.register_forward_hook(mark, with_kwargs=True)))
        yield


@contextmanager
def removing(hook: RemovableHandle) -> Iterator[None]:
    """A hook for the time of the block."""
    try:
        yield
    finally:
        hook.remove()


class SupervisedRehearsal(Rehearsal[Supervised]):
    """Forward, backward and step of one batch."""

    def learn(self) -> None:
        """A batch."""
        self.step(self.load.rows)

    def before(self, phase: str) -> None:
        """Gradients that earlier batches have left."""
        if self.load.accumulated and phase == "forward":
            self._leave_gradients(self._groups())

    def step_peaks(self, rows: int) -> Peaks:
        """The peaks with another number of rows."""
        return self._peaks_of(lambda: self.step(rows))

    def step(self, rows: int) -> None:
        """As Lightning does it with automatic optimization, and `Supervised.optimizer_step` after it."""
        module = self.module
        batch = self.batch(rows)
        with module.phase("forward"):
            loss = self.loss(batch)
        with module.phase("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        with module.phase("optimizer"):
            clip_by_group(self.optimizer, {})
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def batch(self, items: int) -> RatedBatch:
        """So many of the longest rows or pairs."""
        return rated_of(self.load, items)

    def loss(self, batch: RatedBatch) -> Tensor:
        """The module's own objective in a training pass."""
        with self.module.trunk.training_pass():
            return self.module.objective(batch)[0]


def rated_of(load: Load, items: int) -> RatedBatch:
    """The longest rows, all of them imitated and judged: single ones by thumbs."""
    rows = items * (2 if load.pairs else 1)
    ids = torch.zeros(rows, load.prompt_tokens + load.response_tokens, dtype=torch.int64)
    response_mask = torch.ones_like(ids, dtype=torch.bool)
    response_mask[:, : load.prompt_tokens] = False
    imitate = torch.ones(rows, dtype=torch.bool)
    return RatedBatch(
        ids=ids,
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        response_mask=response_mask,
        prompt_tokens=load.prompt_tokens,
        imitate=imitate,
        label=torch.ones(rows),
        labelled=~imitate if load.pairs else imitate,
        pairs=torch.arange(rows if load.pairs else 0).view(-1, 2),
        row=torch.arange(rows),
        turns=torch.arange(rows),
        packing=_packing(load, items) if load.pairs else None,
    )


def _packing(load: Load, pairs: int) -> Packing:
    prompt, response = [0] * load.prompt_tokens, load.response_tokens
    return plan([[prompt + [1] * response, prompt + [2] * response]] * pairs)


def rehearsal_of(
    module: AdapterModule, load: Load, block: int = CUDA_BLOCK
) -> OnPolicyRehearsal | SupervisedRehearsal:
    """The rehearsal of a module that was made inside `weightless`.

    Raises:
        ValueError: There is none for this kind of module, or the rows are too long for the trunk.
    """
    if isinstance(module, OnPolicy):
        return OnPolicyRehearsal(module, load, block)
    if isinstance(module, Supervised):
        return SupervisedRehearsal(module, load, block)
    raise ValueError(
        f"estimate knows the acts of on-policy and supervised modules, not of {type(module).__name__}."
    )


def prompts_of(rows: int, tokens: int) -> PromptBatch:
    """Prompts without padding."""
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    return PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(rows))


def _keys_and_values(cache: Cache) -> Iterator[Tensor]:
    for layer in cache.layers:
        # Recurrent layers keep a state instead.
        for held in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(held, Tensor):
                yield held


def own_weights(trunk: Trunk) -> Iterator[Tensor]:
    """A trunk's weights without its adapters'."""
    adapters = {id(one) for name in trunk.adapters.specs for one in trunk.adapters.parameters(name)}
    return (one for one in trunk.parameters() if id(one) not in adapters)


def optimizer_of(module: AdapterModule) -> Optimizer:
    """The module's own, without a trainer."""
    made = module.configure_optimizers()
    optimizer: Optimizer = made["optimizer"] if isinstance(made, dict) else made
    return optimizer


@contextmanager
def _whole_chunks() -> Iterator[None]:
    """Log-probabilities as CUDA takes them: all of a chunk at once, not as many rows as fit a CPU's cache.

    Fake tensors are on the CPU, as everything is before a fit.
    """
    kept, logprobs.CACHED = logprobs.CACHED, sys.maxsize
    try:
        yield
    finally:
        logprobs.CACHED = kept


def _all_at_once(optimizer: Optimizer) -> None:
    """Run PyTorch's optimizers as they run on CUDA by default: one call for all parameters."""
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True


def _quiet_trainer(callback: PhaseLedger) -> Trainer:
    """A trainer that trains nothing: modules tell their phases to its callbacks."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback],
        )
    finally:
        log.setLevel(level)
