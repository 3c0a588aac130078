"""Cohere's Command R and Command R7B: attention and MLP side by side, layer norms without bias, scaled logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from truffula.model.architectures.moe_pieces import DEEPSEEK_NAMES, predictors, read_experts
from truffula.model.architectures.pieces import (
    ACTIVATIONS,
    MakeNorm,
    Sizes,
    attention,
    finish_spec,
    layer_norm,
    layer_types,
    mlp,
    read_sizes,
    rms,
    windows,
)
from truffula.model.config_view import ConfigView
from truffula.model.parts.attention import AttentionSpec
from truffula.model.parts.mlp import MlpSpec
from truffula.model.parts.moe import MoeSpec, RouterSpec, SharedSpec
from truffula.model.rope import read_rope
from truffula.model.rows import NormSpec
from truffula.model.spec import LayerSpec, ModelSpec, ModuleNames


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


def cohere2_moe(view: ConfigView) -> ModelSpec:
    """Cohere 2's attention, experts from layer ``first_k_dense_replace`` on, and an average with shared experts.

    The dense layers before have windows and MLPs of their own, and a rotary embedding even without a window.
    """
    sizes, bias, layers = read_sizes(view), view.flag("attention_bias"), view.integer("num_hidden_layers")
    first = view.optional_integer("first_k_dense_replace", minimum=0) or 0
    pattern, before = view.integer("sliding_window_pattern"), view.integer("prefix_dense_sliding_window_pattern")
    kinds = layer_types(view, layers, lambda i: (i + 1) % before == 0 if i < first else (i - first + 1) % pattern == 0)
    dense = view.strings("mlp_layer_types", layers) or ("dense",) * first + ("sparse",) * (layers - first)
    norm: MakeNorm = _norm if view.optional_number("rms_norm_eps") is None else rms
    moe, made = _cohere_experts(view, sizes), []
    for kind, window in zip(dense, windows(view, layers, view.optional_integer("sliding_window"), kinds), strict=True):
        if kind not in ("dense", "sparse"):
            raise view.error("mlp_layer_types", f"{kind} is not supported; dense and sparse are.", kind)
        rotated = window is not None or (kind == "dense" and before == 1)
        mixer = attention(sizes, window, rope=0 if rotated else None, rope_layout="interleaved", qkv_bias=bias,
                          out_bias=bias)  # fmt: skip
        part = MlpSpec(view.integer("prefix_dense_intermediate_size"), moe.activation) if kind == "dense" else moe
        made.append(LayerSpec(mixer, part, norm(view, "input_layernorm"), None, parallel=True))
    rope, names = read_rope(view, sizes.head_dim), ModuleNames(unused=predictors(view, layers))
    return finish_spec(view, made, (rope,), norm(view, "norm"), logit_scale=view.number("logit_scale"), names=names)


def _cohere_experts(view: ConfigView, sizes: Sizes) -> MoeSpec:
    (experts, top_k), count = read_experts(view, "num_experts"), view.integer("num_shared_experts", minimum=0)
    score: Literal["softmax", "sigmoid"] = view.choice(
        "expert_selection_fn", {"softmax": "softmax", "sigmoid": "sigmoid"}
    )
    divided = view.flag("norm_topk_prob") or score == "softmax"  # the softmax is over the chosen experts
    share = view.choice("shared_expert_combination_strategy", {"average": 0.5, "sum": 1.0}) if count else 1.0
    return MoeSpec(
        RouterSpec(experts, top_k, score=score, norm=1.0 if divided else None, scale=share),
        sizes.mlp,
        view.choice("hidden_act", ACTIVATIONS),
        shared=SharedSpec(sizes.mlp * count, scale=share) if count else None,
        scaled_sum=share != 1.0,
        names=DEEPSEEK_NAMES,
    )


def _finish(view: ConfigView, mixers: Sequence[AttentionSpec]) -> ModelSpec:
    feed_forward = mlp(view, read_sizes(view))
    layers = [LayerSpec(mixer, feed_forward, _norm(view, "input_layernorm"), None, parallel=True) for mixer in mixers]
    rope = read_rope(view, mixers[0].head_dim)
    return finish_spec(view, layers, (rope,), _norm(view, "norm"), logit_scale=view.number("logit_scale"))
