"""Four roles and who answers them.

A role is answered by a *(trunk, adapter, head)*; roles that name the same trunk and adapter by one forward. An
algorithm asks for roles and never learns how many trunks there are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from lightning_perl.arguments import Checked
from lightning_perl.functional.packing import plan_samples, saves_work
from lightning_perl.functional.sequences import Sequences, at_last_response, predicting
from lightning_perl.models.adapters import OFF, LoraSpec
from lightning_perl.models.heads import ScalarHead, average, has_head, load_head
from lightning_perl.models.loading import NO_BF16_TUNING, TrunkDtype, load_trunk, model_source
from lightning_perl.models.manifest import require_trunk_of
from lightning_perl.models.quantization import NO_QUANTIZED_TUNING, Quantization
from lightning_perl.models.trunk import Trunk
from lightning_perl.models.weightless import architecture

Role = Literal["policy", "value", "reference", "reward"]
TrainedRole = Literal["policy", "value"]
Layout = Literal["full", "lora", "dynamic_lora", "perl", "hydra", "joint_hydra"]


class Seat(NamedTuple):
    """Who answers a role: the number of a trunk, and one of its adapters or `OFF`."""

    trunk: int
    adapter: str = OFF


def _seated(*seats: tuple[int, str]) -> dict[Role, Seat]:
    roles: tuple[Role, ...] = get_args(Role)
    return {role: Seat(*seat) for role, seat in zip(roles, seats, strict=True)}


LAYOUTS: dict[Layout, dict[Role, Seat]] = {
    # Trunk and adapter of policy, value, reference, reward.
    # Four whole models; the first two are trained.
    "full": _seated((0, OFF), (1, OFF), (2, OFF), (3, OFF)),
    # LoRA-PPO: adapters are trained, four trunks stay.
    "lora": _seated((0, "actor"), (1, "critic"), (2, OFF), (3, OFF)),
    # The reference is the policy's trunk without its adapter, the reward the critic's.
    "dynamic_lora": _seated((0, "actor"), (1, "critic"), (0, OFF), (1, OFF)),
    # PERL on one trunk: the reward is an adapter that RewardModel trained.
    "perl": _seated((0, "actor"), (0, "critic"), (0, OFF), (0, "reward")),
    # Hydra-RLHF, Table 2: one trunk that is both SFT model and reward model.
    "hydra": _seated((0, "actor"), (0, "critic"), (0, OFF), (0, OFF)),
    # J-Hydra: one adapter for actor and critic, one pass for both.
    "joint_hydra": _seated((0, "actor"), (0, "actor"), (0, OFF), (0, OFF)),
}
REWARD_TRUNK_LAYOUTS: tuple[Layout, ...] = ("full", "lora", "dynamic_lora")
RewardEnsemble = Literal["mean", "minimum", "weight_average"]
# What several reward adapters say together, of their scores. Shape: (k, B) to (B,).
REDUCTIONS: dict[RewardEnsemble, Callable[[Tensor], Tensor]] = {
    "mean": lambda scores: scores.mean(0),
    "minimum": lambda scores: scores.amin(0),
    # Their weights were averaged when they were loaded: one adapter scores.
    "weight_average": lambda scores: scores[0],
}

Name = TypeVar("Name", bound=str)


class RoleAnswers(NamedTuple):
    """The roles' answers about some rows; None where a role was not asked.

    Attributes:
        policy: The policy's log-probabilities of the response tokens. Shape: ``(B, R)``.
        entropy: Entropies of the policy's distributions, in nats (see `Trunk.logprobs`). Shape: ``(B, R)``.
        value: The critic's values. Shape: ``(B, R)``.
        reference: The reference's log-probabilities. Shape: ``(B, R)``.
        divergence: KL(reference || policy) over the whole vocabulary, in nats. Shape: ``(B, R)``.
        reward: Score of each row, read at its last response token. Shape: ``(B,)``.
        spread: Highest less lowest score that an ensemble's rewards give each row. Shape: ``(B,)``.
    """

    policy: Tensor | None = None
    entropy: Tensor | None = None
    value: Tensor | None = None
    reference: Tensor | None = None
    divergence: Tensor | None = None
    reward: Tensor | None = None
    spread: Tensor | None = None


class Roles(Checked, nn.Module):
    """Policy, value, reference and reward on as few trunks as the layout needs.

    Args:
        layout: Key of `LAYOUTS`.
        trunk: Folder or hub name of the SFT or Hydra-SFT trunk.
        lora: Shape of the actor and critic adapters.
        reward: Where the reward model is, see `Evaluation`.
        checkpointing: Recompute activations in training passes: of all roles, or of those named.
        seed: Seed of the fresh adapters.
        ensemble: How several reward adapters, each with the head it was trained with, make one score. The
            critic starts as a copy of the first of them, or of their average; so values are scores at
            step 0 for one adapter and for ``weight_average`` only.
        learned_reward: False: there is no reward role, and the trunk needs no reward head. The value head
            then starts as a copy of the trunk's reward head where there is one, else at 0.
        critic: False: there is no value role, and nothing is kept for it.
        **loading: The other arguments of `load_trunk`.

    Attributes:
        value_head: The critic's head; absent without a critic.
        judges: Names of what answers the reward role: of reward adapters, or ``reward`` alone.
        reward_fingerprints: Fingerprints of the judges' heads as they were trained, before any average.
    """

    def __init__(
        self,
        layout: Layout,
        trunk: str,
        lora: LoraSpec,
        reward: str | list[str] | None = None,
        checkpointing: bool | Sequence[TrainedRole] = False,
        seed: int = 0,
        ensemble: RewardEnsemble = "mean",
        learned_reward: bool = True,
        critic: bool = True,
        **loading: Any,
    ) -> None:
        super().__init__()
        rewards = [reward] if isinstance(reward, str) else list(reward or [])
        _require_fitting_rewards(layout, rewards, learned_reward)
        _require_trainable(layout, lora, **loading)
        named = checkpointing if isinstance(checkpointing, Sequence) else get_args(TrainedRole)
        self.checkpointed = frozenset(named if checkpointing else ())
        self.layout: Layout = layout
        self.ensemble: RewardEnsemble = ensemble
        # Heads before trunks: a missing one is found before gigabytes are read.
        trunk = model_source(trunk)
        folders = [Path(folder).expanduser() for folder in rewards or [trunk]]
        wanted = [path for path in folders if learned_reward or has_head(path, "reward")]
        heads = [load_head(folder, "reward") for folder in wanted]
        trained = learned_reward and architecture() is None
        self.reward_fingerprints = [head.fingerprint() for head in heads if trained]
        averaged = len(heads) > 1 and ensemble == "weight_average"
        judges = learned_reward * (1 if averaged else len(heads))
        self.judges = tuple(f"reward_{n}" if n else "reward" for n in range(judges))
        self.seats = _seats(layout, self.judges, critic)
        reward_trunk = rewards[0] if layout in REWARD_TRUNK_LAYOUTS and rewards else trunk
        judged = {self.seats[name].trunk for name in (*self.judges, "value") if name in self.seats}
        loading["checkpointing"] = bool(self.checkpointed)
        trunks = [
            load_trunk(reward_trunk if number in judged else trunk, **loading)
            for number in range(1 + max(seat.trunk for seat in self.seats.values()))
        ]
        judging = trunks[max(judged, default=0)]
        _require_widths(heads, folders, judging)
        heads = [average(heads)] if averaged else heads
        self.reward_heads = nn.ModuleDict(dict(zip(self.judges, heads, strict=False)))
        if critic:
            self.value_head = _first_value_head(heads, judging.hidden_size)
        # The heads alone so far; trunks keep theirs.
        self.to(torch.promote_types(judging.dtype, torch.float32))
        self.trunks = nn.ModuleList(trunks)
        self._compare_tokenizers()
        self.requires_grad_(False)
        if critic:
            self.value_head.requires_grad_(True)
        self._place_adapters(lora, folders if rewards else [], seed)

    def _place_adapters(self, lora: LoraSpec, rewards: list[Path], seed: int) -> None:
        if self.layout == "full":
            self.trunk("policy").requires_grad_(True)
            if "value" in self.seats:
                # It never uses its LM head; weights without a gradient are not trained.
                self.trunk("value").model.base_model.requires_grad_(True)
            return
        self.trunk("policy").adapters.add("actor", lora, seed)
        if self.layout == "joint_hydra":
            return
        from_reward = bool(rewards) and self.layout == "perl"
        if from_reward:
            self._load_judges(rewards)
        elif self.layout == "perl" and self.judges:
            # The trunk's own head scores: the reward adapter is a fresh one that changes nothing.
            self.trunk("reward").adapters.add("reward", lora, seed + 1, trainable=False)
        if "value" not in self.seats:
            return
        critic = self.trunk("value").adapters
        critic.add("critic", critic.specs["reward"] if from_reward else lora, seed + 1)
        if from_reward:
            critic.copy("reward", "critic")

    def _load_judges(self, rewards: list[Path]) -> None:
        adapters = self.trunk("reward").adapters
        for folder in rewards:
            require_trunk_of(folder, self.trunk("reward"))
        if len(self.judges) < len(rewards):
            adapters.load_average("reward", rewards, trainable=False)
            return
        for judge, folder in zip(self.judges, rewards, strict=True):
            adapters.load(judge, folder, trainable=False)

    def _compare_tokenizers(self) -> None:
        vocabularies = [trunk.tokenizer.get_vocab() for trunk in self.distinct_trunks()]
        if any(vocabulary != vocabularies[0] for vocabulary in vocabularies):
            sources = [trunk.source for trunk in self.distinct_trunks()]
            raise ValueError(
                f"The trunks {sources} have different tokenizers. Policy and reward read the same ids, "
                "so train the reward model on a trunk with the policy's tokenizer."
            )

    def reward_head(self, judge: str = "reward") -> ScalarHead:
        """The frozen head of one of the `judges`."""
        return cast(ScalarHead, self.reward_heads[judge])

    def distinct_trunks(self) -> list[Trunk]:
        """Every trunk once."""
        return [trunk for trunk in self.trunks if isinstance(trunk, Trunk)]

    def trunk(self, name: str) -> Trunk:
        """The trunk that answers a role, or is a judge's."""
        return self.distinct_trunks()[self.seats[name].trunk]

    @contextmanager
    def __call__(self, name: str) -> Iterator[Trunk]:
        """``with roles("policy") as trunk:`` lets a role's (or judge's) adapter answer inside the block."""
        trunk = self.trunk(name)
        with trunk.switch.use(self.seats[name].adapter):
            yield trunk

    def training_pass(self, group: Sequence[Role]) -> AbstractContextManager[None]:
        """A pass that roles of one group are trained on, its activations kept or computed again."""
        return self.trunk(group[0]).training_pass(not self.checkpointed.isdisjoint(group))

    def groups(self, names: Iterable[Name]) -> list[tuple[Name, ...]]:
        """The asked roles, those answered by one forward together, in the order asked."""
        seated: dict[Seat, list[Name]] = {}
        for name in names:
            seated.setdefault(self.seats[name], []).append(name)
        return [tuple(group) for group in seated.values()]

    def answer(
        self,
        sequences: Sequences,
        roles: Iterable[Role],
        temperature: float = 1.0,
        entropy_gradient: bool = False,
        divergence: bool = False,
    ) -> RoleAnswers:
        """The roles' answers about these rows: one forward per distinct (trunk, adapter).

        The prompt of ``sequences.samples`` neighbouring rows is read once for all of them where that saves work
        and the trunk packs rows. A batch of fewer rows has one prompt.

        Args:
            sequences: Rows with their responses.
            roles: Who is asked. The reward is None where there is no learned one.
            temperature: Divides the logits of policy and reference, as in sampling.
            entropy_gradient: The policy's entropies have a gradient, whatever the LM head.
            divergence: Answer also the policy's ``divergence`` from the reference, which costs a forward.
        """
        asked = [name for role in roles for name in (self.judges if role == "reward" else (role,))]
        found: dict[str, Tensor] = {}
        for group in self.groups(asked):
            with self(group[0]) as trunk:
                hidden = self._hidden(trunk, sequences)
                for name in group:
                    found.update(
                        self._read(name, trunk, hidden, sequences, temperature, entropy_gradient)
                    )
            if divergence and "policy" in group:
                found["divergence"] = self._divergence(trunk, hidden, sequences, temperature)
        scores = [found.pop(judge) for judge in self.judges if judge in found]
        if scores:
            found["reward"] = REDUCTIONS[self.ensemble](torch.stack(scores))
        if len(scores) > 1:
            found["spread"] = torch.stack(scores).amax(0) - torch.stack(scores).amin(0)
        return RoleAnswers(**found)

    def _hidden(self, trunk: Trunk, sequences: Sequences) -> Tensor:
        """Last hidden states. Shape: ``(B, T, H)``."""
        ids, mask = sequences.ids, sequences.attention_mask
        samples = min(sequences.samples, len(ids))
        if samples > 1 and trunk.shortcuts.shared_prompts:
            rows, tokens = ids.shape
            packing = plan_samples(rows, tokens, sequences.prompt_tokens, samples, ids.device)
            if saves_work(packing, rows, tokens, trunk.hidden_size):
                return trunk.packed(ids, mask, packing)
        hidden: Tensor = trunk(ids, mask)
        return hidden

    def _read(
        self,
        name: str,
        trunk: Trunk,
        hidden: Tensor,
        sequences: Sequences,
        temperature: float,
        entropy_gradient: bool,
    ) -> dict[str, Tensor]:
        if name in self.judges:
            last = at_last_response(hidden, sequences.response_mask)
            return {name: self.reward_heads[name](last)}
        states = predicting(hidden, sequences.response_mask.shape[1])
        if name == "value":
            return {"value": self.value_head(states)}
        # Only an update reads entropies.
        wanted = name == "policy" and torch.is_grad_enabled()
        logprobs, entropy = trunk.logprobs(
            states, sequences.response_ids, temperature, wanted, entropy_gradient
        )
        return {name: logprobs} if entropy is None else {name: logprobs, "entropy": entropy}

    def _divergence(
        self, trunk: Trunk, hidden: Tensor, sequences: Sequences, temperature: float
    ) -> Tensor:
        with torch.no_grad(), self("reference") as reference:
            other = self._hidden(reference, sequences)
        tokens = sequences.response_mask.shape[1]
        states = predicting(hidden, tokens)
        return trunk.divergence(states, reference, predicting(other, tokens), temperature)

    def actor_parameters(self) -> list[nn.Parameter]:
        """What the policy's gradient trains (in ``joint_hydra`` the critic's too)."""
        if self.layout == "full":
            return list(self.trunk("policy").parameters())
        return self.trunk("policy").adapters.parameters("actor")

    def critic_parameters(self) -> list[nn.Parameter]:
        """What the value loss trains besides the value head; empty in ``joint_hydra`` and without a critic."""
        if self.layout == "joint_hydra" or "value" not in self.seats:
            return []
        if self.layout == "full":
            return list(self.trunk("value").model.base_model.parameters())
        return self.trunk("value").adapters.parameters("critic")

    def value_parameters(self) -> list[nn.Parameter]:
        """The value head's; empty without a critic."""
        return list(self.value_head.parameters()) if "value" in self.seats else []


