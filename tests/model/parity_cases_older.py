"""Parity cases of phi, phi3, starcoder2 and of the families before Llama."""

from __future__ import annotations

from typing import Any

# Four divisors, for the eight columns of a head that are rotated.
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 4.0, 7.0, 9.0]}
FIRST16, FIRST64 = {"original_max_position_embeddings": 16}, {"original_max_position_embeddings": 64}
SU = {**LONGROPE, "type": "su", **FIRST16}
ONE_KV = {"num_key_value_heads": 1}
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
NO_WINDOW = {"sliding_window": None}
EPS = {"layer_norm_epsilon": 0.05}
THREE = {"num_attention_heads": 3, "hidden_size": 30}
NEOX_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.75}}
FALCON_RW = {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}
LOCAL = {"attention_types": [[["local"], 3]]}
GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 1}
LINEAR = {"rope_scaling": {"type": "linear", "factor": 2.0}}

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("phi", "plain", {}),
    ("phi", "norms of q and k, part 0.75", {"qk_layernorm": True, "partial_rotary_factor": 0.75}),
    ("phi", "tied, its head has a bias", {**TIED, **ONE_KV, "vocab_size": 97}),
    ("phi", "large eps, relu, rope linear", {"layer_norm_eps": 0.05, "hidden_act": "relu", **LINEAR}),
    ("phi3", "plain", {}),
    ("phi3", "no window, tied, one kv head", {**NO_WINDOW, **TIED, **ONE_KV}),
    ("phi3", "part 0.5 (phi-4-mini)", {"partial_rotary_factor": 0.5, "head_dim": 8}),
    ("phi3", "longrope, within the first length", {"rope_scaling": LONGROPE, **FIRST64}),
    ("phi3", "longrope, beyond the first length", {"rope_scaling": LONGROPE, **FIRST16}),
    ("phi3", "longrope, its factor, old name", {"rope_scaling": {**SU, "factor": 2.0}, **FIRST16}),
    ("phi3", "longrope, part of the head", {
        "num_attention_heads": 2, "partial_rotary_factor": 0.5, **FIRST16,
        "rope_scaling": {**LONGROPE, "attention_factor": 1.3},
    }),
    ("starcoder2", "plain", {}),
    ("starcoder2", "no biases, no window, untied", {"use_bias": False, **NO_WINDOW, **UNTIED}),
    ("starcoder2", "one kv head, large eps", {**ONE_KV, "norm_epsilon": 0.05, "vocab_size": 97}),
    ("gpt2", "plain", {}),
    ("gpt2", "three heads, untied, odd vocabulary", {**THREE, **UNTIED, "vocab_size": 97}),
    ("gpt2", "n_inner null, relu, large eps", {"n_inner": None, "activation_function": "relu", **EPS}),
    ("gpt2", "scaled by layer", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    ("gpt2", "not scaled by width", {"scale_attn_weights": False}),
    ("gpt_bigcode", "one kv head", {}),
    ("gpt_bigcode", "a kv head for each, untied", {"multi_query": False, **UNTIED, "activation_function": "gelu"}),
    ("gpt_neo", "local and global", {}),
    ("gpt_neo", "all local, untied, null width", {**LOCAL, "intermediate_size": None, **UNTIED}),
    ("gpt_neox", "parallel", {}),
    ("gpt_neox", "sequential, tied, whole heads", {"use_parallel_residual": False, **TIED, "rotary_pct": 1.0}),
    ("gpt_neox", "no attention bias, a quarter", {"attention_bias": False, "rotary_pct": 0.25, "rotary_emb_base": 500}),
    ("gpt_neox", "new spelling, gelu_new", {**NEOX_ROPE, "hidden_act": "gelu_new"}),
    ("gptj", "plain", {}),
    ("gptj", "tied, whole heads, null width", {**TIED, "rotary_dim": 8, "n_inner": None, "vocab_size": 97}),
    ("bloom", "plain", {}),
    ("bloom", "three heads, untied", {**THREE, **UNTIED}),
    ("bloom", "residual after the norm, large eps", {"apply_residual_connection_post_layernorm": True, **EPS}),
    ("falcon", "7b: one kv head, one norm", {}),
    ("falcon", "rw: alibi, sequential, biases", {**FALCON_RW, "num_attention_heads": 4}),
    ("falcon", "alibi, six heads, parallel", {"alibi": True, "num_attention_heads": 6, "hidden_size": 36, **UNTIED}),
    ("falcon", "40b: grouped, two norms", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", "11b: grouped, one norm, biases", {**GROUPED, "num_ln_in_parallel_attn": 1, "bias": True}),
    ("falcon", "a kv head for each, rope linear", {"multi_query": False, **LINEAR, "activation": "gelu_new", **EPS}),
    ("mpt", "plain", {}),
    ("mpt", "clipped, scaled, untied", {"attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.2}, **UNTIED}),
    ("mpt", "three heads, large eps", {**THREE, **EPS}),
    ("opt", "plain", {}),
    ("opt", "no biases, gelu, untied", {"enable_bias": False, "activation_function": "gelu", **UNTIED}),
    ("opt", "350m: norms after, narrow tables", {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    ("opt", "narrow tables with a last norm, untied", {"word_embed_proj_dim": 20, **UNTIED}),
    ("opt", "norms without parameters", {"layer_norm_elementwise_affine": False}),
    ("opt", "no last norm", {"_remove_final_layer_norm": True}),
]  # fmt: skip
