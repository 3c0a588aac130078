"""Awkward configs of the dense families, as rows of ``test_architecture_parity``."""

from __future__ import annotations

from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_OF_32 = LLAMA3 | {"original_max_position_embeddings": 32}
BETA = {"rope_theta": 1e4, "original_max_position_embeddings": 5, "llama_4_scaling_beta": 0.5}
WINDOW5 = {"use_sliding_window": True, "sliding_window": 5}
ONE_KV = {"num_key_value_heads": 1}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("arcee", "plain", {}),
    ("arcee", "tied, biases, own head_dim", {**TIED, "attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    ("arcee", "rope llama3, silu", {"hidden_act": "silu", "rope_scaling": LLAMA3_OF_32}),
    ("cwm", "the class's rope", {}),
    ("cwm", "layer_types, tied, one kv head", {**TIED, **ONE_KV, "layer_types": [SLIDING, FULL] * 2 + [FULL]}),
    ("cwm", "no window, default rope", {"sliding_window": 3, "mlp_bias": True, "rope_parameters": {"rope_theta": 5e3}}),
    ("gemma", "plain", {}),
    ("gemma", "untied, biases, the old activation", {**UNTIED, "attention_bias": True, "hidden_act": "gelu"}),
    ("gemma", "one kv head, rope linear", {**ONE_KV, "rope_scaling": {"type": "linear", "factor": 3.0}}),
    ("granite", "plain", {}),
    ("granite", "tied, biases, odd vocabulary", {**TIED, "attention_bias": True, "mlp_bias": True, "vocab_size": 97}),
    ("granite", "no multipliers, rope yarn", {
        "attention_multiplier": 1.0, "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}),
    ("ministral3", "plain", {}),
    ("ministral3", "window, tied, default rope", {**TIED, "sliding_window": 6, "rope_parameters": BETA}),
    ("ministral3", "one kv head", {**ONE_KV, "hidden_size": 30}),
    ("seed_oss", "plain", {}),
    ("seed_oss", "tied, other biases", {**TIED, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
    ("smollm3", "plain", {}),
    ("smollm3", "untied, interval 2", {**UNTIED, "no_rope_layers": None, "no_rope_layer_interval": 2}),
    ("smollm3", "windows without rope", {**ONE_KV, **WINDOW5}),
    ("smollm3", "windows with rope", {**WINDOW5, "layer_types": [SLIDING, FULL, FULL]}),
    ("smollm3", "biases, own head_dim", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
]  # fmt: skip
