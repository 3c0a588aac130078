"""Qwen2, Qwen2.5 and Qwen3: Llama's layer; 2 has biases on q, k and v, 3 has norms of q and k per head."""

from __future__ import annotations

from truffula.model.architectures.pieces import Sizes, llama_model, read_sizes, windows
from truffula.model.config_view import ConfigView
from truffula.model.spec import ModelSpec


def qwen2(view: ConfigView) -> ModelSpec:
    """Biases on q, k and v, not on o. The window has no effect unless ``use_sliding_window``."""
    sizes = read_sizes(view)
    return llama_model(view, sizes, _windows(view, sizes), qkv_bias=True)


def qwen3(view: ConfigView) -> ModelSpec:
    """Norms of q and k per head before the rotation; ``attention_bias`` is for q, k, v and o."""
    sizes, bias = read_sizes(view), view.flag("attention_bias")
    return llama_model(view, sizes, _windows(view, sizes), qkv_bias=bias, out_bias=bias, qk_norm=True)


def _windows(view: ConfigView, sizes: Sizes) -> tuple[int | None, ...]:
    window, first = view.optional_integer("sliding_window", minimum=0), view.integer("max_window_layers", minimum=0)
    if not view.flag("use_sliding_window"):
        window = None
    elif window == 0:
        raise view.error("sliding_window", "a window of zero tokens.", window)
    kinds = view.strings("layer_types", sizes.layers)
    if kinds is None:
        first = sizes.layers if window is None else first
        kinds = tuple("full_attention" if index < first else "sliding_attention" for index in range(sizes.layers))
    return windows(view, sizes.layers, window, kinds)
