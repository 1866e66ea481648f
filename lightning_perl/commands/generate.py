"""``generate``: a trained policy answers a prompt, a file of prompts, or a chat at the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_perl.arguments import CountOrZero
from lightning_perl.batches import PromptBatch
from lightning_perl.callbacks.console import in_columns, show
from lightning_perl.commands.trained import Trained, load, template_of, trained
from lightning_perl.data.own_rows import RowReader
from lightning_perl.data.reading import Source
from lightning_perl.data.rows import BadRow, Row, Turn
from lightning_perl.data.tokenization import PLAIN, TurnEncoder
from lightning_perl.models.adapters import OFF
from lightning_perl.models.heads import ScalarHead, has_head, load_head
from lightning_perl.models.loading import TrunkDtype
from lightning_perl.models.manifest import require_trunk_of
from lightning_perl.models.trunk import Trunk
from lightning_perl.packaged import unpackaged
from lightning_perl.rollouts.sampling import Asked, RolloutEngine, SamplingSpec

Prompt: TypeAlias = tuple[str, tuple[Turn, ...]]
"""A file and line, and the turns there."""
JUDGE = "judge"
"""The reward adapter's name on the trunk."""


@dataclass(frozen=True)
class Answer:
    """A text and, where there is a reward model, its score."""

    text: str
    score: float | None


class Speaker:
    """A policy, its reference and perhaps a reward model on one trunk, asked in turns; arguments as `generate`."""

    def __init__(
        self,
        found: Trained,
        reward: Path | None,
        sampling: SamplingSpec,
        seed: int,
        dtype: TrunkDtype | None,
        engine: RolloutEngine | None = None,
    ) -> None:
        gpu = torch.cuda.is_available()
        self.trunk, self.policy = load(found, dtype or ("bfloat16" if gpu else "float32"))
        self.trunk.require_cache()
        self._judge, self._head = _judge(self.trunk, found, reward)
        chats = bool(self.trunk.tokenizer.chat_template)
        template = template_of(found)
        self._encoder = TurnEncoder(self.trunk.tokenizer, chats and template != PLAIN)
        window = self.trunk.window or sys.maxsize
        # What is asked has the other half, at least.
        longest = min(sampling.max_new_tokens, window // 2)
        self._sampling = replace(sampling, max_new_tokens=longest)
        self._room = window - longest
        self._seed = seed
        self._asked = 0
        self._engine = engine or RolloutEngine()
        self._device = torch.device("cuda" if gpu else "cpu")
        self.trunk.to(self._device)
        if self._head is not None:
            self._head.to(self._device)

    def answer(
        self, turns: Sequence[Turn], adapter: str, watch: Callable[[str], None] | None = None
    ) -> Answer:
        """Answer the last turn; ``watch`` reads along. The same turns in the same place give the same answer."""
        ids = torch.tensor([self.asked(turns)], device=self._device)
        row = torch.tensor([len(turns)], device=self._device)
        prompts = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), row)
        streamed = None if watch is None else partial(self._stream, watch, [])
        asked = Asked(prompts, self._sampling, self._seed, self._asked, watch=streamed)
        rollout = self._engine.sample(self.trunk, adapter, asked)
        drawn = rollout.response_ids[0][rollout.response_mask[0]]
        text = str(self.trunk.tokenizer.decode(drawn, skip_special_tokens=True)).strip()
        if self._engine.elsewhere and watch is not None:
            watch(text)
        return Answer(text, self._score(torch.cat([ids[0], drawn])))

    def asked(self, turns: Sequence[Turn]) -> list[int]:
        """The turns as tokens, behind which the answer is drawn.

        Raises:
            BadRow: They do not fit into the trunk's window, or its chat template refuses them.
        """
        try:
            return self._encoder.encode_prompt(turns, self._room).ids
        except BadRow as error:  # what it advises are settings of data
            raise BadRow(f"{str(error).partition('. ')[0]}.") from error

    def next_prompt(self) -> None:
        """Draw the answers to come with other noise."""
        self._asked += 1

    def _stream(
        self, watch: Callable[[str], None], drawn: list[int], _: Tensor, tokens: Tensor
    ) -> None:
        """Pass on the text that a token adds; half a character waits for its other half."""
        decode = partial(self.trunk.tokenizer.decode, skip_special_tokens=True)
        before = str(decode(drawn)).rstrip("\ufffd").lstrip()
        drawn.append(int(tokens))
        watch(str(decode(drawn)).rstrip("\ufffd").lstrip().removeprefix(before))

    @torch.no_grad()
    def _score(self, ids: Tensor) -> float | None:
        if self._head is None:
            return None
        with self.trunk.switch.use(self._judge):
            hidden = self.trunk(
                ids.unsqueeze(0), torch.ones_like(ids.unsqueeze(0), dtype=torch.bool)
            )
        return float(self._head(hidden[0, -1]))


def _judge(trunk: Trunk, found: Trained, reward: Path | None) -> tuple[str, ScalarHead | None]:
    """The adapter and the head that score answers; no head where there is none."""
    if reward is not None:
        judge = trained(reward, "reward", found.trunk)
        if not judge.is_adapter:
            raise ValueError(
                f"reward: {judge.folder} is a whole trunk and no adapter of {found.trunk}. The reward head of a "
                "policy's own trunk scores without reward being given."
            )
        require_trunk_of(judge.folder, trunk)
        trunk.adapters.load(JUDGE, judge.folder, trainable=False)
        return JUDGE, load_head(judge.folder, "reward")
    own = Path(found.trunk)
    return OFF, load_head(own, "reward") if own.is_dir() and has_head(own, "reward") else None


