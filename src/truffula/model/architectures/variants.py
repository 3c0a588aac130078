"""Llama's layer with other norms, activations or rotations: Apertus, ERNIE 4.5, EXAONE 4, Helium, Hunyuan (dense),
Nemotron, StableLM."""

from __future__ import annotations

from truffula.model.architectures.pieces import (
    ACTIVATIONS,
    Sizes,
    attention,
    finish_spec,
    layer_norm,
    layer_types,
    mlp,
    post_norm,
    pre_norm,
    read_sizes,
    rms,
    rms_last,
    windows,
)
from truffula.model.config_view import ConfigView
from truffula.model.parts.mlp import MlpSpec
from truffula.model.rope import read_rope
from truffula.model.rows import NormSpec
from truffula.model.spec import LayerSpec, ModelSpec, ModuleNames


def apertus(view: ConfigView) -> ModelSpec:
    """Norms of q and k per head, and an MLP without a gate, whose activation has numbers of its own."""
    sizes, bias = read_sizes(view), view.flag("attention_bias")
    q_norm, k_norm = rms(view, "self_attn.q_norm"), rms(view, "self_attn.k_norm")
    mixer = attention(sizes, q_norm=q_norm, k_norm=k_norm, qkv_bias=bias, out_bias=bias)
    feed_forward = MlpSpec(sizes.mlp, view.choice("hidden_act", {**ACTIVATIONS, "xielu": "xielu"}), gated=False)
    layer = LayerSpec(mixer, feed_forward, rms(view, "attention_layernorm"), rms(view, "feedforward_layernorm"))
    return finish_spec(view, [layer] * sizes.layers, (read_rope(view, sizes.head_dim),), rms(view, "norm"))


def ernie4_5(view: ConfigView) -> ModelSpec:
    """``use_bias`` is for all linears of a layer."""
    sizes, bias = read_sizes(view), view.flag("use_bias")
    mixer = attention(sizes, rope_layout="interleaved", qkv_bias=bias, out_bias=bias)
    layer = pre_norm(view, mixer, mlp(view, sizes, bias=bias))
    return finish_spec(view, [layer] * sizes.layers, (read_rope(view, sizes.head_dim),), rms(view, "norm"))


def exaone4(view: ConfigView) -> ModelSpec:
    """Norms after the parts, and of q and k per head. With a window, only windowed layers have a rotary embedding."""
    sizes, window = read_sizes(view), view.optional_integer("sliding_window")
    pattern = view.raw("sliding_window_pattern")
    if not view.written("layer_types") and window is not None and type(pattern) is not int:
        raise view.error("sliding_window_pattern", "without layer_types, transformers reads a number only.", pattern)
    every = view.integer("sliding_window_pattern") if type(pattern) is int and pattern else 1
    kinds = layer_types(view, sizes.layers, lambda layer: window is None or (layer + 1) % every == 0)
    q_norm, k_norm = rms(view, "self_attn.q_norm"), rms(view, "self_attn.k_norm")
    layers = []
    for width in windows(view, sizes.layers, window, kinds):
        rope = 0 if window is None or width is not None else None
        mixer = attention(sizes, width, rope=rope, q_norm=q_norm, k_norm=k_norm)
        layers.append(post_norm(view, mixer, mlp(view, sizes)))
    return finish_spec(view, layers, (read_rope(view, sizes.head_dim),), rms(view, "norm"))


def helium(view: ConfigView) -> ModelSpec:
    """``attention_bias`` is for q, k and v, ``mlp_bias`` for the MLP."""
    sizes, bias = _square(view), view.flag("attention_bias")
    mixer = attention(sizes, rope_layout="interleaved", qkv_bias=bias)
    layer = pre_norm(view, mixer, mlp(view, sizes, bias=view.flag("mlp_bias")), rms_last)
    return finish_spec(view, [layer] * sizes.layers, (read_rope(view, sizes.head_dim),), rms_last(view, "norm"))


def hunyuan_v1_dense(view: ConfigView) -> ModelSpec:
    """Norms of q and k per head, after the rotation, whose base ``alpha`` stretches."""
    view.skip("eod_token_id")  # the end of a document in training
    sizes, bias = read_sizes(view), view.flag("attention_bias")
    q_norm, k_norm = rms(view, "self_attn.query_layernorm"), rms(view, "self_attn.key_layernorm")
    mixer = attention(sizes, q_norm=q_norm, k_norm=k_norm, norm_rotated=True, qkv_bias=bias, out_bias=bias)
    layer = pre_norm(view, mixer, mlp(view, sizes))
    # Its files have the others beside alpha, without effect.
    more = ("alpha", "beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim")
    rope = read_rope(view, sizes.head_dim, more=more)
    return finish_spec(view, [layer] * sizes.layers, (rope,), rms(view, "norm"))


def nemotron(view: ConfigView) -> ModelSpec:
    """Layer norms with 1 + w, an MLP without a gate, and a part of each head rotated."""
    sizes, bias = read_sizes(view), view.flag("attention_bias")
    mixer = attention(sizes, qkv_bias=bias, out_bias=bias)
    layer = pre_norm(view, mixer, mlp(view, sizes, bias=view.flag("mlp_bias"), gated=False), _nemotron_norm)
    rope = read_rope(view, sizes.head_dim, partial=True)
    return finish_spec(view, [layer] * sizes.layers, (rope,), _nemotron_norm(view, "norm"))


def _nemotron_norm(view: ConfigView, module: str) -> NormSpec:
    return layer_norm(view, module, "norm_eps", plus_one=True, rounded=True)


def stablelm(view: ConfigView) -> ModelSpec:
    """Layer norms and partial rotation; optionally norms of q and k with a module for each head, and parallel parts."""
    sizes, parallel = _square(view), view.flag("use_parallel_residual")
    q_norm = k_norm = None
    if view.flag("qk_layernorm"):
        each = {"bias": False, "per_head": "norms.{h}"}
        q_norm = layer_norm(view, "self_attn.q_layernorm", "layer_norm_eps", **each)
        k_norm = layer_norm(view, "self_attn.k_layernorm", "layer_norm_eps", **each)
    mixer = attention(sizes, q_norm=q_norm, k_norm=k_norm, qkv_bias=view.flag("use_qkv_bias"))
    before = layer_norm(view, "input_layernorm", "layer_norm_eps")
    before_mlp = None if parallel else layer_norm(view, "post_attention_layernorm", "layer_norm_eps")
    layer = LayerSpec(mixer, mlp(view, sizes), before, before_mlp, parallel=parallel)
    rope = read_rope(view, sizes.head_dim, partial=True)
    final = layer_norm(view, "norm", "layer_norm_eps")
    return finish_spec(view, [layer] * sizes.layers, (rope,), final, names=ModuleNames(attention=None))


def _square(view: ConfigView) -> Sizes:
    """The sizes of an architecture whose o_proj is as wide as the residual stream."""
    sizes = read_sizes(view)
    if sizes.heads * sizes.head_dim != sizes.hidden:
        why = f"{view.model_type} has {sizes.hidden} / {sizes.heads} columns per head."
        raise view.error("head_dim", why, sizes.head_dim)
    return sizes
