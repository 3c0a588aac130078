"""Mamba-2 in most layers and attention in some: Bamba, Granite 4; both in each layer: Falcon-H1."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial

from truffula.model.architectures import softmax_moe
from truffula.model.architectures.pieces import (
    ACTIVATIONS,
    Sizes,
    attention,
    finish_spec,
    mlp,
    read_sizes,
    rms,
)
from truffula.model.config_view import ConfigView
from truffula.model.parts.mamba2 import Mamba2Spec
from truffula.model.parts.mlp import MlpSpec
from truffula.model.parts.moe import MoeSpec, RouterSpec, SharedSpec
from truffula.model.parts.parallel import ParallelSpec, ScaledPart
from truffula.model.rope import read_rope
from truffula.model.rows import NormSpec
from truffula.model.spec import LayerSpec, ModelSpec, ModuleNames, Part

BAMBA_NAMES = ModuleNames(
    gate="feed_forward.gate_proj", up="feed_forward.up_proj", gate_up=None, down="feed_forward.down_proj"
)

GRANITE_NAMES = ModuleNames(gate_up="shared_mlp.input_linear", gate_up_fused=True, down="shared_mlp.output_linear")
_POSITIONS = "position_embedding_type"


def bamba(view: ConfigView) -> ModelSpec:
    """Half of each head is rotated, whatever the file says."""
    sizes, bias, mlp_bias = read_sizes(view), view.flag("attention_bias"), view.flag("mlp_bias")
    view.must_be("partial_rotary_factor", (None, 0.5), "transformers always rotates half of a head.")
    view.skip("num_logits_to_keep", "z_loss_coefficient")
    mixers = attention(sizes, qkv_bias=bias, out_bias=bias), read_mamba2(view, sizes)
    attend = layer_numbers(view, "attn_layer_indices")
    layers = [
        LayerSpec(
            mixer=mixers[index not in attend],
            mlp=mlp(view, sizes, bias=mlp_bias),
            before_mixer=rms(view, "input_layernorm"),
            before_mlp=rms(view, "pre_ff_layernorm"),
        )
        for index in range(sizes.layers)
    ]
    ropes = (read_rope(view, sizes.head_dim, partial=True),)
    return finish_spec(view, layers, ropes, rms(view, "final_layernorm"), names=BAMBA_NAMES)


def granitemoehybrid(view: ConfigView) -> ModelSpec:
    """Granite's four multipliers; without rotary embedding unless ``position_embedding_type`` is rope."""
    sizes, bias = read_sizes(view), view.flag("attention_bias")
    ropes = (read_rope(view, sizes.head_dim),)
    rotated = view.choice("position_embedding_type", {"rope": True, "nope": False}) if view.raw(_POSITIONS) else False
    scale, residual = view.number("attention_multiplier"), view.number("residual_multiplier", positive=False)
    mixers: dict[str, Part] = {
        "full_attention": attention(sizes, rope=0 if rotated else None, scale=scale, qkv_bias=bias, out_bias=bias),
        "linear_attention": read_mamba2(view, sizes),
    }
    layers = [
        LayerSpec(
            mixer=mixers[kind],
            mlp=_granite_mlp(view, sizes),
            before_mixer=rms(view, "input_layernorm"),
            before_mlp=rms(view, "post_attention_layernorm"),
            residual_multiplier=residual,
        )
        for kind in _kinds(view, sizes.layers)
    ]
    return finish_spec(
        view,
        layers,
        ropes if rotated else (),
        rms(view, "norm"),
        embed_scale=view.number("embedding_multiplier"),
        logit_scale=1 / view.number("logits_scaling"),
        names=GRANITE_NAMES,
    )


def falcon_h1(view: ConfigView) -> ModelSpec:
    """Attention and Mamba-2 read the same norm; multipliers of what nearly each module reads or returns."""
    sizes, bias = read_sizes(view), view.flag("attention_bias")
    view.skip("num_logits_to_keep")
    factor = partial(view.number, positive=False)
    gate_scale, down = view.numbers("mlp_multipliers", 2) or (1.0, 1.0)
    heads = attention(sizes, qkv_bias=bias, out_bias=bias, key_scale=factor("key_multiplier"))
    feed_forward = mlp(view, sizes, bias=view.flag("mlp_bias"), gate_scale=gate_scale)
    mixer = ParallelSpec((
        ScaledPart(_falcon_mamba2(view, sizes), factor("ssm_in_multiplier"), factor("ssm_out_multiplier")),
        ScaledPart(heads, factor("attention_in_multiplier"), factor("attention_out_multiplier")),
    ))  # fmt: skip
    layer = LayerSpec(
        mixer=mixer,
        mlp=ParallelSpec((ScaledPart(feed_forward, after=down),)),
        before_mixer=rms(view, "input_layernorm"),
        before_mlp=rms(view, "pre_ff_layernorm"),
    )
    return finish_spec(
        view,
        [layer] * sizes.layers,
        (read_rope(view, sizes.head_dim),),
        rms(view, "final_layernorm"),
        embed_scale=factor("embedding_multiplier"),
        embed_scaled="ids",
        logit_scale=factor("lm_head_multiplier"),
        names=BAMBA_NAMES,
    )


