"""Llama's attention with DeepSeek V3's kind of experts: GLM-4.5 to 4.7, dots.llm1, EXAONE (MoE), Trinity
(AFMoE), MiniMax-M2; and ERNIE 4.5 (MoE)."""

from __future__ import annotations

from dataclasses import replace

from truffula.model.architectures.mixtral import MIXTRAL_NAMES
from truffula.model.architectures.moe_pieces import (
    DEEPSEEK_NAMES,
    dense_first,
    expert_number,
    moe_model,
    predictors,
    read_experts,
    read_top_k,
    sigmoid_router,
    sparse_kinds,
    with_experts,
)
from truffula.model.architectures.pieces import (
    ACTIVATIONS,
    attention,
    finish_spec,
    layer_types,
    llama_layer,
    mlp,
    pre_norm,
    read_sizes,
    rms,
    windows,
)
from truffula.model.config_view import ConfigView
from truffula.model.parts.moe import MoeNames, MoeSpec, RouterSpec, SharedSpec
from truffula.model.rope import read_rope
from truffula.model.spec import ModelSpec, ModuleNames


def glm4_moe(view: ConfigView) -> ModelSpec:
    """A part of each head is rotated; the first layers are dense; ``attention_bias`` is for q, k and v."""
    sizes, moe = read_sizes(view), _moe(view)
    names = ModuleNames(unused=predictors(view, sizes.layers))
    sparse, qk_norm = dense_first(view, "first_k_dense_replace", sizes.layers), view.flag("use_qk_norm")
    bias, full = view.flag("attention_bias"), [None] * sizes.layers
    return moe_model(view, sizes, full, moe, sparse, names, qkv_bias=bias, qk_norm=qk_norm, partial=True)


def dots1(view: ConfigView) -> ModelSpec:
    """Norms of q and k per head; windows from layer ``max_window_layers`` on."""
    sizes, moe = read_sizes(view), _moe(view)
    window, first = view.optional_integer("sliding_window"), view.integer("max_window_layers", minimum=0)
    kinds = layer_types(view, sizes.layers, lambda layer: window is None or layer < first)
    sparse, bias = dense_first(view, "first_k_dense_replace", sizes.layers), view.flag("attention_bias")
    widths = windows(view, sizes.layers, window, kinds)
    return moe_model(view, sizes, widths, moe, sparse, qkv_bias=bias, out_bias=bias, qk_norm=True)


def _moe(view: ConfigView) -> MoeSpec:
    experts, top_k = read_experts(view, "n_routed_experts")
    width, shared = view.integer("moe_intermediate_size"), view.optional_integer("n_shared_experts", minimum=0)
    return MoeSpec(
        sigmoid_router(view, experts, top_k),
        width,
        view.choice("hidden_act", ACTIVATIONS),
        shared=SharedSpec(width * shared) if shared else None,
        names=DEEPSEEK_NAMES,
    )


_EXAONE_NAMES = MoeNames(correction="e_score_correction_bias", shared="mlp.shared_experts")


def exaone_moe(view: ConfigView) -> ModelSpec:
    """Norms of q and k per head. With a window, only windowed layers have a rotary embedding."""
    sizes, window = read_sizes(view), view.optional_integer("sliding_window")
    experts, top_k = read_experts(view, "num_experts")
    width, shared = view.integer("moe_intermediate_size"), view.integer("num_shared_experts")
    moe = MoeSpec(
        sigmoid_router(view, experts, top_k),
        width,
        view.choice("hidden_act", ACTIVATIONS),
        shared=SharedSpec(width * shared),
        names=_EXAONE_NAMES,
    )
    pattern = view.raw("sliding_window_pattern")
    if not view.written("layer_types") and window is not None and type(pattern) is not int:
        raise view.error("sliding_window_pattern", "without layer_types, transformers reads a number only.", pattern)
    every = pattern if type(pattern) is int and pattern > 0 else 1
    kinds = layer_types(view, sizes.layers, lambda layer: window is None or (layer + 1) % every == 0)
    sparse = sparse_kinds(view, "first_k_dense_replace", sizes.layers)
    layers = []
    for one in windows(view, sizes.layers, window, kinds):
        rope = 0 if window is None or one is not None else None
        layers.append(llama_layer(view, sizes, one, rope=rope, qk_norm=True))
    tables, names = (read_rope(view, sizes.head_dim),), ModuleNames(unused=("mtp.", *predictors(view, sizes.layers)))
    return finish_spec(view, with_experts(layers, moe, sparse), tables, rms(view, "norm"), names=names)


_AFMOE_NAMES = MoeNames(
    router="router.gate", router5="router.gate", correction="expert_bias", shared="mlp.shared_experts"
)


