"""Loading trunks: the only file that calls ``from_pretrained``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.peft_utils import find_adapter_config_file

from lightning_perl.chat import ends_of_answers, load_tokenizer
from lightning_perl.models.manifest import note_template
from lightning_perl.models.quantization import (
    Quantization,
    loading_config,
    prepare,
    require_quantizable,
)
from lightning_perl.models.shortcuts import Shortcuts
from lightning_perl.models.trunk import Trunk
from lightning_perl.models.weightless import architecture, stand_in_tokenizer
from lightning_perl.quiet import no_progress_bars
from lightning_perl.whole import read_json, require_whole

TrunkDtype = Literal["float32", "bfloat16", "float64"]
NO_BF16_TUNING = (
    "A trunk that is tuned whole must be float32, got bfloat16: most steps of a usual learning rate are "
    "smaller than a bf16 weight can move, and would be lost. Use trunk_dtype float32, or LoRA, whose weights "
    "are fp32 over a bf16 trunk."
)


def load_trunk(
    source: str,
    dtype: TrunkDtype = "float32",
    checkpointing: bool = False,
    attention: str | None = None,
    quantization: Quantization | None = None,
    shortcuts: bool | Shortcuts = True,
) -> Trunk:
    """A trunk from a transformers folder or a hub name, every dropout probability set to 0.

    Dropout is switched off by its probabilities, not by eval mode: transformers checkpoints activations
    in train mode only, and train mode would turn GPT-2's and OPT's dropout back on.

    Args:
        source: Folder or hub name of a decoder with an LM head.
        dtype: Dtype of the trunk's weights and matrix products.
        checkpointing: Recompute activations in backward, in training passes only.
        attention: transformers' ``attn_implementation``; None leaves it to transformers.
        quantization: Keep the linear layers in 4 bits (nf4, double quantization) or 8 bits (int8), by
            bitsandbytes; LM head and embeddings stay in ``dtype``. The CPU quantizes. None: all in ``dtype``.
        shortcuts: Save work whose result is known or not needed. False: save none, for comparison.
    """
    if dtype not in get_args(TrunkDtype):
        raise ValueError(
            f"trunk_dtype must be one of {list(get_args(TrunkDtype))}, got {dtype!r}. In float16, RL ratios "
            "over- and underflow and adapters turn to NaN; bfloat16 takes the same memory."
        )
    if quantization is not None:
        require_quantizable(quantization, dtype)
    options = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    shapes = architecture()
    if shapes is not None:
        bare = _without_weights(shapes, quantization, options)
        return Trunk(bare, stand_in_tokenizer(shapes), checkpointing, source, shortcuts)
    where = model_source(source)
    require_whole(Path(where))
    with no_progress_bars(Path(where).exists()):  # a download shows how far it is
        model = _load_model(where, _load_config(source, where), quantization, options)
    trunk = Trunk(model, load_tokenizer(where, "trunk"), checkpointing, source, shortcuts)
    _require_embedded(trunk)
    _end_responses(trunk)
    note_template(Path(where), trunk)
    return trunk


def plain_model(folder: Path, classifier: bool = False) -> PreTrainedModel:
    """What others load from a folder, in float32: transformers' own model, through PEFT where it is an adapter."""
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    return cast(PreTrainedModel, kind.from_pretrained(folder, dtype=torch.float32))


def classifier_like(trunk: Trunk) -> PreTrainedModel:
    """An untrained sequence classifier of the trunk's family with one label, in float32.

    Its padding is no stop token: an answer is scored at its stop token, and padding would be passed over.
    """
    config = copy.deepcopy(trunk.model.config)
    config.num_labels, config.problem_type, config.dtype = 1, "regression", torch.float32
    tokenizer, rows = trunk.tokenizer, trunk.vocabulary_size
    special = [n for n in tokenizer.all_special_ids if n not in trunk.stop_ids and n < rows]
    own = tokenizer.pad_token_id
    config.pad_token_id = own if own in special else next(iter(special), None)
    try:
        made = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise ValueError(
            f"transformers has no sequence classifier of the family {config.model_type}. Export without merge."
        ) from error
    return cast(PreTrainedModel, made)


