"""Writes tiny models with unusual shapes: odd vocabularies, head widths other than hidden size / heads.

Needs only numpy and takes milliseconds. Weights are large enough that errors show in the logits; with transformers'
initialisation near zero, all models would be equal.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from truffula.model.config_view import load_defaults
from truffula.model.names import written_tensors
from truffula.model.read import read_config
from truffula.model.rows import WeightRow
from truffula.testing.files import Array, as_dtype, write_safetensors

_BASE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
}
_EXPERTS = {
    "n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 2, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
_V3_EXPERTS = {**_EXPERTS, "first_k_dense_replace": 1}
_INDEXER = {"index_topk": 64, "index_head_dim": 8, "index_n_heads": 2}
_KIMI_VISION = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "pos_emb_height": 2,
    "pos_emb_width": 2,
}  # fmt: skip
_VISION = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2}
_MUSE = {
    "vision_config": {**_VISION, "max_position_embeddings": 16, "pos_emb_height": 4, "pos_emb_width": 4},
    "projector_hidden_size": 8,
}
_DELTA = {
    # The norm of a small result of the delta rule would enlarge rounding errors, also transformers'.
    "rms_norm_eps": 1e-2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
}
_SHARED = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 6}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_OF_TYPE: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": {**_MLA, **_V3_EXPERTS},
    "deepseek_v3": {**_MLA, **_V3_EXPERTS},
    "deepseek_v32": {**_MLA, **_V3_EXPERTS, **_INDEXER},
    "glm4_moe_lite": {**_MLA, **_EXPERTS, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "glm_moe_dsa": {**_MLA, **_V3_EXPERTS, **_INDEXER},
    "kimi_k2": {**_MLA, **_V3_EXPERTS},
    "bloom": {},
    "falcon": {"ffn_hidden_size": 56},
    "gemma2": {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 7},
    "gemma3_text": {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 7, "num_hidden_layers": 7},
    "gpt2": {"n_inner": 56},
    "gpt_bigcode": {"n_inner": 56},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 7},
    "gpt_neox": {"rotary_pct": 0.5},
    "gptj": {"n_inner": 56, "rotary_dim": 6},
    "apertus": {"head_dim": 10},
    "arcee": {},
    "cohere": {"layer_norm_eps": 1e-4, "logit_scale": 0.4},
    "cohere2": {"sliding_window": 7, "num_hidden_layers": 5, "logit_scale": 0.4},
    "cwm": {"head_dim": 10, "sliding_window": 7, "num_hidden_layers": 5},
    "ernie4_5": {"head_dim": 10},
    "exaone4": {"sliding_window": 7, "sliding_window_pattern": 2, "head_dim": 10},
    "gemma": {"head_dim": 10},
    # A larger eps: the norm of a small scan would enlarge rounding errors, also those of transformers.
    "bamba": {
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_n_groups": 2,
        "mamba_d_state": 10,
        "rms_norm_eps": 1e-2,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 0,
        "shared_intermediate_size": 40,
        "mamba_n_heads": 4,
        "mamba_n_groups": 2,
        "mamba_d_state": 12,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.4,
        "rms_norm_eps": 1e-2,
    },
    "kimi_linear": {
        "num_hidden_layers": 6,
        "rms_norm_eps": 1e-2,
        **_MLA,
        "q_lora_rank": None,
        "linear_head_dim": 20,
        "linear_num_heads": 3,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "pad_token_id": 0,
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv"],
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.1,
    },
    "falcon_h1": {
        "head_dim": 10,
        "mamba_d_ssm": 24,
        "mamba_n_heads": 4,
        "mamba_n_groups": 2,
        "mamba_d_state": 12,
        "rms_norm_eps": 1e-2,
        "embedding_multiplier": 3.0,
        "lm_head_multiplier": 0.6,
        "mlp_multipliers": [0.8, 1.3],
        "key_multiplier": 0.7,
        "attention_in_multiplier": 0.9,
        "attention_out_multiplier": 1.2,
        "ssm_multipliers": [1.1, 0.7, 1.3, 0.8, 0.6],
        "ssm_in_multiplier": 0.8,
        "ssm_out_multiplier": 1.4,
    },
    "jamba": {
        "head_dim": 10,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "num_experts": 5,
        "mamba_d_state": 6,
        "rms_norm_eps": 1e-2,
    },
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "num_dense_layers": 1,
    },
    # Scores of normed q and k are not scaled: with a small epsilon they are so large that float32 rounds visibly.
    "gemma4_text": {
        "rms_norm_eps": 0.5,
        "head_dim": 10,
        "global_head_dim": 16,
        "sliding_window": 7,
        "num_hidden_layers": 5,
        "layer_types": [_SLIDING, _FULL, _SLIDING, _SLIDING, _FULL],
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": 103,
        "num_kv_shared_layers": 2,
    },
    "gemma4_unified_text": {
        "head_dim": 10,
        "global_head_dim": 16,
        "sliding_window": 7,
        "layer_types": [_SLIDING, _SLIDING, _FULL],
    },
    "dbrx": {
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 5e3, "clip_qkv": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e3},
        "ffn_config": {"ffn_hidden_size": 17, "moe_num_experts": 5, "moe_top_k": 2},
    },
    "glm": {"head_dim": 12},
    "glm4": {"head_dim": 12},
    "granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.5,
        "residual_multiplier": 0.3,
    },
    "helium": {"head_dim": 8},
    "laguna": {
        "head_dim": 10,
        "sliding_window": 7,
        "layer_types": [_FULL, _SLIDING, _SLIDING],
        "num_attention_heads_per_layer": [4, 6, 2],
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 9,
        "shared_expert_intermediate_size": 11,
        "rope_parameters": {
            _FULL: {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.6},
            _SLIDING: {"rope_type": "default", "rope_theta": 2e3},
        },
    },
    "hunyuan_v1_dense": {"head_dim": 10},
    "llama": {},
    "mixtral": {"sliding_window": None, "num_local_experts": 5, "num_experts_per_tok": 2},
    "ministral": {"sliding_window": 7, "head_dim": 8},
    "ministral3": {"head_dim": 10, "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.3}},
    "mistral": {"sliding_window": 7},
    "mistral4": {**_MLA, **_V3_EXPERTS, "first_k_dense_replace": 0},
    "mpt": {"max_seq_len": 512},
    "opt": {"ffn_dim": 56},
    "phi": {"num_key_value_heads": 4},
    "phi3": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {"head_dim": 10},
    "starcoder2": {"sliding_window": 7},
    "muse_glimmer_text": {"head_dim": 10, "sliding_window": 7, "num_hidden_layers": 5},
    "nemotron": {"head_dim": 12},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 7, "num_hidden_layers": 5},
    "nemotron_h": {
        "hybrid_override_pattern": "ME*-M",
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "moe_shared_expert_intermediate_size": 28,
        "head_dim": 10,
        "mamba_num_heads": 4,
        "mamba_head_dim": 6,
        "n_groups": 2,
        "ssm_state_size": 12,
        "layer_norm_epsilon": 1e-2,
    },
    "afmoe": {
        "head_dim": 8,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "sliding_window": 6,
        "global_attn_every_n_layers": 2,
        "mup_enabled": True,
        "route_scale": 1.7,
    },
    "cohere2_moe": {
        "head_dim": 8,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "sliding_window": 6,
        "sliding_window_pattern": 2,
        "logit_scale": 0.4,
    },
    "exaone_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "sliding_window": 6,
        "sliding_window_pattern": 2,
    },
    "llama4_text": {
        "head_dim": 8,
        "num_local_experts": 5,
        "intermediate_size": 24,
        "intermediate_size_mlp": 40,
        "attention_chunk_size": 6,
        "no_rope_layer_interval": 3,
        "floor_scale": 4,
    },
    "dots1": {
        "head_dim": 10,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "sliding_window": None,
    },
    "ernie4_5_moe": {
        "head_dim": 8,
        "moe_num_experts": 6,
        "moe_k": 3,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 2,
    },
    "glm4_moe": {
        "head_dim": 8,
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {
        "head_dim": 8,
        "sliding_window": 6,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "intermediate_size": 24,
    },
    "granitemoe": {
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "intermediate_size": 24,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "granitemoeshared": {
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "intermediate_size": 24,
        "shared_intermediate_size": 20,
        "attention_multiplier": 0.3,
    },
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 6, "moe_topk": 2, "intermediate_size": 24},
    "minimax_m2": {
        "head_dim": 12,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "intermediate_size": 24,
        "rotary_dim": 6,
    },
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 24},
    "phimoe": {"num_local_experts": 5, "intermediate_size": 24, "router_jitter_noise": 0.1},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20,
    },
    "olmo_hybrid": {
        "num_hidden_layers": 4,
        "pad_token_id": 0,
        **_DELTA,
        "linear_key_head_dim": 24,
        "linear_value_head_dim": 20,
    },
    "qwen3_5_text": {"head_dim": 16, "num_hidden_layers": 4, **_DELTA},
    "qwen3_5_moe_text": {"head_dim": 16, "num_hidden_layers": 4, **_DELTA, **_SHARED},
    "qwen3_next": {"head_dim": 16, "num_hidden_layers": 4, **_DELTA, **_SHARED},
    "qwen3_moe": {"head_dim": 10, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
    "seed_oss": {"head_dim": 10},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "stablelm": {"hidden_size": 64},
    "youtu": {**_MLA, "pad_token_id": None},
}
# Numbers of xielu whose tensors have no shape.
_SCALARS = ("act_fn.beta", "act_fn.eps")
# Multimodal types: the type of their text part, its default tying, and the keys beside it.
_TEXT_OF: Mapping[str, tuple[str, bool, Mapping[str, Any]]] = {
    "gemma3": ("gemma3_text", True, {}),
    "gemma4": ("gemma4_text", True, {}),
    "gemma4_unified": ("gemma4_unified_text", True, {}),
    "kimi_k25": ("deepseek_v3", False, {"vision_config": _KIMI_VISION, "projection_hidden_size": 8}),
    "llama4": ("llama4_text", False, {}),
    "mistral3": ("ministral3", True, {"vision_config": {"model_type": "pixtral", **_VISION}}),
    "muse_glimmer": ("muse_glimmer_text", False, _MUSE),
    "qwen3_5": ("qwen3_5_text", False, {}),
    "qwen3_5_moe": ("qwen3_5_moe_text", False, {}),
}


def tiny_config(model_type: str = "llama", **overrides: Any) -> dict[str, Any]:
    """A config.json of a tiny model, changed by ``overrides``; for multimodal types nested, without image encoder.

    Of a multimodal type whose text part may have several types, ``text_type`` is the one.
    """
    if model_type in _TEXT_OF:
        text_type, tied, more = _TEXT_OF[model_type]
        text_type = overrides.pop("text_type", text_type)
        text = tiny_config(text_type, **overrides)
        return {
            "model_type": model_type,
            "text_config": text,
            "tie_word_embeddings": text.get("tie_word_embeddings", tied),
            **more,
        }
    defaults = load_defaults()[model_type]
    base = {key: value for key, value in _BASE.items() if key in defaults.known}
    config = {"model_type": model_type, **base, **_OF_TYPE[model_type], **overrides}
    return {defaults.aliases.get(key, key): value for key, value in config.items()}


def tiny_llama_config(**overrides: Any) -> dict[str, Any]:
    """``tiny_config`` of a llama model."""
    return tiny_config("llama", **overrides)


def tiny_tensors(config: Mapping[str, Any], *, seed: int = 0, dtype: str = "float32") -> dict[str, Array]:
    """Random tensors with transformers' names; the head only when ``tie_word_embeddings`` is not true.

    Each tensor depends on ``seed`` and its name, so the common tensors of two configs are equal.
    """
    read = read_config(config)
    tied = config.get("tie_word_embeddings", read.tie_default)
    tensors = {}
    for item in written_tensors(read.spec, has_head=not tied):
        shape = () if item.module_name.endswith(_SCALARS) else item.shape
        tensors[item.name] = _random(item.module_name, item.row, shape, seed, dtype)
    return tensors


def _random(name: str, row: WeightRow, shape: tuple[int, ...], seed: int, dtype: str) -> Array:
    values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape).astype(np.float32)
    if row.kind == "vector" and row.param == "weight":
        values = values * np.float32(0.1) + np.float32(0 if row.transform == "plus_one" else 1)
    elif row.param == "bias":
        values = values * np.float32(0.1)
    elif row.kind == "vector":
        values = values * np.float32(0.3) + np.float32(0.4)
    else:
        # The embedding is small: a tied head with a large one would repeat every token.
        values = values * np.float32((0.5 if row.kind == "embed" else 1.5) / row.width**0.5)
    return as_dtype(values, dtype)


def write_tiny_checkpoint(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    dtype: str = "float32",
    drop: Iterable[str] = (),
    extra: Mapping[str, Array] | None = None,
    generation_config: Mapping[str, Any] | None = None,
) -> Path:
    """Write config.json and model.safetensors without transformers, and return ``folder``.

    ``drop`` removes tensors, then ``extra`` adds or replaces some, by their stored names.
    """
    config = dict(config if config is not None else tiny_llama_config())
    left_out = set(drop)
    tensors = {
        name: array for name, array in tiny_tensors(config, seed=seed, dtype=dtype).items() if name not in left_out
    }
    tensors |= dict(extra or {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder
