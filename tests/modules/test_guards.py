"""What the modules refuse, and what they leave out: broken steps, wrong rows, heads that never learned."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from lightning_perl.batches import Bounded, PromptBatch, RatedBatch
from lightning_perl.functional.sequences import pad_left, pad_right
from lightning_perl.models.heads import HEADS_FILE
from lightning_perl.models.loading import TrunkDtype, load_trunk
from lightning_perl.modules import PPO, SFT, HydraPPO, HydraSFT, RewardModel
from lightning_perl.modules.base import AdapterModule
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.modules.safety import FiniteGuard, ratio_tolerance
from lightning_perl.modules.supervised import Supervised
from lightning_perl.rollouts.rollout import Rollout, Scored, split_at
from lightning_perl.rollouts.sampling import SamplingSpec
from tests.modules import tiny

SUPERVISED: dict[str, Callable[[str], Supervised]] = {
    "SFT": lambda trunk: SFT(trunk, tiny.LORA),
    "SFT full": SFT,
    "HydraSFT": lambda trunk: HydraSFT(trunk, tiny.LORA),
    "RewardModel": lambda trunk: RewardModel(trunk, tiny.LORA),
}
KINDS: dict[str, Callable[[str], AdapterModule]] = {
    **SUPERVISED,
    "HydraPPO": lambda trunk: HydraPPO(trunk, lora=tiny.LORA, sampling=tiny.SAMPLING),
}


def demonstrations(count: int, seed: int = 0) -> RatedBatch:
    """Rows to imitate without thumbs or pairs."""
    batch = tiny.rated(count, seed, imitate=True)
    return batch._replace(labelled=torch.zeros(count, dtype=torch.bool))


@pytest.mark.parametrize(("batches", "expected"), [(1, [0, 0, 0, 0]), (2, [0, 1, 0, 1])])
def test_gradients_go_with_their_step(
    batches: int, expected: list[int], hydra_trunk: Path, tmp_path: Path
) -> None:
    held: list[bool] = []
    look = LambdaCallback(
        on_train_batch_start=lambda trainer, module, *_: held.append(
            any(one.grad is not None for one in module.parameters())
        )
    )
    module = HydraSFT(str(hydra_trunk), tiny.LORA)
    rows = [tiny.rated(4, seed) for seed in range(4)]
    tiny.fit(module, tmp_path, rows, look, accumulate_grad_batches=batches)
    assert held == expected


class Kept(Callback):
    """Keeps weights, optimizer state and the count of skipped steps after every batch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.states: list[dict[str, Tensor]] = []
        self.skipped: list[float] = []

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        self.weights.append(tiny.weights(pl_module))
        state = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])
        self.states.append(
            {f"{one}.{key}": value for one in state for key, value in state[one].items()}
        )
        # Accumulating, the first batch of a step logs nothing of it.
        self.skipped.append(float(trainer.callback_metrics.get("train/skipped_steps", 0)))

    def same(self, one: int, other: int) -> bool:
        """Whether nothing at all changed between the ends of two batches."""
        return all(
            kept[one].keys() == kept[other].keys()
            and all(torch.equal(value, kept[other][key]) for key, value in kept[one].items())
            for kept in (self.weights, self.states)
        )


# ---- steps that are not finite -------------------------------------------------------------------

FINE = {"actor": torch.tensor(2.0), "head": torch.tensor(0.0)}


@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan])
def test_guard_counts_and_forgets(broken: float) -> None:
    guard, bad = FiniteGuard(), {**FINE, "head": torch.tensor(broken)}
    answers = [guard(norms) for norms in (FINE, bad, bad, FINE, bad, bad, FINE, bad, bad)]
    assert answers == [True, False, False, True, False, False, True, False, False]
    assert guard.skipped == 6
    words = (
        r"gradients of \['actor', 'head'\] were not finite 3 times in a row; nothing was learned"
    )
    with pytest.raises(RuntimeError, match=words):
        guard({**bad, "actor": torch.tensor(broken)})
    assert guard.skipped == 7