def model_source(source: str) -> str:
    """What transformers should be asked for: an existing folder's path, or a hub name."""
    if architecture() is not None:
        return source
    path = Path(source).expanduser()
    # A hub name is OWNER/NAME; where OWNER is a folder here, a path was meant.
    looks_like_path = (
        source.startswith((".", "/", "~")) or source.count("/") != 1 or path.parent.is_dir()
    )
    if looks_like_path and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"trunk: {source} is no model folder (no config.json there). Give the folder that an "
            "earlier stage wrote (RUN/trunk), a transformers folder, or a hub name like Qwen/Qwen2-0.5B."
        )
    return str(path) if path.exists() else source


def without_dropout(config: PreTrainedConfig) -> None:
    """Set every dropout probability of a configuration, and of those inside it, to 0."""
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            without_dropout(value)
        elif isinstance(value, float) and "drop" in key:
            setattr(config, key, 0.0)


def _require_embedded(trunk: Trunk) -> None:
    """Refuse tokens that texts can have and the embedding has not.

    A special token that no text begins or ends with and no chat template writes may lie beyond it: padding, or
    Gemma 3's stand-in for images.
    """
    tokenizer, rows = trunk.tokenizer, trunk.vocabulary_size
    written = {tokenizer.bos_token, tokenizer.eos_token}
    template = str(tokenizer.chat_template or "")
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    lost = {
        token: number
        for token, number in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        if number >= rows and (token in written or token not in special or token in template)
    }
    if lost:
        raise ValueError(
            f"trunk: the tokenizer of {trunk.source} has {len(lost)} tokens that its embedding of {rows} rows has "
            f"not, such as {dict(list(lost.items())[:3])}. Call model.resize_token_embeddings(len(tokenizer)) and "
            "save the model again, or save the tokenizer that belongs to it."
        )


def _end_responses(trunk: Trunk) -> None:
    """Let responses end where the chat template ends answers, here and in what is handed over.

    Warns of a stop token that is an ordinary piece of text: every response would be cut there.
    """
    tokenizer, stop = trunk.tokenizer, ends_of_answers(trunk.tokenizer).stop
    added = tokenizer.added_tokens_decoder.keys() | set(tokenizer.all_special_ids)
    ordinary = [
        number for number in trunk.stop_ids if number not in added and number < len(tokenizer)
    ]
    if ordinary:
        rank_zero_warn(
            f"trunk: {trunk.source} stops at {tokenizer.convert_ids_to_tokens(ordinary[:3])} (ids {ordinary[:3]}, "
            f"{len(ordinary)} in all), which its tokenizer does not call special: responses end at such a piece "
            "of text. If they should not, take it out of eos_token_id in generation_config.json and config.json."
        )
    if stop:
        generation = trunk.model.generation_config
        generation.eos_token_id = sorted({*trunk.stop_ids, tokenizer.convert_tokens_to_ids(stop)})


def _without_weights(
    shapes: PreTrainedConfig, quantization: Quantization | None, options: dict[str, Any]
) -> PreTrainedModel:
    if quantization is not None:
        raise ValueError(
            f"quantization {quantization}: a trunk of shapes alone cannot be quantized. Leave it out, and "
            "subtract the bytes that the linear layers save from the trunk's."
        )
    without_dropout(shapes)
    model = AutoModelForCausalLM.from_config(shapes, **options)  # type: ignore[no-untyped-call]
    return cast(PreTrainedModel, model)


def _load_config(source: str, where: str) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(where)
    except Exception as error:  # each family's configuration refuses in its own way
        if Path(where).is_dir():
            raise ValueError(
                f"trunk: {where}/config.json describes no decoder ({_in_a_line(error)}). Copy the folder again."
            ) from error
        raise FileNotFoundError(
            f"trunk: {source} is no folder here, and no hub name that could be read "
            f"({str(error).partition(chr(10))[0]})."
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"trunk: {source} is stored quantized (quantization_config in its config.json), which adapters here "
            "are not tested on. Give the folder or hub name of the full-precision weights, and set quantization: "
            "nf4 or int8."
        )
    _require_decoder(source, config)
    settings = Path(where, GENERATION_CONFIG_NAME)
    if settings.is_file():
        read_json(settings)  # transformers passes over a damaged one, and with it over stop tokens
    without_dropout(config)
    return config


