"""Contestants against the same answers by plain PEFT, judges, references, and refusals."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lightning_perl.cli import main
from lightning_perl.commands.compare import questions_of
from lightning_perl.data import PreferenceDataModule
from lightning_perl.models import roles
from lightning_perl.models.adapters import LoraSpec
from lightning_perl.models.heads import ScalarHead, save_heads
from lightning_perl.models.loading import load_trunk
from lightning_perl.models.manifest import write_adapter_manifest
from lightning_perl.models.trunk import Trunk
from lightning_perl.packaged import unpackaged
from lightning_perl.rewards.coffee_orders import CoffeeOrderQuality
from tests.conftest import TinyTrunk
from tests.data.orders import orders, prompt_data

TRUNK = unpackaged("packaged:quickstart/trunk")
GOLD = "lightning_perl.rewards.coffee_orders.CoffeeOrderQuality"
DOCS = Path(__file__).parents[2] / "docs" / "compare.md"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of the packaged trunk: two policies, one of them trained on the reward that is the third."""
    made: dict[str, Path] = {}
    for number, name in enumerate(("reward", "ppo", "dpo")):
        trunk = load_trunk(TRUNK)
        trunk.adapters.add(name, LoraSpec(2, 4.0), number)
        generator = torch.Generator().manual_seed(number)
        for weight in trunk.adapters.parameters(name):
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
        made[name] = tmp_path_factory.mktemp(name)
        trunk.adapters.save(name, made[name], TRUNK)
        head = ScalarHead(trunk.hidden_size, seed=5)
        if name == "reward":
            save_heads(made[name], {"reward": head})
        write_adapter_manifest(
            made[name], trunk, [head.fingerprint(), GOLD] if name == "ppo" else ()
        )
    return made


def few_prompts(**changes: Any) -> dict[str, Any]:
    """Arguments of data with five held-out prompts, as long as the packaged trunk can read."""
    return {**prompt_data(val=5)["init_args"], "max_tokens": 80, **changes}