def _first_value_head(heads: list[ScalarHead], hidden_size: int) -> ScalarHead:
    """A copy of the (first) reward head where there is one, else all zeros."""
    if heads:
        return copy.deepcopy(heads[0])
    head = ScalarHead(hidden_size)
    nn.init.zeros_(head.weight)
    return head


def _require_widths(heads: list[ScalarHead], folders: list[Path], trunk: Trunk) -> None:
    for head, folder in zip(heads, folders, strict=False):
        if len(head.weight) != trunk.hidden_size:
            raise ValueError(
                f"{folder}: its reward head reads {len(head.weight)} numbers per token, but the reward "
                f"trunk {trunk.source} gives {trunk.hidden_size}. Was the head trained on another model?"
            )


def _seats(layout: Layout, judges: tuple[str, ...], critic: bool) -> dict[str, Seat]:
    """The layout's seats: one per judge, none for the value without a critic; trunks numbered without gaps."""
    reward = LAYOUTS[layout]["reward"]
    seats = {str(role): seat for role, seat in LAYOUTS[layout].items() if role != "reward"}
    seats |= {
        judge: reward if number == 0 else Seat(reward.trunk, judge)
        for number, judge in enumerate(judges)
    }
    if not critic:
        del seats["value"]
    trunks = sorted({seat.trunk for seat in seats.values()})
    return {name: Seat(trunks.index(seat.trunk), seat.adapter) for name, seat in seats.items()}


