"""``export`` and ``generate``: what others load is what was trained, and what a policy answers."""

from __future__ import annotations

import builtins
import io
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from lightning_perl.cli import main
from lightning_perl.commands.export import export
from lightning_perl.commands.generate import Answer, Speaker, columns, generate
from lightning_perl.commands.trained import load, trained
from lightning_perl.data.rows import BadRow, Turn
from lightning_perl.data.tokenization import PLAIN, PLAIN_CHAT_TEMPLATE, TurnEncoder
from lightning_perl.models.adapters import name_trunk
from lightning_perl.models.heads import HEADS_FILE, load_head
from lightning_perl.models.loading import load_trunk
from lightning_perl.packaged import unpackaged
from lightning_perl.rollouts.sampling import SamplingSpec
from lightning_perl.whole import manifest_of

DOCS = Path(__file__).parents[2] / "docs" / "after.md"
TRUNK = unpackaged("packaged:quickstart/trunk")
IDS = torch.tensor([[1, 40, 41, 60, 90, 91, 2], [1, 44, 300, 61, 70, 95, 77]])
TURNS = [
    ("user", "two iced teas "),
    ("assistant", "Sure, which size?"),
    ("system", "Be kind."),
    ("user", "large"),
]
QUIET = "--trainer.enable_progress_bar=false --trainer.enable_model_summary=false --trainer.accelerator=cpu"
SMALL = "--model.trunk_dtype=float32 --trainer.max_epochs=1 --trainer.limit_val_batches=1"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy and a reward model, trained for a batch or two on the quickstart's trunk."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [
        {"prompt": f"{n} teas", "chosen": f"Sure, {n} teas.", "rejected": f"No {n}."}
        for n in range(12)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    configs = Path(__file__).parents[2] / "configs"
    data = f"--data.train={folder}/pairs.jsonl --data.max_tokens=60 --data.max_response_tokens=16"
    logger = f"--trainer.logger.save_dir={folder}"
    common = f"--model.trunk={TRUNK} {data} {logger} {QUIET} {SMALL}"
    reward = f"fit -c {configs}/own/reward_model.yaml {common} --trainer.logger.name=reward"
    main([*reward.split(), "--data.batch_size=4", "--trainer.log_every_n_steps=1"])
    policy = f"fit -c {configs}/own/rloo.yaml {common} --trainer.logger.name=policy"
    policy += f" --model.reward={folder}/reward/latest/adapters/reward --model.max_episodes=16"
    policy += " --model.sampling.max_new_tokens=16 --trainer.val_check_interval=1"
    main([*policy.split(), "--data.batch_size=2", "--model.samples=4"])
    return folder


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def ours(folder: Path) -> torch.Tensor:
    """Logits of a handed-over policy."""
    trunk, adapter = load(trained(folder, "policy"))
    with torch.no_grad(), trunk.switch.use(adapter):
        return trunk.project(trunk(IDS, torch.ones_like(IDS, dtype=torch.bool)))


@pytest.mark.parametrize("merge", [[], ["--merge"]])
def test_transformers_loads_the_policy_from_any_folder(
    runs: Path, merge: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main(["export", str(runs / "policy"), "out", *merge])
    assert "wrote out: the policy as" in capsys.readouterr().out
    shutil.move("out", tmp_path / "else where")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "else where")
    assert_close(logits(model), ours(runs / "policy"), atol=1e-4, rtol=1e-4)
    reference = AutoModelForCausalLM.from_pretrained(TRUNK)
    assert float((logits(model) - logits(reference)).abs().max()) > 1e-3
    assert all(path.stat().st_mode & 0o044 for path in Path(tmp_path / "else where").iterdir())
    card = (tmp_path / "else where" / "README.md").read_text()
    assert "(RLOO)" in card
    assert "| `val/score` |" in card
    assert "samples: 4" in card
    # Its chat template writes what the policy was trained on, token by token.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "else where")
    messages = [{"role": role, "content": text} for role, text in TURNS]
    turns = [Turn("agent" if role == "assistant" else role, text) for role, text in TURNS]  # type: ignore[arg-type]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False).input_ids
    assert prompt == TurnEncoder(AutoTokenizer.from_pretrained(TRUNK)).encode_prompt(turns, 99).ids


