"""``compare``: trained adapters and their reference answer the same held-out prompts on one trunk.

Shapes: ``N`` prompts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lightning_perl import metrics
from lightning_perl.arguments import Count, CountOrZero
from lightning_perl.batches import PromptBatch, RatedBatch
from lightning_perl.callbacks.console import show
from lightning_perl.data.base import ConversationDataModule
from lightning_perl.functional.logprobs import k1
from lightning_perl.functional.masked import masked_row_sums
from lightning_perl.functional.sequences import pad_left
from lightning_perl.models.adapters import OFF, LoraSpec, stored_spec
from lightning_perl.models.heads import has_head
from lightning_perl.models.loading import TrunkDtype
from lightning_perl.models.manifest import require_trunk_of
from lightning_perl.models.quantization import Quantization
from lightning_perl.models.roles import Layout, Seat
from lightning_perl.modules import RLOO
from lightning_perl.modules.evaluation import VALIDATION_ROLLOUT, Evaluation, kept_tokens
from lightning_perl.packaged import unpackaged
from lightning_perl.rewards import RewardFunction
from lightning_perl.rollouts.sampling import RolloutEngine, SamplingSpec
from lightning_perl.whole import manifest_of, require_new

REFERENCE = "reference"
Measures = dict[str, float | tuple[float, float]]


class Question(NamedTuple):
    """A held-out prompt as tokens, its number in the split, and the answers that the data has for it, if any."""

    ids: list[int]
    row: int
    references: list[list[int]]


class Answer(NamedTuple):
    """What a contestant answers; the KL to the trunk (k1, nats) where the scored distribution was sampled."""

    response: str
    ids: list[int]
    score: float
    kl: float | None
    truncated: bool


def compare(
    out: Path,
    trunk: str,
    adapters: dict[str, str],
    data: ConversationDataModule,
    reward: str | None = None,
    reward_function: RewardFunction | None = None,
    sampling: SamplingSpec = SamplingSpec(),
    prompts: Count | None = None,
    batch_size: Count = 32,
    seed: CountOrZero = 0,
    trunk_dtype: TrunkDtype = "float32",
    quantization: Quantization | None = None,
    rollout_engine: RolloutEngine | None = None,
) -> dict[str, Measures]:
    """Let trained adapters and the trunk without one (the reference) answer held-out prompts, and compare them.

    All answer a prompt with the same noise. Writes ``compare.json``, ``answers.jsonl`` and, where the KL is known,
    ``frontier.png``, and prints a table.

    Args:
        out: Folder for the results; it must not exist yet.
        trunk: Folder or hub name of the trunk that the adapters were trained on. It is loaded once.
        adapters: Folders of the adapters to compare, such as RUN/adapters/actor, by the names to show.
        data: Its test rows (without any, its validation rows) are the prompts. Where ``data.rows`` is rated,
            chosen answers, thumbs up and demonstrations are references for ROUGE-L. Its tokenizer is the trunk's.
        reward: The judge: folder of a reward adapter on this trunk, or of another trunk with a reward head.
            None, without a ``reward_function``: the trunk's own reward head.
        reward_function: A judge in plain Python instead.
        sampling: How answers are drawn. KL is estimated only with a temperature above 0, top_p 1 and top_k 0.
        prompts: Number of prompts, the first ones. None: all.
        batch_size: Prompts answered and scored at once.
        seed: Seed of the answers and of the bootstrap.
        trunk_dtype: Dtype of the trunk's weights and matrix products.
        quantization: As the adapters were trained (nf4 or int8). None: not quantized.
        rollout_engine: Where answers are drawn, such as `VllmServers`. None: in this process.

    Returns:
        The measures of every contestant by name, the reference first (see `measures_of`).
    """
    folders = {name: Path(unpackaged(path)).expanduser() for name, path in adapters.items()}
    judge = None if reward is None else Path(unpackaged(reward)).expanduser()
    _refuse_early(out, folders, judge is not None and reward_function is not None)
    questions = questions_of(data)[:prompts]
    loading: dict[str, Any] = {"trunk_dtype": trunk_dtype, "quantization": quantization}
    loading |= {"seed": seed, "score_batch_size": batch_size, "rollout_engine": rollout_engine}
    module = _module(trunk, judge, reward_function, sampling, **loading)
    # Names on the trunk are numbers: the user's may hold a dot, or be those of roles.
    seated = {REFERENCE: OFF} | {name: f"contestant_{n}" for n, name in enumerate(folders)}
    for name, folder in folders.items():
        require_trunk_of(folder, module.policy_trunk)
        module.policy_trunk.adapters.load(seated[name], folder, trainable=False)
    module.require_fitting(data)
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    with closing(module.rollout_engine):
        answers = {name: [*answers_of(module, at, questions)] for name, at in seated.items()}
    references = [module.decoded(question.references) for question in questions]
    measures = measures_of(answers, references, seed)
    rows = "validation" if data.splits and data.splits.test is data.splits.val else "test"
    drawn = (
        f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, top_k {sampling.top_k}"
    )
    known = (
        "" if sampling.scored_as_sampled else " (KL is known for temperature > 0, top_p 1, top_k 0)"
    )
    asked = f"{len(questions)} prompts of the {rows} rows, {drawn}{known}"
    about = [asked, judge_of(module, judge, folders)]
    out.mkdir(parents=True)
    texts = module.prompts_read([question.ids for question in questions])
    with (out / "answers.jsonl").open("w", encoding="utf-8") as file:
        for number, question in enumerate(questions):
            line = {"row": question.row, "prompt": texts[number], "references": references[number]}
            given = {name: several[number]._asdict() for name, several in answers.items()}
            file.write(json.dumps(line | {"answers": given}) + "\n")
    if sampling.scored_as_sampled:
        draw_frontier(measures, out / "frontier.png")
    result = json.dumps({"about": about, "contestants": measures}, indent=2)
    (out / "compare.json").write_text(result + "\n", encoding="utf-8")
    show("\n".join([*about, *table(measures), f"wrote {out}"]))
    return measures


def _refuse_early(out: Path, folders: Mapping[str, Path], two_judges: bool) -> None:
    """Refuse what can be seen before anything is loaded."""
    require_new(out)
    if not folders or REFERENCE in folders:
        raise ValueError(
            f"adapters must name at least one adapter folder, none of them {REFERENCE!r} (the trunk without an "
            f"adapter, which always answers), got {list(folders)}."
        )
    if two_judges:
        raise ValueError("compare has one judge: give reward or reward_function, not both.")
    for folder in folders.values():
        stored_spec(folder)
        if has_head(folder, "reward"):
            raise ValueError(
                f"{folder} is a reward adapter, which answers nothing. Name it as reward."
            )


def _module(
    trunk: str,
    judge: Path | None,
    function: RewardFunction | None,
    sampling: SamplingSpec,
    **settings: Any,
) -> Evaluation:
    """What answers and judges. It learns nothing, so any method without a critic will do."""
    layout: Layout = "hydra"
    if judge:
        layout = "dynamic_lora" if (judge / "config.json").is_file() else "perl"
    return RLOO(
        trunk,
        lora=LoraSpec(1),
        layout=layout,
        reward=str(judge) if judge else None,
        learned_reward_weight=0.0 if function else 1.0,
        reward_function=function,
        sampling=sampling if sampling.scored_as_sampled else SamplingSpec(sampling.max_new_tokens),
        validation_sampling=sampling,
        **settings,
    )


def questions_of(data: ConversationDataModule) -> list[Question]:
    """The distinct prompts of the test rows, in their order."""
    data.prepare_data()
    data.setup("test")
    questions: dict[tuple[int, ...], Question] = {}
    for batch in data.test_dataloader():
        for ids, row, reference in _asked(batch):
            question = questions.setdefault(tuple(ids), Question(ids, row, []))
            question.references.extend([reference] if reference else [])
    if not questions:
        raise ValueError("compare: data has no test or validation rows, so there are no prompts.")
    return list(questions.values())


def _asked(batch: PromptBatch | RatedBatch) -> Iterator[tuple[list[int], int, list[int]]]:
    """Prompt, number and good answer (empty where there is none) of every row."""
    if isinstance(batch, PromptBatch):
        for ids, mask, row in zip(*batch, strict=True):
            yield ids[mask].tolist(), int(row), []
        return
    for number, row in enumerate(batch.row.tolist()):
        ids, counts = batch.ids[number], batch.response_mask[number].long()
        start = int(counts.argmax())
        # A demonstrated dialog has several answers; the first one answers the prompt.
        length = int(counts[start:].cumprod(0).sum())
        answer = ids[start : start + length].tolist() if batch.imitate[number] else []
        yield ids[:start].tolist(), row, answer


@torch.no_grad()
def answers_of(module: Evaluation, adapter: str, questions: Sequence[Question]) -> Iterator[Answer]:
    """Answer all questions with one adapter in the policy's seat, and score the answers."""
    spec, size = module.validation_sampling, module.score_batch_size
    module.roles.seats["policy"] = Seat(module.roles.seats["reference"].trunk, adapter)
    for start in range(0, len(questions), size):
        asked = questions[start : start + size]
        rows = torch.tensor([question.row for question in asked])
        batch = PromptBatch(*pad_left([question.ids for question in asked], 0), rows)
        batch = move_data_to_device(batch, module.device)
        rollout = module.collect(batch, VALIDATION_ROLLOUT, "policy", spec)
        scored = module.score(rollout, values=False, temperature=spec.temperature or 1.0)
        # Raises where another model sampled.
        module.rollout_engine.mismatch(rollout, scored.logprobs)
        scores, _ = module.rewarded(rollout, scored.scores)
        mask = rollout.response_mask
        kl = masked_row_sums(k1(scored.logprobs, scored.reference), mask)
        # The reference's own is 0; what is left of it is rounding.
        kl = torch.zeros_like(kl) if adapter == OFF else kl
        yield from map(
            Answer,
            module.texts(rollout)[1],
            kept_tokens(rollout.response_ids, mask),
            scores.tolist(),
            kl.tolist() if spec.scored_as_sampled else [None] * len(rows),
            (~rollout.stopped).tolist(),
        )


