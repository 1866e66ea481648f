"""Every YAML that the repository offers runs, in a tiny form, in a folder of its own."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_perl.cli import main
from lightning_perl.models.heads import load_head
from lightning_perl.models.loading import load_trunk
from tests.conftest import TinyTrunk
from tests.data import corpus_files, taskmaster_files
from tests.data.orders import orders

ROOT = Path(__file__).parents[1]
# A link and its target are one config.
FOUND = [*ROOT.glob("lightning_perl/quickstart/**/*.yaml"), *ROOT.glob("configs/**/*.yaml")]
CONFIGS = sorted({path.resolve() for path in FOUND})


def content(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def kind(path: Path) -> str:
    """Tells what a YAML is for by its keys; one that fits nothing is an error, not a skipped test."""
    keys = content(path).keys()
    if path.parent.name == "recipes":
        return "real"  # see test_recipes.py
    if {"model", "data", "trainer"} <= keys:
        return "fit"
    if keys == {"model", "data"}:
        return "layer"
    if {"model", "trainer"} <= keys:
        return "recipe"
    if keys == {"data"}:
        return "data"
    if {"folder", "data"} <= keys:
        return "new-trunk"
    if keys == {"trainer"} and path.parent == ROOT / "configs" / "loggers":
        return "logger"
    raise AssertionError(f"{path}: no test knows how to run a config with the keys {sorted(keys)}")


def of_kind(name: str) -> pytest.MarkDecorator:
    """Runs a test on each config of a kind."""
    chosen = [path for path in CONFIGS if kind(path) == name]
    assert chosen, f"no config of the kind {name}: its test would pass on nothing"
    ids = [path.relative_to(ROOT).as_posix() for path in chosen]
    return pytest.mark.parametrize("path", chosen, ids=ids)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths of the configs, such as ``runs``, lie in the test's own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    taskmaster_files.save_corpora(folder)
    return corpus_files.save_corpora(folder)


def tiny_data(config: dict[str, Any], corpora: Path) -> dict[str, Any]:
    """Arguments that make a config's data small; the tests' tokenizer makes long rows."""
    name = config["data"]["class_path"].rpartition(".")[2]
    arguments = config["data"]["init_args"]
    small: dict[str, Any] = {"max_tokens": 300, "max_response_tokens": 128}
    if name in ("PreferenceDataModule", "MixedDataModule"):
        small["train"] = str(corpora / Path(arguments["train"]).name)
    else:
        small["data_dir"] = str(corpora)
    for split in ("train", "val", "test", "texts"):
        source = str(arguments.get(split, ""))
        if source.startswith("packaged:"):
            count = 16 if split == "train" else 4
            rows = orders(Path(source).name.removesuffix(".jsonl.gz"), count)
            # The first training rows have no thumb.
            more = orders("rated_val", 8) if source.endswith("rated_train.jsonl.gz") else []
            small |= {split: [*rows, *more], "max_response_tokens": 150}
    return small


def tiny_model(arguments: dict[str, Any], trunk: Path) -> dict[str, Any]:
    """Arguments that run a model on a random trunk."""
    model: dict[str, Any] = {"trunk": str(trunk)}
    if "sampling" in arguments:
        model["sampling"] = {"max_new_tokens": 4}
    if "reward" in arguments:
        # The trunk's own head scores then, in every layout.
        model["reward"] = None
    return model


TINY_TRAINER: dict[str, Any] = {
    "accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1,
    "val_check_interval": 2, "log_every_n_steps": 1, "enable_progress_bar": False,
}  # fmt: skip


def tiny_fit(
    path: Path, trunk: Path, corpora: Path, data: Path | None = None, **model: object
) -> list[str]:
    """Arguments of a short run of a config on a random trunk, its data its own or another YAML's."""
    config = content(path)
    rows = content(data or path)
    tiny: dict[str, Any] = {
        "data": {"init_args": {**tiny_data(rows, corpora), "batch_size": 4}},
        "trainer": dict(TINY_TRAINER),
    }
    if "model" in config:
        tiny["model"] = {"init_args": tiny_model(config["model"]["init_args"], trunk)}
    else:
        tiny["model"] = model
        logger = {"save_dir": "runs", "name": path.stem}
        tiny["trainer"]["logger"] = {"class_path": "CSVLogger", "init_args": logger}
    Path("tiny.yaml").write_text(yaml.safe_dump(tiny), encoding="utf-8")
    sources = [str(file) for file in (path, data) if file is not None]
    layers = [argument for file in sources for argument in ("--config", file)]
    return ["fit", *layers, "--config", "tiny.yaml"]


