"""Laguna: attention with a gate, whose number of heads depends on the layer, and DeepSeek V3's kind of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from truffula.model.architectures.moe_pieces import read_experts
from truffula.model.architectures.pieces import (
    ACTIVATIONS,
    Sizes,
    attention,
    finish_spec,
    layer_types,
    mlp,
    pre_norm,
    read_sizes,
    rms,
    windows,
)
from truffula.model.config_view import ConfigView
from truffula.model.parts.moe import MoeNames, MoeSpec, RouterSpec, SharedSpec
from truffula.model.rope import read_rope_by_layer_type
from truffula.model.spec import ModelSpec, RopeSpec

ORDER = ("full_attention", "sliding_attention")
_THETAS = {"full_attention": ("rope_theta", 5e5), "sliding_attention": ("rope_theta", 1e4)}
_PARTIAL = {"full_attention": 0.5, "sliding_attention": 1.0}
_NAMES = MoeNames(
    correction="experts.e_score_correction_bias", shared="mlp.shared_expert", shared5="mlp.shared_experts"
)


def laguna(view: ConfigView) -> ModelSpec:
    """Norms of q and k per head; each type of layers has a rotary table; the first layer is dense."""
    view.must_be("moe_apply_router_weight_on_input", (False,), "only false is supported.")
    sizes, bias = read_sizes(view), view.flag("attention_bias")
    kinds = layer_types(view, sizes.layers, lambda _: True)
    sparse, moe = _sparse(view, sizes.layers), _moe(view)
    per_head = view.raw("gating") in (True, "per-head")
    if not per_head:
        view.must_be("gating", ("per-element",), "supported are true, per-head and per-element.")
    q_norm, k_norm = rms(view, "self_attn.q_norm"), rms(view, "self_attn.k_norm")
    layers = []
    for index, window in enumerate(windows(view, sizes.layers, view.integer("sliding_window"), kinds)):
        mixer = attention(
            replace(sizes, heads=_heads(view, sizes)[index]),
            window,
            rope=ORDER.index(kinds[index]),
            q_norm=q_norm,
            k_norm=k_norm,
            qkv_bias=bias,
            out_bias=bias,
            gate="self_attn.g_proj",
            gate_activation="softplus",
            gate_per_head=per_head,
        )
        layer = pre_norm(view, mixer, mlp(view, sizes))
        layers.append(replace(layer, mlp=moe) if sparse[index] else layer)
    tables = _ropes(view, sizes, kinds)
    return finish_spec(view, layers, tuple(tables[kind] for kind in ORDER), rms(view, "norm"))


def _heads(view: ConfigView, sizes: Sizes) -> tuple[int, ...]:
    """The number of query heads of each layer."""
    key = "num_attention_heads_per_layer"
    given = view.numbers(key, sizes.layers)
    if given is None:
        return (sizes.heads,) * sizes.layers
    if any(count < 1 or count % sizes.kv_heads or not count.is_integer() for count in given):
        raise view.error(key, f"expected multiples of the {sizes.kv_heads} KV heads.")
    return tuple(int(count) for count in given)


def _sparse(view: ConfigView, layers: int) -> list[bool]:
    """Which layers have experts."""
    kinds = view.strings("mlp_layer_types", layers) or ("dense", *["sparse"] * (layers - 1))
    for kind in kinds:
        if kind not in ("dense", "sparse"):
            raise view.error("mlp_layer_types", f"{kind} is not supported; dense and sparse are.", kind)
    return [kind == "sparse" for kind in kinds]


def _moe(view: ConfigView) -> MoeSpec:
    experts, top_k = read_experts(view, "num_experts")
    softcap = view.number("moe_router_logit_softcapping", positive=False)
    router = RouterSpec(
        experts,
        top_k,
        score="sigmoid",
        correction=True,
        norm=1.0,
        scale=view.number("moe_routed_scaling_factor", positive=False),
        softcap=softcap if softcap > 0 else None,
    )
    shared = SharedSpec(view.integer("shared_expert_intermediate_size"))
    width, activation = view.integer("moe_intermediate_size"), view.choice("hidden_act", ACTIVATIONS)
    return MoeSpec(router, width, activation, shared=shared, scaled_sum=True, names=_NAMES)


def _ropes(view: ConfigView, sizes: Sizes, kinds: tuple[str, ...]) -> Mapping[str, RopeSpec]:
    """The table of each type of layers. transformers reads no key outside ``rope_parameters``."""
    view.must_be("rope_scaling", (None,), "transformers reads rope_parameters only.")
    given = view.mapping("rope_parameters")
    if given is None:
        for key in ("rope_theta", "partial_rotary_factor"):
            view.must_be(key, (None,), "transformers reads it in rope_parameters only.")
        return read_rope_by_layer_type(view, sizes.head_dim, theta_keys=_THETAS, partial=_PARTIAL)
    view.skip("rope_theta", "partial_rotary_factor")
    for kind in set(kinds):
        values = given.get(kind)
        if not isinstance(values, Mapping) or values.get("rope_theta") is None:
            raise view.error(f"rope_parameters.{kind}", "rope_theta is needed in it.", values)
    whole = dict.fromkeys(ORDER, 1.0)
    return read_rope_by_layer_type(view, sizes.head_dim, theta_keys=_THETAS, partial=whole)
