"""Qwen3-Next and Qwen3.5: layers of linear attention by the gated delta rule, and some of gated attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from truffula.kernels.program import RowOrder
from truffula.model.architectures.moe_pieces import read_experts, sparse_layers
from truffula.model.architectures.pieces import ACTIVATIONS, Sizes, finish_spec, gemma_rms, read_sizes
from truffula.model.config_view import ConfigView
from truffula.model.parts.attention import AttentionSpec
from truffula.model.parts.gated_delta import GatedDeltaSpec, Inputs
from truffula.model.parts.mlp import MlpSpec
from truffula.model.parts.moe import MoeSpec, RouterSpec, SharedSpec
from truffula.model.rope import read_rope
from truffula.model.rows import NormSpec
from truffula.model.spec import LayerSpec, ModelSpec, ModuleNames, Part

LINEAR, FULL = "linear_attention", "full_attention"
# They mix the three axes of an image's positions; those of text are equal.
_OF_IMAGES = ("mrope_section", "mrope_interleaved")
NAMES = ModuleNames(skip=("visual.", "model.visual."), unused=("mtp.",))


@dataclass(frozen=True)
class DeltaSizes:
    """Heads and widths of the linear attention."""

    heads: int
    key_heads: int
    dim_k: int
    dim_v: int
    taps: int


def read_delta_sizes(view: ConfigView) -> DeltaSizes:
    sizes = DeltaSizes(
        heads=view.integer("linear_num_value_heads"),
        key_heads=view.integer("linear_num_key_heads"),
        dim_k=view.integer("linear_key_head_dim"),
        dim_v=view.integer("linear_value_head_dim"),
        taps=view.integer("linear_conv_kernel_dim", minimum=2),
    )
    if sizes.heads % sizes.key_heads:
        why = f"it does not divide the {sizes.heads} value heads."
        raise view.error("linear_num_key_heads", why, sizes.key_heads)
    return sizes


def qwen3_5_text(view: ConfigView) -> ModelSpec:
    """The projections are stored apart: q, k and v; the gate; beta; the decay."""
    sizes, mlp = read_sizes(view), _mlp(view)
    return _model(view, sizes, *_separate(view), [mlp] * sizes.layers)


def qwen3_5_moe_text(view: ConfigView) -> ModelSpec:
    """The same with experts in every layer, whose weights add up to one."""
    sizes = read_sizes(view, "moe_intermediate_size")
    return _model(view, sizes, *_separate(view), [_experts(view, norm=True)] * sizes.layers)


def qwen3_5(view: ConfigView) -> ModelSpec:
    """The text part of the multimodal class, in which the models are published."""
    return qwen3_5_text(_text_config(view))


def qwen3_5_moe(view: ConfigView) -> ModelSpec:
    """The same with experts."""
    return qwen3_5_moe_text(_text_config(view))


def qwen3_next(view: ConfigView) -> ModelSpec:
    """The projections are stored by key head: q, k, v and the gate together, beta and the decay together."""
    sizes, delta = read_sizes(view), read_delta_sizes(view)
    share = delta.heads // delta.key_heads
    of_key_head = {"qkvz": (delta.dim_k, delta.dim_k, share * delta.dim_v, share * delta.dim_v), "ba": (share, share)}
    orders = {name: RowOrder(delta.key_heads, widths) for name, widths in of_key_head.items()}
    inputs = tuple(
        (f"linear_attn.in_proj_{name}", order.groups * sum(order.widths), order) for name, order in orders.items()
    )
    mlp, sparse, norm = _mlp(view), sparse_layers(view, sizes.layers), view.flag("norm_topk_prob")
    if view.integer("num_experts", minimum=0) == 0:
        view.skip("num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
        return _model(view, sizes, delta, inputs, [mlp] * sizes.layers)
    experts = _experts(view, norm=norm)
    return _model(view, sizes, delta, inputs, [experts if has_experts else mlp for has_experts in sparse])


def layer_kinds(view: ConfigView, layers: int, full: Callable[[int], bool]) -> tuple[str, ...]:
    """``layer_types``; where it is missing, the layers for which ``full`` holds have attention, the others linear."""
    kinds = view.strings("layer_types", layers)
    kinds = kinds or tuple(FULL if full(index) else LINEAR for index in range(layers))
    for kind in kinds:
        if kind not in (LINEAR, FULL):
            raise view.error("layer_types", f"{kind} is not supported; {LINEAR} and {FULL} are.", kind)
    return kinds


def _text_config(view: ConfigView) -> ConfigView:
    view.skip("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    view.must_be("is_encoder_decoder", (False,), "only decoder-only models are supported.")
    return view.nested("text_config", f"{view.model_type}_text")


def _separate(view: ConfigView) -> tuple[DeltaSizes, Inputs]:
    """Sizes and projections of Qwen3.5's linear attention. Checks keys of its files that transformers does not read."""
    view.skip("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    view.must_be("mamba_ssm_dtype", (None, "float32"), "states are kept in float32.")
    view.must_be("attn_output_gate", (None, True), "attention without a gate is not supported.")
    delta = read_delta_sizes(view)
    qkv = 2 * delta.key_heads * delta.dim_k + delta.heads * delta.dim_v
    rows = {"qkv": qkv, "z": delta.heads * delta.dim_v, "b": delta.heads, "a": delta.heads}
    return delta, tuple((f"linear_attn.in_proj_{name}", count, None) for name, count in rows.items())


def _mlp(view: ConfigView) -> MlpSpec:
    return MlpSpec(view.integer("intermediate_size"), view.choice("hidden_act", ACTIVATIONS))


def _experts(view: ConfigView, *, norm: bool) -> MoeSpec:
    """Experts and a gated shared one. ``norm``: the weights of a row's experts add up to one."""
    experts, top_k = read_experts(view, "num_experts")
    return MoeSpec(
        RouterSpec(experts, top_k, norm=1.0 if norm else None),
        view.integer("moe_intermediate_size"),
        view.choice("hidden_act", ACTIVATIONS),
        SharedSpec(view.integer("shared_expert_intermediate_size"), gated=True),
    )


def _model(view: ConfigView, sizes: Sizes, delta: DeltaSizes, inputs: Inputs, mlps: Sequence[Part]) -> ModelSpec:
    """Layers of the kinds in ``layer_types``; without it each ``full_attention_interval``-th has attention."""
    bias = view.flag("attention_bias")
    attention = AttentionSpec(
        heads=sizes.heads, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim, scale=sizes.head_dim**-0.5, rope=0,
        q_norm=gemma_rms(view, "self_attn.q_norm"), k_norm=gemma_rms(view, "self_attn.k_norm"), gated=True,
        qkv_bias=bias, out_bias=bias,
    )  # fmt: skip
    linear = GatedDeltaSpec(
        heads=delta.heads, key_heads=delta.key_heads, dim_k=delta.dim_k, dim_v=delta.dim_v, taps=delta.taps,
        activation=view.choice("hidden_act", ACTIVATIONS), inputs=inputs,
        norm=NormSpec("linear_attn.norm", view.number("rms_norm_eps")),
    )  # fmt: skip
    interval = view.optional_integer("full_attention_interval") or 4
    kinds = layer_kinds(view, sizes.layers, lambda index: (index + 1) % interval == 0)
    layers = [
        LayerSpec(
            mixer=linear if kind == LINEAR else attention,
            mlp=mlp,
            before_mixer=gemma_rms(view, "input_layernorm"),
            before_mlp=gemma_rms(view, "post_attention_layernorm"),
        )
        for kind, mlp in zip(kinds, mlps, strict=True)
    ]
    rope = read_rope(view, sizes.head_dim, partial=True, more=_OF_IMAGES)
    return finish_spec(view, layers, (rope,), gemma_rms(view, "norm"), names=NAMES)
