"""Qwen2, Qwen2.5 and Qwen3: Llama's layer; 2 has biases on q, k and v, 3 has norms of q and k per head."""

from __future__ import annotations

from truffula.model.architectures.pieces import Sizes, finish_spec, llama_layer, read_sizes, rms, windows
from truffula.model.config_view import ConfigView
from truffula.model.rope import read_rope
from truffula.model.spec import ModelSpec


def qwen2(view: ConfigView) -> ModelSpec:
    """Biases on q, k and v, not on o. The window has no effect unless ``use_sliding_window``."""
    return _qwen(view, qkv_bias=True, out_bias=False, qk_norm=False)


def qwen3(view: ConfigView) -> ModelSpec:
    """Norms of q and k per head before the rotation; ``attention_bias`` is for q, k, v and o."""
    bias = view.flag("attention_bias")
    return _qwen(view, qkv_bias=bias, out_bias=bias, qk_norm=True)


def _qwen(view: ConfigView, *, qkv_bias: bool, out_bias: bool, qk_norm: bool) -> ModelSpec:
    sizes = read_sizes(view)
    layers = [
        llama_layer(view, sizes, window, qkv_bias=qkv_bias, out_bias=out_bias, qk_norm=qk_norm)
        for window in _windows(view, sizes)
    ]
    return finish_spec(view, layers, (read_rope(view, sizes.head_dim),), rms(view, "norm"))


def _windows(view: ConfigView, sizes: Sizes) -> tuple[int | None, ...]:
    window, first = view.optional_integer("sliding_window", minimum=0), view.integer("max_window_layers", minimum=0)
    if not view.flag("use_sliding_window"):
        window = None
    elif window == 0:
        raise view.error("sliding_window", "a window of zero tokens.", window)
    kinds = view.strings("layer_types", sizes.layers)
    if kinds is None:
        kinds = tuple(
            "sliding_attention" if window is not None and index >= first else "full_attention"
            for index in range(sizes.layers)
        )
    return windows(view, sizes.layers, window, kinds)