def _require_trainable(
    layout: Layout,
    lora: LoraSpec,
    dtype: TrunkDtype = "float32",
    quantization: Quantization | None = None,
    **_: object,
) -> None:
    if lora.dropout > 0:
        raise ValueError(
            f"lora.dropout must be 0 in RL, got {lora.dropout}: dropout makes the first ratio "
            "differ from 1 although nothing has been learned."
        )
    if layout == "full" and dtype == "bfloat16":
        raise ValueError(NO_BF16_TUNING)
    if layout == "full" and quantization is not None:
        raise ValueError(NO_QUANTIZED_TUNING)


def _require_fitting_rewards(layout: Layout, rewards: list[str], learned: bool) -> None:
    if rewards and layout in ("hydra", "joint_hydra"):
        raise ValueError(
            f"layout {layout} takes its reward from the trunk's own head, so `reward` must stay "
            f"empty; got {', '.join(rewards)}. Use layout perl for a reward adapter, dynamic_lora for "
            "a reward trunk."
        )
    if len(rewards) > 1 and layout != "perl":
        raise ValueError(
            f"layout {layout} holds one reward model, got {len(rewards)}: {', '.join(rewards)}. Reward "
            "ensembles are adapters on one trunk: train them with RewardModel's lora and use layout perl."
        )
    if rewards and not learned:
        raise ValueError(
            f"reward is {', '.join(rewards)}, but learned_reward_weight is 0, so nobody would ask it. "
            "Leave `reward` empty, or give it a weight."
        )