def _require_decoder(source: str, config: PreTrainedConfig) -> None:
    """Refuse what `AutoModelForCausalLM` does not know, or would take the decoder of, without its encoder."""
    known = type(config) in AutoModelForCausalLM._model_mapping
    if config.is_encoder_decoder or not known:
        kind = "an encoder with a decoder" if config.is_encoder_decoder else "no decoder of text"
        raise ValueError(
            f"trunk: {source} is {kind} (model_type {config.model_type}). Give a decoder that transformers' "
            "AutoModelForCausalLM loads, such as Llama, Qwen or Gemma."
        )


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _load_model(
    where: str,
    config: PreTrainedConfig,
    quantization: Quantization | None,
    options: dict[str, Any],
) -> PreTrainedModel:
    if quantization is not None:
        # Without a map transformers would take the GPU where there is one; here the trainer moves modules.
        how = loading_config(quantization, options["dtype"])
        options = {**options, "quantization_config": how, "device_map": {"": "cpu"}}
    try:
        adapter = find_adapter_config_file(where)
        # Shapes that differ are reported with the missing weights, instead of raised one by one.
        loaded: Any = adapter or AutoModelForCausalLM.from_pretrained(
            where, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # each family's code fails in its own way
        raise ValueError(
            f"trunk: {where} cannot be loaded ({_in_a_line(error)}). Was a file lost, or an upload or download "
            "cut short? Is it a decoder, and can it take the attention and quantization that are set?"
        ) from error
    if adapter is not None:
        raise ValueError(
            f"trunk: {where} also holds an adapter (adapter_config.json), which would change the trunk's own "
            "answers. Merge it into the weights, or move it to a folder of its own."
        )
    model: PreTrainedModel = loaded[0]
    _require_all_weights(where, *loaded)
    if quantization is not None and prepare(model, options["dtype"]) == 0:
        raise ValueError(
            f"trunk: transformers found nothing to quantize in {where} ({type(model).__name__}), whose linear "
            "layers are of a class of their own. Leave `quantization` out."
        )
    return model


def _require_all_weights(where: str, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Refuse weights that transformers drew at random because the files have none; name those left out.

    Tied weights are not reported as missing, and buffers are computed.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    unknown = sorted(report["unexpected_keys"])
    misshapen = sorted(report["mismatched_keys"])
    missing = sorted(key for key in report["missing_keys"] if key in weights)
    if missing or misshapen:
        shapes = [f"{key} {tuple(got)} instead of {tuple(own)}" for key, got, own in misshapen]
        raise ValueError(
            f"trunk: {where} does not hold the weights of {type(model).__name__}: {len(missing)} are missing "
            f"({', '.join(missing[:3])}), {len(shapes)} have another shape ({', '.join(shapes[:1])}), "
            f"{len(unknown)} are unknown ({', '.join(unknown[:3])}). {_likely_cause(model, missing, unknown)}"
        )
    if unknown:
        rank_zero_warn(
            f"trunk: {len(unknown)} tensors in {where} are no weights of {type(model).__name__} and are left out: "
            f"{', '.join(unknown[:3])}."
        )


def _likely_cause(model: PreTrainedModel, missing: list[str], unknown: list[str]) -> str:
    pairs = ((key, name) for name in missing for key in unknown if key.endswith(f".{name}"))
    prefix = next((key.removesuffix(name) for key, name in pairs), None)
    if prefix is not None:
        return (
            f"Its keys begin with {prefix!r}: save the model itself, not what torch.compile, DDP or PEFT wrapped "
            "around it."
        )
    if any(".lora_" in key or ".base_layer." in key for key in unknown):
        return "Its layers carry adapters: merge them into the weights before saving."
    if missing and not any(key.startswith(model.base_model_prefix + ".") for key in missing):
        made = ", ".join(model.config.architectures or ())
        return f"Its LM head is missing: a classifier or a reward model (architectures: {made})?"
    return "Does config.json belong to these weights, and are all their files there?"
