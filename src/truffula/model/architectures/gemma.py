"""Gemma 1 to 3 (text): scaled embeddings, norms with 1 + w; from 2 on four norms per layer and windowed layers."""

from __future__ import annotations

from truffula.model.architectures.pieces import (
    ACTIVATIONS,
    Sizes,
    attention,
    finish_spec,
    gemma_rms,
    layer_types,
    mlp,
    pre_norm,
    read_sizes,
    windows,
)
from truffula.model.config_view import ConfigView
from truffula.model.parts.mlp import MlpSpec
from truffula.model.rope import read_rope, read_rope_by_layer_type
from truffula.model.spec import LLAMA_NAMES, LayerSpec, ModelSpec, ModuleNames, RopeSpec

# The multimodal class has the same body under language_model.
MULTIMODAL_NAMES = ModuleNames(
    body="model.language_model.",
    skip=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)


# Old files say gelu, and transformers reads it as its tanh form.
OLD_ACTIVATIONS = ACTIVATIONS | {"gelu": ACTIVATIONS["gelu_pytorch_tanh"]}


def gemma(view: ConfigView) -> ModelSpec:
    """Llama's layer; ``attention_bias`` is for q, k, v and o."""
    sizes, bias = read_sizes(view), view.flag("attention_bias")
    mixer = attention(sizes, qkv_bias=bias, out_bias=bias)
    feed_forward = MlpSpec(sizes.mlp, view.choice("hidden_act", OLD_ACTIVATIONS))
    layers = [pre_norm(view, mixer, feed_forward, gemma_rms)] * sizes.layers
    return _finish(view, sizes, layers, (read_rope(view, sizes.head_dim),))


def gemma2(view: ConfigView) -> ModelSpec:
    """Every second layer is windowed; attention scores and logits have a softcap."""
    sizes = read_sizes(view)
    kinds = layer_types(view, sizes.layers, lambda layer: layer % 2 == 1)
    softcap = view.optional_number("attn_logit_softcapping")
    layers = [
        _layer(view, sizes, window, rope=0, softcap=softcap, qk_norm=False)
        for window in windows(view, sizes.layers, view.optional_integer("sliding_window"), kinds)
    ]
    ropes = (read_rope(view, sizes.head_dim),)
    return _finish(view, sizes, layers, ropes)


def gemma3_text(view: ConfigView, names: ModuleNames = LLAMA_NAMES) -> ModelSpec:
    """Five windowed layers per full layer, each type with its rope; norms of q and k per head; no softcap on scores."""
    sizes = read_sizes(view)
    pattern = view.optional_integer("sliding_window_pattern") or 6
    view.skip("_sliding_window_pattern")  # a copy, which transformers writes but does not read
    kinds = layer_types(view, sizes.layers, lambda layer: (layer + 1) % pattern == 0)
    thetas = {"sliding_attention": ("rope_local_base_freq", 1e4), "full_attention": ("rope_theta", 1e6)}
    tables = read_rope_by_layer_type(view, sizes.head_dim, theta_keys=thetas)
    order = ("sliding_attention", "full_attention")
    # transformers reads it but does not pass it to its attention, so it has no effect.
    view.optional_number("attn_logit_softcapping")
    per_layer = windows(view, sizes.layers, view.optional_integer("sliding_window"), kinds)
    layers = [
        _layer(view, sizes, window, rope=order.index(kind), softcap=None, qk_norm=True)
        for kind, window in zip(kinds, per_layer, strict=True)
    ]
    return _finish(view, sizes, layers, tuple(tables[kind] for kind in order), names)


def gemma3(view: ConfigView) -> ModelSpec:
    """The text part of the multimodal class: text_config with the class defaults of gemma3_text."""
    view.skip("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index")
    view.skip("image_token_index", "image_token_id", "boi_token_id", "eoi_token_id")
    view.must_be("is_encoder_decoder", (False,), "only decoder-only models are supported.")
    return gemma3_text(view.nested("text_config", "gemma3_text"), MULTIMODAL_NAMES)


def _layer(
    view: ConfigView, sizes: Sizes, window: int | None, *, rope: int, softcap: float | None, qk_norm: bool
) -> LayerSpec:
    bias = view.flag("attention_bias")
    return LayerSpec(
        mixer=attention(
            sizes,
            window,
            scale=view.number("query_pre_attn_scalar") ** -0.5,
            rope=rope,
            q_norm=gemma_rms(view, "self_attn.q_norm") if qk_norm else None,
            k_norm=gemma_rms(view, "self_attn.k_norm") if qk_norm else None,
            softcap=softcap,
            qkv_bias=bias,
            out_bias=bias,
        ),
        mlp=mlp(view, sizes, key="hidden_activation"),
        before_mixer=gemma_rms(view, "input_layernorm"),
        after_mixer=gemma_rms(view, "post_attention_layernorm"),
        before_mlp=gemma_rms(view, "pre_feedforward_layernorm"),
        after_mlp=gemma_rms(view, "post_feedforward_layernorm"),
    )


def _finish(
    view: ConfigView,
    sizes: Sizes,
    layers: list[LayerSpec],
    ropes: tuple[RopeSpec, ...],
    names: ModuleNames = LLAMA_NAMES,
) -> ModelSpec:
    view.must_be("use_bidirectional_attention", (None, False), "attention in both directions is not supported.")
    return finish_spec(
        view,
        layers,
        ropes,
        gemma_rms(view, "norm"),
        embed_scale=sizes.hidden**0.5,
        embed_scaled="module",
        logit_softcap=view.optional_number("final_logit_softcapping"),
        names=names,
    )
