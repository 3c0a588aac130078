"""Cohere's Command R and Command R7B: attention and MLP side by side, layer norms without bias, scaled logits."""

from __future__ import annotations

from collections.abc import Sequence

from truffula.model.architectures.pieces import (
    attention,
    finish_spec,
    layer_norm,
    layer_types,
    mlp,
    read_sizes,
    windows,
)
from truffula.model.config_view import ConfigView
from truffula.model.parts.attention import AttentionSpec
from truffula.model.rope import read_rope
from truffula.model.rows import NormSpec
from truffula.model.spec import LayerSpec, ModelSpec


def cohere(view: ConfigView) -> ModelSpec:
    """With ``use_qk_norm``, norms of q and k with a weight for each head; ``attention_bias`` is for q, k, v and o."""
    sizes, bias = read_sizes(view), view.flag("attention_bias")
    qk_norm = view.flag("use_qk_norm")
    mixer = attention(
        sizes,
        rope_layout="interleaved",
        q_norm=_norm(view, "self_attn.q_norm", per_head="rows") if qk_norm else None,
        k_norm=_norm(view, "self_attn.k_norm", per_head="rows") if qk_norm else None,
        qkv_bias=bias,
        out_bias=bias,
    )
    return _finish(view, [mixer] * sizes.layers)


def cohere2(view: ConfigView) -> ModelSpec:
    """Three windowed layers per full one; only windowed layers have a rotary embedding."""
    sizes, bias = read_sizes(view), view.flag("attention_bias")
    pattern = view.optional_integer("sliding_window_pattern") or 4
    kinds = layer_types(view, sizes.layers, lambda layer: (layer + 1) % pattern == 0)
    mixers = [
        attention(
            sizes, window, rope=None if window is None else 0, rope_layout="interleaved", qkv_bias=bias, out_bias=bias
        )
        for window in windows(view, sizes.layers, view.optional_integer("sliding_window"), kinds)
    ]
    return _finish(view, mixers)


def _norm(view: ConfigView, module: str, per_head: str | None = None) -> NormSpec:
    return layer_norm(view, module, "layer_norm_eps", bias=False, per_head=per_head)


def _finish(view: ConfigView, mixers: Sequence[AttentionSpec]) -> ModelSpec:
    feed_forward = mlp(view, read_sizes(view))
    layers = [LayerSpec(mixer, feed_forward, _norm(view, "input_layernorm"), None, parallel=True) for mixer in mixers]
    rope = read_rope(view, mixers[0].head_dim)
    return finish_spec(view, layers, (rope,), _norm(view, "norm"), logit_scale=view.number("logit_scale"))
