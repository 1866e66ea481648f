"""Guards a policy in training: a ceiling for its KL to the reference, and a watch over signs of reward hacking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from statistics import fmean, variance
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_perl.arguments import (
    Checked,
    CountOrZero,
    FractionAboveZero,
    Positive,
    TwoOrMore,
)
from lightning_perl.phases import only_sent
from lightning_perl.ranks import trained_by

WATCHED = ("score", "kl", "length_score_correlation", "distinct_2", "score_gap")
"""What the watch reads of every rollout, logged as ``rollout/KEY``; the last one where rewards are an ensemble."""
Measures = Mapping[str, float]


class PolicyGuard(Checked, Callback):
    """Takes a policy back that has left its reference, and says when its reward is being gamed.

    After every rollout it reads what was logged of it. Where the KL is above a ceiling, the weights and moments of
    the newest policy below it come back, all learning rates are multiplied by ``lr_factor``, and training goes on
    with the next prompts. The next time after ``max_rollbacks`` of them training ends with that policy, marked as
    unfinished.

    The watch compares the mean of the last ``window`` rollouts with that of the ``window`` before them. It warns,
    in one line, where the score has risen by more than its noise, and meanwhile its correlation with length is up
    by 0.2 and above 0.5, distinct-2 has fallen by 30%, the rewards of an ensemble are 1.5 times as far apart, or
    the rise took 5 times as much KL per score as those before.

    Every on-policy module has this guard with its default settings, unless the trainer is given one. It then warns
    (also of a KL above 1 nat per token) and changes nothing. With a ceiling or ``act_on_hacking`` a copy is kept
    in the host's memory and in checkpoints: as much again as is trained, with its moments.

    Args:
        max_kl_per_token: Ceiling of a rollout's mean KL in nats per response token. For texts 1 is far above what
            training needs; an answer of a word or two may cost more. None: no such ceiling.
        max_kl: Ceiling of the mean KL in nats per response. None: no such ceiling.
        max_rollbacks: How often the policy is taken back before training ends. 0: no policy is kept, and training
            ends the first time: for whole trunks, of which a copy is large.
        lr_factor: What a rollback multiplies learning rates by.
        window: Rollouts that the watch takes a mean of. None: no watch.
        act_on_hacking: Also take the policy back, to that of the warning, where signs of hacking are still there a
            window later.
    """

    def __init__(
        self,
        max_kl_per_token: Positive | None = None,
        max_kl: Positive | None = None,
        max_rollbacks: CountOrZero = 3,
        lr_factor: FractionAboveZero = 0.5,
        window: TwoOrMore | None = 20,
        act_on_hacking: bool = False,
    ) -> None:
        self.max_kl_per_token = max_kl_per_token
        self.max_kl = max_kl
        self.max_rollbacks = max_rollbacks
        self.lr_factor = lr_factor
        self.window = window
        self.act_on_hacking = act_on_hacking
        self.rollbacks = 0
        self.stopped_by: str | None = None
        # Rollouts since the watch has warned; None where it has not.
        self._since_warning: int | None = None
        self._history: list[dict[str, float]] = []
        self._first: dict[str, float] = {}
        self._good: dict[str, Any] | None = None
        # The policies of this batch and, where rollouts overlap, of the one before.
        self._sampled: list[dict[str, Any]] = []
        self._rates: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs to guard as this one would have."""
        return {
            "rollbacks": self.rollbacks,
            "since_warning": self._since_warning,
            "history": self._history,
            "first": self._first,
            "good": self._good,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.rollbacks = state_dict["rollbacks"]
        self._since_warning = state_dict["since_warning"]
        self._history, self._first = list(state_dict["history"]), dict(state_dict["first"])
        self._good = state_dict["good"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Come first, so that other callbacks and their checkpoints see the policy that training goes on with.

        Raises:
            MisconfigurationException: The module has no rollouts.
        """
        if getattr(pl_module, "rows", "prompts") != "prompts":
            raise MisconfigurationException(
                f"trainer.callbacks: PolicyGuard reads rollouts, and {type(pl_module).__name__} has none."
            )
        trainer.callbacks = [self, *(other for other in trainer.callbacks if other is not self)]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lower learning rates inside of steps alone: schedulers and resuming know nothing of it."""
        self.stopped_by = None
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(self._lower_rates)
            optimizer.register_step_post_hook(self._put_rates_back)

    def _lower_rates(self, optimizer: Optimizer, *_: object) -> None:
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            # Not in place: it may be a tensor.
            group["lr"] = group["lr"] * self.lr_factor**self.rollbacks

    def _put_rates_back(self, optimizer: Optimizer, *_: object) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: object) -> None:  # noqa: ANN401
        """Keep the policy that samples now: whether it is good is known after its rollout."""
        acts = self.max_kl_per_token or self.max_kl or self.act_on_hacking
        if self.max_rollbacks and acts:
            before = self._sampled[-1:] if _overlap(pl_module) else []
            self._sampled = [*before, _kept(trainer.optimizers[0])]

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,  # noqa: ANN401 (an on-policy module, which this room does not import)
        outputs: Any,  # noqa: ANN401 (as Lightning says it)
        *_: object,
    ) -> None:
        """Judge the rollout; a batch that was only sent to servers has none."""
        if only_sent(outputs):
            return
        logged = trainer.callback_metrics
        rollout = {
            key: float(logged[f"rollout/{key}"]) for key in WATCHED if f"rollout/{key}" in logged
        }
        problem = self._above_ceiling(rollout["kl"], float(logged["rollout/response_tokens"]))
        problem = problem or self._hacking(rollout)
        # Ranks act together, whatever each has logged.
        if trainer.strategy.reduce_boolean_decision(problem is not None, all=False):
            self._act(trainer, problem or "what another rank saw")
            self._sampled.clear()
            if _overlap(pl_module):
                pl_module.sample_again()
        elif isfinite(rollout["kl"]) and not (
            self.act_on_hacking and self._since_warning is not None
        ):
            known = len(self._sampled) > _overlap(pl_module)
            self._good = self._sampled[0] if known else self._good
        pl_module.log("train/rollbacks", float(self.rollbacks), on_step=True, on_epoch=False)

    def _above_ceiling(self, kl: float, tokens: float) -> str | None:
        for name, ceiling in (
            ("max_kl", self.max_kl),
            ("max_kl_per_token", self.max_kl_per_token and self.max_kl_per_token * tokens),
        ):
            if ceiling is not None and kl > ceiling:
                return f"KL of {kl:.3g} nats per response, {name} allows {ceiling:.3g}"
        if kl > tokens and self.max_kl is self.max_kl_per_token is None:
            rank_zero_warn(
                "The rollouts' KL is above 1 nat per response token: the policy no longer speaks the reference's "
                "language. Lower the learning rate or raise kl_coef (beta), and go on from an earlier checkpoint; "
                "PolicyGuard(max_kl_per_token=1) does so by itself."
            )
        return None

    def _hacking(self, rollout: dict[str, float]) -> str | None:
        """Watch; what to act on, if anything."""
        if self.window is None:
            return None
        self._history = [*self._history, rollout][-2 * self.window :]
        if len(self._history) == self.window:
            self._first = self._first or mean_of(self._history)
        if self._since_warning is not None:
            self._since_warning += 1
        if (
            len(self._history) < 2 * self.window
            or (self._since_warning or self.window) < self.window
        ):
            return None
        signs = signs_of_hacking(self._history, self._first)
        warned, self._since_warning = self._since_warning, 0 if signs else None
        if not signs:
            return None
        problem = f"signs of reward hacking in {self.window} rollouts: {'; '.join(signs)}"
        if self.act_on_hacking and warned is not None:
            return problem
        rank_zero_warn(
            f"{problem}. Read some answers (SampleWriter), raise kl_coef (beta), or stop at an earlier checkpoint."
        )
        return None

    def _act(self, trainer: Trainer, problem: str) -> None:
        """Take the policy back and go on, or end."""
        step, back = trainer.global_step, self._good is not None
        if self._good is not None:
            _put_back(self._good, trainer.optimizers[0])
        # Another policy: what was measured of the last one says nothing of it.
        self._history, self._since_warning = [], None
        outcome = f"; back to the last good policy, rollback {self.rollbacks + 1}" if back else ""
        if back and self.rollbacks < self.max_rollbacks:
            self.rollbacks += 1
            outcome += f"; learning rates times {self.lr_factor**self.rollbacks:g} from here"
        else:
            trainer.should_stop = True
            self.stopped_by = problem
            outcome += "; training ends (max_rollbacks)"
        rank_zero_warn(f"Step {step}: {problem}{outcome}.")


