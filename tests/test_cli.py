"""The command line: what it finds, what it refuses and in which words, what it leaves behind."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any
from zipfile import ZipFile

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

import lightning_perl
from lightning_perl.cli import config_source, main, packaged_configs, run
from lightning_perl.commands.parsing import load_yaml
from lightning_perl.commands.trained import newest_checkpoint
from lightning_perl.packaged import unpackaged
from tests.conftest import TinyTrunk
from tests.data.orders import prompt_data
from tests.modules import tiny
from tests.test_project import marked_block, project

ROOT = Path(__file__).parents[1]

MODEL: dict[str, Any] = {
    "class_path": "HydraPPO",
    "init_args": {"lora": {"rank": 2}, "sampling": {"max_new_tokens": 3}, "micro_batch_size": 4},
}
REWARD: dict[str, Any] = {"class_path": "RewardModel", "init_args": {"lora": {"rank": 2}}}
DATA = prompt_data()
TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "tiny"}},
}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trunk(tiny_trunk: TinyTrunk) -> str:
    return str(tiny_trunk("llama", max_position_embeddings=512))


def write_yaml(name: str, content: dict[str, Any]) -> str:
    Path(name).write_text(yaml.safe_dump(content), encoding="utf-8")
    return name


def fit(*arguments: str, **parts: dict[str, Any]) -> None:
    """Runs ``fit`` on three config files, one per part."""
    parts = {"model": MODEL, "data": DATA, "trainer": TRAINER} | parts
    configs = [write_yaml(f"{name}.yaml", {name: part}) for name, part in parts.items()]
    flags = [flag for config in configs for flag in ("--config", config)]
    main(["fit", *flags, *arguments])


def rows_of(run: str) -> list[dict[str, str]]:
    with Path(run, "metrics.csv").open(encoding="utf-8", newline="") as file:
        # The first row is the data's report.
        return [row for row in csv.DictReader(file) if not row["data/rows"]]


def exits(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    """Exit status and everything printed."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    printed = capsys.readouterr()
    return stopped.value.code, printed.out + printed.err