def generate(
    run: Path,
    prompt: str | None = None,
    file: Path | None = None,
    out: Path | None = None,
    beside: Literal["reference"] | None = None,
    reward: Path | None = None,
    sampling: SamplingSpec = SamplingSpec(temperature=0.7),
    seed: CountOrZero = 0,
    trunk: str | None = None,
    trunk_dtype: TrunkDtype | None = None,
    rollout_engine: RolloutEngine | None = None,
) -> None:
    """Let a trained policy answer: one prompt, a file of prompts, or without either a chat at the terminal.

    Args:
        run: A run's folder such as runs/NAME/latest, or the folder of an adapter or a trunk.
        prompt: What to answer.
        file: Prompts to answer, in any form that data.train may have (.jsonl, .csv, ...). Written as JSON lines.
        out: File for the answers to a file. None: they are printed.
        beside: Answer with the reference (the trunk without the adapter) as well, with the same noise, and show
            both in two columns.
        reward: Folder of a reward adapter of the same trunk, or of its run, to score the answers. None: the
            trunk's own reward head, if it has one.
        sampling: How answers are drawn. At most half of the trunk's window is for an answer.
        seed: Seed of the answers.
        trunk: Folder or hub name of the trunk, where it no longer lies where it was. None: as the run says.
        trunk_dtype: Dtype of the trunk. None: bfloat16 on a GPU, else float32.
        rollout_engine: Where answers are drawn, such as `VllmServers`. None: in this process.
    """
    if prompt is not None and file is not None:
        raise ValueError(
            "generate answers a prompt or a file of prompts: give prompt or file, not both."
        )
    if out is not None and (file is None or out.exists()):
        raise ValueError(
            f"out: {out} exists already." if file else "out is for the answers to a file."
        )
    place = None if reward is None else Path(unpackaged(str(reward))).expanduser()
    found = trained(run, "policy", trunk)
    if beside and not found.is_adapter:
        raise ValueError(
            f"beside: {found.folder} is a whole trunk, under which there is no reference. Leave beside out, and "
            "ask the trunk that it was trained from by itself."
        )
    prompts = [] if file is None else list(prompts_of(file))
    speaker = Speaker(found, place, sampling, seed, trunk_dtype, rollout_engine)
    adapters = {"policy": speaker.policy} | ({"reference": OFF} if beside else {})
    try:
        if file is not None:
            _answer_file(speaker, adapters, prompts, out)
        elif prompt is not None:
            _answer(speaker, adapters, [Turn("user", prompt)])
        else:
            _chat(speaker, adapters)
    finally:
        if rollout_engine is not None:
            rollout_engine.close()


def _answer(speaker: Speaker, adapters: dict[str, str], turns: Sequence[Turn]) -> str:
    """Show the answers to the last turn, alone as it is drawn; returns the policy's."""
    if len(adapters) == 1:
        alone = speaker.answer(turns, speaker.policy, partial(show, end=""))
        show("" if alone.score is None else f"\n[score {alone.score:+.2f}]")
        return alone.text
    answers = {name: speaker.answer(turns, adapter) for name, adapter in adapters.items()}
    show(columns(answers))
    return answers["policy"].text


def columns(answers: dict[str, Answer], width: int | None = None) -> str:
    """Answers side by side under their names and scores, as wide as the terminal."""
    heads = [
        name if answer.score is None else f"{name}, score {answer.score:+.2f}"
        for name, answer in answers.items()
    ]
    return in_columns([heads, [answer.text for answer in answers.values()]], width)


def _chat(speaker: Speaker, adapters: dict[str, str]) -> None:
    """Answer until the input ends."""
    show("An empty line begins a new chat, Ctrl-C breaks an answer off, Ctrl-D ends.")
    turns: list[Turn] = []
    while True:
        try:
            said = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            show("")
            return
        if not said:
            turns = []
            speaker.next_prompt()
            continue
        try:
            text = _answer(speaker, adapters, [*turns, Turn("user", said)])
        except BadRow as error:
            show(f"{error} An empty line begins a new chat.")
            continue
        except KeyboardInterrupt:
            show("\n[broken off, and not remembered]")
            continue
        turns += [Turn("user", said), Turn("agent", text)]


def _answer_file(
    speaker: Speaker, adapters: dict[str, str], prompts: Sequence[Prompt], out: Path | None
) -> None:
    """Answer every prompt of a file, a line of JSON each, once all of them are known to fit."""
    for where, turns in prompts:
        try:
            speaker.asked(turns)
        except BadRow as error:
            raise BadRow(f"{where}: {error}") from error
    for where, turns in prompts:
        answers = {name: speaker.answer(turns, adapter) for name, adapter in adapters.items()}
        speaker.next_prompt()
        line: dict[str, Any] = {"where": where, "prompt": turns[-1].text}
        line |= {name: answer.text for name, answer in answers.items()}
        scores = {f"{name}_score": a.score for name, a in answers.items() if a.score is not None}
        text = json.dumps(line | scores, ensure_ascii=False)
        if out is None:
            show(text)
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a", encoding="utf-8") as written:
                written.write(f"{text}\n")
    if out is not None:
        show(f"wrote {len(prompts)} answers to {out}")


def prompts_of(file: Path) -> Iterator[Prompt]:
    """The prompts of a file with their places.

    Raises:
        BadRow: A row cannot be read.
    """

    def refuse(where: str, message: str) -> None:
        raise BadRow(f"{where}: {message}")

    reader = RowReader({}, prompts=True)
    for where, row in Source("file", unpackaged(str(file))).rows(refuse):
        try:
            items = list(reader.items(row, where, 0))
        except BadRow as error:
            raise BadRow(f"{where}: {error}") from error
        for item in items:
            assert isinstance(item, Row)
            yield where, item.context
