"""On-policy methods that also train a critic."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_perl.arguments import CountOrZero, NonNegative, Positive
from lightning_perl.models.heads import save_heads
from lightning_perl.models.roles import Layout, Role, RoleAnswers, TrainedRole
from lightning_perl.modules.base import Backward, Stats
from lightning_perl.modules.evaluation import given
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.modules.updating import MinibatchSize, add, size_of, weighed
from lightning_perl.ranks import shared_cuts, summed
from lightning_perl.rollouts.rollout import Experience, Rollout, Scored


class ActorCritic(OnPolicy):
    """Policy and critic learn together. Leaves fill `value_loss` besides `OnPolicy`'s holes.

    Args:
        trunk: Folder of the SFT or Hydra-SFT trunk, or a hub name.
        value_coef: Weight of the value loss; matters where actor and critic share an adapter.
        max_grad_norm: Clips the norm of the actor's gradient.
        critic_max_grad_norm: Clips the norms of the critic's and the value head's gradients. None: the actor's.
        critic_learning_rate: Learning rate of the critic. None: the optimizer's.
        head_learning_rate: Learning rate of the value head. None: the critic's.
        critic_warmup: Rollouts at the beginning from which only the critic learns (PPO-max, 2307.04964). They
            count towards ``max_episodes``.
    """

    trained_roles: ClassVar[tuple[TrainedRole, ...]] = ("policy", "value")

    def __init__(
        self,
        trunk: str,
        value_coef: NonNegative = 1.0,
        max_grad_norm: Positive = 1.0,
        critic_max_grad_norm: Positive | None = None,
        critic_learning_rate: Positive | None = None,
        head_learning_rate: Positive | None = None,
        critic_warmup: CountOrZero = 0,
        **settings: Any,
    ) -> None:
        norm = max_grad_norm if critic_max_grad_norm is None else critic_max_grad_norm
        super().__init__(trunk, max_grad_norm=max_grad_norm, **settings)
        self.value_coef = value_coef
        self.critic_warmup = critic_warmup
        self.max_grad_norms |= {"critic": norm, "head": norm}
        self.critic_learning_rate = critic_learning_rate
        self.head_learning_rate = (
            critic_learning_rate if head_learning_rate is None else head_learning_rate
        )

    def require_settings(self, layout: Layout) -> None:
        """Refuse to warm up a critic that is the actor."""
        super().require_settings(layout)
        if layout == "joint_hydra" and self.hparams.get("critic_warmup"):
            raise ValueError(
                f"critic_warmup needs a critic of its own; layout {layout} has one adapter for actor and "
                "critic. Use layout hydra, or critic_warmup: 0."
            )

    @abstractmethod
    def value_loss(
        self, values: Tensor, experience: Experience, size: MinibatchSize
    ) -> tuple[Tensor, Stats]:
        """The critic's loss on a micro-batch before ``value_coef``, and statistics; see `policy_loss`.

        Args:
            values: Values of the critic being trained. Shape: ``(B, R)``.
            experience: The micro-batch.
            size: How much the whole minibatch holds.
        """

    def role_loss(
        self, role: Role, answers: RoleAnswers, experience: Experience, size: MinibatchSize
    ) -> tuple[Tensor, Stats]:
        """Weighted loss of one trained role on a micro-batch, and its statistics."""
        if role != "value" or answers.value is None:
            return super().role_loss(role, answers, experience, size)
        loss, stats = self.value_loss(answers.value, experience, size)
        weighted = self.value_coef * loss
        return weighted, {"value_loss": loss.detach(), "loss": weighted.detach(), **stats}

    @property
    def learning_roles(self) -> tuple[TrainedRole, ...]:
        """At first the critic alone."""
        return ("value",) if self.rollout_index < self.critic_warmup else self.trained_roles

    @cached_property
    def values_come_later(self) -> bool:
        """Whether the critic's values come with its first gradient: if its pass is its own."""
        alone = ("value",) in self.roles.groups(self.trained_roles)
        return alone and self.shortcuts.shared_value_pass

    def values_of(
        self, rollout: Rollout, scored: Scored, backward: Backward = torch.Tensor.backward
    ) -> tuple[Scored, Stats | None]:
        """The critic's values, and the statistics of its first minibatch, whose gradient comes with them."""
        if not self.values_come_later:
            return scored, None
        with self.phase("critic"):
            return self.first_value_pass(rollout, scored, backward)

    def first_value_pass(
        self, rollout: Rollout, scored: Scored, backward: Backward = torch.Tensor.backward
    ) -> tuple[Scored, Stats]:
        """The critic's values, and from the same passes its gradient in the first minibatch.

        The critic has not moved since the rollout, so the first update would read the same rows with the
        same weights again. A row's value loss needs that row's returns alone.
        """
        minibatches = self._minibatches(len(rollout.row), rollout.samples, 0)
        first, *later = (rows.to(rollout.row.device) for rows in minibatches)
        values = torch.zeros_like(scored.values)
        if later:
            rest = torch.cat(later)
            values[rest] = given(self.ask(rollout.rows(rest), ["value"]).value)
        sequences = rollout.sequences().rows(first)
        size = size_of(sequences)
        sums: Stats = {}
        by_length = self.shortcuts.length_buckets
        for cut, counts in shared_cuts(sequences, self.micro_batch_size, by_length):
            rows = first[cut.rows]
            with self.roles.training_pass(("value",)):
                answers = self.roles.answer(sequences.cut(cut), ("value",))
                if counts:
                    values[rows, : cut.responses] = given(answers.value).detach()
                piece = scored._replace(values=values).rows(rows)
                experience, _ = self.experience(rollout.rows(rows), piece)
                every = torch.arange(len(rows), device=rows.device)
                micro = experience.cut(cut._replace(rows=every))
                loss, stats = self.role_loss("value", answers, micro, size)
                backward(weighed(loss, counts))
            add(sums, {key: weighed(value, counts) for key, value in stats.items()})
        values[first] = summed(values[first])
        return scored._replace(values=values), sums

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Actor, critic and value head, each with its own learning rate and clipping."""
        critic = {"params": self.roles.critic_parameters(), "lr": self.critic_learning_rate}
        head = {"params": self.roles.value_parameters(), "lr": self.head_learning_rate}
        groups = [
            *super().parameter_groups(),
            {"name": "critic", **critic},
            {"name": "head", **head},
        ]
        return [
            {key: value for key, value in group.items() if value is not None}
            for group in groups
            if group["params"]
        ]

    def hand_over(self, folder: Path) -> None:
        """Write ``RUN/adapters/{actor,critic}``, or trunks under ``RUN/{policy,critic}`` in the layout full."""
        super().hand_over(folder)
        target = folder / "adapters" / self.roles.seats["value"].adapter
        if self.roles.seats["value"] != self.roles.seats["policy"]:
            target = self.write_role("value", folder, "critic")
        save_heads(target, {"value": self.roles.value_head})
