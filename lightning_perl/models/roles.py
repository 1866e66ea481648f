"""Four roles and who answers them.

A role is answered by a *(trunk, adapter, head)*. An algorithm asks for roles and never learns how
many trunks there are; roles that name the same trunk and adapter are answered by one forward.

Shapes: ``B`` rows, ``R`` response tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_perl.functional.logprobs import chunked_logprobs
from lightning_perl.functional.sequences import Sequences, at_last_response, predicting
from lightning_perl.models.adapters import OFF, LoraSpec
from lightning_perl.models.heads import load_head
from lightning_perl.models.trunk import (
    NO_BF16_TUNING,
    Trunk,
    TrunkDtype,
    load_trunk,
    model_source,
    require_trunk_of,
)

Role = Literal["policy", "value", "reference", "reward"]
Layout = Literal["full", "lora", "dynamic_lora", "perl", "hydra", "joint_hydra"]


class Seat(NamedTuple):
    """Who answers a role.

    Attributes:
        trunk: Number of the trunk.
        adapter: Its adapter, or `OFF`.
    """

    trunk: int
    adapter: str = OFF


LAYOUTS: dict[Layout, dict[Role, Seat]] = {
    # Four whole models; the first two are trained.
    "full": {"policy": Seat(0), "value": Seat(1), "reference": Seat(2), "reward": Seat(3)},
    # LoRA-PPO: adapters are trained, four trunks stay.
    "lora": {
        "policy": Seat(0, "actor"),
        "value": Seat(1, "critic"),
        "reference": Seat(2),
        "reward": Seat(3),
    },
    # The reference is the policy's trunk without its adapter, the reward the critic's.
    "dynamic_lora": {
        "policy": Seat(0, "actor"),
        "value": Seat(1, "critic"),
        "reference": Seat(0),
        "reward": Seat(1),
    },
    # PERL on one trunk: the reward is an adapter that RewardModel trained.
    "perl": {
        "policy": Seat(0, "actor"),
        "value": Seat(0, "critic"),
        "reference": Seat(0),
        "reward": Seat(0, "reward"),
    },
    # Hydra-RLHF, Table 2: one trunk that is both SFT model and reward model.
    "hydra": {
        "policy": Seat(0, "actor"),
        "value": Seat(0, "critic"),
        "reference": Seat(0),
        "reward": Seat(0),
    },
    # J-Hydra: one adapter for actor and critic, one pass for both.
    "joint_hydra": {
        "policy": Seat(0, "actor"),
        "value": Seat(0, "actor"),
        "reference": Seat(0),
        "reward": Seat(0),
    },
}
REWARD_TRUNK_LAYOUTS: tuple[Layout, ...] = ("full", "lora", "dynamic_lora")


class Answers(NamedTuple):
    """What roles said about some rows; None where a role was not asked.

    Attributes:
        policy: Log-probabilities of the response tokens. Shape: ``(B, R)``.
        entropy: Of the policy's distributions, nats. Shape: ``(B, R)``.
        value: Shape: ``(B, R)``.
        reference: Log-probabilities. Shape: ``(B, R)``.
        reward: Score of each row, read at its last response token. Shape: ``(B,)``.
    """

    policy: Tensor | None = None
    entropy: Tensor | None = None
    value: Tensor | None = None
    reference: Tensor | None = None
    reward: Tensor | None = None


class Roles(nn.Module):
    """Policy, value, reference and reward on as few trunks as the layout needs.

    Args:
        layout: Row of `LAYOUTS`.
        trunk: Folder or hub name of the SFT or Hydra-SFT trunk.
        lora: The adapters' shape.
        reward: Where the reward model is. None: the trunk's own reward head. For ``perl`` an
            adapter folder of `RewardModel`; for ``full``, ``lora`` and ``dynamic_lora`` a trunk folder.
        dtype: Of the trunks.
        checkpointing: Recompute activations in training passes.
        seed: Of the fresh adapters.

    Raises:
        ValueError: The layout is unknown, or there is no reward head where it needs one.
    """

    def __init__(
        self,
        layout: Layout,
        trunk: str,
        lora: LoraSpec,
        reward: str | None = None,
        dtype: TrunkDtype = "float32",
        checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {list(get_args(Layout))}, got {layout!r}.")
        if reward is not None and layout in ("hydra", "joint_hydra"):
            raise ValueError(
                f"layout {layout} takes its reward from the trunk's own head, so `reward` must stay "
                f"empty; got {reward}. Use layout perl for a reward adapter, dynamic_lora for a reward "
                "trunk."
            )
        if lora.dropout > 0:
            raise ValueError(
                f"lora.dropout must be 0 in RL, got {lora.dropout}: dropout makes the first ratio "
                "differ from 1 although nothing has been learned."
            )
        self.layout: Layout = layout
        self.seats = LAYOUTS[layout]
        # Heads before trunks: a missing one is found before gigabytes are read.
        trunk = model_source(trunk)
        reward_folder = Path(reward or trunk).expanduser()
        if layout == "full" and dtype == "bfloat16":
            raise ValueError(NO_BF16_TUNING)
        self.reward_head = load_head(reward_folder, "reward").requires_grad_(False)
        self.value_head = load_head(reward_folder, "reward")
        reward_trunks = {self.seats["value"].trunk, self.seats["reward"].trunk}
        reward_trunk = reward if layout in REWARD_TRUNK_LAYOUTS and reward else trunk
        self.trunks = nn.ModuleList(
            load_trunk(reward_trunk if number in reward_trunks else trunk, dtype, checkpointing)
            for number in range(1 + max(seat.trunk for seat in self.seats.values()))
        )
        head_dtype = torch.promote_types(self.trunk("policy").dtype, torch.float32)
        self.reward_head.to(head_dtype)
        self.value_head.to(head_dtype)
        self._compare_tokenizers()
        self._compare_head_size(reward_folder)
        self.requires_grad_(False)
        self.value_head.requires_grad_(True)
        self._place_adapters(lora, reward, seed)

    def _place_adapters(self, lora: LoraSpec, reward: str | None, seed: int) -> None:
        if self.layout == "full":
            self.trunk("policy").requires_grad_(True)
            # The value role never uses its LM head; weights without a gradient are not trained.
            self.trunk("value").model.base_model.requires_grad_(True)
            return
        self.trunk("policy").adapters.add("actor", lora, seed)
        if self.layout == "joint_hydra":
            return
        critic = self.trunk("value").adapters
        if self.layout != "perl":
            critic.add("critic", lora, seed + 1)
        elif reward is None:
            # The trunk's own head scores: the reward adapter is a fresh one that changes nothing.
            critic.add("reward", lora, seed + 1, trainable=False)
            critic.add("critic", lora, seed + 1)
        else:
            folder = Path(reward).expanduser()
            require_trunk_of(folder, self.trunk("reward"))
            critic.load("reward", folder, trainable=False)
            critic.add("critic", critic.specs["reward"], seed + 1)
            critic.copy("reward", "critic")

    def _compare_tokenizers(self) -> None:
        vocabularies = [trunk.tokenizer.get_vocab() for trunk in self.distinct_trunks()]
        if any(vocabulary != vocabularies[0] for vocabulary in vocabularies):
            sources = [trunk.source for trunk in self.distinct_trunks()]
            raise ValueError(
                f"The trunks {sources} have different tokenizers. Policy and reward read the same ids, "
                "so train the reward model on a trunk with the policy's tokenizer."
            )

    def _compare_head_size(self, folder: Path) -> None:
        reads, gives = len(self.reward_head.weight), self.trunk("reward").hidden_size
        if reads != gives:
            raise ValueError(
                f"{folder}: its reward head reads {reads} numbers per token, but the reward trunk "
                f"{self.trunk('reward').source} gives {gives}. Was the head trained on another "
                "model?"
            )

    def distinct_trunks(self) -> list[Trunk]:
        """Every trunk once."""
        return [trunk for trunk in self.trunks if isinstance(trunk, Trunk)]

    def trunk(self, role: Role) -> Trunk:
        """The trunk that answers ``role``."""
        return self.distinct_trunks()[self.seats[role].trunk]

    @contextmanager
    def __call__(self, role: Role) -> Iterator[Trunk]:
        """``with roles("policy") as trunk:`` lets ``role``'s adapter answer inside the block."""
        trunk = self.trunk(role)
        with trunk.switch.use(self.seats[role].adapter):
            yield trunk

    def groups(self, roles: Iterable[Role]) -> list[tuple[Role, ...]]:
        """The asked roles, those answered by one forward together, in the order asked."""
        seated: dict[Seat, list[Role]] = {}
        for role in roles:
            seated.setdefault(self.seats[role], []).append(role)
        return [tuple(group) for group in seated.values()]

    def answer(
        self, sequences: Sequences, roles: Iterable[Role], temperature: float = 1.0
    ) -> Answers:
        """What the roles say of these rows: one forward per distinct (trunk, adapter).

        Args:
            sequences: Rows with their responses.
            roles: Who is asked.
            temperature: Divides the logits of policy and reference, as in sampling.
        """
        found: dict[str, Tensor] = {}
        for group in self.groups(roles):
            with self(group[0]) as trunk:
                hidden = trunk(sequences.ids, sequences.attention_mask)
                for role in group:
                    found.update(self._read(role, trunk, hidden, sequences, temperature))
        return Answers(**found)

    def _read(
        self, role: Role, trunk: Trunk, hidden: Tensor, sequences: Sequences, temperature: float
    ) -> dict[str, Tensor]:
        if role == "reward":
            last = at_last_response(hidden, sequences.response_mask)
            return {"reward": self.reward_head(last)}
        states = predicting(hidden, sequences.response_mask.shape[1])
        if role == "value":
            return {"value": self.value_head(states)}
        logprobs, entropy = chunked_logprobs(
            states, sequences.response_ids, trunk.project, temperature
        )
        return {role: logprobs, "entropy": entropy} if role == "policy" else {role: logprobs}

    def actor_parameters(self) -> list[nn.Parameter]:
        """What the policy's gradient trains (in ``joint_hydra`` the critic's too)."""
        if self.layout == "full":
            return list(self.trunk("policy").parameters())
        return self.trunk("policy").adapters.parameters("actor")

    def critic_parameters(self) -> list[nn.Parameter]:
        """What the value loss trains besides the value head; empty in ``joint_hydra``."""
        if self.layout == "full":
            return list(self.trunk("value").model.base_model.parameters())
        if self.layout == "joint_hydra":
            return []
        return self.trunk("value").adapters.parameters("critic")
