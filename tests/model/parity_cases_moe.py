"""Cases of ``test_architecture_parity`` with experts."""

from __future__ import annotations

from typing import Any

LAGUNA_YARN = {
    "full_attention": {
        "rope_type": "yarn", "rope_theta": 5e4, "partial_rotary_factor": 0.6, "factor": 4.0,
        "original_max_position_embeddings": 16, "beta_fast": 8.0, "beta_slow": 1.0, "attention_factor": 1.2},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e3},
}  # fmt: skip
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("mixtral", "plain", {}),
    ("mixtral", "all experts chosen, window", {"num_experts_per_tok": 5, "sliding_window": 6}),
    ("mixtral", "one expert, tied, one kv head", {"num_local_experts": 1, "num_experts_per_tok": 1,
                                                  "tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("qwen3_moe", "plain", {}),
    ("qwen3_moe", "normalised, dense first layer, odd vocabulary", {"norm_topk_prob": True, "mlp_only_layers": [0],
                                                                     "vocab_size": 97}),
    ("qwen3_moe", "every second layer, biases", {"decoder_sparse_step": 2, "attention_bias": True}),
    ("qwen3_moe", "window", {"sliding_window": 5, "use_sliding_window": True, "moe_intermediate_size": 17}),
    ("dots1", "groups of experts", {}),
    ("dots1", "windows, normalised, scaled", {"sliding_window": 6, "max_window_layers": 1, "norm_topk_prob": True,
                                              "routed_scaling_factor": 2.5}),
    ("ernie4_5_moe", "plain", {}),
    ("ernie4_5_moe", "biases, no shared expert, every second layer", {
        "use_bias": True, "moe_num_shared_experts": 0, "moe_layer_start_index": 0, "moe_layer_interval": 2}),
    ("ernie4_5_moe", "biases, untied, a layer without experts at the end", {
        "use_bias": True, "moe_layer_end_index": 1, "tie_word_embeddings": False}),
    ("glm4_moe", "one group", {}),
    ("glm4_moe", "groups, norms of q and k, biases", {
        "n_group": 3, "topk_group": 2, "use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 1.8}),
    ("glm4_moe", "all dense, not normalised", {"first_k_dense_replace": 3, "norm_topk_prob": False}),
    ("gpt_oss", "plain", {}),
    ("gpt_oss", "tight limit, one kv head, no biases", {
        "swiglu_limit": 0.5, "num_key_value_heads": 1, "attention_bias": False, "intermediate_size": 17}),
    ("granitemoe", "multipliers", {}),
    ("granitemoe", "tied, biases, one expert chosen", {
        "tie_word_embeddings": True, "attention_bias": True, "num_experts_per_tok": 1}),
    ("granitemoeshared", "shared expert", {}),
    ("granitemoeshared", "none", {"shared_intermediate_size": 0}),
    ("hunyuan_v1_moe", "plain", {}),
    ("hunyuan_v1_moe", "a list, biases", {
        "moe_topk": [2, 2, 2], "attention_bias": True, "num_key_value_heads": 1}),
    ("minimax_m2", "plain", {}),
    ("minimax_m2", "one kv head, all experts", {"num_key_value_heads": 1, "num_experts_per_tok": 6}),
    ("olmoe", "plain", {}),
    ("olmoe", "normalised, biases", {"norm_topk_prob": True, "attention_bias": True}),
    ("phimoe", "plain", {}),
    ("phimoe", "window, biases, head bias", {"sliding_window": 5, "attention_bias": True, "lm_head_bias": True}),
    ("qwen2_moe", "plain", {}),
    ("qwen2_moe", "windows, normalised, dense layers", {
        "sliding_window": 5, "use_sliding_window": True, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    ("qwen2_moe", "no biases, every second layer", {"qkv_bias": False, "decoder_sparse_step": 2}),
    ("afmoe", "plain", {}),
    ("afmoe", "no shared expert, biases, one kv head", {
        "num_shared_experts": 0, "attention_bias": True, "num_key_value_heads": 1, "mup_enabled": False}),
    ("cohere2_moe", "plain", {}),
    ("cohere2_moe", "dense first layer, shared experts averaged, sigmoid", {
        "first_k_dense_replace": 1, "prefix_dense_intermediate_size": 28, "num_shared_experts": 2,
        "expert_selection_fn": "sigmoid", "norm_topk_prob": False}),
    ("cohere2_moe", "shared expert added, rms norms", {
        "num_shared_experts": 1, "shared_expert_combination_strategy": "sum", "rms_norm_eps": 1e-5}),
    ("exaone_moe", "plain", {}),
    ("exaone_moe", "groups, full layers, a dense layer between", {
        "n_group": 3, "topk_group": 2, "sliding_window_pattern": 1, "mlp_layer_types": ["sparse", "dense", "sparse"]}),
    ("dbrx", "plain", {}),
    ("dbrx", "clipped, one kv head, another norm of the weights", {
        "attn_config": {"kv_n_heads": 1, "rope_theta": 5e3, "clip_qkv": 0.7},
        "ffn_config": {"ffn_hidden_size": 9, "moe_num_experts": 5, "moe_top_k": 3,
                       "moe_normalize_expert_weights": 2.0}}),
    ("dbrx", "weights as they are, gelu, all experts", {
        "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 3, "moe_top_k": 3,
                       "moe_normalize_expert_weights": None, "ffn_act_fn": {"name": "gelu"}}}),
    ("laguna", "plain", {}),
    ("laguna", "a gate per column, softcap, one kv head, biases, tied", {
        "gating": "per-element", "moe_router_logit_softcapping": 0.7, "num_key_value_heads": 1,
        "attention_bias": True, "tie_word_embeddings": True, "moe_routed_scaling_factor": 2.5}),
    ("laguna", "the class's ropes and heads, dense layers", {
        "rope_parameters": None, "layer_types": None, "num_attention_heads_per_layer": None, "head_dim": 12,
        "mlp_layer_types": ["sparse", "dense", "dense"]}),
    ("laguna", "yarn in full layers", {"rope_parameters": LAGUNA_YARN}),
    ("llama4_text", "chunks shorter than the prompt", {}),
    ("llama4_text", "dense layers, no norms, one kv head", {
        "interleave_moe_layer_step": 2, "use_qk_norm": False, "num_key_value_heads": 1,
        "attn_temperature_tuning": False}),
    ("llama4_text", "no chunks, biases", {"attention_chunk_size": None, "attention_bias": True}),
]  # fmt: skip