def test_a_merged_policy_is_a_trunk_again(runs: Path) -> None:
    main(["export", str(runs / "policy/latest"), "out", "--merge"])
    trunk = load_trunk("out")
    assert_close(logits(trunk.model), ours(runs / "policy"), atol=1e-4, rtol=1e-4)
    main(["export", "out", "again"])
    assert_close(logits(AutoModelForCausalLM.from_pretrained("again")), logits(trunk.model))


def test_a_merged_reward_model_is_a_classifier(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(runs / "reward/latest"), "out", "--role", "reward", "--merge"])
    assert "lower by the bias" in capsys.readouterr().out
    found = trained(runs / "reward", "reward")
    trunk, adapter = load(found)
    head = load_head(found.folder, "reward")
    assert float(head.bias.abs()) > 0
    texts = ["<bos>User: a tea\nAgent: Sure, a tea.<eos>", "<bos>User: hi\nAgent: No.<eos>"]
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert tokenizer.pad_token == AutoTokenizer.from_pretrained(TRUNK).pad_token
    model = AutoModelForSequenceClassification.from_pretrained("out")
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        scores = model(**batch).logits.squeeze(-1)
        for score, ids, mask in zip(scores, batch.input_ids, batch.attention_mask, strict=True):
            row = ids[mask.bool()].unsqueeze(0)
            assert int(row[0, -1]) in trunk.stop_ids
            with trunk.switch.use(adapter):
                hidden = trunk(row, torch.ones_like(row, dtype=torch.bool))
            assert_close(
                score + model.config.reward_bias, head(hidden[0, -1]), atol=1e-5, rtol=1e-5
            )


def test_the_card_of_a_reward_adapter_scores_as_it_does(runs: Path) -> None:
    main(["export", str(runs / "reward"), "out", "--role", "reward"])
    blocks = re.findall(r"```python\n(.*?)```", Path("out/README.md").read_text(), re.DOTALL)
    text = "<bos>User: a tea\nAgent: Sure, a tea.<eos>"
    names: dict[str, Any] = {"TEXT": text}
    exec("".join(blocks).replace("FOLDER", "out"), names)
    found = trained(runs / "reward", "reward")
    trunk, adapter = load(found)
    with torch.no_grad(), trunk.switch.use(adapter):
        hidden = trunk(names["ids"], torch.ones_like(names["ids"], dtype=torch.bool))
    ours = load_head(found.folder, "reward")(hidden[0, -1])
    assert_close(names["score"], ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("run", "role"), [("policy", "policy"), ("reward", "reward")])
def test_a_checkpoint_becomes_the_adapter_that_was_handed_over(
    runs: Path, run: str, role: str
) -> None:
    (checkpoint,) = (runs / run / "latest/checkpoints").glob("last.ckpt")
    main(["export", str(checkpoint), "out", "--role", role])
    kept = trained(runs / run, role).folder  # type: ignore[arg-type]
    assert (
        Path("out/adapter_model.safetensors").read_bytes()
        == (kept / "adapter_model.safetensors").read_bytes()
    )
    assert (
        role == "policy" or Path("out", HEADS_FILE).read_bytes() == (kept / HEADS_FILE).read_bytes()
    )


