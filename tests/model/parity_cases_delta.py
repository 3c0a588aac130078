"""Awkward configs of the families with linear attention by the gated delta rule."""

from __future__ import annotations

from typing import Any

LINEAR, FULL = "linear_attention", "full_attention"
IMAGE_ROPE = {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [1, 1, 1], "mrope_interleaved": True}
ONE_KEY_HEAD = {"linear_num_key_heads": 1, "linear_num_value_heads": 3, "linear_key_head_dim": 5}

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("qwen3_5_text", "plain", {}),
    ("qwen3_5_text", "tied, one key head, odd vocabulary", {
        "tie_word_embeddings": True, "vocab_size": 97, "num_key_value_heads": 1, **ONE_KEY_HEAD,
    }),
    ("qwen3_5_text", "layer_types, biases, half of a head rotated", {
        "layer_types": [FULL, LINEAR, LINEAR], "num_hidden_layers": 3, "attention_bias": True,
        "rope_parameters": IMAGE_ROPE | {"partial_rotary_factor": 0.5},
    }),
    ("qwen3_5_text", "linear attention alone, long convolution", {
        "layer_types": [LINEAR, LINEAR], "num_hidden_layers": 2, "linear_conv_kernel_dim": 7,
    }),
    ("qwen3_5_text", "an interval, head_dim not hidden over heads", {
        "full_attention_interval": 2, "hidden_size": 30, "head_dim": 24, "num_hidden_layers": 3,
    }),
    ("qwen3_5_moe_text", "plain", {}),
    ("qwen3_5_moe_text", "one expert of two, tied, one key head", {
        "num_experts": 2, "num_experts_per_tok": 1, "tie_word_embeddings": True, **ONE_KEY_HEAD,
    }),
    ("kimi_linear", "plain", {}),
    ("kimi_linear", "as published, groups, dense", {
        "linear_attn_config": {"full_attn_layers": [2], "kda_layers": [1, 3], "head_dim": 22, "num_heads": 2,
                               "short_conv_kernel_size": 3},
        "num_hidden_layers": 3, "first_k_dense_replace": 2, "num_expert_group": 3, "topk_group": 2,
        "q_lora_rank": 14, "num_shared_experts": 2, "moe_renormalize": False, "model_max_length": 400,
    }),
    ("olmo_hybrid", "plain", {}),
    ("olmo_hybrid", "no rotation, tied, widths by default, one layer with attention", {
        "rope_parameters": {"rope_theta": None, "rope_type": "default"}, "tie_word_embeddings": True,
        "num_hidden_layers": 2, "linear_key_head_dim": None, "linear_value_head_dim": None,
        "linear_num_key_heads": None, "linear_num_value_heads": None,
    }),
    ("olmo_hybrid", "no change of sign, layer_types, one kv head", {
        "linear_allow_neg_eigval": False, "layer_types": [FULL, LINEAR, LINEAR], "num_hidden_layers": 3,
        "num_key_value_heads": 1, "attention_bias": True, **ONE_KEY_HEAD, "linear_key_head_dim": 23,
    }),
    ("qwen3_next", "plain", {}),
    ("qwen3_next", "without experts", {"num_experts": 0}),
    ("qwen3_next", "dense layers, weights as they are", {
        "mlp_only_layers": [1], "decoder_sparse_step": 2, "norm_topk_prob": False, "vocab_size": 97,
    }),
    ("qwen3_next", "one key head, tied, large eps", {
        "tie_word_embeddings": True, "rms_norm_eps": 0.1, **ONE_KEY_HEAD,
    }),
    ("qwen3_next", "three values per key, biases", {
        "linear_num_value_heads": 6, "attention_bias": True, "num_key_value_heads": 1, "full_attention_interval": 3,
    }),
]  # fmt: skip
