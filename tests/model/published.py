"""Facts of published models: the numbers of their config.json that give its shape, and what their cards say of them.

``config`` has the keys that differ from the defaults of transformers' class, as the model's repository publishes them.
The rest is from the model card or the report: parameters in billions, all and those that a token uses, and the context.
What a token takes in the KV cache is written as layers x numbers x bytes in bfloat16, from the described attention;
``tied`` is whether the head is the input table. Nothing here was computed by truffula.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """``parameters`` and ``active``: as the source writes them, correct to the last digit. ``refused``: the error."""

    config: Mapping[str, Any]
    source: str
    parameters: str = ""
    active: str = ""
    context: int = 0
    kv: int = 0
    windows: int = 0
    tied: bool = False
    refused: str = ""


_FULL_EACH_FOURTH = ["linear_attention"] * 3 + ["full_attention"]
_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "rope_theta": 1e6, "max_position_embeddings": 40960}
_QWEN3_5 = {"vocab_size": 248320, "head_dim": 256, "max_position_embeddings": 262144}
_LLAMA3 = {
    "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 5e5, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_GEMMA4_LAYERS = ["sliding_attention"] * 5 + ["full_attention"]
_KIMI = {
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
    "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384, "num_experts_per_tok": 8,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 1536, "kv_lora_rank": 512, "n_group": 1,
    "topk_group": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 163840,
    "rms_norm_eps": 1e-5, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0, "rope_theta": 50000.0, "model_type": "kimi_k2",
}  # fmt: skip

PUBLISHED: Mapping[str, Published] = {
    "Qwen2.5-3B-Instruct": Published(
        {
            "model_type": "qwen2",
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
        },
        "model card: 3.09B parameters, 36 layers, 16 heads for Q and 2 for KV, context 32,768, tied embedding",
        parameters="3.09",
        context=32768,
        kv=36 * (2 * 2 * 128) * 2,
        tied=True,
    ),
    "Qwen3-0.6B": Published(
        {
            "model_type": "qwen3",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            **_QWEN3,
            "tie_word_embeddings": True,
        },
        "model card: 0.6B, 28 layers, 16 heads for Q and 8 for KV; technical report: tied",
        parameters="0.6",
        context=40960,
        kv=28 * (2 * 8 * 128) * 2,
        tied=True,
    ),
    "Qwen3-30B-A3B": Published(
        {
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            **_QWEN3,
            "tie_word_embeddings": False,
        },
        "model card: 30.5B in total and 3.3B activated, 48 layers, 32 heads for Q and 4 for KV, 8 of 128 experts",
        parameters="30.5",
        active="3.3",
        context=40960,
        kv=48 * (2 * 4 * 128) * 2,
    ),
    "Qwen3.5-4B": Published(
        {
            "model_type": "qwen3_5",
            "tie_word_embeddings": True,
            "text_config": {
                "model_type": "qwen3_5_text",
                "hidden_size": 2560,
                "intermediate_size": 9216,
                "num_hidden_layers": 32,
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
                "linear_num_value_heads": 32,
                "layer_types": _FULL_EACH_FOURTH * 8,
                "tie_word_embeddings": True,
                **_QWEN3_5,
            },
        },
        "model card: 4B, 32 layers, one of four with attention, 16 heads for Q and 4 for KV of 256, context 262,144",
        parameters="4",
        context=262144,
        kv=8 * (2 * 4 * 256) * 2,
        tied=True,
    ),
    "Qwen3.6-35B-A3B": Published(
        {
            "model_type": "qwen3_5_moe",
            "tie_word_embeddings": False,
            "text_config": {
                "model_type": "qwen3_5_moe_text",
                "hidden_size": 2048,
                "moe_intermediate_size": 512,
                "shared_expert_intermediate_size": 512,
                "num_hidden_layers": 40,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
                "num_experts": 256,
                "num_experts_per_tok": 8,
                "linear_num_value_heads": 32,
                "layer_types": _FULL_EACH_FOURTH * 10,
                "tie_word_embeddings": False,
                **_QWEN3_5,
            },
        },
        "model card: 35B in total and 3B activated, 40 layers, one of four with attention, 2 heads for KV of 256",
        parameters="35",
        active="3",
        context=262144,
        kv=10 * (2 * 2 * 256) * 2,
    ),
    "GLM-4.7-Flash": Published(
        {
            "model_type": "glm4_moe_lite",
            "hidden_size": 2048,
            "intermediate_size": 10240,
            "num_hidden_layers": 47,
            "moe_intermediate_size": 1536,
            "num_attention_heads": 20,
            "num_key_value_heads": 20,
            "vocab_size": 154880,
            "n_routed_experts": 64,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "q_lora_rank": 768,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64,
            "v_head_dim": 256,
            "routed_scaling_factor": 1.8,
            "max_position_embeddings": 202752,
            "tie_word_embeddings": False,
        },
        "model card: 30B-A3B; latent attention caches a latent of 512 and a rotated key of 64",
        parameters="30",
        active="3",
        context=202752,
        kv=47 * (512 + 64) * 2,
    ),
    "Kimi-K2.5": Published(
        {
            "model_type": "kimi_k25",
            "tie_word_embeddings": False,
            "text_config": {
                **_KIMI,
                "max_position_embeddings": 262144,
                "tie_word_embeddings": False,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 64.0,
                    "original_max_position_embeddings": 4096,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                },
            },
        },
        "model card: 1T in total and 32B activated, 61 layers, 384 experts of which 8 and a shared one, context 256K",
        parameters="1000",
        active="32",
        context=262144,
        kv=61 * (512 + 64) * 2,
    ),
    "DeepSeek-V3": Published(
        {
            "model_type": "deepseek_v3",
            "max_position_embeddings": 163840,
            "tie_word_embeddings": False,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
        "technical report: 671B in total and 37B activated, 61 layers, latent of 512 and rotated key of 64",
        parameters="671",
        active="37",
        context=163840,
        kv=61 * (512 + 64) * 2,
    ),
    "GLM-5": Published(
        {"model_type": "glm_moe_dsa", "tie_word_embeddings": False, "max_position_embeddings": 202752},
        "model card: 744B in total and 40B activated; sparse attention to 2,048 keys, which is what is served",
        parameters="744",
        active="40",
        context=2048,
        kv=78 * (512 + 64) * 2,
    ),
    "Llama-3.2-1B": Published(
        {
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "head_dim": 64,
            **_LLAMA3,
            "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "llama3", "factor": 32.0, **_LLAMA3_ROPE},
        },
        "model card: 1.23B parameters, context 128k, shared embeddings",
        parameters="1.23",
        context=131072,
        kv=16 * (2 * 8 * 64) * 2,
        tied=True,
    ),
    "Llama-3.1-8B": Published(
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            **_LLAMA3,
            "tie_word_embeddings": False,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **_LLAMA3_ROPE},
        },
        "The Llama 3 Herd of Models, table 3: 8B, 32 layers, 8 heads for KV; 8.03B by the repository's file sizes",
        parameters="8.03",
        context=131072,
        kv=32 * (2 * 8 * 128) * 2,
    ),
    "Mixtral-8x7B": Published(
        {
            "model_type": "mixtral",
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        "announcement: 46.7B in total and 12.9B used per token; paper: 32 layers, 8 heads for KV of 128",
        parameters="46.7",
        active="12.9",
        context=32768,
        kv=32 * (2 * 8 * 128) * 2,
    ),
    "gpt-oss-20b": Published(
        {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32, "tie_word_embeddings": False},
        "model card, table 1: 20.91B in total and 3.61B active, 24 layers, 8 heads for KV of 64, every second layer "
        "with a window of 128",
        parameters="20.91",
        active="3.61",
        context=131072,
        kv=12 * (2 * 8 * 64) * 2,
        windows=12 * (2 * 8 * 64) * 2 * 128,
    ),
    "gpt-oss-120b": Published(
        {"model_type": "gpt_oss", "num_hidden_layers": 36, "num_local_experts": 128, "tie_word_embeddings": False},
        "model card, table 1: 116.83B in total and 5.13B active, 36 layers",
        parameters="116.83",
        active="5.13",
        context=131072,
        kv=18 * (2 * 8 * 64) * 2,
        windows=18 * (2 * 8 * 64) * 2 * 128,
    ),
    "MiniMax-M2.5": Published(
        {"model_type": "minimax_m2", "max_position_embeddings": 196608, "tie_word_embeddings": False},
        "model card: 230B in total and 10B activated",
        parameters="230",
        active="10",
        context=196608,
        kv=62 * (2 * 8 * 128) * 2,
    ),
    "Gemma-4-E4B": Published(
        {
            "model_type": "gemma4",
            "tie_word_embeddings": True,
            "text_config": {
                "model_type": "gemma4_text",
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 42,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "head_dim": 256,
                "global_head_dim": 512,
                "hidden_size_per_layer_input": 256,
                "num_kv_shared_layers": 18,
                "sliding_window": 512,
                "layer_types": _GEMMA4_LAYERS * 7,
                "max_position_embeddings": 131072,
                "vocab_size": 262144,
            },
        },
        "model card: 8B with embeddings (and encoders), 42 layers, window 512, context 128K",
        parameters="8",
        context=131072,
        kv=4 * (2 * 2 * 512) * 2,
        windows=20 * (2 * 2 * 256) * 2 * 512,
        tied=True,
    ),
    "Gemma-4-26B-A4B": Published(
        {
            "model_type": "gemma4",
            "tie_word_embeddings": True,
            "text_config": {
                "model_type": "gemma4_text",
                "hidden_size": 2816,
                "intermediate_size": 2112,
                "num_hidden_layers": 30,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "num_global_key_value_heads": 2,
                "head_dim": 256,
                "global_head_dim": 512,
                "attention_k_eq_v": True,
                "hidden_size_per_layer_input": 0,
                "enable_moe_block": True,
                "num_experts": 128,
                "top_k_experts": 8,
                "moe_intermediate_size": 704,
                "sliding_window": 1024,
                "layer_types": _GEMMA4_LAYERS * 5,
                "max_position_embeddings": 262144,
                "vocab_size": 262144,
            },
        },
        "model card: 25.2B in total and 3.8B active, 30 layers, window 1,024, context 256K, 8 of 128 experts",
        parameters="25.2",
        active="3.8",
        context=262144,
        kv=5 * (2 * 2 * 512) * 2,
        windows=25 * (2 * 8 * 256) * 2 * 1024,
        tied=True,
    ),
    "Gemma-4-31B": Published(
        {
            "model_type": "gemma4",
            "tie_word_embeddings": True,
            "text_config": {
                "model_type": "gemma4_text",
                "hidden_size": 5376,
                "intermediate_size": 21504,
                "num_hidden_layers": 60,
                "num_attention_heads": 32,
                "num_key_value_heads": 16,
                "num_global_key_value_heads": 4,
                "head_dim": 256,
                "global_head_dim": 512,
                "attention_k_eq_v": True,
                "hidden_size_per_layer_input": 0,
                "sliding_window": 1024,
                "layer_types": _GEMMA4_LAYERS * 10,
                "max_position_embeddings": 262144,
                "vocab_size": 262144,
            },
        },
        "model card: 30.7B, 60 layers, window 1,024, context 256K; full layers with 4 heads for KV of 512",
        parameters="30.7",
        context=262144,
        kv=10 * (2 * 4 * 512) * 2,
        windows=50 * (2 * 16 * 256) * 2 * 1024,
        tied=True,
    ),
    "Nemotron-H-56B": Published(
        {
            "model_type": "nemotron_h",
            "hidden_size": 8192,
            "intermediate_size": 32768,
            "num_attention_heads": 64,
            "hybrid_override_pattern": "M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-" * 0 + "M-M-M-M-M-",
            "head_dim": 128,
            "num_hidden_layers": 118,
            "num_key_value_heads": 8,
            "mamba_num_heads": 256,
            "mamba_head_dim": 64,
            "n_groups": 8,
            "ssm_state_size": 256,
            "vocab_size": 131072,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
        },
        "technical report: 56B, 118 layers: 54 Mamba-2, 54 MLP and 10 of attention with 8 heads for KV of 128",
        parameters="56",
        context=8192,
        kv=10 * (2 * 8 * 128) * 2,
    ),
    "Kimi-K3": Published(
        {"model_type": "kimi_k3", "auto_map": {"AutoConfig": "configuration_kimi_k3.KimiK3Config"}},
        "a type with code of its repository, which transformers lacks",
        refused="model_type is 'kimi_k3'",
    ),
}
