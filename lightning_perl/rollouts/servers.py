"""Rollouts on vLLM servers: an adapter of megabytes is pushed to them, and every push is proven.

Shapes: ``B`` responses, ``R`` response tokens.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Literal, TypeVar, cast
from uuid import uuid4

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_perl.arguments import AtLeastOne, Checked, Count, Positive, Text
from lightning_perl.batches import PromptBatch
from lightning_perl.functional.logprobs import k3
from lightning_perl.functional.masked import masked_mean
from lightning_perl.functional.sequences import pad_right, predicting
from lightning_perl.models.adapters import OFF
from lightning_perl.models.trunk import Trunk
from lightning_perl.ranks import everyones, share
from lightning_perl.rollouts.rollout import Rollout, Scored
from lightning_perl.rollouts.sampling import Asked, Phase, RolloutEngine, row_seeds, untold
from lightning_perl.rollouts.server import TRUNK, Answer, Json, LostError, Server
from lightning_perl.whole import whole_folder

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Mean difference of log-probabilities, in nats, that rounding explains between two programs; see `_rounding`."""
PROBE = 32
"""Tokens of the row that every push is proven on."""
LEAVE = 5.0
"""Seconds that responses under way may take where nobody wants them any more."""


class VllmServers(Checked, RolloutEngine):
    """Samples on vLLM servers that were started beside the run, see docs/servers.md.

    Before a rollout the policy's adapter is written as a PEFT folder, loaded by every server under a name of its
    own, and proven: log-probabilities of a fixed row under that name and under the trunk's must be ours. A server
    that does not answer loses its responses to the others, and is asked again at the next push.

    Args:
        urls: Addresses of the servers, such as ``http://localhost:8000``.
        folder: Where adapters are written; every server reads them under the same path. None: a temporary folder,
            for servers on this machine.
        importance_clip: Largest weight of a sampled token in the gradient: its probability here over that there.
        overlap: 1: servers sample the next rollout with the policy as it is before an update, while the trainer
            learns from the last one; so rollouts are one update old. 0: from the policy as it is.
        at_once: Responses of one rollout that a rank asks one server for at the same time.
        timeout: Seconds after which a server that has not answered counts as lost.
    """

    elsewhere = True

    def __init__(
        self,
        urls: list[Text],
        folder: str | None = None,
        importance_clip: AtLeastOne = 2.0,
        overlap: Literal[0, 1] = 0,
        at_once: Count = 64,
        timeout: Positive = 600.0,
    ) -> None:
        if not urls:
            raise ValueError("VllmServers.urls must name at least one server, got [].")
        self.urls, self.timeout, self.at_once = urls, timeout, at_once
        self.importance_clip, self.overlap = importance_clip, overlap
        self._given = folder
        self._temporary: TemporaryDirectory[str] | None = None
        self._servers: list[Server] = []
        # What rounding explains, and less than which no move of an adapter is looked for.
        self._longest, self._tolerance, self._least = 0, 0.0, 0.0
        self._run, self._version = uuid4().hex[:8], 0
        # The adapter and its weights that the newest name stands for; and all names that are loaded.
        self._served: tuple[str, str] | None = None
        self._names: list[str] = []
        # Our log-probabilities of the probe, by name.
        self._ours: dict[str, list[float]] = {}
        # A server's of the name that it was last proven to serve, by its address.
        self._proven: dict[str, dict[str, list[float]]] = {}
        # What is being sampled, and what is set once nobody waits for it any more.
        self._running: list[Future[tuple[list[Answer], list[int]]]] = []
        self._closing = Event()

    def require_served(self, trained_trunk: bool, quantization: str | None) -> None:
        """Servers sample from the trunk's own weights and an adapter."""
        if trained_trunk or quantization:
            problem = (
                f"quantization is {quantization}"
                if quantization
                else "layout full trains the trunk"
            )
            raise ValueError(
                f"rollout_engine: {problem}, and servers sample from the trunk's own weights and an adapter: "
                "another model. Leave rollout_engine out, or train an adapter on a trunk that is not quantized."
            )

    def begin(self, trunk: Trunk, longest: int) -> None:
        """Every server must serve this trunk for rows of this length; at first all must answer."""
        self._longest = max(self._longest, longest)
        (self._run, *_) = everyones(self._run)
        self._servers = self._servers or [Server(url, self.timeout) for url in self.urls]
        first = self._served is None
        checks = partial(self._each, lambda server: server.check(trunk, self._longest), first)
        _agreed(checks)

    # ---- push ------------------------------------------------------------------------------------

    def _publish(self, trunk: Trunk, adapter: str, phase: Phase) -> str:
        """The name under which all servers that answer have the adapter as it is now."""
        version = (adapter, "" if adapter == OFF else trunk.adapters.fingerprint(adapter))
        if self._served and (adapter == OFF or version == self._served):
            return TRUNK if adapter == OFF else self._names[-1]
        self._version += 1
        name = TRUNK if adapter == OFF else f"{adapter}-{self._run}-{self._version}"
        with phase("wait"):  # The version before is unloaded then, and may still be sampled from.
            wait(self._running)
        probe = trunk.probe(min(PROBE, self._servers[0].window - 1))[0].tolist()
        self._tolerance = self._tolerance or _rounding(trunk, probe)
        self._least = TOLERANCES[trunk.dtype] / 10
        before = {known: self._ours[known] for known in self._names}
        self._ours = before | {TRUNK: _logprobs(trunk, OFF, probe)}
        self._ours[name] = _logprobs(trunk, adapter, probe)
        # The first rank pushes, and all of them know how it went.
        _agreed(lambda: self._push(trunk, adapter, name, probe) if _first() else None)
        lost = everyones([server.lost for server in self._servers])[0]
        for server, reason in zip(self._servers, lost, strict=True):
            server.lost = reason
        self._served = version
        if name != TRUNK:
            self._names.append(name)
            self._forget(1)
        return name

    def _push(self, trunk: Trunk, adapter: str, name: str, probe: list[int]) -> None:
        """Write the adapter, let every server load it, and prove that each serves it."""
        folder = self._folder() / name
        if name != TRUNK:
            with whole_folder(folder) as part:
                trunk.adapters.save(adapter, part, trunk.source)

        def load(server: Server) -> None:
            if server.lost:
                server.check(trunk, self._longest)
            if name != TRUNK:
                told = {"lora_name": name, "lora_path": str(folder)}
                server.tell("/v1/load_lora_adapter", told)
            self._prove(server, name, probe)

        self._each(load, all_must=self._version == 1)

    def _prove(self, server: Server, name: str, probe: list[int]) -> None:
        """Compare what a server says of the probe, under the trunk's name and the adapter's, with ours.

        Raises:
            RuntimeError: It serves something else.
        """
        tolerance = self._tolerance
        theirs = {model: server.score(model, probe) for model in (TRUNK, name)}
        for model, said in theirs.items():
            gap = _gap(said, self._ours[model])
            if not gap <= tolerance:
                gaps = {key: _gap(said, ours) for key, ours in self._ours.items()}
                like = [key for key in sorted(gaps, key=gaps.__getitem__) if gaps[key] <= tolerance]
                raise RuntimeError(
                    f"{server.url} serves something else as {model}: log-probabilities of the probe differ from "
                    f"ours by {gap:.2g} nats a token, and rounding explains {tolerance:.1g}. They are those of "
                    f"{like[0] if like else 'no model of this run'}. Nothing was sampled."
                )
        # What an update moves may be less than rounding; the same numbers to the last bit are the same model's.
        for other, said in ({TRUNK: theirs[TRUNK]} | self._proven.get(server.url, {})).items():
            moved = _gap(self._ours[name], self._ours.get(other, self._ours[name]))
            if moved > self._least and theirs[name] == said:
                raise RuntimeError(
                    f"{server.url} serves something else as {name}: its log-probabilities are those of {other}, "
                    f"from which the adapter is {moved:.2g} nats a token away. Nothing was sampled."
                )
        self._proven[server.url] = {name: theirs[name]}

    def _folder(self) -> Path:
        """Where adapters are written. Other users can read a temporary one; a given one keeps its mode."""
        if self._given is not None:
            home = Path(self._given).expanduser()
            home.mkdir(parents=True, exist_ok=True)
            return home.resolve()
        if self._temporary is None:
            # It goes with the process.
            self._temporary = TemporaryDirectory(prefix="lightning_perl_served_")
            Path(self._temporary.name).chmod(0o755)
        return Path(self._temporary.name).resolve()

    def _forget(self, kept: int) -> None:
        """Unload all names but the newest, and remove their folders, which nobody reads any more."""
        while len(self._names) > kept:
            name = self._names.pop(0)
            if _first():
                for server in self._servers:
                    server.forget(name)
                shutil.rmtree(self._folder() / name, ignore_errors=True)

    def close(self) -> None:
        """Unload what was pushed, as far as servers answer."""
        self._closing.set()
        wait(self._running, timeout=LEAVE)
        self._running, self._closing = [], Event()
        self._forget(0)
        self._served, self._tolerance = None, 0.0

    def _each(self, act: Callable[[Server], object], all_must: bool = False) -> None:
        """Do the same with all servers, lost ones included: one that does it is not lost any more.

        Raises:
            RuntimeError: None of them answers, or one of those that must.
        """

        def acted(server: Server) -> None:
            before = server.lost
            try:
                act(server)
                server.lost = None
            except LostError as error:
                server.lost = str(error)
            if before and not server.lost:
                rank_zero_warn(f"{server.url} answers again.")

        with ThreadPoolExecutor(len(self._servers)) as pool:
            list(pool.map(acted, self._servers))
        reasons = [server.lost for server in self._servers if server.lost]
        if reasons and all_must:
            raise RuntimeError(
                f"At the start all servers must answer: {'; '.join(reasons)}. docs/servers.md has the command "
                "that starts one."
            )
        if len(reasons) == len(self._servers):
            raise RuntimeError(_nobody_left(self._servers))

    # ---- sampling --------------------------------------------------------------------------------

    def sample(self, trunk: Trunk, adapter: str, asked: Asked, phase: Phase = untold) -> Rollout:
        """Push the adapter if it has changed, and share the responses out among the servers."""
        return self.start(trunk, adapter, asked, phase)()

    def start(
        self, trunk: Trunk, adapter: str, asked: Asked, phase: Phase = untold
    ) -> Callable[[], Rollout]:
        """Push the adapter if it has changed, and let servers sample until the returned function is called."""
        prompts, spec = asked.repeated(), asked.spec
        longest = prompts.ids.shape[1] + spec.max_new_tokens
        if longest > self._longest or not self._servers:
            self.begin(trunk, longest)
        with phase("push"):
            name = self._publish(trunk, adapter, phase)
        common: Json = {
            "max_tokens": spec.max_new_tokens,
            "temperature": spec.temperature,
            "top_p": spec.top_p,
            "top_k": spec.top_k,
            "stop": list(spec.stop),
            "skip_special_tokens": False,  # a stop string may be one
            "stop_token_ids": list(trunk.stop_ids),
            "ignore_eos": True,  # of the server's own settings
            "logprobs": 0,
            "return_token_ids": True,
        }
        seeds = row_seeds(asked.seed, asked.rollout, asked.prompts.row, asked.samples)
        rows = zip(prompts.ids, prompts.mask, seeds, strict=True)
        bodies = [common | {"prompt": ids[mask].tolist(), "seed": seed} for ids, mask, seed in rows]
        running = _in_background(partial(self._answers, name, bodies, trunk.vocabulary_size))
        self._running.append(running)

        def finished() -> Rollout:
            with phase("wait"):
                answers, sources = _agreed(running.result)
            self._running = [other for other in self._running if other is not running]
            rollout = _rollout(trunk, prompts, answers)
            servers = torch.tensor(sources, device=rollout.row.device)
            rollout = rollout._replace(samples=asked.samples, servers=servers)
            return (
                rollout if asked.early_exit else rollout.widened(spec.max_new_tokens, trunk.pad_id)
            )

        return finished

    def _answers(
        self, name: str, bodies: list[Json], vocabulary: int
    ) -> tuple[list[Answer], list[int]]:
        """A response to each body, and the number of its server, which takes a body whenever it has a hand free.

        Raises:
            RuntimeError: No server is left, or one answers something else than was asked.
        """
        answers: dict[int, Answer] = {}
        sources: dict[int, int] = {}
        waiting: deque[int] = deque()
        closing = self._closing  # a rollout that comes later has another

        def respond(number: int, row: int) -> None:
            answers[row] = self._servers[number].respond(name, bodies[row], vocabulary)
            sources[row] = number

        while len(answers) < len(bodies):
            if closing.is_set():
                raise RuntimeError("The engine was closed while servers sampled.")
            alive = [number for number, server in enumerate(self._servers) if not server.lost]
            if not alive:
                raise RuntimeError(_nobody_left(self._servers))
            waiting.extend(row for row in range(len(bodies)) if row not in answers)
            hands = (alive * self.at_once)[: len(waiting)]
            work = partial(self._work, waiting, respond, closing)
            hands_at_work = [_in_background(partial(work, number)) for number in hands]
            wait(hands_at_work)
            for hand in hands_at_work:
                hand.result()
            for number in alive:
                if reason := self._servers[number].lost:
                    rank_zero_warn(f"{reason}: its responses go to the other servers.")
        rows = range(len(bodies))
        return [answers[row] for row in rows], [sources[row] for row in rows]

    def _work(
        self,
        waiting: deque[int],
        respond: Callable[[int, int], None],
        closing: Event,
        number: int,
    ) -> None:
        """One hand of a server: rows that wait are answered until none is left, or the server is lost."""
        server = self._servers[number]
        while not (server.lost or closing.is_set()):
            try:
                respond(number, waiting.popleft())
            except IndexError:  # none is left
                return
            except LostError as error:
                server.lost = str(error)
            except RuntimeError:
                waiting.clear()
                raise

    def mismatch(self, rollout: Rollout, logprobs: Tensor) -> dict[str, Tensor]:
        """Refuse log-probabilities that are another model's; else say by how much they differ from ours.

        Raises:
            RuntimeError: They differ by more than rounding explains.
        """
        if rollout.logprobs is None or rollout.servers is None:
            return {}
        mask, gaps = rollout.response_mask, (logprobs - rollout.logprobs).abs()
        for number, server in enumerate(self._servers):
            gap = float(masked_mean(gaps, mask & (rollout.servers == number).unsqueeze(1)))
            if not gap <= self._tolerance:
                raise RuntimeError(
                    f"{server.url} sampled with other log-probabilities than ours, by {gap:.2g} nats a token; "
                    f"rounding explains {self._tolerance:.1g}. It may have lost the adapter, or scale by another "
                    "temperature. Nothing was learned from it."
                )
        return {
            "mismatch": masked_mean(gaps, mask),
            "mismatch_kl": masked_mean(k3(rollout.logprobs, logprobs), mask),
            "mismatch_largest": torch.where(mask, gaps, 0.0).amax(),
        }

    def weighted(self, rollout: Rollout, scored: Scored) -> Scored:
        """Weigh every token by how likely it is for the policy that learns and for the one that sampled."""
        if rollout.logprobs is None:
            return scored
        mask, gaps = rollout.response_mask, scored.logprobs - rollout.logprobs
        weights = gaps.exp().clamp(max=self.importance_clip)
        return scored._replace(importance=torch.where(mask, weights, torch.ones_like(weights)))