def compared(contestants: dict[str, Path], **changes: Any) -> tuple[dict[str, Any], list[Any]]:
    """What ``compare`` writes."""
    config: dict[str, Any] = {
        "out": "out",
        "trunk": TRUNK,
        "adapters": {name: str(folder) for name, folder in contestants.items()},
        "data": {"class_path": "PreferenceDataModule", "init_args": few_prompts()},
        "sampling": {"max_new_tokens": 12},
        "batch_size": 2,
        **changes,
    }
    Path("compare.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    main(["compare", "--config", "compare.yaml"])
    lines = Path(config["out"], "answers.jsonl").read_text("utf-8").splitlines()
    result = Path(config["out"], "compare.json").read_text("utf-8")
    return json.loads(result), [*map(json.loads, lines)]


def test_greedy_answers_are_plain_pefts_on_one_trunk(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def counted(source: str, **settings: Any) -> Trunk:
        loaded.append(source)
        return load_trunk(source, **settings)

    monkeypatch.setattr(roles, "load_trunk", counted)
    result, lines = compared(
        {"ppo": folders["ppo"], "v1.0": folders["dpo"]},
        sampling={"max_new_tokens": 12, "temperature": 0},
        reward_function={"class_path": GOLD},
    )
    assert loaded == [TRUNK]
    assert len(lines) == 5
    asked = questions_of(PreferenceDataModule(TRUNK, **few_prompts()))
    bare: Any = AutoModelForCausalLM.from_pretrained(TRUNK)
    for name, folder in (("reference", None), ("ppo", folders["ppo"]), ("v1.0", folders["dpo"])):
        model: Any = PeftModel.from_pretrained(bare, folder) if folder else bare
        for line, question in zip(lines, asked, strict=True):
            written = model.generate(
                input_ids=torch.tensor([question.ids]), do_sample=False, max_new_tokens=12
            )
            answer = line["answers"][name]
            assert answer["ids"] == written[0, len(question.ids) :].tolist()
            (score,) = CoffeeOrderQuality()([line["prompt"]], [answer["response"]], [0])
            assert answer["score"] == pytest.approx(score)
            assert answer["kl"] is None
        bare = model.unload() if folder else bare
    assert not Path("out/frontier.png").exists()
    assert "kl" not in result["contestants"]["ppo"]
    assert result["about"][0].startswith("5 prompts of the validation rows, temperature 0, top_p 1")
    assert "KL is known for" in result["about"][0]


def test_all_see_the_same_noise_and_the_kl_is_the_log_ratio(folders: dict[str, Path]) -> None:
    names = {"dpo": folders["dpo"], "ppo": folders["ppo"], "again": folders["ppo"]}
    result, lines = compared(names, trunk_dtype="float64")
    bare = AutoModelForCausalLM.from_pretrained(TRUNK).double()
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TRUNK), folders["ppo"])
    data = PreferenceDataModule(TRUNK, **few_prompts())
    for line, question in zip(lines, questions_of(data), strict=True):
        answer = line["answers"]["ppo"]
        assert answer == line["answers"]["again"]
        assert line["answers"]["reference"]["kl"] == 0
        ids = torch.tensor([question.ids + answer["ids"]])
        with torch.no_grad():
            logprobs = [
                model(ids).logits[0, len(question.ids) - 1 : -1].log_softmax(-1)
                for model in (policy.double(), bare)
            ]
        chosen = [p.gather(1, torch.tensor(answer["ids"])[:, None]).sum() for p in logprobs]
        assert_close(answer["kl"], float(chosen[0] - chosen[1]), rtol=1e-4, atol=1e-5)
    measures = result["contestants"]
    assert list(measures) == ["reference", *names]
    mean = sum(line["answers"]["ppo"]["kl"] for line in lines) / 5
    assert measures["ppo"]["kl"] == pytest.approx(mean)
    assert measures["ppo"] == measures["again"] != measures["dpo"]
    low, high = measures["dpo"]["win_rate_interval"]
    assert low <= measures["dpo"]["win_rate"] <= high
    assert Path("out/frontier.png").stat().st_size > 1000
    settings = {"trunk_dtype": "float64", "out": "alone", "prompts": 3}
    result, alone = compared({"dpo": folders["dpo"]}, **settings)
    assert result["about"][0].startswith("3 prompts")
    for line, other in zip(alone, lines[:3], strict=True):
        found, expected = line["answers"]["dpo"], other["answers"]["dpo"]
        assert found["ids"] == expected["ids"]
        assert found["score"] == pytest.approx(expected["score"])


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (
            {"reward": "reward"},
            "the training reward of ppo, held out from dpo, unknown for old",
        ),
        ({"reward_function": {"class_path": GOLD}}, "the training reward of ppo, held out from"),
        ({}, "the trunk's own reward head, held out from ppo and dpo, unknown"),
        ({"reward": TRUNK}, "held out from ppo and dpo"),
    ],
)
def test_the_judge_is_named_with_those_who_trained_on_it(
    folders: dict[str, Path], judge: dict[str, Any], said: str
) -> None:
    old = Path(shutil.copytree(folders["dpo"], "old"))
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["rewarded_by"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    if judge.get("reward") == "reward":
        judge = {"reward": str(folders["reward"])}
    adapters = {"ppo": folders["ppo"], "dpo": folders["dpo"], "old": old}
    result, _ = compared(adapters, **judge, prompts=2)
    assert said in result["about"][1]


def test_rated_rows_ask_their_prompts_and_bring_references(folders: dict[str, Path]) -> None:
    rows = [{**row, "label": number % 2} for number, row in enumerate(orders("rated_val", 4))]
    rows.append({**rows[1], "response": "Right away, one of those.", "label": 1})
    settings = few_prompts(train=rows, val=rows, keep_conflicts=True)
    result, lines = compared(
        {"dpo": folders["dpo"]},
        data={"class_path": "PreferenceDataModule", "init_args": {**settings, "rows": "rated"}},
    )
    bare = [{"prompt": row["prompt"]} for row in rows]
    plain = questions_of(PreferenceDataModule(TRUNK, **{**settings, "val": bare}))
    rated = questions_of(PreferenceDataModule(TRUNK, **{**settings, "rows": "rated"}))
    assert [question.ids for question in rated] == [question.ids for question in plain]
    expected: dict[str, list[str]] = {}
    for row in rows:
        good = expected.setdefault(json.dumps(row["prompt"]), [])
        good.extend([row["response"]] * row["label"])
    assert [[text.strip() for text in line["references"]] for line in lines] == [*expected.values()]
    assert 0 <= result["contestants"]["dpo"]["rouge_l"] <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "."}, "exists already"),
        ({"adapters": {}}, "at least one adapter folder"),
        ({"adapters": {"reference": "x"}}, "none of them 'reference'"),
        ({"adapters": {"ppo": "nowhere"}}, "nowhere is no adapter folder"),
        ({"reward": "x", "reward_function": {"class_path": GOLD}}, "one judge"),
        ({"adapters": {"judge": "reward"}}, "is a reward adapter, which answers nothing"),
        ({"adapters": {"broken": "broken"}}, "broken has weights that are not finite, the first"),
        ({"trunk": "other"}, "was trained on another trunk"),
        ({"no_rows": True}, "there are no prompts"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    folders: dict[str, Path], changes: dict[str, Any], message: str, tiny_trunk: TinyTrunk
) -> None:
    if "broken" in changes.get("adapters", {}):
        broken = Path(shutil.copytree(folders["ppo"], "broken"))
        (broken / "manifest.json").unlink()
        weights = load_file(broken / "adapter_model.safetensors")
        nans = {key: value * torch.nan for key, value in weights.items()}
        save_file(nans, broken / "adapter_model.safetensors")
    if changes.get("adapters") == {"judge": "reward"}:
        changes = {"adapters": {"judge": str(folders["reward"])}}
    if "trunk" in changes:
        changes = {"trunk": str(tiny_trunk(max_position_embeddings=512))}
        changes["data"] = prompt_data()
    if "no_rows" in changes:
        settings = few_prompts(val=None, val_fraction=0.0)
        changes = {"data": {"class_path": "PreferenceDataModule", "init_args": settings}}
    with pytest.raises((ValueError, FileExistsError, FileNotFoundError), match=message):
        compared({"ppo": folders["ppo"]}, **changes)
    assert not Path("out").exists()


def test_the_commands_of_the_docs_run(folders: dict[str, Path], tmp_path: Path) -> None:
    text = DOCS.read_text("utf-8")
    (config,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    lines = re.findall(r"^python -m lightning_perl (.*)$", text.replace("\\\n", ""), re.M)
    compare_line, mix_line = lines
    Path("compare.yaml").write_text(config, encoding="utf-8")
    for name, source in (("quickstart", "ppo"), ("grpo", "dpo")):
        shutil.copytree(folders[source], Path("runs", name, "latest/adapters/actor"))
    # Nothing is learned: what the training rows are does not matter, but that they are read.
    few = "--data.init_args.train=packaged:quickstart/orders/rated_val.jsonl.gz"
    main([*shlex.split(compare_line), "--prompts", "4", few])
    result = json.loads(Path("runs/comparison/compare.json").read_text("utf-8"))
    assert set(result["contestants"]) == {"reference", "ppo", "grpo"}
    documented = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", text, re.M))))
    plain = {key for key in result["contestants"]["ppo"] if not key.endswith("_interval")}
    assert plain == documented
    main(shlex.split(mix_line))
    mixed, _ = compared({"mixed": Path("runs/mixed")}, prompts=2)
    assert "mixed" in mixed["contestants"]
