"""Experts that a softmax weighs: OLMoE, Granite (MoE), Hunyuan (MoE) and Phi-3.5-MoE."""

from __future__ import annotations

from truffula.model.architectures.mixtral import MIXTRAL_NAMES
from truffula.model.architectures.moe_pieces import expert_number, moe_model, read_experts, with_experts
from truffula.model.architectures.pieces import (
    ACTIVATIONS,
    attention,
    finish_spec,
    layer_norm,
    mlp,
    pre_norm,
    read_sizes,
    rms,
)
from truffula.model.config_view import ConfigView
from truffula.model.parts.moe import MoeNames, MoeSpec, RouterSpec, SharedSpec
from truffula.model.rope import read_rope
from truffula.model.rows import ExpertLayout
from truffula.model.spec import ModelSpec


def olmoe(view: ConfigView) -> ModelSpec:
    """Norms of all heads of q and k together; the weights of the chosen experts add up to one if ``norm_topk_prob``."""
    sizes, (experts, top_k) = read_sizes(view), read_experts(view, "num_experts")
    view.must_be("clip_qkv", (None,), "clipping after the norms of q and k is not supported.")
    router = RouterSpec(experts, top_k, norm=1.0 if view.flag("norm_topk_prob") else None)
    moe, bias = MoeSpec(router, sizes.mlp, view.choice("hidden_act", ACTIVATIONS)), view.flag("attention_bias")
    full = [None] * sizes.layers
    return moe_model(view, sizes, full, moe, qk_norm=True, norm_over="width", qkv_bias=bias, out_bias=bias)


_GRANITE = "block_sparse_moe"
GRANITE_NAMES = MoeNames(
    block=_GRANITE,
    block5=_GRANITE,
    router="router.layer",
    router5="router",
    in_layouts=(ExpertLayout((f"{_GRANITE}.input_linear.weight",), parameter=f"{_GRANITE}.experts.gate_up_proj"),),
    out_layouts=(ExpertLayout((f"{_GRANITE}.output_linear.weight",), parameter=f"{_GRANITE}.experts.down_proj"),),
    shared="shared_mlp",
    shared_in=("input_linear",),
    shared_down="output_linear",
)


def granitemoe(view: ConfigView) -> ModelSpec:
    """Granite's multipliers; the shared expert, if any, is added to the sum of the others."""
    sizes, (experts, top_k) = read_sizes(view), read_experts(view, "num_local_experts")
    shared = view.optional_integer("shared_intermediate_size", minimum=0)
    moe = MoeSpec(
        RouterSpec(experts, top_k, norm=1.0),
        sizes.mlp,
        view.choice("hidden_act", ACTIVATIONS),
        shared=SharedSpec(shared) if shared else None,
        names=GRANITE_NAMES,
    )
    bias, residual = view.flag("attention_bias"), view.number("residual_multiplier", positive=False)
    mixer = attention(sizes, scale=view.number("attention_multiplier"), qkv_bias=bias, out_bias=bias)
    layer = pre_norm(view, mixer, mlp(view, sizes), residual_multiplier=residual)
    return finish_spec(
        view,
        with_experts([layer] * sizes.layers, moe),
        (read_rope(view, sizes.head_dim),),
        rms(view, "norm"),
        embed_scale=view.number("embedding_multiplier"),
        logit_scale=1 / view.number("logits_scaling"),
    )


def hunyuan_v1_moe(view: ConfigView) -> ModelSpec:
    """Norms of q and k per head after the rotation; a shared expert as wide as the others."""
    view.skip("eod_token_id", "sep_token_id")
    sizes, bias = read_sizes(view), view.flag("attention_bias")
    experts, top_k = expert_number(view, "num_experts"), _same_in_all_layers(view, "moe_topk")
    if top_k > experts:
        raise view.error("moe_topk", f"the model has {experts} experts.", top_k)
    moe = MoeSpec(
        RouterSpec(experts, top_k, norm=1.0),
        sizes.mlp,
        view.choice("hidden_act", ACTIVATIONS),
        shared=SharedSpec(sizes.mlp),
        names=MoeNames(router="gate.wg", router5="gate.wg", shared="mlp.shared_mlp"),
    )
    q_norm, k_norm = rms(view, "self_attn.query_layernorm"), rms(view, "self_attn.key_layernorm")
    mixer = attention(sizes, q_norm=q_norm, k_norm=k_norm, norm_rotated=True, qkv_bias=bias, out_bias=bias)
    layer = pre_norm(view, mixer, mlp(view, sizes))
    more = ("alpha", "beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim")
    rope = read_rope(view, sizes.head_dim, more=more)
    return finish_spec(view, with_experts([layer] * sizes.layers, moe), (rope,), rms(view, "norm"))


def _same_in_all_layers(view: ConfigView, key: str) -> int:
    """A count that the config gives once, or once for each layer."""
    value = view.raw(key)
    values = value if isinstance(value, list) and value else [value]
    if any(type(item) is not int or item < 1 for item in values):
        raise view.error(key, "expected a positive integer, or a list of them.", value)
    if len(set(values)) > 1:
        raise view.error(key, "different numbers in different layers are not supported.", value)
    return int(values[0])


def phimoe(view: ConfigView) -> ModelSpec:
    """Layer norms, whose epsilon is ``rms_norm_eps``; a sparse mixer chooses two experts."""
    view.skip("input_jitter_noise")  # of training
    sizes, (experts, top_k) = read_sizes(view), read_experts(view, "num_local_experts")
    if top_k != 2:
        raise view.error("num_experts_per_tok", "the sparse mixer of transformers chooses two.", top_k)
    router = RouterSpec(experts, 2, score="sparsemixer", jitter=view.number("router_jitter_noise", positive=False))
    names = MoeNames(block=MIXTRAL_NAMES.block, router5="router", gate="w1", up="w3", down="w2")
    moe = MoeSpec(router, sizes.mlp, view.choice("hidden_act", ACTIVATIONS), names=names)
    bias, window = view.flag("attention_bias"), view.optional_integer("sliding_window")
    mixer = attention(sizes, window, qkv_bias=bias, out_bias=bias)
    layer = pre_norm(view, mixer, mlp(view, sizes), lambda v, module: layer_norm(v, module, "rms_norm_eps"))
    return finish_spec(
        view,
        with_experts([layer] * sizes.layers, moe),
        (read_rope(view, sizes.head_dim),),
        layer_norm(view, "norm", "rms_norm_eps"),
        head_bias=view.flag("lm_head_bias"),
    )
