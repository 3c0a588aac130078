"""Awkward configs of the dense families, as rows of ``test_architecture_parity``."""

from __future__ import annotations

from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_OF_32 = LLAMA3 | {"original_max_position_embeddings": 32}
BETA = {"rope_theta": 1e4, "original_max_position_embeddings": 5, "llama_4_scaling_beta": 0.5}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
KINDS = [FULL, SLIDING] * 2 + [FULL]
GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 9}
WINDOW5 = {"use_sliding_window": True, "sliding_window": 5}
ONE_KV = {"num_key_value_heads": 1}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("apertus", "the class's rope", {}),
    ("apertus", "tied, biases, default rope", {**TIED, "attention_bias": True, "rope_parameters": {"rope_theta": 5e3}}),
    ("apertus", "another activation, one kv head", {**ONE_KV, "hidden_act": "relu2"}),
    ("arcee", "plain", {}),
    ("arcee", "tied, biases, own head_dim", {**TIED, "attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    ("arcee", "rope llama3, silu", {"hidden_act": "silu", "rope_scaling": LLAMA3_OF_32}),
    ("cohere", "plain", {}),
    ("cohere", "norms of heads, untied, own head_dim", {**UNTIED, "use_qk_norm": True, "head_dim": 10}),
    ("cohere", "one kv head, biases, rope linear", {
        **ONE_KV, "attention_bias": True, "use_qk_norm": True, "rope_scaling": {"type": "linear", "factor": 3.0}}),
    ("cohere2", "plain", {}),
    ("cohere2", "pattern 2, untied, biases", {**UNTIED, "sliding_window_pattern": 2, "attention_bias": True}),
    ("cohere2", "layer_types, one kv head", {**ONE_KV, "layer_types": [FULL, FULL, SLIDING, SLIDING, FULL]}),
    ("cwm", "the class's rope", {}),
    ("cwm", "layer_types, tied, one kv head", {**TIED, **ONE_KV, "layer_types": [SLIDING, FULL] * 2 + [FULL]}),
    ("cwm", "no window, default rope", {"sliding_window": 3, "mlp_bias": True, "rope_parameters": {"rope_theta": 5e3}}),
    ("ernie4_5", "plain", {}),
    ("ernie4_5", "untied, biases, one kv head", {**UNTIED, **ONE_KV, "use_bias": True}),
    ("ernie4_5", "rope yarn, head_dim null", {"head_dim": None, "rope_scaling": YARN}),
    ("exaone4", "plain", {}),
    ("exaone4", "no window, tied", {**TIED, "sliding_window": None, "layer_types": [FULL] * 3}),
    ("exaone4", "layer_types, one kv head, rope llama3", {
        **ONE_KV, "layer_types": [FULL, SLIDING, FULL], "rope_scaling": LLAMA3_OF_32}),
    ("gemma", "plain", {}),
    ("gemma", "untied, biases, the old activation", {**UNTIED, "attention_bias": True, "hidden_act": "gelu"}),
    ("gemma", "one kv head, rope linear", {**ONE_KV, "rope_scaling": {"type": "linear", "factor": 3.0}}),
    ("gemma4_text", "plain", {}),
    ("gemma4_text", "keys as values, untied, softcap", {
        **UNTIED, "attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0, "final_logit_softcapping": 1.5}),
    ("gemma4_text", "wide shared layers, biases, one kv head", {
        **ONE_KV, "use_double_wide_mlp": True, "attention_bias": True, "num_kv_shared_layers": 3}),
    ("gemma4_text", "other ropes", {"num_hidden_layers": 3, "layer_types": KINDS[2:], "num_kv_shared_layers": 0,
        "rope_parameters": {FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 7e3},
                            SLIDING: {"rope_type": "linear", "factor": 2.0, "rope_theta": 2e3}}}),
    ("gemma4_text", "experts", {**GEMMA4_EXPERTS}),
    ("gemma4_text", "all experts, no inputs of layers, keys as values, wide, untied", {
        **UNTIED, **GEMMA4_EXPERTS, "top_k_experts": 5, "attention_k_eq_v": True, "num_kv_shared_layers": 0,
        "use_double_wide_mlp": True, "hidden_size_per_layer_input": 0}),
    ("gemma4_text", "one expert, one kv head", {
        **ONE_KV, **GEMMA4_EXPERTS, "num_experts": 1, "top_k_experts": 1, "hidden_activation": "silu"}),
    ("gemma4_unified_text", "plain", {}),
    ("gemma4_unified_text", "shared layers, keys as values, window shorter", {
        "attention_k_eq_v": True, "num_kv_shared_layers": 1, "sliding_window": 3,
        "num_hidden_layers": 5, "layer_types": KINDS}),
    ("glm", "plain", {}),
    ("glm", "tied, no biases, all rotated, one kv head", {
        **TIED, **ONE_KV, "attention_bias": False, "partial_rotary_factor": 1.0}),
    ("glm4", "plain", {}),
    ("glm4", "tied, rope yarn, one kv head", {**TIED, **ONE_KV, "rope_scaling": YARN}),
    ("granite", "plain", {}),
    ("granite", "tied, biases, odd vocabulary", {**TIED, "attention_bias": True, "mlp_bias": True, "vocab_size": 97}),
    ("granite", "no multipliers, rope yarn", {
        "attention_multiplier": 1.0, "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}),
    ("helium", "plain", {}),
    ("helium", "tied, biases, one kv head", {**TIED, **ONE_KV, "attention_bias": True, "mlp_bias": True}),
    ("hunyuan_v1_dense", "plain", {}),
    ("hunyuan_v1_dense", "tied, alpha, biases", {
        **TIED, "attention_bias": True, "rope_scaling": {"type": "dynamic", "alpha": 50.0, "factor": 1.0}}),
    ("hunyuan_v1_dense", "one kv head, rope linear", {**ONE_KV, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("ministral3", "plain", {}),
    ("ministral3", "window, tied, default rope", {**TIED, "sliding_window": 6, "rope_parameters": BETA}),
    ("ministral3", "one kv head", {**ONE_KV, "hidden_size": 30}),
    ("muse_glimmer", "plain", {}),
    ("muse_glimmer", "tied, biases, one kv head", {**TIED, **ONE_KV, "attention_bias": True, "qk_scale_factor": 1.7}),
    ("muse_glimmer", "rotated and windowed layers apart, large eps", {
        "layer_types": KINDS, "layer_rope_theta": [5e3, 0, 0, 5e3, 5e3], "rope_parameters": {"rope_theta": 5e3},
        "post_norm_eps": 0.1, "rms_norm_eps": 0.01, "output_multiplier": 0.4, "final_logit_softcapping": 1.5}),
    ("nemotron", "plain", {}),
    ("nemotron", "tied, biases, all rotated", {
        **TIED, "attention_bias": True, "mlp_bias": True, "partial_rotary_factor": 1.0}),
    ("nemotron", "one kv head, gelu, rope linear", {
        **ONE_KV, "hidden_act": "gelu", "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("olmo", "plain", {}),
    ("olmo", "clipped, tied, biases", {**TIED, "clip_qkv": 0.5, "attention_bias": True}),
    ("olmo", "one kv head, rope yarn", {**ONE_KV, "rope_scaling": YARN}),
    ("olmo2", "plain", {}),
    ("olmo2", "tied, biases, one kv head", {**TIED, **ONE_KV, "attention_bias": True}),
    ("olmo2", "own head_dim, rope llama3", {"head_dim": 10, "rope_scaling": LLAMA3_OF_32}),
    ("olmo3", "plain", {}),
    ("olmo3", "scaled full layers", {**TIED, "rope_scaling": {"rope_type": "yarn", **YARN}, "layer_types": KINDS}),
    ("olmo3", "nested ropes, one kv head", {**ONE_KV, "rope_parameters": {
        FULL: {"rope_type": "linear", "factor": 3.0, "rope_theta": 7e3}, SLIDING: {"rope_theta": 2e3}}}),
    ("seed_oss", "plain", {}),
    ("seed_oss", "tied, other biases", {**TIED, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
    ("smollm3", "plain", {}),
    ("smollm3", "untied, interval 2", {**UNTIED, "no_rope_layers": None, "no_rope_layer_interval": 2}),
    ("smollm3", "windows without rope", {**ONE_KV, **WINDOW5}),
    ("smollm3", "windows with rope", {**WINDOW5, "layer_types": [SLIDING, FULL, FULL]}),
    ("smollm3", "biases, own head_dim", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    ("stablelm", "plain", {}),
    ("stablelm", "tied, parallel, norms of heads", {**TIED, "use_parallel_residual": True, "qk_layernorm": True}),
    ("stablelm", "one kv head, biases, norms, half rotated", {
        **ONE_KV, "use_qkv_bias": True, "qk_layernorm": True, "partial_rotary_factor": 0.5}),
]  # fmt: skip
