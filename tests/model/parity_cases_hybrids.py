"""Parity cases of hybrids: LFM2 with experts, attention and Mamba-2 beside each other, and Mamba."""

from __future__ import annotations

from typing import Any

CONV, FULL = "conv", "full_attention"
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("lfm2_moe", "plain", {}),
    ("lfm2_moe", "no correction, weights as they are, scaled, one kv head, untied", {"use_expert_bias": False,
     "norm_topk_prob": False, "routed_scaling_factor": 1.7, "num_key_value_heads": 1, "tie_word_embeddings": False}),
    ("lfm2_moe", "experts in all layers, one per row, biases, two taps", {"num_dense_layers": 0,
     "num_experts_per_tok": 1, "conv_bias": True, "conv_L_cache": 2, "layer_types": [CONV, CONV, FULL]}),
    ("lfm2_moe", "own head width, hidden not a multiple of a vector", {"hidden_size": 40, "head_dim": 12,
     "intermediate_size": 37, "moe_intermediate_size": 19, "vocab_size": 97}),
    ("falcon_h1", "plain", {}),
    ("falcon_h1", "a norm after the gate, biases, one kv head, tied", {"mamba_rms_norm": True, "attention_bias": True,
     "mamba_norm_before_gate": False, "mlp_bias": True, "mamba_proj_bias": True, "projectors_bias": True,
     "num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("falcon_h1", "a norm before the gate, limited steps, no bias of the convolution", {"mamba_rms_norm": True,
     "time_step_limit": [0.3, 0.9], "mamba_conv_bias": False, "mamba_d_conv": 2, "mamba_n_groups": 1}),
    ("falcon_h1", "no multipliers, width by expansion", {"mamba_d_ssm": None, "mamba_expand": 1, "mlp_multipliers":
     None, "ssm_multipliers": None, "key_multiplier": 1.0, "attention_in_multiplier": 1.0, "head_dim": 8,
     "attention_out_multiplier": 1.0, "ssm_in_multiplier": 1.0, "ssm_out_multiplier": 1.0, "rope_theta": 1e11}),
    ("jamba", "plain", {}),
    ("jamba", "biases, a rank that is given, one kv head, experts in all layers, tied", {"mamba_proj_bias": True,
     "mamba_dt_rank": 5, "num_key_value_heads": 1, "expert_layer_period": 1, "expert_layer_offset": 0,
     "num_experts_per_tok": 1, "mamba_conv_bias": False, "mamba_d_conv": 2, "tie_word_embeddings": True}),
    ("jamba", "no experts, wide states, hidden not a multiple of a vector", {"num_experts": 1, "mamba_d_state": 20,
     "hidden_size": 40, "mamba_expand": 3, "intermediate_size": 37, "attn_layer_offset": 0}),
]  # fmt: skip