def _falcon_mamba2(view: ConfigView, sizes: Sizes) -> Mamba2Spec:
    """Mamba-2 of a width of its own, with a norm or without."""
    before_gate, normed = view.flag("mamba_norm_before_gate"), view.flag("mamba_rms_norm")
    return replace(
        read_mamba2(view, sizes, view.optional_integer("mamba_d_ssm")),
        out_bias=view.flag("projectors_bias"),
        norm=NormSpec("mamba.norm", view.number("rms_norm_eps"), cast="last") if normed else None,
        norm_before_gate=before_gate,
        scales=view.numbers("ssm_multipliers", 5) or (),
    )


def _granite_mlp(view: ConfigView, sizes: Sizes) -> MlpSpec | MoeSpec:
    """Experts and a shared one; the small models have the shared one alone."""
    experts, top_k = (
        view.optional_integer("num_local_experts", minimum=0) or 0,
        view.integer("num_experts_per_tok", minimum=0),
    )
    shared, activation = view.integer("shared_intermediate_size"), view.choice("hidden_act", ACTIVATIONS)
    if not experts:
        return MlpSpec(shared, activation)
    if not 0 < top_k <= experts:
        raise view.error("num_experts_per_tok", f"it must be 1 to {experts}, the number of experts.", top_k)
    router = RouterSpec(experts, top_k, norm=1.0)
    return MoeSpec(router, sizes.mlp, activation, shared=SharedSpec(shared), names=softmax_moe.GRANITE_NAMES)


def _kinds(view: ConfigView, layers: int) -> tuple[str, ...]:
    """The kind of each layer, under its newer name; all are Mamba-2 where none is given."""
    kinds = view.strings("layer_types", layers) or ("linear_attention",) * layers
    return tuple(newer_kind(view, "layer_types", kind, ("linear_attention", "full_attention")) for kind in kinds)


def newer_kind(view: ConfigView, key: str, kind: object, supported: Collection[str]) -> str:
    """The kind of a layer (an item of the list under ``key``) under its name in transformers 5."""
    found = {"mamba": "linear_attention", "attention": "full_attention"}.get(str(kind), kind)
    if not isinstance(found, str) or found not in supported:
        raise view.error(key, f"{kind} is not supported; {', '.join(supported)} are.", kind)
    return found


def read_mamba2(view: ConfigView, sizes: Sizes, width: int | None = None) -> Mamba2Spec:
    """The Mamba-2 layer of Bamba's configs, and of those that took its keys; by default mamba_expand x hidden_size
    wide."""
    view.skip("mamba_chunk_size")  # how transformers divides its sums
    heads, bias, expand = view.integer("mamba_n_heads"), view.flag("mamba_proj_bias"), view.integer("mamba_expand")
    width = width or expand * sizes.hidden
    head_dim = width // heads if view.raw("mamba_d_head") == "auto" else view.integer("mamba_d_head")
    if head_dim * heads != width:
        raise view.error("mamba_n_heads", f"with heads of {head_dim} it does not make the width, {width}.", heads)
    groups = view.integer("mamba_n_groups")
    if heads % groups:
        raise view.error("mamba_n_groups", f"it does not divide the {heads} heads.", groups)
    return Mamba2Spec(
        heads=heads,
        head_dim=head_dim,
        groups=groups,
        state_size=view.integer("mamba_d_state"),
        taps=view.integer("mamba_d_conv", minimum=2),
        norm=rms(view, "mamba.norm"),
        activation=view.choice("hidden_act", ACTIVATIONS),
        in_bias=bias,
        out_bias=bias,
        conv_bias=view.flag("mamba_conv_bias"),
        dt_limit=_time_step_limit(view),
    )


def layer_numbers(view: ConfigView, key: str) -> Collection[int]:
    """A list of layer numbers; none for null."""
    found = view.raw(key)
    if found is None:
        return ()
    if not isinstance(found, list) or not all(type(index) is int for index in found):
        raise view.error(key, "expected a list of layer numbers.", found)
    return frozenset(found)


def _time_step_limit(view: ConfigView) -> tuple[float, float]:
    """The bounds of a step; transformers writes infinity as an object."""
    key = "time_step_limit"
    found = view.raw(key)
    if not isinstance(found, list) or len(found) != 2:
        raise view.error(key, "expected two numbers.", found)
    values = [item.get("__float__") if isinstance(item, Mapping) else item for item in found]
    low, high = (
        math.inf if item in ("Infinity", math.inf) else view.number_value(key, item, positive=False) for item in values
    )
    if not 0 <= low < high:
        raise view.error(key, "the first must be below the second, and none below 0.", found)
    return low, high
