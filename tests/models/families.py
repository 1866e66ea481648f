"""Tiny random models of every family, written as transformers folders: no hub, milliseconds each.

Their settings are chosen to be felt: grouped heads, another rotary base, a sliding window of 8,
soft caps, logit scales and multipliers far from 1, dropout above 0, a generation config full of
warpers.
"""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lightning_perl.models.heads import ScalarHead, save_heads

WINDOW = 8
"""Sliding window of the families that have one; tests use longer rows."""

Settings = dict[str, Any]


def _family(model_type: str, *shared: Settings, **settings: object) -> Settings:
    return {
        "model_type": model_type,
        **{k: v for one in shared for k, v in one.items()},
        **settings,
    }


def _rope(theta: float, **more: object) -> Settings:
    return {"rope_type": "default", "rope_theta": theta, **more}


_BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_HIDDEN = {**_BLOCKS, "max_position_embeddings": 96}
_ROTARY = {**_HIDDEN, "rope_parameters": _rope(300.0)}
_GROUPED = {**_ROTARY, "num_key_value_heads": 2, "intermediate_size": 40, "attention_dropout": 0.1}
_DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
_SLIDING = {**_GROUPED, "sliding_window": WINDOW}
_GEMMA = {
    "head_dim": 8,
    "query_pre_attn_scalar": 5,
    "layer_types": ["sliding_attention", "full_attention"],
}
_NO_TIE = {"tie_word_embeddings": False}
_GEMMA_ROPES = {"full_attention": _rope(900.0), "sliding_attention": _rope(60.0)}
_GPT2_DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}

FAMILIES: dict[str, Settings] = {
    "llama": _family("llama", _GROUPED, tie_word_embeddings=True),
    "qwen2": _family("qwen2", _GROUPED),
    "qwen3": _family("qwen3", _GROUPED, head_dim=12),
    "mistral": _family("mistral", _SLIDING, head_dim=10),
    # Tied, its big embeddings make a random model repeat its last token for ever.
    "gemma2": _family(
        "gemma2", _SLIDING, _GEMMA, _NO_TIE, attn_logit_softcapping=1.5, final_logit_softcapping=2.0
    ),
    "gemma3": _family("gemma3_text", _SLIDING, _GEMMA, rope_parameters=_GEMMA_ROPES),
    "phi3": _family(
        "phi3", _SLIDING, resid_pdrop=0.1, embd_pdrop=0.1, original_max_position_embeddings=96
    ),
    "gpt2": _family("gpt2", _GPT2_DROPOUT, n_embd=32, n_layer=2, n_head=4, n_positions=96),
    "opt": _family(
        "opt", _HIDDEN, {"dropout": 0.2, "attention_dropout": 0.2, "layerdrop": 0.3}, ffn_dim=40,
        word_embed_proj_dim=24,
    ),
    "gpt_neox": _family(
        "gpt_neox", _HIDDEN, _DROPOUT, intermediate_size=40,
        rope_parameters=_rope(300.0, partial_rotary_factor=0.5),
    ),
    "falcon": _family("falcon", _ROTARY, _DROPOUT, multi_query=True, bias=True),
    "falcon_new": _family(
        "falcon", _ROTARY, new_decoder_architecture=True, num_kv_heads=2, hidden_dropout=0.2
    ),
    "olmo2": _family("olmo2", _GROUPED),
    "granite": _family(
        "granite", _GROUPED, {"logits_scaling": 3.0, "embedding_multiplier": 2.5},
        attention_multiplier=0.7, residual_multiplier=0.4,
    ),
    "cohere": _family("cohere", _GROUPED, logit_scale=0.2, use_qk_norm=True),
}  # fmt: skip

_LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    **{"v_head_dim": 8, "num_key_value_heads": 4, "head_dim": 8},
}
_ROUTED = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    **{"n_group": 2, "topk_group": 1},
}
_DORY = {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1}
_STATE = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
_ZAMBA = {"num_key_value_heads": 4, "num_mem_blocks": 1, "adapter_rank": 4, "chunk_size": 8}
_ZAMBA_STATE = {"mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1}
RECURRENT: dict[str, Settings] = {
    "falcon_h1": _family(
        "falcon_h1", _GROUPED, _STATE, mamba_d_ssm=64, mamba_chunk_size=8, lm_head_multiplier=0.4
    ),
    "lfm2": _family(
        "lfm2", _GROUPED, {"layer_types": ["conv", "full_attention"]}, block_ff_dim=64,
        block_multiple_of=8,
    ),
    "qwen3_next": _family(
        "qwen3_next", _GROUPED, _EXPERTS, _LINEAR, head_dim=8, linear_num_value_heads=4,
        shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"],
    ),
    "mamba2": _family("mamba2", _SMALL, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    "mamba": _family("mamba", _SMALL),
    "bamba": _family("bamba", _GROUPED, _STATE, attn_layer_indices=[1], mamba_chunk_size=8),
    "zamba2": _family(
        "zamba2", _GROUPED, _ZAMBA, _ZAMBA_STATE, layers_block_type=["mamba", "hybrid"]
    ),
    # Its configuration of text alone has a base model of another name than its prefix.
    "llama4": _family(
        "llama4_text", _GROUPED, head_dim=8, num_local_experts=4, intermediate_size_mlp=48,
        moe_layers=[1], no_rope_layers=[1, 0], attention_chunk_size=256,
    ),
    "phimoe": _family("phimoe", _GROUPED, num_local_experts=4, num_experts_per_tok=2),
    # PEFT renames what its shared experts learned, and does not find it again.
    "laguna": _family(
        "laguna", _GROUPED, _EXPERTS, head_dim=8, shared_expert_intermediate_size=16,
        rope_parameters=None, mlp_layer_types=["dense", "sparse"], layer_types=["full_attention"] * 2,
        num_attention_heads_per_layer=[4, 4],
    ),
    # Its router reads a weight past its layer; the indexers of DeepSeek-V3.2 only pick.
    "longcat": _family(
        "longcat_flash", _GROUPED, _LATENT, _ROUTED, num_layers=2, ffn_hidden_size=40,
        expert_ffn_hidden_size=16, zero_expert_num=2, num_hidden_layers=4,
    ),
    "deepseek_v32": _family(
        "deepseek_v32", _GROUPED, _LATENT, _ROUTED, index_n_heads=2, index_head_dim=16, index_topk=64,
        mlp_layer_types=["dense", "sparse"],
    ),
    "inkling": _family(
        "inkling_text", _GROUPED, _EXPERTS, head_dim=8, sliding_window_size=8, d_rel=4,
        logits_mup_width_multiplier=3.0, swa_num_attention_heads=4, swa_num_key_value_heads=2,
        swa_head_dim=8, rel_extent=8, n_routed_experts=4, n_shared_experts=1,
    ),
    # Runs two of its four layers twice.
    "dory": _family(
        "dory", _SLIDING, _DORY, head_dim=8, num_hidden_layers=4, rope_parameters=None,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}  # fmt: skip
"""Families with states that are neither keys nor values, experts, or layers that cannot be adapted."""
TRIED = ("llama4", "phimoe", "laguna", "longcat", "deepseek_v32", "inkling", "dory")
"""Those of `RECURRENT` whose structure does not tell that they cannot read packed rows."""
UNPADDED: dict[str, Settings] = {
    "deepseek_v4": _family(
        "deepseek_v4",
        _GROUPED,
        _ROUTED,
        num_key_value_heads=1,
        num_hidden_layers=3,
        head_dim=16,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=8,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=6,
        layer_types=[
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        mlp_layer_types=["moe", "moe", "hash_moe"],
        rope_parameters=None,
        sliding_window=WINDOW,
    ),
    "mbart": _family(
        "mbart",
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=40,
        max_position_embeddings=96,
        is_encoder_decoder=False,
        is_decoder=True,
    ),
    "recurrent_gemma": _family(
        "recurrent_gemma",
        _BLOCKS,
        block_types=["recurrent", "attention"],
        lru_width=32,
        head_dim=8,
        num_key_value_heads=2,
        intermediate_size=40,
        attention_window_size=WINDOW,
    ),
}
"""Families that give other numbers where a row is padded on the left."""

LLAMA_TARGETS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
_NEOX_TARGETS = "dense dense_4h_to_h dense_h_to_4h query_key_value"
_LATENT_TARGETS = "kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj"
_TARGETS = {
    "gpt2": "c_attn c_fc c_proj",
    "opt": "fc1 fc2 k_proj out_proj q_proj v_proj",
    "gpt_neox": _NEOX_TARGETS,
    "falcon": _NEOX_TARGETS,
    "falcon_new": _NEOX_TARGETS,
    "phi3": "down_proj gate_up_proj o_proj qkv_proj",
    # Mamba's kernels read all weights but in_proj's past their layers; PEFT takes gate_proj for experts.
    "falcon_h1": "down_proj gate_proj in_proj k_proj o_proj q_proj up_proj v_proj",
    "lfm2": "in_proj k_proj out_proj q_proj v_proj w1 w2 w3",
    "qwen3_next": "in_proj_ba in_proj_qkvz k_proj o_proj out_proj q_proj shared_expert_gate v_proj",
    "mamba2": "in_proj",
    "mamba": "in_proj",
    "bamba": "down_proj gate_proj in_proj k_proj o_proj q_proj up_proj v_proj",
    # Parts that a list of modules shares the name of are named with what stands before them.
    # Their routers are linear layers that give two tensors.
    "phimoe": "k_proj o_proj q_proj v_proj",
    # Adapters on its shared experts would be lost in PEFT's files.
    "laguna": "g_proj k_proj mlp.down_proj mlp.gate_proj mlp.up_proj o_proj q_proj v_proj",
    # A router and indexers learn nothing; PEFT takes gate_proj for experts.
    "longcat": _LATENT_TARGETS,
    "deepseek_v32": _LATENT_TARGETS,
    "inkling": "k_proj o_proj q_proj r_proj v_proj",
    "dory": "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
    "zamba2": "0.0 0.1 down_proj gate_up_proj in_proj k_proj linear o_proj q_proj v_proj",
}
TARGETS = {family: tuple(ends.split()) for family, ends in _TARGETS.items()}
"""Ends of the names of all adapted layers of a block; the others have Llama's seven."""
LAYERS = {"gpt2": 8, "opt": 12, "gpt_neox": 8, "falcon": 8, "falcon_new": 8, "phi3": 8}
"""Linear layers of both blocks (GPT-2 has two of the name c_proj); the other `FAMILIES` have Llama's fourteen."""

FLOAT64_THROUGHOUT = ("gpt2", "opt")
"""Families that stay in float64 if loaded so; the others compute norms or rotary angles in fp32."""

STOP_IDS = (2, *range(20, 50))
"""EOS and thirty more, so that random answers end now and then."""


def save_tiny_trunk(
    folder: Path, tokenizer: Path, family: str = "llama", seed: int = 0, **changes: object
) -> Path:
    """Write a random model, its tokenizer and a reward head; returns the folder.

    Args:
        folder: Made if missing.
        tokenizer: Folder of the tokenizer to copy.
        family: Key of `FAMILIES`.
        seed: Of all weights.
        changes: Settings of the configuration to override.
    """
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    settings = {
        # A copy all through: Phi-3's configuration writes into its rotary settings, which families share.
        **deepcopy({**FAMILIES, **RECURRENT, **UNPADDED}[family]),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    settings["vocab_size"] = len(AutoTokenizer.from_pretrained(folder))
    settings.update(changes)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        # Stock initialization is so small that a wrong mask or scale would hardly show.
        if parameter.dim() > 1:
            parameter.data = 0.25 * noise
        else:
            parameter.data += 0.2 * noise
    generation = model.generation_config
    generation.eos_token_id = list(STOP_IDS)
    # What leaks into sampling in other libraries; ours must not notice.
    generation.do_sample = True
    generation.temperature, generation.top_k, generation.top_p = 0.1, 2, 0.3
    model.save_pretrained(folder)
    head = ScalarHead(model.get_output_embeddings().weight.shape[1], seed)
    head.bias.data.fill_(0.3)
    save_heads(folder, {"reward": head})
    return folder