def afmoe(view: ConfigView) -> ModelSpec:
    """Gated attention with norms of q and k per head; only windowed layers have a rotary embedding; norms before and
    after each part."""
    sizes, (experts, top_k) = read_sizes(view), read_experts(view, "num_experts")
    width, shared = view.integer("moe_intermediate_size"), view.integer("num_shared_experts", minimum=0)
    moe = MoeSpec(
        RouterSpec(experts, top_k, score="sigmoid", correction=True, norm=1.0, scale=view.number("route_scale")),
        width,
        view.choice("hidden_act", ACTIVATIONS),
        shared=SharedSpec(width * shared) if shared else None,
        names=_AFMOE_NAMES,
    )
    every, bias = view.integer("global_attn_every_n_layers"), view.flag("attention_bias")
    kinds = layer_types(view, sizes.layers, lambda layer: (layer + 1) % every == 0)
    layers = []
    for window in windows(view, sizes.layers, view.optional_integer("sliding_window"), kinds):
        layer = llama_layer(view, sizes, window, rope=None if window is None else 0, qk_norm=True, qkv_bias=bias,
                            out_bias=bias, gate="self_attn.gate_proj")  # fmt: skip
        layers.append(
            replace(
                layer,
                after_mixer=rms(view, "post_attention_layernorm"),
                before_mlp=rms(view, "pre_mlp_layernorm"),
                after_mlp=rms(view, "post_mlp_layernorm"),
            )
        )
    sparse = dense_first(view, "num_dense_layers", sizes.layers)
    return finish_spec(
        view,
        with_experts(layers, moe, sparse),
        (read_rope(view, sizes.head_dim),),
        rms(view, "norm"),
        embed_scale=sizes.hidden**0.5 if view.flag("mup_enabled") else None,
    )


# The correction is beside the router, not under it.
_MINIMAX_NAMES = MoeNames(
    block=MIXTRAL_NAMES.block, gate="w1", up="w3", down="w2", correction="e_score_correction_bias"
)


def minimax_m2(view: ConfigView) -> ModelSpec:
    """Norms of all heads of q and k together; a part of each head is rotated; experts in every layer."""
    view.skip("router_jitter_noise")  # of training
    sizes, (experts, top_k) = read_sizes(view), read_experts(view, "num_local_experts")
    router = RouterSpec(experts, top_k, score="sigmoid", correction=True, norm=1.0)
    moe = MoeSpec(router, sizes.mlp, view.choice("hidden_act", ACTIVATIONS), names=_MINIMAX_NAMES)
    full, rotated = [None] * sizes.layers, view.optional_integer("rotary_dim")  # the older of two spellings
    partial = True if rotated is None else rotated / sizes.head_dim
    return moe_model(view, sizes, full, moe, qk_norm=True, norm_over="width", partial=partial)


_ERNIE_NAMES = MoeNames(correction="moe_statics.e_score_correction_bias", shared="mlp.shared_experts")


def ernie4_5_moe(view: ConfigView) -> ModelSpec:
    """The softmax with a correction decides; ``use_bias`` is for all linears but those of experts, and the head."""
    sizes, bias, experts = read_sizes(view), view.flag("use_bias"), expert_number(view, "moe_num_experts")
    width, shared = view.integer("moe_intermediate_size"), view.integer("moe_num_shared_experts", minimum=0)
    router = RouterSpec(experts, read_top_k(view, "moe_k", experts), correction=True, norm=1.0,
                        floor=view.number("moe_norm_min"))  # fmt: skip
    names = MoeNames(**{**vars(_ERNIE_NAMES), "correction_shape": (1, experts)})
    moe = MoeSpec(
        router,
        width,
        view.choice("hidden_act", ACTIVATIONS),
        shared=SharedSpec(width * shared, bias=bias) if shared else None,
        names=names,
    )
    first, last = view.integer("moe_layer_start_index", minimum=0), view.integer("moe_layer_end_index", minimum=-1)
    last, every = sizes.layers - 1 if last == -1 else last, view.integer("moe_layer_interval")
    sparse = [first <= index <= last and (index + 1) % every == 0 for index in range(sizes.layers)]
    mixer = attention(sizes, rope_layout="interleaved", qkv_bias=bias, out_bias=bias)
    layer = pre_norm(view, mixer, mlp(view, sizes, bias=bias))
    return finish_spec(
        view,
        with_experts([layer] * sizes.layers, moe, sparse),
        (read_rope(view, sizes.head_dim),),
        rms(view, "norm"),
        head_bias=bias,
        names=ModuleNames(unused=("mtp_block.", "mtp_emb_norm.", "mtp_hidden_norm.", "mtp_linear_proj.")),
    )