def _overlap(module: Any) -> int:  # noqa: ANN401 (a module with rollouts, which this room does not import)
    """How many updates old the rollouts are."""
    return int(getattr(getattr(module, "rollout_engine", None), "overlap", 0))


def mean_of(rollouts: Sequence[Measures]) -> dict[str, float]:
    """Mean of each measure that the first of the rollouts has."""
    return {key: fmean(one[key] for one in rollouts) for key in rollouts[0]}


def signs_of_hacking(rollouts: Sequence[Measures], first: Measures) -> list[str]:
    """What has run away in the second half of the rollouts while the score rose; empty where all is well.

    Args:
        rollouts: An even number of them, in their order.
        first: Means of the run's first rollouts.
    """
    half = len(rollouts) // 2
    before, now = mean_of(rollouts[:half]), mean_of(rollouts[half:])
    rise = now["score"] - before["score"]
    spread = [variance(one["score"] for one in part) for part in (rollouts[:half], rollouts[half:])]
    if not rise > 2 * (sum(spread) / half) ** 0.5:
        return []
    links = [abs(part["length_score_correlation"]) for part in (before, now)]
    signs = {
        "length_score_correlation": links[1] > max(0.5, links[0] + 0.2),
        "distinct_2": now["distinct_2"] < 0.7 * before["distinct_2"],
        "score_gap": now.get("score_gap", 0.0) > 1.5 * before.get("score_gap", 0.0),
        "kl": _dearer(rise, first, before, now),
    }
    shown = [key for key, present in signs.items() if present]
    return [
        f"{key} from {before[key]:.3g} to {now[key]:.3g}"
        for key in (["score", *shown] * bool(shown))
    ]


