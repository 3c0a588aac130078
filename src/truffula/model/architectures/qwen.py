"""Qwen2, Qwen2.5 and Qwen3: one body; 2 has biases on q, k and v, 3 has per-head norms of q and k."""

from __future__ import annotations

from truffula.model.architectures.pieces import ACTIVATIONS, Sizes, finish_spec, read_sizes, rms, windows
from truffula.model.config_view import ConfigView
from truffula.model.rope import read_rope
from truffula.model.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec


def qwen2(view: ConfigView) -> ModelSpec:
    """Biases on q, k and v always, on o never. The window is dead unless ``use_sliding_window``."""
    return _qwen(view, qkv_bias=True, out_bias=False, qk_norm=False)


def qwen3(view: ConfigView) -> ModelSpec:
    """Norms of q and k per head before the rotation; ``attention_bias`` covers q, k, v and o."""
    bias = view.flag("attention_bias")
    return _qwen(view, qkv_bias=bias, out_bias=bias, qk_norm=True)


def _qwen(view: ConfigView, *, qkv_bias: bool, out_bias: bool, qk_norm: bool) -> ModelSpec:
    sizes, activation = read_sizes(view), view.choice("hidden_act", ACTIVATIONS)

    def layer(window: int | None) -> LayerSpec:
        return LayerSpec(
            attention=AttentionSpec(
                heads=sizes.heads,
                kv_heads=sizes.kv_heads,
                head_dim=sizes.head_dim,
                scale=sizes.head_dim**-0.5,
                rope=0,
                window=window,
                q_norm=rms(view, "self_attn.q_norm") if qk_norm else None,
                k_norm=rms(view, "self_attn.k_norm") if qk_norm else None,
                qkv_bias=qkv_bias,
                out_bias=out_bias,
            ),
            mlp=MlpSpec(sizes.mlp, activation),
            before_attention=rms(view, "input_layernorm"),
            before_mlp=rms(view, "post_attention_layernorm"),
        )

    layers = [layer(window) for window in _windows(view, sizes)]
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