def test_a_checkpoint_knows_its_template_where_the_trunk_says_none(runs: Path) -> None:
    shutil.copytree(TRUNK, "foreign")
    Path("foreign/manifest.json").unlink()
    (checkpoint,) = (runs / "policy/latest/checkpoints").glob("last.ckpt")
    main(["export", str(checkpoint), "out", "--trunk", "foreign"])
    assert manifest_of(Path("out"))["template"] == PLAIN
    assert AutoTokenizer.from_pretrained("out").chat_template == PLAIN_CHAT_TEMPLATE
    weights = load_file("foreign/model.safetensors")
    save_file(
        {key: -value for key, value in weights.items()},
        "foreign/model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match="another trunk than foreign"):
        export(checkpoint, Path("again"), trunk="foreign")


def test_a_trunk_named_from_where_the_run_began_is_found_from_elsewhere(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(TRUNK, "models/trunk")
    shutil.copytree(runs / "policy/latest/adapters/actor", "runs/a/adapters/actor")
    name_trunk(Path("runs/a/adapters/actor"), "models/trunk")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert trained(Path("../runs/a"), "policy").trunk == str(tmp_path / "models/trunk")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("missing out", "There is no missing"),
        ("RUNS out", "holds no policy: none of adapters/actor"),
        ("RUNS/reward/latest/adapters/reward out", "is a reward model, which answers nothing"),
        ("RUNS/policy out --role reward", "has handed over no reward"),
        ("RUNS/policy RUNS/policy", "exists already"),
        ("RUNS/policy/latest/checkpoints/last.ckpt out --role reward", "holds no reward adapter"),
        ("RUNS/policy out --trunk ./gone", "is not there|no model folder"),
        (f"{TRUNK} out --role reward", "Export it with --merge"),
        ("quantized out --merge", "trained on a trunk in nf4"),
    ],
)
def test_export_refuses_in_one_line(runs: Path, arguments: str, said: str) -> None:
    shutil.copytree(runs / "policy/latest/adapters/actor", "quantized")
    manifest = json.loads(Path("quantized/manifest.json").read_text())
    Path("quantized/manifest.json").write_text(json.dumps(manifest | {"quantization": "nf4"}))
    with pytest.raises((ValueError, OSError), match=said) as refused:
        main(["export", *arguments.replace("RUNS", str(runs)).split()])
    assert "\n" not in str(refused.value)
    assert not Path("out").exists()


def test_every_command_of_the_page_runs(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtins, "input", lambda _: _ended(iter(())))
    blocks = re.findall(r"```bash\n(.*?)```", DOCS.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]
    assert len(lines) >= 8
    Path("prompts.jsonl").write_text('{"prompt": "a tea"}\n')
    for line in lines:
        words = shlex.split(line.replace("runs/own/rloo", f"{runs}/policy"), comments=True)
        words = [word.replace("runs/own/reward", f"{runs}/reward") for word in words]
        assert words[:3] == ["python", "-m", "lightning_perl"]
        main(words[3:])


# ---- generate ------------------------------------------------------------------------------------


def test_a_greedy_answer_is_that_of_transformers(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(runs / "policy"), "out"])
    tokenizer = AutoTokenizer.from_pretrained("out")
    model = AutoModelForCausalLM.from_pretrained("out")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "two large lattes please"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    prompt = tokenizer(asked, return_tensors="pt", add_special_tokens=False).input_ids
    said = model.generate(input_ids=prompt, max_new_tokens=24, do_sample=False)
    expected = str(tokenizer.decode(said[0, prompt.shape[1] :], skip_special_tokens=True))
    capsys.readouterr()
    options = ["--sampling.temperature=0", "--sampling.max_new_tokens=24"]
    main(["generate", str(runs / "policy"), "--prompt", "two large lattes please", *options])
    text, _, score = capsys.readouterr().out.rstrip().rpartition("\n")
    # The text was shown while it was drawn; the trunk's own head scored it.
    assert text == expected.strip()
    assert score.startswith("[score ")