def _dearer(rise: float, first: Measures, before: Measures, now: Measures) -> bool:
    """Whether the score's rise took 5 times as much KL per score as its earlier ones; twice is natural."""
    earlier = before["score"] - first["score"], before["kl"] - first["kl"]
    if earlier[0] <= 0 or earlier[1] <= 0:
        return False
    return (now["kl"] - before["kl"]) / rise > 5 * earlier[1] / earlier[0]


def _kept(optimizer: Optimizer) -> dict[str, Any]:
    """Copies of all weights and of their moments, in the host's memory."""
    weights = trained_by(optimizer)
    return {
        "weights": [_copied(weight) for weight in weights],
        "moments": [
            {key: _copied(value) for key, value in optimizer.state.get(weight, {}).items()}
            for weight in weights
        ],
    }


def _copied(value: Any) -> Any:  # noqa: ANN401 (a moment, or a number of steps)
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


@torch.no_grad()
def _put_back(kept: Mapping[str, Any], optimizer: Optimizer) -> None:
    for weight, before, moments in zip(
        trained_by(optimizer), kept["weights"], kept["moments"], strict=True
    ):
        weight.copy_(before)
        if not moments:
            optimizer.state.pop(weight, None)
            continue
        state = optimizer.state[weight]
        for key, value in moments.items():
            if isinstance(value, Tensor):
                state[key].copy_(value)
            else:
                state[key] = value
