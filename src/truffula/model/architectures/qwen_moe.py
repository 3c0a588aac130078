"""Qwen2 and Qwen3 with experts; layers without experts have the MLP of ``intermediate_size``."""

from __future__ import annotations

from truffula.model.architectures.moe_pieces import moe_model, read_experts, sparse_layers
from truffula.model.architectures.pieces import ACTIVATIONS, layer_types, read_sizes, windows
from truffula.model.config_view import ConfigView
from truffula.model.parts.moe import MoeSpec, RouterSpec, SharedSpec
from truffula.model.spec import ModelSpec


def qwen2_moe(view: ConfigView) -> ModelSpec:
    """Biases on q, k and v; a shared expert with a gate of its own."""
    sizes, (experts, top_k) = read_sizes(view), read_experts(view, "num_experts")
    moe = MoeSpec(
        RouterSpec(experts, top_k, norm=1.0 if view.flag("norm_topk_prob") else None),
        view.integer("moe_intermediate_size"),
        view.choice("hidden_act", ACTIVATIONS),
        shared=SharedSpec(view.integer("shared_expert_intermediate_size"), gated=True),
    )
    sliding, first_full = view.flag("use_sliding_window"), view.integer("max_window_layers", minimum=0)
    window = view.optional_integer("sliding_window") if sliding else None
    view.skip("sliding_window")
    kinds = layer_types(view, sizes.layers, lambda i: bool(i % 2) or i >= first_full or not sliding)
    widths, sparse = windows(view, sizes.layers, window, kinds), sparse_layers(view, sizes.layers)
    return moe_model(view, sizes, widths, moe, sparse, qkv_bias=view.flag("qkv_bias"))


def qwen3_moe(view: ConfigView) -> ModelSpec:
    """Norms of q and k per head; the weights of the chosen experts add up to one if ``norm_topk_prob``."""
    sizes, (experts, top_k) = read_sizes(view), read_experts(view, "num_experts")
    moe = MoeSpec(
        RouterSpec(experts, top_k, norm=1.0 if view.flag("norm_topk_prob") else None),
        view.integer("moe_intermediate_size"),
        view.choice("hidden_act", ACTIVATIONS),
    )
    window = view.optional_integer("sliding_window") if view.flag("use_sliding_window") else None
    view.skip("sliding_window", "max_window_layers")
    bias, sparse = view.flag("attention_bias"), sparse_layers(view, sizes.layers)
    windows = [window] * sizes.layers
    return moe_model(view, sizes, windows, moe, sparse, qkv_bias=bias, out_bias=bias, qk_norm=True)
