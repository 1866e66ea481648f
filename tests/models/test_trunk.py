"""Loading a trunk: what it refuses, what it switches off, what it knows about itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, LlamaConfig, OPTConfig

from lightning_perl.models.adapters import OFF, LoraSpec
from lightning_perl.models.loading import TrunkDtype, load_trunk, without_dropout
from lightning_perl.models.manifest import save_trunk
from tests.conftest import TinyTrunk
from tests.models.families import FAMILIES, STOP_IDS
from tests.models.rows import SPEC, backward, padded

DROPPING = ("llama", "phi3", "gpt2", "opt", "gpt_neox", "falcon")


@pytest.mark.parametrize("dtype", ["float16", "bf16"])
def test_other_dtypes_are_refused(tiny_trunk: TinyTrunk, dtype: str) -> None:
    with pytest.raises(ValueError, match=f"got '{dtype}'. In float16, RL.*bfloat16 takes the same"):
        load_trunk(str(tiny_trunk()), dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["./runs/trunk", "/nowhere/at/all", "a/b/c", "trunk", "runs/trunk", "runs/there"]
)
def test_a_path_that_is_no_model_folder_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where `runs` is a folder here, runs/trunk is a path and no hub name.
    (tmp_path / "runs" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"{name} is no model folder \(no config.json"):
        load_trunk(name)


def test_a_relative_folder_is_found(tiny_trunk: TinyTrunk, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_trunk()
    monkeypatch.chdir(folder.parent)
    assert load_trunk(folder.name).vocabulary_size == load_trunk(f"./{folder.name}").vocabulary_size


def test_a_name_below_no_folder_is_a_hub_name(
    tiny_trunk: TinyTrunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = []

    def absent(where: str) -> None:
        asked.append(where)
        raise OSError("not there")

    monkeypatch.setattr("lightning_perl.models.loading.AutoConfig.from_pretrained", absent)
    with pytest.raises(FileNotFoundError, match=r"no hub name that could be read \(not there\)"):
        load_trunk("owner/name")
    assert asked == ["owner/name"]


def test_weights_that_are_not_finite_are_refused(tiny_trunk: TinyTrunk, tmp_path: Path) -> None:
    shutil.copytree(tiny_trunk(), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = r"in torch.float32 are not finite .* padding on the left.*Are its weights finite\?"
    with pytest.raises(ValueError, match=message):
        load_trunk(str(tmp_path))


Weights = dict[str, torch.Tensor]


def _prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + key: value for key, value in weights.items()}


def _without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: value for key, value in weights.items() if part not in key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _without("layers.1.mlp.up"),
            r"1 are missing \(model.layers.1.mlp.up_proj.weight\).*all their files",
        ),
        (_prefixed("module."), r"unknown \(module.*begin with 'module.': save the model itself"),
        (_prefixed("base_model.model."), r"begin with 'base_model.model.'"),
        (_without("lm_head"), r"\(lm_head.weight\).*Its LM head is missing: .*Qwen2ForCausalLM"),
        (
            lambda weights: weights | {"model.norm.weight": torch.ones(8)},
            r"1 have another shape \(model.norm.weight \(8,\) instead of \(32,\)\)",
        ),
        (
            lambda weights: {
                key.replace("q_proj.w", "q_proj.base_layer.w"): value
                for key, value in weights.items()
            },
            "carry adapters: merge them",
        ),
    ],
)
def test_weights_that_would_be_drawn_at_random_are_refused(
    tiny_trunk: TinyTrunk, tmp_path: Path, change: Callable[[Weights], Weights], message: str
) -> None:
    shutil.copytree(tiny_trunk("qwen2"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_trunk(str(tmp_path))


def test_weights_that_are_left_out_are_named(tiny_trunk: TinyTrunk, tmp_path: Path) -> None:
    shutil.copytree(tiny_trunk(), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    save_file(
        load_file(file) | {"score.weight": torch.ones(1, 32)}, file, metadata={"format": "pt"}
    )
    with pytest.warns(UserWarning, match=r"1 tensors in .* are left out: score.weight"):
        assert (
            load_trunk(str(tmp_path)).fingerprint() == load_trunk(str(tiny_trunk())).fingerprint()
        )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", "{}", "also holds an adapter .*Merge it"),
        ("model.safetensors", "half", "cannot be loaded .*cut short"),
        ("config.json", "{}", "config.json describes no decoder .*Copy the folder again"),
        ("tokenizer.json", "{}", "trunk: no tokenizer could be loaded from"),
        ("generation_config.json", "{", "generation_config.json cannot be read .*Copy the folder"),
        ("manifest.json", "{", "manifest.json cannot be read .*Copy the folder again"),
    ],
)
def test_a_folder_with_a_file_that_should_not_be_so_is_refused(
    tiny_trunk: TinyTrunk, tmp_path: Path, name: str, content: str, message: str
) -> None:
    shutil.copytree(tiny_trunk(), tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_trunk(str(tmp_path))


@pytest.mark.parametrize("family", DROPPING)
def test_dropout_is_zero_also_in_train_mode(tiny_trunk: TinyTrunk, family: str) -> None:
    settings = FAMILIES[family]
    assert any("drop" in key and value > 0 for key, value in settings.items())
    rows = padded()
    trunk = load_trunk(str(tiny_trunk(family)))
    with torch.no_grad(), trunk.switch.use(OFF):
        quiet = trunk(rows.ids, rows.attention_mask)
        trunk.model.train()
        torch.manual_seed(0)
        assert torch.equal(trunk(rows.ids, rows.attention_mask), quiet)
    rates = [module.p for module in trunk.model.modules() if isinstance(module, torch.nn.Dropout)]
    assert not any(rates)


def test_dropout_of_a_configuration_inside_another_is_zero() -> None:
    config = LlamaConfig(attention_dropout=0.1)
    config.text_config = OPTConfig(dropout=0.2, attention_dropout=0.3, layerdrop=0.4)
    config.text_config.inner = GPT2Config(resid_pdrop=0.5, embd_pdrop=0.6, attn_pdrop=0.7)
    kept = (config.rms_norm_eps, config.text_config.init_std, config.text_config.inner.n_layer)
    without_dropout(config)
    text, inner = config.text_config, config.text_config.inner
    found = [config.attention_dropout, text.dropout, text.attention_dropout, text.layerdrop]
    found += [inner.resid_pdrop, inner.embd_pdrop, inner.attn_pdrop]
    assert found == [0.0] * 7
    assert kept == (config.rms_norm_eps, text.init_std, inner.n_layer)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_pass_trains_blocks_that_recompute_and_gives_the_mode_back(
    tiny_trunk: TinyTrunk, checkpointing: bool
) -> None:
    trunk = load_trunk(str(tiny_trunk()), checkpointing=checkpointing)
    trunk.adapters.add("actor", LoraSpec(rank=2, targets=("q_proj",), dropout=0.1), 0)
    drops = {f"model.layers.{n}.self_attn.q_proj.lora_dropout.actor" for n in (0, 1)}
    blocks = {"model", "model.layers.0", "model.layers.1"} if checkpointing else set()

    def trained() -> set[str]:
        return {name for name, module in trunk.model.named_modules() if module.training}

    for mode in (False, True):
        trunk.model.train(mode)
        before = trained()
        with trunk.training_pass():
            assert trained() == blocks | drops
        assert trained() == before


def test_a_trunk_knows_its_sizes(tiny_trunk: TinyTrunk) -> None:
    opt, gpt2 = load_trunk(str(tiny_trunk("opt"))), load_trunk(str(tiny_trunk("gpt2")))
    # What a head reads is what the LM head reads, not the width of the blocks.
    assert (opt.hidden_size, opt.model.config.hidden_size) == (24, 32)
    assert (gpt2.hidden_size, gpt2.window) == (32, 96)
    assert gpt2.vocabulary_size == len(gpt2.tokenizer)
    assert gpt2.dtype == torch.float32
    assert gpt2.passes == 0
    rows = padded()
    with torch.no_grad(), gpt2.switch.use(OFF):
        gpt2(rows.ids, rows.attention_mask)
    assert gpt2.passes == 1


def test_stop_ids_are_the_tokenizers_and_the_generation_configs(
    tiny_trunk: TinyTrunk, tmp_path: Path
) -> None:
    assert load_trunk(str(tiny_trunk())).stop_ids == STOP_IDS
    shutil.copytree(tiny_trunk(), tmp_path, dirs_exist_ok=True)
    for eos, expected in ((7, (2, 7)), ([9, 2], (2, 9)), (None, (2,))):
        config = GenerationConfig(eos_token_id=eos)  # type: ignore[no-untyped-call]
        config.save_pretrained(tmp_path)
        assert load_trunk(str(tmp_path)).stop_ids == expected


def told(folder: Path, to: Path, change: Callable[[Any], object]) -> str:
    """A copy of a trunk's folder with another tokenizer."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(to)
    change(tokenizer)
    tokenizer.save_pretrained(to)
    return str(to)