def measures_of(
    contestants: Mapping[str, Sequence[Answer]], references: Sequence[Sequence[str]], seed: int
) -> dict[str, Measures]:
    """Every contestant's means over prompts, and against the reference with 95% bootstrap intervals.

    ``score``; ``win_rate`` (a tie counts half) and ``length_controlled`` (see `length_controlled_win_rate`), each
    with ``..._interval``; ``kl``; ``tokens``; ``truncated``, the share of answers without an end; ``distinct_1``
    and ``distinct_2`` (see `distinct`); ``rouge_l`` over the prompts with references.
    """
    drawn = metrics.resamples(len(references), seed)
    before = _numbers(contestants[REFERENCE])
    judged = [number for number, texts in enumerate(references) if texts]
    measures: dict[str, Measures] = {}
    for name, answers in contestants.items():
        numbers = _numbers(answers)
        found: Measures = {key: float(values.mean()) for key, values in numbers.items()}
        if name != REFERENCE:
            won = metrics.wins(numbers["score"] - before["score"])
            longer = numbers["tokens"] - before["tokens"]
            rates = {
                "win_rate": drawn @ won / len(won),
                "length_controlled": metrics.length_controlled_win_rate(won, longer, drawn),
            }
            for key, values in rates.items():
                found[key], found[f"{key}_interval"] = metrics.with_interval(values)
        found |= {f"distinct_{n}": metrics.distinct([a.ids for a in answers], n) for n in (1, 2)}
        if judged:
            texts = [answers[number].response for number in judged]
            found["rouge_l"] = metrics.rouge_l(texts, [references[number] for number in judged])
        measures[name] = found
    return measures


