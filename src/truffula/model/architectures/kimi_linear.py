"""Kimi Linear: latent attention without rotation in some layers, linear attention by the gated delta rule in the
others, with a decay for each row of its state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from truffula.model.architectures.moe_pieces import MOST_EXPERTS
from truffula.model.architectures.pieces import ACTIVATIONS, MOST_LAYERS, finish_spec, rms
from truffula.model.architectures.qwen_hybrid import FULL, LINEAR, layer_kinds
from truffula.model.config_view import ConfigView
from truffula.model.parts.gated_delta import GatedDeltaSpec, LowRank
from truffula.model.parts.mla import MlaSpec
from truffula.model.parts.mlp import MlpSpec
from truffula.model.parts.moe import MoeNames, MoeSpec, RouterSpec, SharedSpec
from truffula.model.rope import MOST_WIDTH
from truffula.model.rows import NormSpec
from truffula.model.spec import LayerSpec, ModelSpec, Part

# Keys of files -> fields of transformers' class.
_FIELDS = {
    "model_max_length": "max_position_embeddings", "moe_renormalize": "norm_topk_prob", "num_expert_group": "n_group",
    "num_experts": "num_local_experts", "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
}  # fmt: skip
_EXPERT_KEYS = (
    "norm_topk_prob", "n_group", "num_local_experts", "num_experts_per_tok", "n_shared_experts", "topk_group",
    "routed_scaling_factor", "moe_intermediate_size",
)  # fmt: skip
_LATENT_EPS = 1e-6
_MOE_NAMES = MoeNames(
    block="block_sparse_moe",
    gate="w1",
    up="w3",
    down="w2",
    shared="block_sparse_moe.shared_experts",
    shared5="mlp.shared_experts",
)


def kimi_linear(view: ConfigView) -> ModelSpec:
    """Layers of linear attention, by default but every fourth after the first; all but the first have experts."""
    layers = view.integer("num_hidden_layers")
    if layers > MOST_LAYERS:
        raise view.error("num_hidden_layers", f"at most {MOST_LAYERS} layers are served.", layers)
    # Of the repository's own class; nothing is rotated.
    view.must_be("mla_use_nope", (None, True), "latent attention with rotation is not supported.")
    view.must_be("moe_router_activation_func", (None, "sigmoid"), "only sigmoid is supported.")
    for key in ("rope_scaling", "rope_parameters"):
        view.must_be(key, (None,), "nothing is rotated.")
    view.must_be("moe_layer_freq", (None, 1), "only 1 is supported.")
    view.skip("use_grouped_topk", "head_dim", "rope_theta", "num_nextn_predict_layers")
    linear = view.mapping("linear_attn_config") or {}
    full = linear.get("full_attn_layers")
    if full is not None and (not isinstance(full, list) or any(type(index) is not int for index in full)):
        raise view.error("linear_attn_config.full_attn_layers", "expected a list of layer numbers.", full)
    kinds = layer_kinds(view, layers, lambda i: i + 1 in full if full is not None else i > 0 and i % 4 == 0)
    mixers: dict[str, Part] = {FULL: _latent(view), LINEAR: _delta(view, linear)}
    sparse, activation = _sparse(view, layers), view.choice("hidden_act", ACTIVATIONS)
    mlp, moe = MlpSpec(view.integer("intermediate_size"), activation), _moe(view) if any(sparse) else None
    if moe is None:
        view.skip(*_EXPERT_KEYS, *(key for key in _FIELDS if key != "model_max_length"))
    norms = rms(view, "input_layernorm"), rms(view, "post_attention_layernorm")
    made = [
        LayerSpec(mixers[kind], moe if moe is not None and experts else mlp, *norms)
        for kind, experts in zip(kinds, sparse, strict=True)
    ]
    longest = view.integer(_key(view, "model_max_length"))
    return replace(finish_spec(view, made, (), rms(view, "norm")), max_positions=longest)


def _key(view: ConfigView, key: str) -> str:
    """``key`` of a file, or the class's field where the file has none."""
    return key if view.written(key) else _FIELDS[key]


def _sparse(view: ConfigView, layers: int) -> list[bool]:
    """Which layers have experts: by ``mlp_layer_types``, or all but the first ``first_k_dense_replace`` (1)."""
    kinds, first = view.strings("mlp_layer_types", layers), view.optional_integer("first_k_dense_replace", minimum=0)
    if kinds is None:
        return [index >= (1 if first is None else first) for index in range(layers)]
    for kind in kinds:
        if kind not in ("dense", "sparse"):
            raise view.error("mlp_layer_types", f"{kind} is not supported; dense and sparse are.", kind)
    return [kind == "sparse" for kind in kinds]


