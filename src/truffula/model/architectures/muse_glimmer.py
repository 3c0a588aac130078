"""Muse Glimmer (text): normed embeddings, gated attention, and layers with a window and a rotation between full ones
without."""

from __future__ import annotations

from dataclasses import replace

from truffula.model.architectures.pieces import (
    attention,
    finish_spec,
    gemma_rms,
    layer_types,
    mlp,
    read_sizes,
    rms_last,
    windows,
)
from truffula.model.config_view import ConfigView
from truffula.model.rope import read_rope
from truffula.model.rows import NormSpec
from truffula.model.spec import LayerSpec, ModelSpec, ModuleNames, body_prefixes

_PARTS = ("vision_tower.", "vision_adapter.", "vision_projection.")
# q is multiplied by a factor within the module of attention, here within the scale of scores: they cannot be compared.
_NAMES = ModuleNames(
    body="model.language_model.",
    prefixes=body_prefixes("model.language_model."),
    skip=tuple(f"{root}{part}" for part in _PARTS for root in ("", "model.")),
    attention=None,
)


def muse_glimmer(view: ConfigView) -> ModelSpec:
    """The text part of the multimodal class."""
    view.skip("vision_config", "image_token_id", "video_token_id", "out_hidden_size", "projector_hidden_size")
    view.skip("projector_hidden_act")
    view.must_be("is_encoder_decoder", (False,), "only decoder-only models are supported.")
    return _text(view.nested("text_config", "muse_glimmer_text"))


def _text(view: ConfigView) -> ModelSpec:
    sizes, bias = read_sizes(view), view.flag("attention_bias")
    kinds = layer_types(view, sizes.layers, lambda layer: (sizes.layers - 1 - layer) % 4 == 0)
    norm = NormSpec("self_attn.qk_norm", view.number("rms_norm_eps"), cast="last", weight=False)
    rotated, after_eps = _rotated(view, sizes.layers), view.number("post_norm_eps")
    layers = []
    for index, window in enumerate(windows(view, sizes.layers, view.optional_integer("sliding_window"), kinds)):
        mixer = attention(
            sizes,
            window,
            scale=sizes.head_dim**-0.5 * view.number("qk_scale_factor"),
            rope=0 if rotated[index] else None,
            q_norm=norm,
            k_norm=norm,
            qkv_bias=bias,
            out_bias=bias,
            gate="self_attn.gate_proj",
        )
        layers.append(
            LayerSpec(
                mixer=mixer,
                mlp=mlp(view, sizes, key="hidden_activation"),
                before_mixer=gemma_rms(view, "input_layernorm"),
                after_mixer=replace(gemma_rms(view, "post_attention_layernorm"), eps=after_eps),
                before_mlp=gemma_rms(view, "pre_feedforward_layernorm"),
                after_mlp=replace(gemma_rms(view, "post_feedforward_layernorm"), eps=after_eps),
            )
        )
    return finish_spec(
        view,
        layers,
        (read_rope(view, sizes.head_dim),),
        rms_last(view, "norm"),
        embed_norm=replace(norm, module="embed_tokens.embed_norm"),
        embed_adapters=False,
        logit_scale=view.number("output_multiplier"),
        logit_softcap=view.number("final_logit_softcapping"),
        names=_NAMES,
    )


def _rotated(view: ConfigView, layers: int) -> list[bool]:
    """Which layers have a rotary embedding: those with a base that is not 0. The base itself is that of all layers."""
    bases = view.numbers("layer_rope_theta", layers)
    if bases is None:
        return [(layers - 1 - index) % 4 != 0 for index in range(layers)]
    rope = view.mapping("rope_parameters") or view.mapping("rope_scaling") or {}
    common = rope.get("rope_theta", view.raw("rope_theta") or view.defaults.rope_theta)
    if set(bases) - {0.0, common}:
        why = f"expected 0 or {common}, the base of rope_parameters: transformers computes one table."
        raise view.error("layer_rope_theta", why)
    return [base != 0 for base in bases]
