"""Parity cases of the families with latent attention: (model type, name, overrides), as in test_architecture_parity."""

from __future__ import annotations

from typing import Any

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
MSCALE_ONE = {"mscale": 1.0, "mscale_all_dim": 1.0}
MSCALE = {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7}
LINEAR = {"rope_type": "linear", "factor": 3.0, "mscale_all_dim": 1.0}
MISTRAL = {**YARN, "rope_theta": 1e4, "original_max_position_embeddings": 6, "llama_4_scaling_beta": 0.1, **MSCALE_ONE}
NO_Q_RANK = {"q_lora_rank": None}
BIASED_HALVES = {"attention_bias": True, "rope_interleave": False}
DENSE = {"first_k_dense_replace": 3}
GROUPS = {"n_group": 3, "topk_group": 2, "num_experts_per_tok": 2}
LIMITED = {"topk_method": "group_limited_greedy"}


def heads(count: int) -> dict[str, int]:
    return {"num_attention_heads": count, "num_key_value_heads": count}


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("deepseek_v2", "groups, yarn with mscale", {**GROUPS, **LIMITED, "rope_scaling": MSCALE}),
    ("deepseek_v2", "greedy", {"routed_scaling_factor": 2.0}),
    ("deepseek_v2", "no query rank, one head", {**NO_Q_RANK, **heads(1)}),
    ("deepseek_v2", "dense, with biases", {**DENSE, "attention_bias": True, "mlp_bias": True}),
    ("deepseek_v3", "groups, yarn with mscale", {**GROUPS, "rope_scaling": MSCALE}),
    ("deepseek_v3", "plain", {}),
    ("deepseek_v3", "no query rank, biases, rope in halves", {**NO_Q_RANK, **BIASED_HALVES, **DENSE}),
    ("deepseek_v3", "experts everywhere, weights as they are", {"first_k_dense_replace": 0, "norm_topk_prob": False}),
    ("deepseek_v3", "hidden not divisible by heads", {"hidden_size": 30, **heads(7)}),
    ("deepseek_v3", "yarn without mscale_all_dim", {"rope_scaling": {**YARN, "mscale": 1.2}}),
    ("deepseek_v3", "linear rope with mscale_all_dim", {"rope_scaling": LINEAR}),
    ("deepseek_v3", "large eps, which the latents' norms do not read", {"rms_norm_eps": 0.01}),
    ("glm4_moe_lite", "odd widths, odd vocabulary", {"v_head_dim": 7, "kv_lora_rank": 33, "vocab_size": 97}),
    ("glm4_moe_lite", "two shared experts' width, scaled", {"n_shared_experts": 2, "routed_scaling_factor": 1.8}),
    ("kimi_k25", "text part", {}),
    ("kimi_k25", "yarn, tied", {"rope_scaling": MSCALE, "tie_word_embeddings": True}),
    ("mistral4", "queries scaled by position", {"rope_parameters": MISTRAL}),
    ("mistral4", "dense first, groups, no query rank", {**NO_Q_RANK, **GROUPS, "first_k_dense_replace": 1}),
    ("mistral3", "mistral4, untied", {
        "text_type": "mistral4", "rope_parameters": MISTRAL, "tie_word_embeddings": False}),
    ("mistral3", "mistral4, tied, dense first", {
        **NO_Q_RANK, "text_type": "mistral4", "first_k_dense_replace": 1, "tie_word_embeddings": True}),
    ("youtu", "tied", {}),
    ("youtu", "untied, no query rank", {**NO_Q_RANK, "tie_word_embeddings": False}),
]  # fmt: skip
