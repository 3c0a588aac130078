"""OLMo 1 to 3: norms without weights, then norms only after the parts, then windows and a rope for each layer type."""

from __future__ import annotations

from truffula.model.architectures.pieces import (
    Sizes,
    attention,
    finish_spec,
    layer_types,
    mlp,
    post_norm,
    pre_norm,
    read_sizes,
    rms_last,
    windows,
)
from truffula.model.config_view import ConfigView
from truffula.model.rope import read_rope, read_rope_by_layer_type
from truffula.model.rows import NormSpec
from truffula.model.spec import LayerSpec, ModelSpec


def olmo(view: ConfigView) -> ModelSpec:
    """Llama's layer with q, k and v clipped; its norms have no weights and an epsilon that no config changes."""
    sizes, bias = read_sizes(view), view.flag("attention_bias")
    mixer = attention(sizes, qkv_bias=bias, out_bias=bias, clip=view.optional_number("clip_qkv"))
    layer = pre_norm(view, mixer, mlp(view, sizes), _norm)
    return finish_spec(view, [layer] * sizes.layers, (read_rope(view, sizes.head_dim),), _norm(view, "norm"))


def olmo2(view: ConfigView) -> ModelSpec:
    """Norms after the parts, and of all heads of q and k together; ``attention_bias`` is for q, k, v and o."""
    sizes = read_sizes(view)
    layers = [olmo2_layer(view, sizes, None, 0)] * sizes.layers
    return finish_spec(view, layers, (read_rope(view, sizes.head_dim),), rms_last(view, "norm"))


def olmo3(view: ConfigView) -> ModelSpec:
    """OLMo 2's layer, three windowed ones per full one. Rotary scaling is for full layers only."""
    sizes, order = read_sizes(view), ("sliding_attention", "full_attention")
    kinds = layer_types(view, sizes.layers, lambda layer: (layer + 1) % 4 == 0)
    default = view.defaults.rope_theta
    if view.raw("rope_theta") not in (None, default):
        why = f"transformers uses {default} in windowed layers then; give rope_parameters of both layer types."
        raise view.error("rope_theta", why)
    tables = read_rope_by_layer_type(view, sizes.head_dim, theta_keys=dict.fromkeys(order, ("rope_theta", default)))
    per_layer = windows(view, sizes.layers, view.optional_integer("sliding_window"), kinds)
    layers = [
        olmo2_layer(view, sizes, window, order.index(kind)) for kind, window in zip(kinds, per_layer, strict=True)
    ]
    return finish_spec(view, layers, tuple(tables[kind] for kind in order), rms_last(view, "norm"))


def _norm(_: ConfigView, module: str) -> NormSpec:
    return NormSpec(module, 1e-5, kind="layer", cast="last", weight=False)


def olmo2_layer(view: ConfigView, sizes: Sizes, window: int | None, rope: int | None) -> LayerSpec:
    """OLMo 2's layer; ``rope`` None: nothing is rotated."""
    bias = view.flag("attention_bias")
    mixer = attention(
        sizes,
        window,
        rope=rope,
        q_norm=rms_last(view, "self_attn.q_norm"),
        k_norm=rms_last(view, "self_attn.k_norm"),
        norm_over="width",
        qkv_bias=bias,
        out_bias=bias,
    )
    return post_norm(view, mixer, mlp(view, sizes), rms_last)
