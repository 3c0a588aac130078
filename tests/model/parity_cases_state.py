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
]  # fmt: skip
