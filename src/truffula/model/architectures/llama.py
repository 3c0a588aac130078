"""Llama 1 to 3 and what differs from it in a few fields: Arcee, CWM, Granite, Seed-OSS, SmolLM3.

Many models have llama's own model type (Vicuna, Yi, SOLAR-10.7B, CodeLlama, SmolLM2).
"""

from __future__ import annotations

from truffula.model.architectures.pieces import (
    attention,
    finish_spec,
    layer_types,
    llama_model,
    mlp,
    pre_norm,
    read_sizes,
    rms,
    windows,
)
from truffula.model.config_view import ConfigView
from truffula.model.rope import read_rope
from truffula.model.spec import ModelSpec


def llama(view: ConfigView) -> ModelSpec:
    """``attention_bias`` is for q, k, v and o, ``mlp_bias`` for the three linears of the MLP."""
    sizes, bias, mlp_bias = read_sizes(view), view.flag("attention_bias"), view.flag("mlp_bias")
    return llama_model(view, sizes, [None] * sizes.layers, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


def arcee(view: ConfigView) -> ModelSpec:
    """An MLP without a gate."""
    sizes, bias, mlp_bias = read_sizes(view), view.flag("attention_bias"), view.flag("mlp_bias")
    mixer = attention(sizes, qkv_bias=bias, out_bias=bias)
    layer = pre_norm(view, mixer, mlp(view, sizes, bias=mlp_bias, gated=False))
    return finish_spec(view, [layer] * sizes.layers, (read_rope(view, sizes.head_dim),), rms(view, "norm"))


def cwm(view: ConfigView) -> ModelSpec:
    """Three windowed layers after each full one."""
    sizes, window = read_sizes(view), view.optional_integer("sliding_window", minimum=0)
    kinds = layer_types(view, sizes.layers, lambda layer: layer % 4 == 0)
    return llama_model(view, sizes, windows(view, sizes.layers, window or None, kinds), mlp_bias=view.flag("mlp_bias"))


def granite(view: ConfigView) -> ModelSpec:
    """Four multipliers: of embeddings, scores, the sums with the residual stream, and (its reciprocal) logits."""
    sizes, bias, mlp_bias = read_sizes(view), view.flag("attention_bias"), view.flag("mlp_bias")
    mixer = attention(sizes, scale=view.number("attention_multiplier"), qkv_bias=bias, out_bias=bias)
    residual = view.number("residual_multiplier", positive=False)
    layer = pre_norm(view, mixer, mlp(view, sizes, bias=mlp_bias), residual_multiplier=residual)
    return finish_spec(
        view,
        [layer] * sizes.layers,
        (read_rope(view, sizes.head_dim),),
        rms(view, "norm"),
        embed_scale=view.number("embedding_multiplier"),
        logit_scale=1 / view.number("logits_scaling"),
    )


def seed_oss(view: ConfigView) -> ModelSpec:
    """``attention_bias`` is for q, k and v, ``attention_out_bias`` for o."""
    sizes, bias = read_sizes(view), view.flag("attention_bias")
    out_bias, mlp_bias = view.flag("attention_out_bias"), view.flag("mlp_bias")
    return llama_model(view, sizes, [None] * sizes.layers, qkv_bias=bias, out_bias=out_bias, mlp_bias=mlp_bias)


def smollm3(view: ConfigView) -> ModelSpec:
    """Some layers have no rotary embedding; only they may be windowed, unless ``layer_types`` says others are."""
    sizes, bias, mlp_bias = read_sizes(view), view.flag("attention_bias"), view.flag("mlp_bias")
    window = view.optional_integer("sliding_window")
    every = view.integer("no_rope_layer_interval")
    rotated = view.numbers("no_rope_layers", sizes.layers)  # despite its name, 0 means no rotary embedding
    rotated = rotated or tuple(float((layer + 1) % every != 0) for layer in range(sizes.layers))
    sliding = view.flag("use_sliding_window") and window is not None
    kinds = layer_types(view, sizes.layers, lambda layer: bool(rotated[layer]) or not sliding)
    feed_forward = mlp(view, sizes, bias=mlp_bias)
    layers = [
        pre_norm(view, attention(sizes, width, rope=0 if turns else None, qkv_bias=bias, out_bias=bias), feed_forward)
        for width, turns in zip(windows(view, sizes.layers, window, kinds), rotated, strict=True)
    ]
    return finish_spec(view, layers, (read_rope(view, sizes.head_dim),), rms(view, "norm"))