def test_responses_end_where_the_chat_template_ends_answers(
    tiny_trunk: TinyTrunk, tmp_path: Path
) -> None:
    template = "{% for m in messages %}{{ m.content }}<bos>\n{% endfor %}"
    folder = told(tiny_trunk(), tmp_path, lambda its: setattr(its, "chat_template", template))
    GenerationConfig(eos_token_id=7).save_pretrained(folder)  # type: ignore[no-untyped-call]
    words = r"stops at \['.*'\] \(ids \[7\], 1 in all\), which its tokenizer does not call special"
    with pytest.warns(match=words):
        trunk = load_trunk(folder)
    assert trunk.stop_ids == (1, 2, 7)
    save_trunk(trunk, tmp_path / "again", None, {})
    written = json.loads((tmp_path / "again/generation_config.json").read_text())
    assert written["eos_token_id"] == [1, 2, 7]


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (lambda tokenizer: tokenizer.add_tokens(["<order>"]), "<order>"),
        (lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "<end>"}), "<end>"),
    ],
    ids=["a word", "EOS"],
)
def test_tokens_without_an_embedding_are_refused(
    tiny_trunk: TinyTrunk, tmp_path: Path, change: Callable[[Any], object], lost: str
) -> None:
    folder = told(tiny_trunk(), tmp_path, change)
    with pytest.raises(ValueError, match=rf"has 1 tokens .*'{lost}': \d+.*resize_token_embeddings"):
        load_trunk(folder)