def run_of(config: dict[str, Any], version: int = 0) -> Path:
    """The folder that the config's CSVLogger gives its run."""
    logger = config["trainer"]["logger"]["init_args"]
    return Path(logger["save_dir"], logger["name"], f"version_{version}")


def assert_finite(run: Path, key: str) -> list[float]:
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        values = [float(row[key]) for row in csv.DictReader(file) if row.get(key)]
    assert values
    assert all(map(math.isfinite, values))
    return values


def assert_loads(run: Path, trunk: Path) -> None:
    """What a run hands over is there, and loads as the next stage or a plain PEFT user loads it."""
    adapters = sorted(run.glob("adapters/*"))
    assert adapters or (run / "trunk").is_dir()
    for folder in adapters:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trunk), folder)
        assert model.peft_config["default"].peft_type == "LORA"
    if (run / "trunk").is_dir():
        written, start = load_trunk(str(run / "trunk")), load_trunk(str(trunk))
        assert written.vocabulary_size == start.vocabulary_size


@pytest.fixture(scope="module")
def trunk(tiny_trunk: TinyTrunk) -> Path:
    return tiny_trunk("llama", max_position_embeddings=512)


@of_kind("fit")
def test_fit_config_runs_and_hands_over(path: Path, trunk: Path, corpora: Path) -> None:
    main(tiny_fit(path, trunk, corpora))
    run = run_of(content(path))
    assert_finite(run, "train/loss")
    if "sampling" in content(path)["model"]["init_args"]:
        assert len(assert_finite(run, "rollout/score")) == 2
    assert_loads(run, trunk)
    saved = content(run / "config.yaml")
    assert saved["model"]["init_args"]["trunk"] == str(trunk)
    assert saved["trainer"]["limit_train_batches"] == 2