def test_a_file_is_answered_with_places_and_scores(runs: Path) -> None:
    rows = [{"prompt": "a tea"}, {"messages": [{"role": "user", "content": "a latte"}]}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = SamplingSpec(8)
    reward = runs / "reward"
    for name in ("one", "two"):
        generate(runs / "policy", file=Path("p.jsonl"), out=Path(name), beside="reference",
                 reward=reward, sampling=spec)  # fmt: skip
    assert Path("one").read_text() == Path("two").read_text()
    first, second = map(json.loads, Path("one").read_text().splitlines())
    assert (first["where"], first["prompt"]) == ("p.jsonl:1", "a tea")
    assert (second["where"], second["prompt"]) == ("p.jsonl:2", "a latte")
    assert {"policy", "reference", "policy_score", "reference_score"} <= first.keys()
    with pytest.raises(ValueError, match="one exists already"):
        generate(runs / "policy", file=Path("p.jsonl"), out=Path("one"))
    with pytest.raises(ValueError, match="not both"):
        generate(runs / "policy", prompt="a", file=Path("p.jsonl"))
    Path("p.jsonl").write_text('{"subject": 1}\n')
    with pytest.raises(ValueError, match=r"p.jsonl:1: missing column"):
        generate(runs / "policy", file=Path("p.jsonl"))


def test_a_chat_remembers_until_an_empty_line(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: Iterator[str] = iter(["a tea", "large", "", "a tea", "word " * 200, "a tea"])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines, None) or _ended(lines))
    generate(runs / "policy", sampling=SamplingSpec(8, temperature=0), beside="reference")
    shown = capsys.readouterr().out
    assert "longer than the window" in shown
    tables = [part.split("\n")[2] for part in shown.split("policy, score")[1:]]
    # The third begins anew and is the first; the fourth follows it, as the second did, with another question.
    assert len(tables) == 4
    assert tables[2] == tables[0] != tables[1]


def test_what_cannot_be_answered_is_refused_before_anything_is(runs: Path) -> None:
    Path("p.jsonl").write_text('{"prompt": "a tea"}\n' + json.dumps({"prompt": "word " * 300}))
    with pytest.raises(BadRow, match=r"^p.jsonl:2: prompt longer than the window") as refused:
        generate(runs / "policy", file=Path("p.jsonl"), out=Path("out"))
    assert "max_tokens, or" not in str(refused.value)
    assert not Path("out").exists()
    with pytest.raises(ValueError, match="there is no reference"):
        generate(Path(TRUNK), prompt="a tea", beside="reference")
    with pytest.raises(ValueError, match="a whole trunk and no adapter"):
        generate(runs / "policy", prompt="a tea", reward=Path(TRUNK))
    # The reward adapter of another trunk would give scores that mean nothing.
    shutil.copytree(runs / "reward/latest/adapters/reward", "judge")
    manifest = json.loads(Path("judge/manifest.json").read_text())
    Path("judge/manifest.json").write_text(json.dumps(manifest | {"trunk_fingerprint": "other"}))
    with pytest.raises(ValueError, match="trained on another trunk"):
        generate(runs / "policy", prompt="a tea", reward=Path("judge"))


def test_an_answer_can_be_broken_off_and_any_console_shows_it(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: Iterator[str] = iter(["a tea", "a tea"])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines, None) or _ended(lines))
    asked: list[int] = []

    def answer(
        self: Speaker, turns: list[Turn], adapter: str, watch: Callable[[str], None]
    ) -> Answer:
        asked.append(len(turns))
        if len(asked) == 1:
            raise KeyboardInterrupt
        watch("\u2615\x1b[2J")  # clears the screen of a terminal that obeys
        return Answer("\u2615", None)

    monkeypatch.setattr(Speaker, "answer", answer)
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", console)
    generate(runs / "policy")
    console.seek(0)
    shown = console.read()
    assert asked == [1, 1]
    assert "broken off" in shown
    assert shown.rstrip().endswith("?\\x1b[2J")


def _ended(lines: Iterator[str]) -> str:
    """An empty line, or the end of the input behind the last one."""
    if lines.__length_hint__() == 0:  # type: ignore[attr-defined]
        raise EOFError
    return ""


def test_columns_wrap_and_align() -> None:
    shown = columns(
        {"policy": Answer("a b " * 12, 1.0), "reference": Answer("short\nlines", None)}, 43
    )
    first, rule, *rest, last = shown.splitlines()
    assert first == "policy, score +1.00  | reference"
    assert rule == last == "-" * 20 + "-+-" + "-" * 20
    assert [line.partition("|")[2].strip() for line in rest] == ["short", "lines", ""]
    assert all(len(line) <= 43 for line in shown.splitlines())