@pytest.mark.parametrize(("token", "expected"), [("<eos>", 2), ("[PAD]", 0)])
def test_pad_id_is_one_that_the_embedding_has(
    tiny_trunk: TinyTrunk, tmp_path: Path, token: str, expected: int
) -> None:
    pad: dict[str, Any] = {"pad_token": token}
    trunk = load_trunk(told(tiny_trunk(), tmp_path, lambda its: its.add_special_tokens(pad)))
    known = trunk.tokenizer.pad_token_id < trunk.vocabulary_size
    assert known == (token == "<eos>")
    assert trunk.pad_id == expected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fingerprint_is_of_the_weights_alone(tiny_trunk: TinyTrunk, family: str) -> None:
    dtypes: tuple[TrunkDtype, ...] = ("float32", "bfloat16", "float64")
    trunks = [load_trunk(str(tiny_trunk(family)), dtype) for dtype in dtypes]
    (fingerprint,) = {trunk.fingerprint() for trunk in trunks}
    assert len(fingerprint) == 16
    assert load_trunk(str(tiny_trunk(family, seed=1))).fingerprint() != fingerprint
    trunk, rows = trunks[0], padded()
    trunk.adapters.add("actor", SPEC, 0)
    assert trunk.fingerprint() == fingerprint
    optimizer = torch.optim.SGD(trunk.adapters.parameters("actor"), lr=1.0)
    for _ in range(2):
        with trunk.switch.use("actor"):
            backward(trunk(rows.ids, rows.attention_mask).sum())
        optimizer.step()
    assert all(bool((weight != 0).any()) for weight in trunk.adapters.parameters("actor"))
    assert trunk.fingerprint() == fingerprint
    # One weight of one layer that moves is enough.
    with torch.no_grad():
        trunk.lm_head.weight[0, 3] += 0.5
    assert trunk.fingerprint() != fingerprint


def test_a_saved_trunk_says_where_it_comes_from(tiny_trunk: TinyTrunk, tmp_path: Path) -> None:
    folder = tiny_trunk()
    trunk = load_trunk(str(folder))
    save_trunk(trunk, tmp_path, None, {"module": "SFT"})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == {
        "kind": "trunk",
        "from": str(folder),
        "dtype": ["float32"],
        "pad_id": 0,
        "stop_ids": list(STOP_IDS),
        "module": "SFT",
    }
    again, rows = load_trunk(str(tmp_path)), padded()
    assert again.tokenizer.get_vocab() == trunk.tokenizer.get_vocab()
    with torch.no_grad(), again.switch.use(OFF), trunk.switch.use(OFF):
        assert torch.equal(
            again(rows.ids, rows.attention_mask), trunk(rows.ids, rows.attention_mask)
        )


def test_attention_is_transformers_own_choice_or_ours(tiny_trunk: TinyTrunk) -> None:
    folder = str(tiny_trunk("llama"))
    assert load_trunk(folder).model.config._attn_implementation == "sdpa"
    assert load_trunk(folder, attention="eager").model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="atention"):
        load_trunk(folder, attention="atention")
