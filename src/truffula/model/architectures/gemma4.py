"""Gemma 4 (text): heads of two widths, layers that share keys and values, inputs for each layer, scaled layers, experts
beside the MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from truffula.model.architectures.moe_pieces import expert_number, read_top_k
from truffula.model.architectures.pieces import (
    ACTIVATIONS,
    Sizes,
    attention,
    finish_spec,
    layer_types,
    read_sizes,
    rms_last,
    windows,
)
from truffula.model.config_view import ConfigView
from truffula.model.parts.attention import AttentionSpec
from truffula.model.parts.dense_and_experts import DenseAndExpertsSpec
from truffula.model.parts.mlp import MlpSpec
from truffula.model.parts.moe import MoeNames, MoeSpec, RouterSpec
from truffula.model.parts.per_layer import PerLayerInputs, PerLayerSpec
from truffula.model.rope import read_rope_by_layer_type
from truffula.model.rows import ExpertLayout, NormSpec
from truffula.model.spec import LayerSpec, ModelSpec, ModuleNames, body_prefixes

ORDER = ("sliding_attention", "full_attention")
THETAS = {"sliding_attention": ("rope_theta", 1e4), "full_attention": ("rope_theta", 1e6)}
# Of layers that use another layer's keys and values; transformers does not load them.
SHARED = tuple(f"self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm"))
PARTS = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.", "vision_embedder.")
EXPERT_NAMES = MoeNames(
    block="",
    block5="",
    router="router.proj",
    router5="router.proj",
    expert_scale="router.per_expert_scale",
    in_layouts=(
        ExpertLayout(("experts.gate_up_proj",), parameter="experts.gate_up_proj"),
        ExpertLayout(("experts.gate_proj.weight", "experts.up_proj.weight")),  # of some GGUF files
    ),
    out_layouts=(ExpertLayout(("experts.down_proj",), parameter="experts.down_proj"),),
)
TEXT_NAMES = ModuleNames(buffers=SHARED)
SKIP = tuple(f"{root}{part}" for part in PARTS for root in ("", "model."))
PREFIXES = body_prefixes("model.", "", "model.language_model.")
MULTIMODAL_NAMES = ModuleNames(body="model.language_model.", prefixes=PREFIXES, buffers=SHARED, skip=SKIP)


def gemma4(view: ConfigView) -> ModelSpec:
    """The text part of the multimodal classes."""
    view.skip("vision_config", "audio_config", "boi_token_id", "eoi_token_id", "image_token_id", "video_token_id")
    view.skip("boa_token_id", "eoa_token_index", "eoa_token_id", "audio_token_id", "vision_soft_tokens_per_image")
    view.must_be("is_encoder_decoder", (False,), "only decoder-only models are supported.")
    text = view.nested("text_config", "gemma4_unified_text" if view.model_type == "gemma4_unified" else "gemma4_text")
    return gemma4_text(text, MULTIMODAL_NAMES)


def gemma4_text(view: ConfigView, names: ModuleNames = TEXT_NAMES) -> ModelSpec:
    """Five windowed layers per full layer; the last layers use the keys and values of the last one of their type."""
    unified = view.model_type == "gemma4_unified_text"
    view.must_be("use_bidirectional_attention", (None, "vision"), "text that attends both ways is not supported.")
    sizes = read_sizes(view)
    kinds = layer_types(view, sizes.layers, lambda layer: (layer + 1) % 6 == 0 or layer == sizes.layers - 1)
    if kinds[-1] != "full_attention":
        raise view.error("layer_types", "the last layer must be full_attention.", kinds[-1])
    widths = {kind: _sizes(view, sizes, kind, kinds) for kind in ORDER}
    shared = view.integer("num_kv_shared_layers", minimum=0)
    first = sizes.layers - shared
    if not set(kinds[first:]) <= set(kinds[:first]):
        raise view.error("num_kv_shared_layers", "no layer has the keys and values of each type.", shared)
    heads = {kind: widths[kind].head_dim for kind in ORDER}
    tables = read_rope_by_layer_type(view, heads, theta_keys=THETAS)
    inputs = None if unified else _inputs(view, sizes)
    experts = None if unified else _experts(view)
    last = {kind: index for index, kind in enumerate(kinds[:first])}
    layers = []
    for index, window in enumerate(windows(view, sizes.layers, view.integer("sliding_window"), kinds)):
        kind = kinds[index]
        source = last[kind] if index >= first else None
        mixer = _attention(view, widths[kind], window, ORDER.index(kind), source)
        double = view.flag("use_double_wide_mlp") and source is not None
        layers.append(_layer(view, mixer, sizes.mlp * (2 if double else 1), inputs, experts))
    return finish_spec(
        view,
        layers,
        tuple(tables[kind] for kind in ORDER),
        rms_last(view, "norm"),
        embed_scale=sizes.hidden**0.5,
        embed_scaled="module",
        per_layer=inputs,
        logit_softcap=view.optional_number("final_logit_softcapping"),
        names=names,
    )


def _sizes(view: ConfigView, sizes: Sizes, kind: str, kinds: tuple[str, ...]) -> Sizes:
    """The sizes of the layers of a type: full ones have heads of their own, as two keys or those of each layer say."""
    if kind != "full_attention":
        return sizes
    head_dim, kv_heads = view.optional_integer("global_head_dim") or 512, sizes.kv_heads
    given = view.optional_integer("num_global_key_value_heads")
    if given is not None and view.flag("attention_k_eq_v"):
        kv_heads = given
    each = view.mapping("per_layer_config")
    if each is not None:
        # transformers pads the numbers of ten layers and more with zeros.
        by_layer = {int(index) if index.isdecimal() else -1: layer for index, layer in each.items()}
        full = [index for index, other in enumerate(kinds) if other == kind]
        found = [_overrides(view, by_layer.get(index, {})) for index in full]
        if set(by_layer) - set(full) or len(by_layer) < len(each) or len(set(found)) != 1:
            raise view.error("per_layer_config", "only full layers may differ from the others, all in the same way.")
        head_dim, kv_heads = found[0][0] or sizes.head_dim, found[0][1] or sizes.kv_heads
    if sizes.heads % kv_heads:
        raise view.error("num_global_key_value_heads", f"it does not divide {sizes.heads} attention heads.", kv_heads)
    return replace(sizes, head_dim=head_dim, kv_heads=kv_heads)


def _overrides(view: ConfigView, found: Any) -> tuple[int | None, int | None]:
    """The head width and the KV heads that ``found`` of ``per_layer_config`` gives a layer."""
    values = [found.get(key) for key in ("head_dim", "num_key_value_heads")] if isinstance(found, Mapping) else [0]
    odd = not isinstance(found, Mapping) or set(found) - {"head_dim", "num_key_value_heads"}
    if odd or any(value is not None and (type(value) is not int or value < 1) for value in values):
        raise view.error("per_layer_config", "expected head_dim and num_key_value_heads of each layer.", found)
    return values[0], values[1]


def _attention(view: ConfigView, sizes: Sizes, window: int | None, rope: int, source: int | None) -> AttentionSpec:
    bias, own = view.flag("attention_bias"), source is None
    values = NormSpec("self_attn.v_norm", view.number("rms_norm_eps"), cast="last", weight=False)
    return attention(
        sizes,
        window,
        scale=1.0,
        rope=rope,
        q_norm=rms_last(view, "self_attn.q_norm"),
        k_norm=rms_last(view, "self_attn.k_norm") if own else None,
        v_norm=values if own else None,
        keys_as_values=own and window is None and view.flag("attention_k_eq_v"),
        kv_layer=source,
        qkv_bias=bias,
        out_bias=bias,
    )


def _inputs(view: ConfigView, sizes: Sizes) -> PerLayerInputs | None:
    width = view.optional_integer("hidden_size_per_layer_input", minimum=0)
    ids = view.integer("vocab_size_per_layer_input")
    if not width:
        return None
    if ids < view.integer("vocab_size"):
        raise view.error("vocab_size_per_layer_input", "it must be at least vocab_size.", ids)
    return PerLayerInputs(ids, sizes.layers, width, rms_last(view, "per_layer_projection_norm"))


def _experts(view: ConfigView) -> MoeSpec | None:
    if not view.flag("enable_moe_block"):
        view.skip("num_experts", "top_k_experts", "moe_intermediate_size")
        return None
    experts = expert_number(view, "num_experts")
    router = RouterSpec(experts, read_top_k(view, "top_k_experts", experts), norm=1.0, expert_scale=True)
    activation = view.choice("hidden_activation", ACTIVATIONS)
    return MoeSpec(router, view.integer("moe_intermediate_size"), activation, names=EXPERT_NAMES)


def _layer(
    view: ConfigView, mixer: AttentionSpec, mlp_width: int, inputs: PerLayerInputs | None, experts: MoeSpec | None
) -> LayerSpec:
    activation = view.choice("hidden_activation", ACTIVATIONS)
    dense = MlpSpec(mlp_width, activation)
    mlp: MlpSpec | DenseAndExpertsSpec = dense
    if experts is not None:
        mlp = DenseAndExpertsSpec(
            dense,
            experts,
            after_mlp=rms_last(view, "post_feedforward_layernorm_1"),
            before_experts=rms_last(view, "pre_feedforward_layernorm_2"),
            after_experts=rms_last(view, "post_feedforward_layernorm_2"),
            router_norm=rms_last(view, "router.norm"),
            router_scale="router.scale",
        )
    return LayerSpec(
        mixer=mixer,
        mlp=mlp,
        before_mixer=rms_last(view, "input_layernorm"),
        after_mixer=rms_last(view, "post_attention_layernorm"),
        before_mlp=rms_last(view, "pre_feedforward_layernorm"),
        after_mlp=rms_last(view, "post_feedforward_layernorm"),
        extra=None if inputs is None else PerLayerSpec(inputs.width, activation),
        after_extra=None if inputs is None else rms_last(view, "post_per_layer_input_norm"),
        scalar="layer_scalar",
    )
