"""Parity cases of models with sequence states."""

from __future__ import annotations

from typing import Any

CONV, FULL = "conv", "full_attention"
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("lfm2", "plain", {}),
    ("lfm2", "one kv head, biases, two taps", {"num_key_value_heads": 1, "conv_bias": True, "conv_L_cache": 2}),
    ("lfm2", "long convolutions first and last, untied", {"conv_L_cache": 9, "layer_types": [CONV, CONV, FULL],
     "tie_word_embeddings": False}),
    ("lfm2", "older keys", {"layer_types": None, "full_attn_idxs": [1], "block_ff_dim": 40, "tie_embedding": True}),
    ("lfm2", "width as configured, own rope", {"block_auto_adjust_ff_dim": False, "rope_theta": 300.0}),
    ("lfm2", "hidden not a multiple of a vector", {"hidden_size": 40, "intermediate_size": 37}),
    ("bamba", "plain", {}),
    ("bamba", "one group, biases, two taps", {"mamba_n_groups": 1, "mamba_conv_bias": False, "mamba_proj_bias": True,
     "mamba_d_conv": 2, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    ("bamba", "limited steps, wide state", {"time_step_limit": [0.3, 0.9], "mamba_d_state": 32, "mamba_expand": 1,
     "mamba_n_heads": 2}),
    ("granitemoehybrid", "plain", {}),
    ("granitemoehybrid", "rope, one group, heads that are given, tied", {"position_embedding_type": "rope",
     "mamba_n_groups": 1, "mamba_d_head": 16, "mamba_conv_bias": False, "tie_word_embeddings": True}),
    ("granitemoehybrid", "newer names, biases", {"layer_types": ["full_attention", "linear_attention",
     "linear_attention"], "attention_bias": True, "mamba_proj_bias": True, "position_embedding_type": "nope"}),
    ("granitemoehybrid", "experts", {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 24}),
    ("nemotron_h", "plain", {}),
    ("nemotron_h", "a list of layers, one group, biases", {"hybrid_override_pattern": None, "layers_block_type":
     ["attention", "mlp", "mamba"], "n_groups": 1, "use_bias": True, "mlp_bias": True}),
    ("nemotron_h", "older keys, longer steps", {"mamba_n_groups": 4, "mamba_d_conv": 2, "mamba_conv_bias": False,
     "time_step_min": 0.4, "num_key_value_heads": 1}),
    ("nemotron_h", "narrow experts, groups, biases", {"hybrid_override_pattern": None, "layers_block_type":
     ["full_attention", "moe", "linear_attention", "mlp", "moe"], "moe_latent_size": 18, "n_routed_experts": 8,
     "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "mlp_bias": True, "n_shared_experts": 2}),
    ("nemotron_h", "experts, weights as they are, another activation", {"hybrid_override_pattern": "*EM",
     "norm_topk_prob": False, "mlp_hidden_act": "silu", "num_key_value_heads": 1}),
]  # fmt: skip