def _numbers(answers: Sequence[Answer]) -> dict[str, Tensor]:
    """What answers are measured by, a number for each. Shapes: ``(N,)``, float64."""
    columns = {
        "score": [answer.score for answer in answers],
        "tokens": [len(answer.ids) for answer in answers],
        "truncated": [answer.truncated for answer in answers],
        "kl": [answer.kl for answer in answers if answer.kl is not None],
    }
    return {key: torch.tensor(c, dtype=torch.float64) for key, c in columns.items() if c}


def judge_of(module: Evaluation, reward: Path | None, folders: Mapping[str, Path]) -> str:
    """Who judges, and whether the contestants were trained on that reward, as far as their manifests say."""
    judge = set(module.rewarded_by)
    kinds: dict[str, list[str]] = {}
    for name, folder in folders.items():
        earned = manifest_of(folder).get("rewarded_by")
        trained = "the training reward of" if judge & set(earned or ()) else "held out from"
        kinds.setdefault("unknown for" if earned is None else trained, []).append(name)
    named = reward or (min(judge) if module.reward_function else "the trunk's own reward head")
    said = [f"{kind} {' and '.join(names)}" for kind, names in kinds.items()]
    return f"judge: {named}, {', '.join(said)}"


def table(measures: Mapping[str, Measures]) -> list[str]:
    """A line per contestant, with the intervals of its win rates in brackets."""
    keys = [key for key in list(measures.values())[-1] if not key.endswith("_interval")]
    rows = [["", *keys]]
    for name, one in measures.items():
        cells = [f"{one[key]:.3f}" if key in one else "" for key in keys]
        for number, key in enumerate(keys):
            if f"{key}_interval" in one:
                cells[number] += " [{:.3f}, {:.3f}]".format(*one[f"{key}_interval"])  # type: ignore[misc]
        rows.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def draw_frontier(measures: Mapping[str, Measures], path: Path) -> None:
    """Draw the mean score over the KL to the trunk, a point per contestant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, one in measures.items():
        axes.plot([one["kl"]], [one["score"]], "s" if name == REFERENCE else "o", label=name)
    axes.set_xlabel("KL to the trunk, nats per answer")
    axes.set_ylabel("mean score")
    axes.set_title("Reward and KL; upper left is better", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
