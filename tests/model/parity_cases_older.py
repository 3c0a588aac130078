"""Parity cases of the older families: phi, phi3, starcoder2."""

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
]  # fmt: skip