def test_inpo_beside_a_preference_file(trunk: Path) -> None:
    page = (ROOT / "docs/methods.md").read_text("utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    prompts = orders("prompts_train", 8)
    pairs = [{**row, "chosen": "two lattes", "rejected": "a mocha"} for row in prompts]
    for name, rows in (("prompts", prompts), ("preferences", pairs)):
        Path(f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    recipe = {**content(ROOT / "configs/relatives/inpo.yaml"), **yaml.safe_load(block)}
    small = {"max_tokens": 300, "max_response_tokens": 128, "batch_size": 4, "texts_batch_size": 3}
    tiny = {
        "data": {"init_args": small},
        "model": {"init_args": tiny_model(recipe["model"]["init_args"], trunk)},
        "trainer": TINY_TRAINER,
    }
    for name, part in (("inpo", recipe), ("tiny", tiny)):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(part), "utf-8")
    main(["fit", "--config", "inpo.yaml", "--config", "tiny.yaml"])
    assert_finite(run_of(recipe), "train/log_odds")


@of_kind("data")
def test_data_config_feeds_a_model(path: Path, trunk: Path, corpora: Path) -> None:
    learners = {"tldr": "SFT", "dialogsum": "SFT", "bolt": "PPO"}
    arguments: dict[str, Any] = {"trunk": str(trunk)}
    if path.stem == "bolt":
        arguments["sampling"] = {"max_new_tokens": 4}
    learner = learners.get(path.stem, "RewardModel")
    main(tiny_fit(path, trunk, corpora, class_path=learner, init_args=arguments))
    assert_finite(Path("runs", path.stem, "version_0"), "train/loss")


@of_kind("recipe")
@pytest.mark.parametrize("data", ["hh_harmless", "coffee"])
def test_recipe_runs_on_pairs_and_on_thumbs(
    path: Path, data: str, trunk: Path, corpora: Path
) -> None:
    main(tiny_fit(path, trunk, corpora, ROOT / f"configs/data/{data}.yaml"))
    run = run_of(content(path))
    assert_finite(run, "train/loss")
    assert_loads(run, trunk)


def test_perls_reward_recipe_steps_on_128_rows_of_every_reward_corpus() -> None:
    trainer = content(ROOT / "configs/reward/perl.yaml")["trainer"]
    for path in (ROOT / "configs/data").glob("*.yaml"):
        batch = content(path)["data"]["init_args"]["batch_size"]
        assert batch * trainer["accumulate_grad_batches"] == 128, path


@of_kind("new-trunk")
def test_new_trunk_config_runs(path: Path, corpora: Path) -> None:
    config = content(path)
    tiny = {"vocabulary_size": 300, "hidden_size": 16, "layers": 1, "heads": 2}
    data = {"data": {"init_args": tiny_data(config, corpora)}}
    Path("tiny.yaml").write_text(yaml.safe_dump(tiny | data), encoding="utf-8")
    command = ["new-trunk", "--config", str(path), "--config", "tiny.yaml"]
    main(command)
    folder = Path(config["folder"])
    trunk = load_trunk(str(folder))
    assert (trunk.vocabulary_size, trunk.hidden_size) == (300, 16)
    assert trunk.window == config["window"]
    # The tokenizer has seen the corpus: a frequent word is fewer tokens than letters.
    assert len(AutoTokenizer.from_pretrained(folder).encode("Agent")) < len("Agent")
    with pytest.raises(FileExistsError, match="exists already; name another folder"):
        main(command)


def outputs(path: Path) -> set[str]:
    """Folders that a run of the config leaves for later stages."""
    config = content(path)
    if kind(path) == "new-trunk":
        return {config["folder"]}
    if kind(path) in ("logger", "data", "layer"):
        return set()
    run = run_of(config)
    return {(run.with_name("latest") / name).as_posix() for name in ("trunk", "adapters/reward")}


@of_kind("fit")
def test_folders_that_a_config_reads_are_what_another_writes(path: Path) -> None:
    written = {folder for other in CONFIGS if other != path for folder in outputs(other)}
    arguments = content(path)["model"]["init_args"]
    read = {arguments[name] for name in ("trunk", "reward") if name in arguments}
    # TRUNK is a model of the user's own.
    read -= {folder for folder in read if folder.startswith("packaged:") or folder == "TRUNK"}
    assert read <= written


def test_hydra_sft_config_hands_a_reward_head_to_hydra_ppo(trunk: Path, corpora: Path) -> None:
    sft, ppo = (ROOT / "configs/taskmaster" / f"hydra_{name}.yaml" for name in ("sft", "ppo"))
    main(tiny_fit(sft, trunk, corpora))
    written = Path(content(ppo)["model"]["init_args"]["trunk"])
    assert len(load_head(written, "reward").weight) == 32
    main(tiny_fit(ppo, written, corpora))
    adapter = run_of(content(ppo)) / "adapters/actor/adapter_config.json"
    assert json.loads(adapter.read_text("utf-8"))["base_model_name_or_path"] == str(written)


def test_packaged_configs_are_relative_links_in_configs() -> None:
    own = [f"own/{name}.yaml" for name in ("coffee", "reward_model", "rloo")]
    for name in ("quickstart.yaml", *own):
        link = ROOT / "configs" / name
        assert link.readlink() == Path(
            "../" * name.count("/"), "../lightning_perl/quickstart", name
        )
        assert link.resolve() in CONFIGS


def test_a_yaml_of_an_unknown_kind_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text("model: {class_path: SFT}\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"odd.yaml: no test knows .* keys \['model'\]"):
        kind(path)


@of_kind("logger")
def test_logger_config_lies_on_top_of_a_run(
    path: Path, trunk: Path, corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    arguments = tiny_fit(ROOT / "configs" / "quickstart.yaml", trunk, corpora)
    for _ in range(2):
        main([*arguments, "--config", str(path)])
        # A W&B run lasts as long as its process, and here two share one.
        wandb.finish()
    # One that goes on is the same W&B run.
    main([*arguments, "--config", str(path), "--ckpt_path", "last"])
    wandb.finish()
    logger = content(path)["trainer"]["logger"]["init_args"]
    folder = Path(logger["save_dir"], logger["project"])
    runs = sorted(path for path in folder.iterdir() if not path.is_symlink())
    assert len(runs) == 2
    newest = (folder / "latest").resolve()
    for run in runs:
        assert (run / "adapters/actor/adapter_config.json").is_file()
        saved = content(run / "config.yaml")["trainer"]["logger"]
        assert saved["class_path"].endswith("WandbLogger")
        logged, *continued = sorted(
            Path(logger["save_dir"], "wandb").glob(f"offline-run-*-{run.name}")
        )
        assert len(continued) == (run.resolve() == newest)
        tables = sorted(logged.rglob("samples_*.table.json"))
        lines = (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        last = [list(json.loads(line).values()) for line in lines[-4:]]
        rows = [json.loads(table.read_text(encoding="utf-8"))["data"] for table in tables]
        assert last in rows
        charts = {path.parent.name for path in logged.rglob("*score_table_*.table.json")}
        assert "rollout" in charts, "no score over KL"
        (memory,) = logged.rglob("by_phase_table_*.table.json")
        measured = json.loads(memory.read_text(encoding="utf-8"))["data"]
        assert "rollout_resident" in dict(measured)