def _nobody_left(servers: Sequence[Server]) -> str:
    reasons = "; ".join(str(server.lost) for server in servers)
    return f"No server is left to sample from: {reasons}. Start one; fit goes on with --ckpt_path last."


Given = TypeVar("Given")


def _agreed(act: Callable[[], Given]) -> Given:
    """What an act gives on this rank; where it fails on one of them, it fails on all."""
    given, own = None, None
    try:
        given = act()
    except Exception as error:  # whatever it is, the others must not wait
        own = error
    problem = None if own is None else str(own) or type(own).__name__
    if problems := [other for other in everyones(problem) if other]:
        raise RuntimeError(problems[0]) from own
    return cast(Given, given)


def _in_background(act: Callable[[], Given]) -> Future[Given]:
    """Run something in a thread that no exit waits for."""
    future: Future[Given] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def _first() -> bool:
    """Whether this is the first rank, or the only one."""
    return share(1).counted > 0


def _gap(some: Sequence[float], others: Sequence[float]) -> float:
    """Mean absolute difference."""
    return sum(abs(one - two) for one, two in zip(some, others, strict=True)) / max(len(some), 1)


@torch.no_grad()
def _logprobs(trunk: Trunk, adapter: str, row: list[int]) -> list[float]:
    """Log-probabilities of a row's tokens but the first."""
    states, tokens = _read(trunk, adapter, row)
    logprobs: list[float] = trunk.logprobs(states, tokens, entropy=False)[0][0].tolist()
    return logprobs


