"""Cases of ``test_architecture_parity`` with experts."""

from __future__ import annotations

from typing import Any

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
]  # fmt: skip