def spoil(module: OnPolicy, value: float, rollouts: set[int], patch: pytest.MonkeyPatch) -> None:
    """One response of each of these rollouts gets this score."""
    score = module.score

    def spoiled(rollout: Rollout, **options: Any) -> Scored:
        scored = score(rollout, **options)
        if module.rollout_index in rollouts:
            scored.scores[1] = value
        return scored

    patch.setattr(module, "score", spoiled)


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("layout", ["hydra", "joint_hydra", "full"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_rollout_with_a_broken_score_teaches_nothing(
    value: float,
    layout: str,
    whiten: bool,
    hydra_trunk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = tiny.hydra(hydra_trunk, layout=layout, trunk_dtype="float32", whiten_advantages=whiten)
    spoil(module, value, {1, 2}, monkeypatch)
    kept = Kept()
    trainer, _ = tiny.fit(module, tmp_path, [tiny.prompts(5, seed) for seed in range(4)], kept)
    assert kept.skipped == [0, 1, 2, 2]
    assert kept.same(0, 1)
    assert kept.same(1, 2)
    assert not kept.same(2, 3)
    assert all(bool(value.isfinite().all()) for value in kept.weights[-1].values())
    assert (module.episodes, trainer.global_step) == (20, 2)


def test_ppo_gives_up_after_three_broken_rollouts(
    hydra_trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, kept = tiny.hydra(hydra_trunk), Kept()
    spoil(module, math.inf, {1, 2, 4, 5, 6}, monkeypatch)
    trainer, _ = tiny.quiet_trainer(tmp_path, kept)
    with pytest.raises(RuntimeError, match=r"\['rollout.* not finite 3 times in a row.*a reward"):
        trainer.fit(module, tiny.Batches([tiny.prompts(5, seed) for seed in range(8)]))
    assert kept.skipped == [0, 1, 2, 2, 3, 4]
    assert tiny.changed(kept.weights[3], module) == set()


def break_objective(
    module: Supervised, value: float, calls: set[int], patch: pytest.MonkeyPatch
) -> None:
    """The loss of these calls is multiplied by this."""
    objective, seen = module.objective, [0]

    def broken(batch: RatedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, stats = objective(batch)
        seen[0] += 1
        return loss * (value if seen[0] - 1 in calls else 1.0), stats

    patch.setattr(module, "objective", broken)


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5}], ids=["", "clipped"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("kind", SUPERVISED)
def test_batch_with_a_broken_loss_teaches_nothing(
    kind: str,
    value: float,
    options: dict[str, Any],
    plain_trunk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, kept = SUPERVISED[kind](str(plain_trunk)), Kept()
    break_objective(module, value, {1}, monkeypatch)
    tiny.fit(module, tmp_path, [tiny.rated(5, seed) for seed in range(3)], kept, **options)
    assert kept.skipped == [0, 1, 1]
    assert kept.same(0, 1)
    assert not kept.same(1, 2)


def test_broken_batch_spoils_its_whole_accumulated_step(
    plain_trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, kept = SFT(str(plain_trunk), tiny.LORA), Kept()
    start = tiny.weights(module)
    break_objective(module, math.nan, {0}, monkeypatch)
    tiny.fit(
        module,
        tmp_path,
        [tiny.rated(5, seed) for seed in range(4)],
        kept,
        accumulate_grad_batches=2,
    )
    assert kept.skipped == [0, 1, 1, 1]
    assert all(torch.equal(value, kept.weights[1][name]) for name, value in start.items())
    assert tiny.changed(start, module) == {name for name in start if "lora_B" in name}


@pytest.mark.parametrize("kind", SUPERVISED)
def test_supervised_training_gives_up_after_three_broken_batches(
    kind: str, plain_trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SUPERVISED[kind](str(plain_trunk))
    start = tiny.weights(module)
    break_objective(module, math.nan, {0, 1, 2}, monkeypatch)
    trainer, folder = tiny.quiet_trainer(tmp_path)
    with pytest.raises(RuntimeError, match=r"\['trunk'.* not finite 3 times in a row.*learning"):
        trainer.fit(module, tiny.Batches([tiny.rated(5, seed) for seed in range(5)]))
    assert tiny.changed(start, module) == set()
    assert not (folder / "trunk").exists()


# ---- the data beside the module ------------------------------------------------------------------


class Data(LightningDataModule):
    """Ready batches that say what they are."""

    def __init__(
        self, rows: str, batches: Sequence[Any], max_tokens: int = 16, max_response_tokens: int = 8
    ) -> None:
        super().__init__()
        self.rows = rows
        self.batches = batches
        self.max_tokens = max_tokens
        self.max_response_tokens = max_response_tokens

    def train_dataloader(self) -> tiny.Batches:
        return tiny.Batches(self.batches)

    def val_dataloader(self) -> tiny.Batches:
        return tiny.Batches(self.batches)


def refused_data(module: AdapterModule, data: Data, words: str, root: Path) -> None:
    """Neither ``fit`` nor ``validate`` begins."""
    assert isinstance(data, Bounded)
    before = tiny.weights(module)
    trainer, folder = tiny.quiet_trainer(root)
    for run in (trainer.fit, trainer.validate):
        with pytest.raises(ValueError, match=words):
            run(module, datamodule=data)
    assert trainer.global_step == 0
    assert tiny.changed(before, module) == set()
    assert not list(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("kind", [*SUPERVISED, "HydraPPO"])
def test_rows_of_the_other_kind_are_refused(kind: str, hydra_trunk: Path, tmp_path: Path) -> None:
    learned, given, batch = (
        ("rated", "prompts", tiny.prompts(4))
        if kind in SUPERVISED
        else ("prompts", "rated", tiny.rated(4))
    )
    module = KINDS[kind](str(hydra_trunk))
    words = (
        f"{kind.split()[0]} learns from {learned}, but data.rows is '{given}'. "
        f"Set data.init_args.rows: {learned}"
    )
    refused_data(module, Data(given, [batch]), words, tmp_path)


PROMPTS = tiny.prompts(2)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (
            {"input_ids": PROMPTS.ids},
            r"got dict with \['input_ids'\]. Return one from the DataLoader's collate_fn",
        ),
        (tiny.rated(2), "got RatedBatch"),
        (
            PROMPTS._replace(mask=PROMPTS.mask.long()),
            "got one whose masks are {'mask': torch.int64}",
        ),
        (PROMPTS._replace(ids=PROMPTS.ids + 5000), r"ids below \d+, got one with the id 50\d\d"),
    ],
)
def test_other_batches_of_own_loaders_are_refused(
    batch: object, words: str, hydra_trunk: Path, tmp_path: Path
) -> None:
    module = HydraPPO(str(hydra_trunk), lora=tiny.LORA, sampling=tiny.SAMPLING)
    with pytest.raises(TypeError, match=rf"HydraPPO takes a PromptBatch .*ids, mask, row.*{words}"):
        tiny.fit(module, tmp_path, [batch])


def long_rows(tokens: int) -> RatedBatch:
    """Two rows, one of exactly this many tokens."""
    ids, mask = pad_right([[5 + step % 9 for step in range(tokens)], [4, 5, 6, 7]], 0)
    columns = torch.arange(tokens).expand_as(mask)
    batch = tiny.rated(2)
    return batch._replace(ids=ids, attention_mask=mask, response_mask=mask & (columns >= 2))


@pytest.mark.parametrize("kind", SUPERVISED)
def test_rows_past_the_window_are_refused(kind: str, gpt2_trunk: Path, tmp_path: Path) -> None:
    module = SUPERVISED[kind](str(gpt2_trunk))
    assert module.window == 64
    words = (
        r"Rows may be 65 tokens long \(data.max_tokens 65, data.max_response_tokens 8\), but the trunk "
        r"has positions for 64 only\. Lower data.max_tokens"
    )
    refused_data(module, Data("rated", [long_rows(65)], 65), words, tmp_path)
    trainer, _ = tiny.quiet_trainer(tmp_path)
    trainer.fit(module, datamodule=Data("rated", [long_rows(64)], 64))
    assert trainer.global_step == 1


@pytest.mark.parametrize("longer", ["sampling", "validation_sampling"])
def test_prompts_and_answers_past_the_window_are_refused(
    longer: str, gpt2_trunk: Path, tmp_path: Path
) -> None:
    short, long = SamplingSpec(max_new_tokens=3), SamplingSpec(max_new_tokens=10)
    options = {"sampling": short, "validation_sampling": short, longer: long}
    module = tiny.hydra(gpt2_trunk, **options)
    words = (
        r"Rows may be 65 tokens long \(data.max_tokens 63, data.max_response_tokens 8\), but the trunk "
        r"has positions for 64 only\. .* or sampling.max_new_tokens"
    )
    refused_data(module, Data("prompts", [tiny.prompts(3)], 63), words, tmp_path)
    rows = [[5 + step % 9 for step in range(count)] for count in (54, 7, 30)]
    ids, mask = pad_left(rows, 0)
    batch = PromptBatch(ids, mask, torch.arange(3))
    trainer, _ = tiny.quiet_trainer(tmp_path)
    trainer.fit(module, datamodule=Data("prompts", [batch], 62))
    assert trainer.global_step == 1


# ---- a head that never learned -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["HydraSFT", "RewardModel"])
def test_epoch_without_a_thumb_or_pair_is_refused(
    kind: str, plain_trunk: Path, tmp_path: Path
) -> None:
    words = (
        f"{kind} saw no row to learn a preference from in a whole epoch, so its reward head is still "
        "random. Give rows with `label`, or with `chosen` and `rejected`; for demonstrations alone use SFT"
    )
    unrated = [demonstrations(4), demonstrations(4, 2)]
    with pytest.raises(ValueError, match=words):
        tiny.fit(SUPERVISED[kind](str(plain_trunk)), tmp_path, unrated)
    assert not list(tmp_path.rglob(HEADS_FILE))
    for number, rated in enumerate((tiny.rated(1, 1), tiny.rated(2, 1, pairs=1)), 1):
        tiny.fit(SUPERVISED[kind](str(plain_trunk)), tmp_path, [*unrated, rated])
        assert len(list(tmp_path.rglob(HEADS_FILE))) == number


def test_thumbs_before_a_checkpoint_count_after_it(plain_trunk: Path, tmp_path: Path) -> None:
    batches = [tiny.rated(4), demonstrations(4, 1), demonstrations(4, 2)]
    keep = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")
    _, folder = tiny.fit(HydraSFT(str(plain_trunk), tiny.LORA), tmp_path, batches, keep)
    module = HydraSFT(str(plain_trunk), tiny.LORA)
    later, again = tiny.quiet_trainer(tmp_path)
    path = folder / "checkpoints" / "step=1.ckpt"
    later.fit(module, tiny.Batches(batches), ckpt_path=path, weights_only=True)
    assert later.global_step == 3
    assert (again / "trunk" / HEADS_FILE).is_file()


def test_dry_run_may_miss_the_thumbs(plain_trunk: Path, tmp_path: Path) -> None:
    module = HydraSFT(str(plain_trunk), tiny.LORA)
    trainer, _ = tiny.fit(
        module,
        tmp_path,
        [demonstrations(4), tiny.rated(4)],
        fast_dev_run=True,
        default_root_dir=tmp_path,
    )
    assert trainer.global_step == 1


@pytest.mark.parametrize("thumbs", [True, False])
def test_hydra_sft_without_reward_weight_writes_no_head(
    thumbs: bool, plain_trunk: Path, tmp_path: Path
) -> None:
    module = HydraSFT(str(plain_trunk), tiny.LORA, reward_weight=0.0)
    _, folder = tiny.fit(module, tmp_path, [tiny.rated(4) if thumbs else demonstrations(4)])
    assert (folder / "trunk" / "model.safetensors").is_file()
    assert not (folder / "trunk" / HEADS_FILE).exists()
    with pytest.raises(ValueError, match=r"has no reward head \(found: no heads file\)"):
        tiny.hydra(folder / "trunk")


# ---- values at the ends of their ranges ------------------------------------------------------------------


def test_ends_of_the_ranges_are_allowed(hydra_trunk: Path) -> None:
    for edge in (0.0, 1.0):
        module = tiny.hydra(
            hydra_trunk, kl_coef=0.0, value_coef=0.0, gae_lambda=edge, discount=edge
        )
        assert (module.gae_lambda, module.discount) == (edge, edge)


# ---- bf16 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [(SFT, {}), (HydraSFT, {}), (RewardModel, {}), (PPO, {"sampling": tiny.SAMPLING})],
)
def test_over_bf16_adapters_learn_in_fp32_and_nothing_else(
    kind: Callable[..., AdapterModule], options: dict[str, Any], hydra_trunk: Path, tmp_path: Path
) -> None:
    whole: dict[str, Any] = {"layout": "full"} if kind is PPO else {"lora": None}
    words = r"A trunk that is tuned whole must be float32, got bfloat16: .* or LoRA, whose weights are fp32"
    with pytest.raises(ValueError, match=words):
        kind(str(hydra_trunk), trunk_dtype="bfloat16", **whole)
    module = kind(str(hydra_trunk), lora=tiny.LORA, trunk_dtype="bfloat16", **options)
    before = tiny.weights(module)
    _, folder = tiny.fit(module, tmp_path, tiny.batches_for(module))
    changed = tiny.changed(before, module)
    assert changed == module.trainable_names()
    assert {module.state_dict()[name].dtype for name in changed} == {torch.float32}
    assert list(folder.rglob("*.safetensors"))


# ---- where things come from ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_run(plain_trunk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reward adapter of a short run on `plain_trunk`."""
    trainer, folder = tiny.quiet_trainer(tmp_path_factory.mktemp("reward"))
    module = RewardModel(str(plain_trunk), tiny.LORA)
    trainer.fit(module, tiny.Batches([tiny.rated(6, seed) for seed in range(2)]))
    return folder / "adapters" / "reward"


def perl(trunk: Path | str, reward: Path | str, dtype: TrunkDtype = "float32") -> PPO:
    return PPO(str(trunk), "perl", reward=str(reward), lora=tiny.LORA, trunk_dtype=dtype)


def test_reward_adapter_names_its_trunk(reward_run: Path, plain_trunk: Path) -> None:
    about = json.loads((reward_run / "manifest.json").read_text())
    trunk = load_trunk(str(plain_trunk))
    assert about.pop("checksums").keys() == {
        "adapter_config.json",
        "adapter_model.safetensors",
        HEADS_FILE,
    }
    assert about == {
        "kind": "adapter",
        "trunk": str(plain_trunk),
        "trunk_fingerprint": trunk.fingerprint(),
        "stop_ids": list(trunk.stop_ids),
        "rewarded_by": [],
    }


def test_reward_adapter_goes_with_its_own_trunk_only(
    reward_run: Path, plain_trunk: Path, tmp_path: Path
) -> None:
    for dtype in ("float32", "bfloat16"):
        perl(plain_trunk, reward_run, dtype)
    moved = shutil.copytree(plain_trunk, tmp_path / "moved")
    perl(moved, reward_run)
    trainer, folder = tiny.quiet_trainer(tmp_path)
    sft = SFT(str(plain_trunk), tiny.LORA, optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    trainer.fit(sft, tiny.Batches([tiny.rated(6, seed) for seed in range(2)]))
    words = (
        rf"{reward_run} was trained on another trunk \({plain_trunk}\): its trunk_fingerprint is "
        r"[0-9a-f]{16}, that of .*trunk is [0-9a-f]{16}\. Give the trunk that it was trained on"
    )
    with pytest.raises(ValueError, match=words):
        perl(folder / "trunk", reward_run)


def test_tilde_paths_are_expanded(
    reward_run: Path, hydra_trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(hydra_trunk, tmp_path / "trunk")
    shutil.copytree(reward_run, tmp_path / "reward")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert HydraSFT("~/trunk").trunk.fingerprint() == load_trunk(str(hydra_trunk)).fingerprint()
    for layout, reward in (("hydra", None), ("perl", "~/reward"), ("dynamic_lora", "~/trunk")):
        tiny.hydra(Path("~/trunk"), layout=layout, reward=reward)
    with pytest.raises(FileNotFoundError, match="trunk: ~/nothing is no model folder"):
        SFT("~/nothing")
    with pytest.raises(ValueError, match=f"There is no folder {tmp_path}/nothing"):
        perl("~/trunk", "~/nothing")


def test_pad_token_without_an_embedding_row_is_not_fed(hydra_trunk: Path, tmp_path: Path) -> None:
    shutil.copytree(hydra_trunk, tmp_path / "trunk")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "trunk")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "trunk")
    modules = [tiny.hydra(folder) for folder in (tmp_path / "trunk", hydra_trunk)]
    trunk = modules[0].policy_trunk
    assert (trunk.tokenizer.pad_token_id, trunk.vocabulary_size) == (tiny.WORDS, tiny.WORDS)
    ours, theirs = (module.collect(tiny.prompts(8), 0) for module in modules)
    assert not bool(ours.response_mask.all())
    assert int(ours.response_ids.max()) < tiny.WORDS
    assert torch.equal(ours.response_ids, theirs.response_ids)
    trainer, folder = tiny.fit(
        modules[0], tmp_path, [tiny.prompts(6)], held_out=[tiny.prompts(3, 1)]
    )
    assert trainer.global_step == 1
    trainer, folder = tiny.fit(SFT(str(tmp_path / "trunk"), tiny.LORA), tmp_path, [tiny.rated(5)])
    assert json.loads((folder / "trunk" / "manifest.json").read_text())["pad_id"] == 0


BOTH = r"\['reference trunk', 'reward trunk'\]"


# ---- the end of a run ----------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "learned"), [(8, 8), (9, 12), (1, 4)])
def test_finished_run_learns_nothing_more(
    limit: int, learned: int, hydra_trunk: Path, tmp_path: Path
) -> None:
    batches = [tiny.prompts(4, seed) for seed in range(5)]
    module = tiny.hydra(hydra_trunk, max_episodes=limit)
    trainer, folder = tiny.fit(module, tmp_path, batches, max_epochs=3)
    assert (module.episodes, trainer.global_step) == (learned, learned // 4)
    (path,) = (folder / "checkpoints").glob("*.ckpt")
    again, kept = tiny.hydra(hydra_trunk, max_episodes=limit), Kept()
    later, folder = tiny.fit(again, tmp_path, batches, kept, ckpt_path=path, max_epochs=3)
    assert (again.episodes, again.rollout_index) == (learned, learned // 4)
    assert again.tokens == module.tokens
    assert later.global_step == learned // 4
    assert kept.weights == []
    assert tiny.changed(tiny.weights(module), again) == set()
    assert (folder / "adapters" / "actor" / "adapter_model.safetensors").is_file()
    # With a higher limit it goes on from there.
    longer = tiny.hydra(hydra_trunk, max_episodes=learned + 1)
    tiny.fit(longer, tmp_path, batches, ckpt_path=path, max_epochs=3)
    assert longer.episodes == learned + 4
    assert tiny.changed(tiny.weights(module), longer) == module.trainable_names()


@pytest.mark.parametrize("layout", ["full", "hydra"])
@pytest.mark.parametrize("validated", [True, False])
def test_reference_that_moves_stops_the_run(
    validated: bool, layout: str, hydra_trunk: Path, tmp_path: Path
) -> None:
    moved = r"\['reference trunk'\]" if layout == "full" else BOTH
    words = f"{moved} has other weights than when training started, so scores and KL"
    module = tiny.hydra(hydra_trunk, layout=layout)
    weight = module.roles.trunk("reference").lm_head.weight.data
    moves = LambdaCallback(on_train_batch_end=lambda *_: weight[0, 0].add_(0.5))
    held_out = [tiny.prompts(3, 1)] if validated else None
    with pytest.raises(RuntimeError, match=words):
        tiny.fit(module, tmp_path, [tiny.prompts(4)], moves, held_out=held_out)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_trunk_exchanged_before_a_resume_stops_the_run(hydra_trunk: Path, tmp_path: Path) -> None:
    _, folder = tiny.fit(tiny.hydra(hydra_trunk), tmp_path, [tiny.prompts(4)])
    (path,) = (folder / "checkpoints").glob("*.ckpt")
    shutil.copytree(hydra_trunk, tmp_path / "trunk")
    weights = load_file(tmp_path / "trunk" / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 0.5
    save_file(weights, tmp_path / "trunk" / "model.safetensors", metadata={"format": "pt"})
    module = tiny.hydra(tmp_path / "trunk")
    words = r"does not fit PPO, it was trained on others: roles.trunks.0 is \w+, there \w+\. Give"
    with pytest.raises(ValueError, match=words):
        tiny.fit(module, tmp_path, [tiny.prompts(4)], ckpt_path=path, max_epochs=2)
    assert (module.global_step, module.episodes) == (0, 0)


def test_best_checkpoint_that_vanished_is_passed_over(plain_trunk: Path, tmp_path: Path) -> None:
    module = SFT(str(plain_trunk), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    watch = ModelCheckpoint(monitor="val/loss", mode="max")  # the first is the best
    forget = LambdaCallback(on_fit_end=lambda *_: Path(watch.best_model_path).unlink())
    rows = [tiny.rated(6)]
    _, folder = tiny.fit(module, tmp_path, rows, forget, watch, held_out=rows, max_epochs=2)
    stored = load_trunk(str(folder / "trunk")).model.state_dict()
    for name, value in module.trunk.model.state_dict().items():
        assert torch.equal(stored[name], value)


# ---- held-out rows -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        SamplingSpec(max_new_tokens=5, temperature=0.0),
        SamplingSpec(max_new_tokens=5, top_p=0.8),
        SamplingSpec(max_new_tokens=5, top_k=4),
    ],
    ids=["greedy", "top_p", "top_k"],
)
def test_warped_sampling_has_no_kl(spec: SamplingSpec, hydra_trunk: Path, tmp_path: Path) -> None:
    held_out = tiny.Batches([tiny.prompts(5, 1)])
    for sampling, has_kl in ((spec, False), (SamplingSpec(5, temperature=0.7), True)):
        module = tiny.hydra(hydra_trunk, validation_sampling=sampling)
        tiny.train_adapters(module)
        trainer, _ = tiny.quiet_trainer(tmp_path)
        (logged,) = trainer.validate(module, held_out, verbose=False)
        assert ("val/kl" in logged) == has_kl
        answers = module.answer(held_out.batches[0], "policy")
        assert logged["val/score"] == pytest.approx(sum(answers.scores) / 5, rel=1e-5)


@pytest.mark.parametrize("kind", SUPERVISED)
def test_test_rows_are_logged_under_test(kind: str, plain_trunk: Path, tmp_path: Path) -> None:
    module = SUPERVISED[kind](str(plain_trunk))
    rows = tiny.Batches([tiny.rated(6, seed, pairs=1) for seed in range(2)])
    trainer, _ = tiny.quiet_trainer(tmp_path)
    (validated,) = trainer.validate(module, rows, verbose=False)
    (tested,) = trainer.test(module, rows, verbose=False)
    # A test says more than a validation, and the same where both speak.
    assert tested.items() >= {k.replace("val/", "test/"): v for k, v in validated.items()}.items()
    assert "test/loss" in tested
    assert all(key.startswith("test/") for key in tested)


def test_predict_gives_rows_texts_and_scores(hydra_trunk: Path, tmp_path: Path) -> None:
    module = HydraPPO(str(hydra_trunk), lora=tiny.LORA, sampling=tiny.SAMPLING)
    tiny.train_adapters(module)
    batches = [tiny.prompts(3, 1), tiny.prompts(2, 2)]
    trainer, _ = tiny.quiet_trainer(tmp_path)
    predicted = trainer.predict(module, tiny.Batches(batches))
    assert predicted is not None
    assert len(predicted) == 2
    for found, batch in zip(predicted, batches, strict=True):
        assert isinstance(found, dict)
        assert set(found) == {"row", "prompts", "responses", "scores"}
        assert torch.equal(found["row"], batch.row)
        expected = module.answer(batch, "policy")
        assert (found["prompts"], found["responses"]) == (expected.prompts, expected.responses)
        assert found["scores"] == pytest.approx(expected.scores)
    reference = module.answer(batches[0], "reference")
    assert reference.responses != predicted[0]["responses"]  # type: ignore[call-overload]


JUDGED = [tiny.rated(6, 1), tiny.rated(5, 2, pairs=1), tiny.rated(4, 3, imitate=False)]
NOT_JUDGED = [demonstrations(3, 4), demonstrations(7, 5)]
NOT_IMITATED = [tiny.rated(5, seed, pairs=1, imitate=False) for seed in (6, 7)]


@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize(
    "batches",
    [
        [*JUDGED, *NOT_JUDGED],
        [*NOT_JUDGED, *JUDGED],
        [JUDGED[0], NOT_JUDGED[0], JUDGED[2], NOT_JUDGED[1]],
        NOT_JUDGED,
        NOT_IMITATED,
        [*NOT_IMITATED, *NOT_JUDGED],
    ],
    ids=["judged first", "judged last", "mixed", "not judged", "not imitated", "apart"],
)
def test_validation_loss_is_the_sum_of_its_parts(
    batches: list[RatedBatch], stage: str, plain_trunk: Path, tmp_path: Path
) -> None:
    module = HydraSFT(str(plain_trunk), tiny.LORA, reward_weight=0.3)
    tiny.train_adapters(module)
    sums: dict[str, list[float]] = {"lm": [0.0, 0.0], "reward": [0.0, 0.0]}
    for batch in batches:
        with torch.no_grad():
            lm_loss, lm_tokens, reward_loss, _, _ = module.losses(batch)
        rated = int(batch.labelled.sum()) + len(batch.pairs)
        for key, loss, weight in (("lm", lm_loss, int(lm_tokens)), ("reward", reward_loss, rated)):
            sums[key][0] += float(loss) * weight
            sums[key][1] += weight
    trainer, _ = tiny.quiet_trainer(tmp_path)
    run = trainer.validate if stage == "val" else trainer.test
    for _ in range(2):  # the second reads nothing of the first
        (logged,) = run(module, tiny.Batches(batches), verbose=False)
        expected = 0.0
        for key, share in (("lm", 1.0), ("reward", 0.3)):
            total, count = sums[key]
            assert (f"{stage}/{key}_loss" in logged) == (count > 0)
            if count:
                assert logged[f"{stage}/{key}_loss"] == pytest.approx(total / count, rel=1e-5)
                expected += share * logged[f"{stage}/{key}_loss"]
        assert logged[f"{stage}/loss"] == pytest.approx(expected, rel=1e-5)
        assert expected > 0


@pytest.mark.parametrize("broken", [[0, 1], [1]], ids=["every batch", "one batch"])
def test_broken_validation_loss_is_not_the_best(
    broken: list[int], plain_trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = HydraSFT(str(plain_trunk), tiny.LORA)
    losses, batches = module.losses, [tiny.rated(5, seed) for seed in range(2)]

    def diverged(batch: RatedBatch) -> tuple[Any, ...]:
        lm_loss, *rest = losses(batch)
        return (lm_loss * math.nan if int(batch.row[0]) // 100 in broken else lm_loss, *rest)

    monkeypatch.setattr(module, "losses", diverged)
    logged = tiny.measured(module, tmp_path, batches)
    assert math.isnan(logged["val/lm_loss"])
    assert math.isnan(logged["val/loss"])


# ---- texts and gold ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "runs"),
    [
        ([5, 6, 7], [[5, 6, 7]]),
        ([5, 6, 2], [[5, 6]]),
        ([5, 2, 6, 7, 9, 8], [[5], [6, 7], [8]]),
        ([5, 2, 9, 6], [[5], [6]]),
        ([5, 2, 2], [[5]]),
        ([2], [[]]),
        ([], [[]]),
    ],
)
def test_ids_are_split_at_stop_ids(ids: list[int], runs: list[list[int]]) -> None:
    assert split_at(ids, (2, 9)) == runs


def test_prompt_texts_have_a_line_per_turn(hydra_trunk: Path) -> None:
    module = tiny.hydra(hydra_trunk)
    rows = [[1, 5, 6, 2, 7, 2, 8], [5, 2], [6], [7, 17, 8]]  # 17 stops in the generation config
    ids, mask = pad_left(rows, 0)
    answers = module.answer(PromptBatch(ids, mask, torch.arange(4)), "policy")
    assert answers.prompts == ["w5 w6\nw7\nw8", "w5", "w6", "w7\nw8"]
    for response in answers.responses:
        assert "<eos>" not in response
        assert not response.endswith("\n")


def test_gold_of_another_length_is_refused(hydra_trunk: Path, tmp_path: Path) -> None:
    module = tiny.hydra(hydra_trunk, gold=lambda prompts, responses, rows: [1.0])
    words = r"gold \(<lambda>\) gave 1 scores for 4 responses; it must give one each"
    for run in (tiny.measured, tiny.fit):
        with pytest.raises(ValueError, match=words):
            run(module, tmp_path, [tiny.prompts(4)])


def test_what_rounding_explains_depends_on_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    precision = "highest"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert ratio_tolerance(torch.float32, True) == ratio_tolerance(torch.float32, False) == 1e-4
    assert ratio_tolerance(torch.bfloat16, True) > ratio_tolerance(torch.bfloat16, False)
    # TF32: a token read alone and among others differ by more, in float32 only.
    precision = "high"
    assert ratio_tolerance(torch.float32, True) == 2e-2
    assert ratio_tolerance(torch.float64, True) == 1e-9