def _rounding(trunk: Trunk, row: list[int]) -> float:
    """Mean difference of log-probabilities, in nats, that rounding explains between two programs.

    Logits are numbers of the trunk's dtype, so it grows with their size.
    """
    with torch.no_grad():
        logits = trunk.project(_read(trunk, OFF, row)[0])
    largest = float(logits.abs().amax(-1).float().mean())
    return max(TOLERANCES[trunk.dtype], torch.finfo(trunk.dtype).eps * largest)


def _read(trunk: Trunk, adapter: str, row: list[int]) -> tuple[Tensor, Tensor]:
    """States that predict a row's tokens but the first, and those tokens."""
    ids = torch.tensor([row], device=trunk.model.device)
    with trunk.switch.use(adapter):
        hidden = trunk(ids, torch.ones_like(ids, dtype=torch.bool))
    return predicting(hidden, len(row) - 1), ids[:, 1:]


def _rollout(trunk: Trunk, prompts: PromptBatch, answers: Sequence[Answer]) -> Rollout:
    """Prompts and answers as a rollout, on the prompts' device."""
    ids, mask = (part.to(prompts.ids) for part in pad_right([a.ids for a in answers], trunk.pad_id))
    mask = mask.bool()
    logprobs = torch.zeros(mask.shape, dtype=torch.promote_types(trunk.dtype, torch.float32))
    for row, answer in enumerate(answers):
        logprobs[row, : len(answer.ids)] = torch.tensor(answer.logprobs, dtype=logprobs.dtype)
    stopped = torch.tensor([answer.stopped for answer in answers], device=mask.device)
    return Rollout(*prompts[:2], ids, mask, stopped, prompts.row, logprobs.to(mask.device))