def _moe(view: ConfigView) -> MoeSpec:
    """DeepSeek V3's router."""
    experts, top_k = view.integer(_key(view, "num_experts")), view.integer(_key(view, "num_experts_per_token"))
    groups, chosen = view.optional_integer(_key(view, "num_expert_group")) or 1, view.optional_integer("topk_group")
    chosen = chosen or groups
    if experts > MOST_EXPERTS or experts % groups or chosen > groups or top_k > experts // groups * chosen:
        why = f"{top_k} experts of {chosen} of {groups} equal groups, and at most {MOST_EXPERTS}, are served."
        raise view.error(_key(view, "num_experts"), why, experts)
    width, shared = view.integer("moe_intermediate_size"), view.integer(_key(view, "num_shared_experts"), minimum=0)
    router = RouterSpec(
        experts, top_k, score="sigmoid", correction=True, groups=groups, topk_groups=chosen,
        norm=1.0 if view.flag(_key(view, "moe_renormalize")) else None, scale=view.number("routed_scaling_factor"),
    )  # fmt: skip
    activation = view.choice("hidden_act", ACTIVATIONS)
    return MoeSpec(router, width, activation, SharedSpec(width * shared) if shared else None, names=_MOE_NAMES)


def _delta(view: ConfigView, written: Mapping[str, Any]) -> GatedDeltaSpec:
    """Sizes are in ``linear_attn_config``, or in fields of the class."""
    fields = {
        "head_dim": "linear_head_dim",
        "num_heads": "linear_num_heads",
        "short_conv_kernel_size": "linear_conv_kernel_dim",
    }
    sizes = {key: written.get(key, view.raw(field)) for key, field in fields.items()}
    for key, value in sizes.items():
        if type(value) is not int or not 1 <= value <= MOST_WIDTH:
            raise view.error(f"linear_attn_config.{key}", f"expected an integer from 1 to {MOST_WIDTH}.", value)
    dim, heads, taps = sizes["head_dim"], sizes["num_heads"], sizes["short_conv_kernel_size"]
    width = heads * dim
    rows = {"q_proj": width, "k_proj": width, "v_proj": width, "g_a_proj": dim, "b_proj": heads}
    decay = ("self_attn.f_a_proj", dim, None, "self_attn.forget_gate.f_a_proj")
    return GatedDeltaSpec(
        heads=heads, key_heads=heads, dim_k=dim, dim_v=dim, taps=taps,
        inputs=(*((f"self_attn.{name}", count, None) for name, count in rows.items()), decay),
        norm=NormSpec("self_attn.o_norm", view.number("rms_norm_eps"), cast="last"), parameters="self_attn",
        rate_shape=(1, 1, heads, 1), activation=view.choice("hidden_act", ACTIVATIONS), gate_activation="sigmoid",
        convs=tuple((f"self_attn.{name}_conv1d", width) for name in "qkv"), conv="self_attn.conv1d",
        out="self_attn.o_proj",
        low_rank=LowRank(dim, "self_attn.f_b_proj", "self_attn.g_b_proj", "self_attn.forget_gate.f_b_proj"),
    )  # fmt: skip


def _latent(view: ConfigView) -> MlaSpec:
    heads, nope, rope = (view.integer(name) for name in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))
    view.must_be("num_key_value_heads", (None, heads), f"latent attention has a key for each of the {heads} heads.")
    view.must_be("qk_head_dim", (None, nope + rope), "it is qk_nope_head_dim + qk_rope_head_dim.")
    q_rank = view.optional_integer("q_lora_rank")
    return MlaSpec(
        heads=heads, nope=nope, rope=rope, dim_v=view.integer("v_head_dim"), rank=view.integer("kv_lora_rank"),
        scale=(nope + rope) ** -0.5, table=None, kv_norm=NormSpec("self_attn.kv_a_layernorm", _LATENT_EPS),
        q_rank=q_rank, q_norm=None if q_rank is None else NormSpec("self_attn.q_a_layernorm", _LATENT_EPS),
        bias=view.flag("attention_bias"),
    )  # fmt: skip