# ---- the dry run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "rows", "said"),
    [
        (MODEL, [], "reference off, reward off (layout hydra)"),
        (REWARD, ["--data.rows=rated"], "trained: head"),
    ],
)
def test_a_dry_run_plans_and_keeps_nothing(
    model: dict[str, Any],
    rows: list[str],
    said: str,
    trunk: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    thumbs = [{"prompt": f"tea {n}", "response": "Sure.", "label": n % 2} for n in range(4)]
    settings = DATA["init_args"] | ({"train": thumbs, "val": thumbs} if rows else {})
    extra = [f"--model.trunk={trunk}", *(rows or ["--model.max_episodes=16"])]
    # Callbacks of the run are tried as well, and what they write is not kept.
    extra += [] if rows else ["--trainer.callbacks+=SampleWriter"]
    fit("--dry-run", *extra, model=model, data=DATA | {"init_args": settings})
    printed = capsys.readouterr().out
    assert "GiB at each phase's peak" in printed
    assert said in printed
    assert bool(rows) or "| before" in printed
    assert f"{trunk}: 0.0M parameters, float32" in printed
    length = "one epoch" if rows else "16 episodes, 4 a batch: about"
    assert length in printed
    with pytest.raises(ValueError, match="leave --ckpt_path out"):
        main(["fit", "--dry-run", "--ckpt_path", "last"])
    assert printed.endswith("nothing is kept\n")
    assert {path.suffix for path in Path().iterdir()} == {".yaml"}


# ---- what it finds -------------------------------------------------------------------------------


def test_a_file_wins_over_a_packaged_config(tmp_path: Path) -> None:
    shipped = packaged_configs()
    assert {"quickstart.yaml", "hydra_sft.yaml", "new_trunk.yaml"} <= shipped.keys()
    for name in ("quickstart.yaml", "quickstart", "packaged:quickstart/quickstart.yaml"):
        assert config_source(name) == str(shipped["quickstart.yaml"])
    Path("quickstart.yaml").write_text("{}", encoding="utf-8")
    assert config_source("quickstart.yaml") == "quickstart.yaml"
    assert config_source("quickstart") == str(shipped["quickstart.yaml"])
    # jsonargparse's own kinds of values stay possible.
    for other in ("{trainer: {max_epochs: 1}}", "a:\n  b: 1\n", "https://a.b/c.yaml"):
        assert config_source(other) == other


@pytest.mark.parametrize("flags", [["-c", "quickstart.yaml"], ["--config=quickstart.yaml"]])
def test_every_spelling_of_config_finds_the_packaged_quickstart(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = exits(capsys, "fit", *flags, "--print_config")
    assert code == 0
    assert yaml.safe_load(printed)["model"]["class_path"].endswith("HydraPPO")
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("command", ["fit", "new-trunk"])
def test_a_missing_config_is_named_with_the_packaged_ones(
    command: str,
) -> None:
    words = r"^nope.yaml is no file .*new_trunk.yaml, own/coffee.yaml, .*quickstart.yaml"
    with pytest.raises(FileNotFoundError, match=words):
        main([command, "--config", "nope.yaml"])


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = exits(capsys, "--help")
    assert code == 0
    assert "{fit,validate,test,predict}" in printed
    assert "lightning_perlnew-trunk" in "".join(printed.split())  # wherever its lines break
    code, printed = exits(capsys, "--version")
    assert (code, printed.split()[-1]) == (0, lightning_perl.__version__)
    code, printed = exits(capsys, "new-trunk", "--help")
    assert code == 0
    assert "--vocabulary_size" in printed


# ---- what a run leaves ---------------------------------------------------------------------------


def test_three_configs_compose_and_two_runs_do_not_collide(trunk: str) -> None:
    for version in range(2):
        fit("--model.trunk", trunk)
        run = Path(f"runs/tiny/version_{version}")
        assert (run / "adapters/actor/adapter_model.safetensors").is_file()
        saved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        assert saved["model"]["init_args"]["trunk"] == trunk
        assert len(saved["data"]["init_args"]["train"]) == 8
        assert saved["trainer"]["max_epochs"] == 1
    # Nothing of a run lies outside its folder.
    names = sorted(path.name for path in Path.cwd().iterdir())
    assert names == ["data.yaml", "model.yaml", "runs", "trainer.yaml"]
    first, second = (rows_of(f"runs/tiny/version_{version}") for version in range(2))
    assert [row["rollout/score"] for row in first] == [row["rollout/score"] for row in second]
    assert first[0]["rollout/score"]


def test_a_saved_config_repeats_its_run(trunk: str) -> None:
    fit("--model.trunk", trunk)
    main(["fit", "--config", "runs/tiny/version_0/config.yaml"])
    first, second = (rows_of(f"runs/tiny/version_{version}") for version in range(2))
    assert [row["train/loss"] for row in first] == [row["train/loss"] for row in second]


def test_a_later_config_lies_on_top(trunk: str) -> None:
    # Of the same class: what the later file does not name stays.
    fit("--model.trunk", trunk, "--config", "{model: {init_args: {lora: {rank: 3}}}}")
    adapter = Path("runs/tiny/version_0/adapters/actor/adapter_config.json")
    assert json.loads(adapter.read_text(encoding="utf-8"))["r"] == 3
    saved = yaml.safe_load(Path("runs/tiny/version_0/config.yaml").read_text(encoding="utf-8"))
    assert saved["model"]["init_args"]["micro_batch_size"] == 4


@pytest.mark.parametrize("model", ["RewardModel", "DPO"])
def test_another_class_over_a_yaml_keeps_what_both_have(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = exits(
        capsys, "fit", "--config=quickstart", f"--model={model}", "--print_config"
    )
    assert code == 0
    settings = yaml.safe_load(printed)["model"]["init_args"]
    assert settings["lora"]["alpha"] == 16
    assert settings["optimizer"]["init_args"]["lr"] == 3e-3


def test_yaml_may_merge_twice_and_name_a_number_and_its_text() -> None:
    text = "a: &a {x: 1}\nb: &b {y: 2}\nc:\n  <<: *a\n  <<: *b\nd: {1: a, '1': b}\n"
    assert load_yaml(text)["c"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (b"model: [\n", "while parsing a flow node did not find expected node content at line 2"),
        (b"- model\n", "no settings (KEY: VALUE)"),
        (
            b"trainer:\n  max_epochs: 1\n  max_epochs: 2\n",
            "key 'max_epochs' is there twice at line 3",
        ),
        (b"{model: {class_path: DPO, init_args: {bta: 1}}}", "DPO has no bta; did you mean beta?"),
        (b"\xff\xfe", "is no YAML file: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_what_is_wrong_in_a_config_is_said_with_its_name(
    held: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.yaml").write_bytes(held)
    with pytest.raises((SystemExit, ValueError)) as stopped:
        main(["fit", "--config=quickstart", f"--config={tmp_path}/own.yaml"])
    said = f"{capsys.readouterr().err}{stopped.value}"
    assert "own.yaml" in said
    assert words in said


def test_a_config_may_come_out_of_a_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = Thread(
        target=pipe.write_text, args=["{model: {init_args: {seed: 7}}}" + 300 * " #"], daemon=True
    )
    writer.start()
    for _ in range(2):  # a dry run reads its arguments twice
        _, printed = exits(
            capsys, "fit", "--config=quickstart", f"--config={pipe}", "--print_config"
        )
        assert yaml.safe_load(printed)["model"]["init_args"]["seed"] == 7


def test_runs_without_a_logger_have_folders_too(trunk: str) -> None:
    for version in range(2):
        fit("--model.trunk", trunk, trainer={**TRAINER, "logger": False})
        assert Path(f"version_{version}/config.yaml").is_file()
        assert Path(f"version_{version}/adapters/actor").is_dir()


def test_an_optimizer_is_chosen_in_yaml(trunk: str) -> None:
    settings = {"lr": 1e-3, "weight_decay": 0.0}
    optimizer = {"class_path": "lightning_perl.optim.HostAdamW", "init_args": settings}
    fit("--model.trunk", trunk, "--config", f"{{model: {{init_args: {{optimizer: {optimizer}}}}}}}")
    run = Path("runs/tiny/version_0")
    saved = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["optimizer"]
    assert saved["class_path"] == optimizer["class_path"]
    (path,) = run.glob("checkpoints/*.ckpt")
    (state,) = torch.load(path, weights_only=True)["optimizer_states"]
    assert {name for moments in state["state"].values() for name in moments} == {
        "exp_avg", "exp_avg_sq", "step"
    }  # fmt: skip


def test_resume_and_validate_from_a_checkpoint(trunk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fit("--model.trunk", trunk)
    read: list[str | None] = []
    monkeypatch.setattr(ZipFile, "testzip", lambda file: read.append(file.filename))
    (checkpoint,) = Path("runs/tiny/version_0/checkpoints").glob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["trunk"] == trunk
    later = ("--model.trunk", trunk, "--trainer.max_epochs", "2", "--model.kl_coef", "0.7")
    fit(*later, "--ckpt_path", "last")
    assert [
        row["train/episodes"] for row in rows_of("runs/tiny/version_1") if row["train/episodes"]
    ] == ["12.0", "16.0"]
    assert read == [str(checkpoint)]  # its checksums, once
    # What is given now wins over the checkpoint's.
    saved = yaml.safe_load(Path("runs/tiny/version_1/config.yaml").read_text(encoding="utf-8"))
    assert saved["model"]["init_args"]["kl_coef"] == 0.7
    assert saved["ckpt_path"] == str(checkpoint)
    configs = [flag for name in ("model", "data", "trainer") for flag in ("-c", f"{name}.yaml")]
    main(["validate", *configs, "--model.trunk", trunk, "--ckpt_path", str(checkpoint)])
    (row,) = rows_of("runs/tiny/version_2")
    assert float(row["val/response_tokens"]) > 0
    # The newest is cut short: the one before is taken, or there is none.
    for path in Path("runs/tiny").glob("version_1/checkpoints/*.ckpt"):
        path.write_bytes(path.read_bytes()[:999])
    assert (
        newest_checkpoint(yaml.safe_load(Path("trainer.yaml").read_text())["trainer"], True)
        == checkpoint
    )
    checkpoint.unlink()
    words = r"no checkpoint to go on from in runs/tiny/\*/checkpoints/\*.ckpt.*is not a zip file"
    with pytest.raises(FileNotFoundError, match=words):
        main(["fit", *configs, "--model.trunk", trunk, "--ckpt_path", "last"])
    assert not Path("runs/tiny/version_3").exists()


def test_settings_that_a_resumed_run_cannot_change(trunk: str) -> None:
    fit("--model.trunk", trunk)
    words = "which cannot change: lora.rank is 3, there 2, seed is 1, there 0"
    changed = ["--model.lora.rank", "3", "--model.seed", "1"]
    with pytest.raises(ValueError, match=words):
        fit("--model.trunk", trunk, "--ckpt_path", "last", *changed)
    rows = {**DATA, "init_args": {**DATA["init_args"], "train": DATA["init_args"]["train"][::-1]}}
    with pytest.raises(ValueError, match="other rows: data is 8 rows with digest"):
        fit("--model.trunk", trunk, "--ckpt_path", "last", data=rows)


# How the lines of the quickstart begin that are no part of the data's report.
OURS = (
    "Seed set to", "GPU available", "TPU available", "speed: ", "trained: actor", "`Trainer",
    "handed over in", "talk to it: ",
)  # fmt: skip
DATA_REPORT = ("PreferenceDataModule", "8512 rows", "train: ", "val: ", "test: ", "template: ")


def test_the_quickstart_says_nothing_that_calls_for_no_action(tmp_path: Path) -> None:
    code = (
        "import runpy, sys, lightning_perl.cli\n"
        "assert 'peft' not in sys.modules  # which takes a second\n"
        "runpy.run_module('lightning_perl', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "fit", "--config=quickstart", "--data.batch_size=8"]
    command += ["--model.max_episodes=8", "--trainer.enable_model_summary=true"]
    command += ["--data.val_batch_size=8", "--trainer.limit_val_batches=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert [line for line in lines if not line.startswith(OURS + DATA_REPORT)] == []
    assert lines[-1].startswith("talk to it: ")
    assert "FLOPs" not in done.stdout
    assert (tmp_path / "runs/quickstart/version_0/adapters/actor").is_dir()


# ---- what it refuses, before the first step --------------------------------------------------------


def refused(kind: type[Exception], words: str, *arguments: str, **parts: dict[str, Any]) -> None:
    """The error's own first words, not a dump around them; and no step was made."""
    with pytest.raises(kind, match=rf"^{words}"):
        fit(*arguments, **parts)
    assert not list(Path.cwd().rglob("metrics.csv"))
    assert not list(Path.cwd().rglob("*.ckpt"))


def test_a_missing_trunk_folder() -> None:
    sft = {"class_path": "SFT", "init_args": {"trunk": "runs/nope/version_0/trunk"}}
    refused(
        FileNotFoundError,
        r"trunk: runs/nope/version_0/trunk is no model folder \(no config.json there\)",
        "--data.rows=rated",
        model=sft,
    )
    refused(
        FileNotFoundError,
        "packaged:nope: lightning_perl ships no such",
        "--model.trunk=packaged:nope",
    )
    with pytest.raises(
        (FileNotFoundError, ValueError), match=r"^(trunk: )?runs/nope/version_0/trunk"
    ):
        fit("--model.trunk", "runs/nope/version_0/trunk")


def test_a_trunk_without_a_reward_head(tmp_path: Path) -> None:
    bare = tiny.save_trunk(tmp_path / "bare")
    words = rf"{bare} has no reward head \(found: no heads file\). Train one first: `HydraSFT`"
    refused(ValueError, words, "--model.trunk", str(bare))


PRECISION = r"trainer.precision must stay 32-true, got '{}'.*model.init_args.trunk_dtype: bfloat16"


@pytest.mark.parametrize(
    ("kind", "words", "arguments"),
    [
        (
            ValueError,
            "HydraPPO is PPO with layout hydra; got layout 'perl'. Use the class PPO",
            "--model.layout=perl",
        ),
        (MisconfigurationException, PRECISION.format("bf16-true"), "--trainer.precision=bf16-true"),
        (
            MisconfigurationException,
            PRECISION.format("bf16-mixed"),
            "--trainer.precision=bf16-mixed",
        ),
        (ValueError, "lora.dropout must be 0 in RL, got 0.1", "--model.lora.dropout=0.1"),
    ],
)
def test_arguments_are_refused_in_their_own_words(
    trunk: str, kind: type[Exception], words: str, arguments: str
) -> None:
    refused(kind, words, "--model.trunk", trunk, arguments)


def own_data(text: str | None, **arguments: Any) -> dict[str, Any]:
    if text is not None:
        Path("rows.jsonl").write_text(text, encoding="utf-8")
    return {
        "class_path": "PreferenceDataModule",
        "init_args": {"train": "rows.jsonl", "val_fraction": 0.0, "batch_size": 1, **arguments},
    }


GOOD = '{"prompt": "hi", "response": "hello", "label": 1}\n'


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        (None, {}, r"No file 'rows.jsonl' \(data.train.*Give the path"),
        (
            GOOD + '{"prompt": "hi", "label": 1}\n',
            {},
            "rows.jsonl:2: missing column: got .*'label'",
        ),
        (GOOD + '{"prompt": "hi",\n', {}, "rows.jsonl:2: broken JSON"),
        (
            GOOD + '{"prompt": "hi", "response": " ", "label": 0}\n',
            {},
            "rows.jsonl:2: empty answer. Remove the row, or set on_bad_row: reject",
        ),
        (
            GOOD + json.dumps({"prompt": "tea " * 99, "response": "no", "label": 0}) + "\n",
            {"max_tokens": 40, "max_response_tokens": 20},
            "rows.jsonl:2: prompt longer than the window: its last turn takes .* the limit is 20",
        ),
    ],
)
def test_bad_rows_name_file_line_and_fix(
    trunk: str, text: str | None, arguments: dict[str, Any], words: str
) -> None:
    reward = {"class_path": "RewardModel", "init_args": {"trunk": trunk}}
    kind = FileNotFoundError if text is None else ValueError
    refused(kind, words, model=reward, data=own_data(text, **arguments))


# ---- as a process --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--model.score_clip=-1", "model.score_clip must be above 0 and finite or null, got -1"),
        ("--model.lora.alpha=0", "model.lora.alpha must be above 0 and finite, got '0'"),
        ("--model.lora.rank=x", "model.lora.rank must be at least 1, got 'x'"),
        ("--data.rows=promts", "data.rows must be Literal['rated', 'prompts'], got promts"),
        ("--trainer.max_steps=x", "trainer.max_steps must be int, got x"),
        ("--config={model: {init_args: {trunk: 3}}}", "model.trunk must be str, got 3"),
        ("--model.score_clp=1", "HydraPPO has no score_clp; did you mean score_clip?"),
        ("--model.lora.rnk=1", "models.adapters.LoraSpec has no rnk; did you mean rank?"),
        ("--config={modle: 1}", "does not accept option 'modle'; did you mean model?"),
        ("--model=HydraPP", "model: there is no class HydraPP; did you mean HydraPPO?"),
        (
            "--model.scheduler.gamma=0.5",
            "model.scheduler.gamma: name its class first, as in --model.scheduler=StepLR",
        ),
        (
            "--config={model: {init_args: {optimizer: {class_path: Adamw}}}}",
            "model.optimizer: there is no class Adamw; did you mean AdamW?",
        ),
        (
            "--trainer.max_epoch=4",
            "there is no --trainer.max_epoch; did you mean trainer.max_epochs?",
        ),
    ],
)
def test_a_wrong_word_costs_one_line(
    arguments: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config=quickstart", arguments])
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert error.endswith(f"{line} (all settings: python -m lightning_perl fit --help)")


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        ("--model=SFT --model.optimizer=torch.optim.AdamW --model.optimizer.lr=1e-4", 0),
        ("--model=SFT --model.optimizer torch.optim.AdamW --model.optimizer.init_args.lr 1e-4", 0),
        ("--config=quickstart --model.init_args.optimizer.lr 1e-4", 0),
        # The default optimizer is a function without settings.
        ("--model=SFT --model.optimizer.lr=1e-4", 2),
    ],
)
def test_a_learning_rate_is_given_as_lightning_users_do(
    flags: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped, printed = exits(capsys, "fit", *flags.split(), "--print_config")
    assert stopped == code
    if code == 0:
        optimizer = yaml.safe_load(printed)["model"]["init_args"]["optimizer"]
        assert optimizer["class_path"] == "torch.optim.AdamW"
        assert optimizer["init_args"]["lr"] == 1e-4
    else:
        assert "name its class first, as in --model.optimizer=torch.optim.AdamW" in printed


def test_a_printed_config_can_be_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [
        "--model=SFT",
        "--model.trunk=packaged:quickstart/trunk",
    ]  # its optimizer is a function
    with pytest.raises(SystemExit):
        main(
            [
                "fit",
                *model,
                "--data=PreferenceDataModule",
                "--data.train=rows.jsonl",
                "--print_config",
            ]
        )
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        main(["fit", f"--config={tmp_path}/printed.yaml", "--print_config"])
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--trainer.strategy=fsdp", "trainer.strategy FSDPStrategy cannot train .*: it wraps the"),
        (
            "--trainer.strategy=deepspeed_stage_2",
            "DeepSpeedStrategy cannot train .*steps the optim",
        ),
        ("--trainer.strategy=ModelParallelStrategy", "ModelParallelStrategy .*Leave it at auto"),
        ("--model.trunk_sharding=shard", "trunk_sharding is shard, and there is one device only"),
        ("--trainer.precision=bf16-mixed", "trainer.precision must stay 32-true"),
        ("--data.rows=rated", "HydraPPO learns from prompts, but data.rows is 'rated'"),
        ("--optimizer=torch.optim.SGD", "--optimizer would replace the module's parameter groups"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "estimate"])
def test_what_needs_neither_data_nor_weights_is_refused_first(
    command: str, flag: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [
        command,
        "--config=quickstart",
        "--model.trunk=is/not/read",
        "--data.train=nor_this.jsonl",
        flag,
    ]
    monkeypatch.setattr("sys.argv", ["lightning_perl", *given])
    with pytest.raises(SystemExit, match=f"^error: .*{words}"):
        run()


def test_a_file_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    given = ["new-trunk", "--config=new_trunk", f"--folder={tmp_path}/file/trunk"]
    monkeypatch.setattr("sys.argv", ["lightning_perl", *given])
    with pytest.raises(SystemExit, match=r"^error: .*file/trunk cannot be written: .*Name a place"):
        run()
    given = ["report", str(tmp_path), f"--out={tmp_path}/file/page.html"]
    (tmp_path / "metrics.csv").write_text("step\n1\n")
    monkeypatch.setattr("sys.argv", ["lightning_perl", *given])
    with pytest.raises(SystemExit, match=r"^error: .*Not a directory: .*file/page.html"):
        run()


def test_the_readme_s_three_commands_run_as_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def typed(_: str) -> str:
        if not lines:
            raise EOFError
        return lines.pop()

    lines = ["a large tea please"]
    monkeypatch.setattr("builtins.input", typed)
    page = (ROOT / "README.md").read_text("utf-8")
    small = ["--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1"]
    small += [
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--data.batch_size=4",
    ]
    for command in marked_block(page, "own-commands").splitlines():
        program, *words = shlex.split(command)
        assert program in project()["scripts"]
        few = small + ["--model.max_episodes=16"] * ("--model.max_episodes" in words)
        main([*words, *(few if words[0] == "fit" else [])])
    assert "policy, score" in capsys.readouterr().out
    (loading,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    exec(loading.replace("TRUNK", unpackaged("packaged:quickstart/trunk")))
