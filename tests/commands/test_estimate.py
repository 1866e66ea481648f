"""Estimates against real runs, closed forms of weights, the search for sizes, and refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from transformers import MixtralConfig, T5Config

from benchmarks.reality import allocator_peak, held_bytes, real_module, real_peak
from lightning_perl.batches import PromptBatch
from lightning_perl.cli import main
from lightning_perl.commands.estimate import (
    MOST_ROWS,
    LlamaSizes,
    architecture_from,
    compare,
    comparison_table,
    comparisons,
    estimate,
    highest,
    largest,
    load_of,
    parse_bytes,
    report,
)
from lightning_perl.commands.ledger import CUDA_BLOCK
from lightning_perl.commands.rehearsal import Load, OnPolicyRehearsal, prompts_of, rehearsal_of
from lightning_perl.functional import logprobs
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.roles import Layout
from lightning_perl.models.sharding import TrunkSharding
from lightning_perl.models.shortcuts import Shortcuts
from lightning_perl.models.weightless import materialize, weightless
from lightning_perl.modules import (
    DPO,
    GRPO,
    INPO,
    IPO,
    KTO,
    PPO,
    RAFT,
    RDPO,
    RLOO,
    SFT,
    Reinforce,
    ReMax,
    RewardModel,
    SuperHF,
)
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.modules.pairwise import Pairwise
from lightning_perl.optim import HostAdamW
from lightning_perl.rollouts.sampling import SamplingSpec
from tests.conftest import TinyTrunk

SIZES = LlamaSizes(64, 1, 4, 176, 500)
LOAD = Load(32, 32, 4)
MIB = 2**20
SHARING = (Shortcuts(), Shortcuts(shared_prompts=False))
FLOAT = 4


def ppo(layout: Layout = "hydra", rank: int = 16, **options: Any) -> Callable[[], PPO]:
    settings: dict[str, Any] = {
        "lora": LoraSpec(rank, 1.0),
        "sampling": SamplingSpec(32),
        "micro_batch_size": 2,
        "ppo_epochs": 1,
    }
    return lambda: PPO(trunk="no/such/trunk/anywhere", layout=layout, **{**settings, **options})


def rehearsal(make: Callable[[], Any], load: Load = LOAD, block: int = CUDA_BLOCK) -> Any:  # noqa: ANN401
    with weightless(SIZES.config()):
        module = make()
    return rehearsal_of(module, load, block)


@pytest.mark.parametrize(
    ("make", "load"),
    [
        (lambda: SFT(trunk="x", lora=LoraSpec(16), checkpointing=True), LOAD),
        (lambda: RewardModel(trunk="x", lora=LoraSpec(16)), LOAD._replace(rows=2, pairs=True)),
        (ppo("hydra", 128), LOAD),
        (ppo("dynamic_lora", checkpointing=True), LOAD),
        (ppo("full"), LOAD),
    ],
    ids=["sft", "pairs", "hydra-128", "dynamic", "full"],
)
def test_estimates_are_what_the_allocator_shows(make: Callable[[], Any], load: Load) -> None:
    estimated = highest(rehearsal(make, load, block=1).peaks())
    assert estimated == pytest.approx(real_peak(make, SIZES.config(), load), rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_are_estimated_in_every_dtype(dtype: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
    sizes["num_key_value_heads"] = 2
    with weightless(MixtralConfig(**sizes, num_hidden_layers=1, vocab_size=500)):
        module = ppo(trunk_dtype=dtype)()
    assert highest(rehearsal_of(module, LOAD, 1).peaks()) > 0


def test_what_depends_on_values_cannot_be_estimated() -> None:
    rehearsed = rehearsal(ppo())
    with pytest.raises(
        ValueError, match=r"estimate: .*\(LlamaForCausalLM\).*aten.nonzero.*dry-run"
    ):
        rehearsed.peaks(lambda: torch.zeros(2).nonzero())


def test_a_rollout_is_what_the_allocator_shows() -> None:
    load, make = Load(16, 96, 8), ppo(sampling=SamplingSpec(96))
    estimated = rehearsal(make, load, block=1).peaks()["rollout"]
    module = real_module(make, SIZES.config())
    ids, mask, row = prompts_of(load.rows, load.prompt_tokens)
    mask[1::2, 0] = False
    prompts = PromptBatch(ids, mask, row)
    held = held_bytes([*module.parameters(), *module.buffers()])
    real = held + allocator_peak(lambda: module.collect(prompts, 0, early_exit=False))
    assert estimated.total - estimated.kinds["optimizer"] == pytest.approx(real, rel=0.05)


def test_weights_adapters_and_moments_by_hand() -> None:
    hidden, inner, layers, words, rank = 64, 176, 1, 500, 16
    block = 4 * hidden**2 + 3 * hidden * inner + 2 * hidden
    trunk = layers * block + 2 * words * hidden + hidden
    # A and B of q, k, v, o, gate, up, down.
    adapter = layers * rank * (4 * 2 * hidden + 3 * (hidden + inner))
    head = hidden + 1
    for layout, trunks, adapters in (("hydra", 1, 2), ("lora", 4, 2), ("joint_hydra", 1, 1)):
        peak = rehearsal(ppo(layout), block=1).peaks()["critic" if adapters == 2 else "actor"]  # type: ignore[arg-type]
        # Rotary frequencies are buffers.
        buffers = trunks * 2 * (hidden // 4 // 2)
        assert peak.kinds["trunk"] == FLOAT * (trunks * trunk + buffers)
        # The frozen reward head beside the trained ones.
        assert peak.kinds["adapters"] == FLOAT * (adapters * adapter + 2 * head)
        # AdamW: two moments, and a count of steps per tensor.
        tensors = adapters * layers * 7 * 2 + 2
        assert peak.kinds["optimizer"] == FLOAT * (2 * (adapters * adapter + head) + tensors)


@pytest.mark.parametrize(("sharding", "ranks", "share"), [("shard", 4, 1 / 4), ("offload", 1, 0)])
def test_blocks_in_pieces_by_hand(sharding: TrunkSharding, ranks: int, share: float) -> None:
    hidden, inner, words = 64, 176, 500
    block = 4 * hidden**2 + 3 * hidden * inner + 2 * hidden
    make, load = ppo(trunk_sharding=sharding), LOAD._replace(ranks=ranks)
    peaks = rehearsal(make, load, block=1).peaks()
    # Two blocks are whole, embeddings and LM head always are; rotary frequencies are buffers.
    trunk = FLOAT * ((2 + share) * block + 2 * words * hidden + hidden + 2 * (hidden // 4 // 2))
    assert {peak.kinds["trunk"] for peak in peaks.values()} == {trunk}


def test_moments_that_rest_on_the_host_are_counted_in_the_step_only() -> None:
    plain = rehearsal(ppo()).peaks()
    hosted = rehearsal(ppo(optimizer=HostAdamW)).peaks()
    # A block of CUDA's for each count of steps.
    left = CUDA_BLOCK * (2 * 7 * 2 + 2)
    for phase, peak in plain.items():
        if phase != "optimizer":
            held = peak.kinds["optimizer"]
            assert held > left
            assert peak.total - hosted[phase].total == held - left
    # All of so small a model visit together.
    assert hosted["optimizer"].total <= plain["optimizer"].total


def test_the_cache_is_as_large_as_it_gets() -> None:
    peak = rehearsal(ppo(), block=1).peaks()["rollout"]
    # Keys and values of the one layer.
    assert peak.kinds["cache"] == FLOAT * 2 * LOAD.rows * 64 * 64


def test_bf16_halves_the_trunk_and_nothing_of_the_adapters() -> None:
    full, half = (
        rehearsal(ppo(trunk_dtype=dtype)).peaks()["critic"].kinds
        for dtype in ("float32", "bfloat16")
    )
    assert half["trunk"] == pytest.approx(full["trunk"] / 2, rel=0.01)
    assert half["adapters"] == full["adapters"]
    assert half["optimizer"] == full["optimizer"]


def test_more_micro_batches_find_gradients() -> None:
    one = rehearsal(ppo(micro_batch_size=4)).peaks()
    several = rehearsal(ppo(micro_batch_size=4), LOAD._replace(rows=8)).peaks()
    assert several["actor"].kinds["gradients"] > one["actor"].kinds["gradients"]
    one_sft, more_sft = (
        rehearsal(
            lambda: SFT(trunk="x", lora=LoraSpec(4)), LOAD._replace(accumulated=more)
        ).peaks()["forward"]
        for more in (False, True)
    )
    assert one_sft.kinds["gradients"] == 0
    assert more_sft.kinds["gradients"] > 0


def test_minibatches_cap_micro_batches() -> None:
    capped, equal, free = (
        rehearsal(ppo(micro_batch_size=micro, minibatch_size=mini)).peaks()["actor"].total
        for micro, mini in ((4, 2), (2, 2), (4, 4))
    )
    assert capped == pytest.approx(equal, rel=0.01)
    assert free > 1.2 * capped


def test_other_modules() -> None:
    reinforce = rehearsal(
        lambda: Reinforce(
            trunk="x", lora=LoraSpec(4), sampling=SamplingSpec(32), micro_batch_size=2
        )
    )
    assert set(reinforce.peaks()) == {"rollout", "score", "actor", "critic", "optimizer"}
    thumbs = rehearsal(lambda: RewardModel(trunk="x", lora=LoraSpec(4)))
    assert set(thumbs.peaks()) == {"forward", "backward", "optimizer"}
    # Prompts of pairs are read once: less than twice as many rows.
    pairs = rehearsal(lambda: RewardModel(trunk="x", lora=LoraSpec(4)), LOAD._replace(pairs=True))
    ratio = pairs.peaks()["forward"].kinds["activations"]
    assert 1.2 < ratio / thumbs.peaks()["forward"].kinds["activations"] < 1.9


def test_samples_of_a_prompt_without_a_critic() -> None:
    def rloo(**options: Any) -> Callable[[], RLOO]:
        settings: dict[str, Any] = {"sampling": SamplingSpec(32), "micro_batch_size": 2}
        return lambda: RLOO(trunk="x", samples=4, lora=LoraSpec(16, 1.0), **{**settings, **options})

    load = LOAD._replace(rows=8)
    peaks = rehearsal(rloo(), load, block=1).peaks()
    assert set(peaks) == {"rollout", "score", "actor", "optimizer"}
    # One adapter and the frozen reward head; PPO has two, and a head of the critic's.
    head, both = FLOAT * 65, rehearsal(ppo(), load, block=1).peaks()["critic"].kinds["adapters"]
    assert peaks["actor"].kinds["adapters"] == (both - 2 * head) / 2 + head
    # A micro-batch of four rows reads their prompt once, where the trunk packs rows.
    rows = [
        rehearsal(rloo(micro_batch_size=4, shortcuts=s), load).peaks()["actor"] for s in SHARING
    ]
    assert rows[0].kinds["activations"] < 0.9 * rows[1].kinds["activations"]
    # Fewer responses at once: less cache, and nothing else moves.
    few = rehearsal(rloo(sampling=SamplingSpec(32, batch_size=2)), load, block=1).peaks()
    assert few["rollout"].kinds["cache"] == peaks["rollout"].kinds["cache"] / 4
    assert few["actor"].total == peaks["actor"].total


@pytest.mark.parametrize("kind", [GRPO, INPO, RAFT, ReMax, SuperHF])
def test_relatives_on_policy_are_known(kind: type[OnPolicy]) -> None:
    def make(micro: int) -> Callable[[], OnPolicy]:
        settings: dict[str, Any] = {} if kind is ReMax else {"samples": 4}
        settings |= {"sampling": SamplingSpec(32), "lora": LoraSpec(16, 1.0)}
        return lambda: kind("x", micro_batch_size=micro, score_batch_size=2, **settings)

    load = LOAD._replace(rows=4 if kind is ReMax else 16)
    few, many = (rehearsal(make(micro), load, block=1).peaks() for micro in (2, 4))
    assert set(few) == {"rollout", "score", "actor", "optimizer"}
    assert few["actor"].kinds["activations"] < many["actor"].kinds["activations"]
    for kind_of in ("adapters", "optimizer"):
        assert few["optimizer"].kinds[kind_of] == many["optimizer"].kinds[kind_of]


def test_the_actor_is_counted_though_the_critic_begins_alone() -> None:
    plain, begins = (
        rehearsal(ppo("hydra", critic_warmup=warmup), LOAD, block=1).peaks() for warmup in (0, 2)
    )
    assert begins == plain


@pytest.mark.parametrize("kind", [DPO, IPO, KTO, RDPO])
def test_relatives_of_pairs_and_thumbs_are_known(kind: type[Pairwise]) -> None:
    load = LOAD._replace(pairs=kind is not KTO)
    pairwise = rehearsal(lambda: kind("x", lora=LoraSpec(16, 1.0)), load, block=1).peaks()
    tuned = rehearsal(lambda: SFT("x", LoraSpec(16, 1.0)), load, block=1).peaks()
    # The reference is the same trunk, and its pass keeps nothing for backward: the memory of a fine-tuning.
    ours, theirs = highest(pairwise), highest(tuned)
    assert ours == pytest.approx(theirs, rel=0.01)


def test_a_module_made_without_weights_reads_nothing() -> None:
    with weightless(SIZES.config()):
        module = ppo("perl", reward=None)()
    assert all(parameter.is_meta for parameter in module.parameters())
    tied = SIZES.config()
    tied.tie_word_embeddings = True
    with weightless(tied):
        sft = SFT(trunk="x")
    materialize(sft)
    model = sft.trunk.model
    assert sft.trunk.lm_head.weight is model.get_input_embeddings().weight
    assert not any(parameter.is_meta for parameter in sft.parameters())


@pytest.mark.parametrize(("held", "slope", "budget"), [(100, 7, 1000), (0, 1, 1), (500, 3, 502)])
def test_largest_is_the_last_that_fits(held: int, slope: int, budget: int) -> None:
    asked: list[int] = []

    def bytes_of(rows: int) -> int:
        asked.append(rows)
        # Steps, as blocks and chunks make them.
        return held + slope * rows + 5 * (rows // 16)

    found = largest(bytes_of, budget, {0: held, 4: bytes_of(4)})
    assert bytes_of(found) <= budget < bytes_of(found + 1)
    assert len(asked) < 12
    # The search has two ends.
    assert largest(lambda rows: 10, 5, {0: 10, 4: 10}) == 0
    assert largest(lambda rows: 1, 5, {0: 1, 4: 1}) == MOST_ROWS


def test_what_is_found_fits_and_one_more_does_not() -> None:
    one = rehearsal(ppo())
    budget = 6 * MIB
    found = estimate(one, budget)
    assert isinstance(one, OnPolicyRehearsal)
    assert found.micro_batch_size is not None
    assert found.rollout_rows is not None
    learning, sampling = ("score", "actor", "critic"), ("rollout",)
    for more, fits in ((0, True), (1, False)):
        micro, rows = found.micro_batch_size + more, found.rollout_rows + more
        # As a run with these sizes would be estimated.
        for load, phases in ((3 * micro, learning), (rows, sampling)):
            fresh = rehearsal(ppo(micro_batch_size=micro), LOAD._replace(rows=load)).peaks()
            assert (max(fresh[phase].total for phase in phases) <= budget) is fits


def test_sizes_are_read_and_others_refused() -> None:
    texts = ("24GiB", "80 GB", "1.5mib", "1TiB")
    assert [parse_bytes(text) for text in texts] == [24 * 2**30, 80 * 10**9, 3 * 2**19, 2**40]
    for text in ("24", "GiB", "-1GiB", "0GiB", "24 gallons", ""):
        with pytest.raises(ValueError, match=r"--budget must be a size such as 24GiB"):
            parse_bytes(text)


def test_refusals(tmp_path: Path) -> None:
    config = SIZES.config()
    with pytest.raises(ValueError, match=r"less than the .* GiB that weights"):
        report(ppo(), config, LOAD, budget="10KiB")
    with pytest.raises(ValueError, match="no architecture found in 'no/such"):
        architecture_from("no/such/folder/at/all")
    short = SIZES.config()
    short.max_position_embeddings = 40
    with pytest.raises(ValueError, match=r"64 tokens long .* positions for 40"):
        report(ppo(), short, LOAD)
    (tmp_path / "config.json").write_text(json.dumps(T5Config().to_dict()))
    with pytest.raises(ValueError, match="is a t5, which is no decoder"):
        architecture_from(str(tmp_path))
    with pytest.raises(ValueError, match="LightningModule is neither"):
        rehearsal(LightningModule)


def test_comparisons_keep_the_settings() -> None:
    options: dict[str, Any] = {
        "attention": "eager",
        "checkpointing": ["policy"],
        "minibatch_size": 3,
        "score_batch_size": 4,
        "shortcuts": Shortcuts(frozen_head=False),
        "trunk_dtype": "bfloat16",
    }
    one = rehearsal(ppo(**options))
    runs = comparisons(one.module, one.load)
    assert {load.rows for name, (_, load) in runs.items() if "SFT" in name} == {2}
    with weightless(SIZES.config()):
        again, tuned = runs["PPO hydra"][0](), runs["SFT with LoRA"][0]()
    options |= {"lora": LoraSpec(16, 1.0), "micro_batch_size": 2}
    for name, value in options.items():
        assert again.hparams[name] == value
    assert tuned.hparams["checkpointing"] is True
    assert highest(rehearsal(runs["PPO hydra"][0]).peaks()) == highest(one.peaks())
    # The estimates left the module's own sizes alone.
    assert (one.module.score_batch_size, one.module.minibatch_size, one.module.epochs) == (4, 3, 1)
    found = compare(SIZES.config(), {name: runs[name] for name in list(runs)[:2]}, None)
    lora, whole = (run.peak.total for run in found.values() if run is not None)
    assert lora < whole
    # A pair is two rows to those that know no pairs.
    pairs = comparisons(one.module, LOAD._replace(rows=2, pairs=True)).values()
    assert {(load.rows, load.pairs) for _, load in pairs} >= {(4, False)}
    # Weights above the budget are left out.
    found = compare(SIZES.config(), {"PPO full": runs["PPO full"]}, one.ledger.total)
    assert found == {"PPO full": None}
    assert "its weights alone pass" in comparison_table(found, fitted=True)


def test_cuda_is_rehearsed_without_what_only_a_cpu_does() -> None:
    on_cuda, on_cpu = (rehearsal(ppo(trunk_dtype="bfloat16"), block=n) for n in (CUDA_BLOCK, 1))
    own = logprobs.CACHED
    for one, rows in ((on_cuda, sys.maxsize), (on_cpu, own)):
        with one._running():
            inside = logprobs.CACHED
        assert inside == rows
        assert own == logprobs.CACHED


def command(tiny_trunk: TinyTrunk, tmp_path: Path, *more: str) -> None:
    model = {"trunk": str(tiny_trunk()), "lora": {"rank": 2}}
    model["sampling"] = {"max_new_tokens": 8, "stop": ["User:"]}
    data = {"train": "never_read.jsonl", "rows": "prompts", "batch_size": 4}
    data |= {"max_tokens": 40, "max_response_tokens": 8}
    config = {
        "model": {"class_path": "HydraPPO", "init_args": model},
        "data": {"class_path": "PreferenceDataModule", "init_args": data},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    main(["estimate", "-c", str(path), *more])


def test_the_command_prints_one_object(
    tiny_trunk: TinyTrunk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of RLOO, from the architecture's file alone: rows are responses, and there is no critic.
    read = ["--model=RLOO", "--model.init_args.samples=3"]
    read.append(f"--architecture={tiny_trunk() / 'config.json'}")
    command(tiny_trunk, tmp_path, "--json", *read)
    found = json.loads(capsys.readouterr().out)
    assert found["load"]["rows"] == 12
    assert "critic" not in found["phases"]
    command(
        tiny_trunk, tmp_path, "--json", "--budget", "64MiB", "--model.init_args.micro_batch_size=2"
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["module"], found["layout"]) == ("HydraPPO", "hydra")
    assert found["load"] == {
        "prompt_tokens": 32, "response_tokens": 8, "rows": 4, "pairs": False, "accumulated": False,
        "ranks": 1, "micro_batch_size": 2,
    }  # fmt: skip
    assert set(found["phases"]) == {"rollout", "score", "actor", "critic", "optimizer"}
    for phase in found["phases"].values():
        assert sum(phase["kinds_gib"].values()) == pytest.approx(phase["peak_gib"])
    assert found["peak_gib"] == max(phase["peak_gib"] for phase in found["phases"].values())
    assert found["largest_micro_batch_size"] >= 2
    assert found["largest_rollout_batch_size"] >= 4
    assert found["budget_gib"] == 64 / 1024
    assert found["layouts"] is None
    assert min(found["seconds"], found["parameters"]) > 0


@pytest.mark.parametrize(
    ("module", "data", "asked", "pairs"),
    [
        ("RewardModel", "PreferenceDataModule", None, True),
        ("RewardModel", "PreferenceDataModule", False, False),
        ("RewardModel", "TaskmasterDataModule", None, False),
        ("SFT", "PreferenceDataModule", None, False),
    ],
)
def test_rows_are_pairs_as_module_and_data_say(
    module: str, data: str, asked: bool | None, pairs: bool
) -> None:
    space: Any = Namespace
    trainer = space(accumulate_grad_batches=2, devices=[0, 1, 2], num_nodes=1)
    config = space(pairs=asked, trainer=trainer)
    config.model = space(class_path=f"lightning_perl.modules.{module}", init_args=space())
    sizes = space(max_tokens=40, max_response_tokens=8, batch_size=4)
    config.data = space(class_path=f"lightning_perl.data.{data}", init_args=sizes)
    # Of the 4 rows on three devices, one reads two.
    assert load_of(config) == Load(32, 8, 2, pairs, accumulated=True, ranks=3)


def test_the_command_prints_a_table_of_all_layouts(
    tmp_path: Path, tiny_trunk: TinyTrunk, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--hidden_size=32", "--layers=1", "--heads=2", "--intermediate_size=48"]
    command(tiny_trunk, tmp_path, "--layouts", *sizes, "--vocabulary_size=64")
    table = capsys.readouterr().out
    runs = ("SFT with LoRA", "full SFT", *(f"PPO {layout}" for layout in get_args(Layout)))
    for name in (*runs, "rollout", "score", "actor", "critic", "optimizer"):
        assert f"\n{name}" in table


def test_sizes_and_rewards_that_cannot_be_estimated_are_refused(
    tiny_trunk: TinyTrunk, tmp_path: Path
) -> None:
    several = ["--model.init_args.layout=perl", "--model.init_args.reward=[a, b]"]
    with pytest.raises(ValueError, match="missing --layers, --heads"):
        command(tiny_trunk, tmp_path, "--hidden_size=32")
    with pytest.raises(ValueError, match=r"\['a', 'b'\] of the 2 reward folders are not there"):
        command(tiny_trunk, tmp_path, "--model=PPO", *several)
    other = tiny_trunk(num_hidden_layers=1)
    apart = ["--model.init_args.layout=lora", f"--model.init_args.reward={other}"]
    with pytest.raises(
        ValueError, match=r"one architecture for all trunks.*'num_hidden_layers': 1"
    ):
        command(tiny_trunk, tmp_path, "--model=PPO", *apart)
