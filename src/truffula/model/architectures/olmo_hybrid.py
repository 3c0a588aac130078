"""OLMo Hybrid: OLMo 3's attention in some layers, linear attention by the gated delta rule in the others."""

from __future__ import annotations

from dataclasses import replace

from truffula.model.architectures.olmo import olmo2_layer
from truffula.model.architectures.pieces import ACTIVATIONS, Sizes, finish_spec, mlp, read_sizes, rms_last
from truffula.model.architectures.qwen_hybrid import FULL, LINEAR, layer_kinds
from truffula.model.config_view import ConfigView
from truffula.model.parts.gated_delta import GatedDeltaSpec
from truffula.model.rope import has_rope, read_rope
from truffula.model.rows import NormSpec
from truffula.model.spec import LayerSpec, ModelSpec


def olmo_hybrid(view: ConfigView) -> ModelSpec:
    """By default every fourth layer has attention. Without ``rope_theta`` in ``rope_parameters`` nothing is rotated."""
    sizes = read_sizes(view)
    kinds = layer_kinds(view, sizes.layers, lambda index: index % 4 == 3 or (index == sizes.layers - 1 < 3))
    ropes = (read_rope(view, sizes.head_dim),) if has_rope(view) else ()
    full = olmo2_layer(view, sizes, None, 0 if ropes else None)
    # In checkpoints the norm after attention has the name of the linear layers' norm before the MLP, or its own.
    after = replace(rms_last(view, "feedforward_layer_norm"), alias="post_attention_layernorm")
    layers = {FULL: replace(full, after_mixer=after), LINEAR: _linear_layer(view, sizes)}
    view.skip("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor")
    return finish_spec(view, [layers[kind] for kind in kinds], ropes, rms_last(view, "norm"))


def _linear_layer(view: ConfigView, sizes: Sizes) -> LayerSpec:
    """Norms before the parts. Keys default to three quarters of the hidden size, values to twice the keys."""
    key_heads = view.optional_integer("linear_num_key_heads") or sizes.heads
    heads = view.optional_integer("linear_num_value_heads") or sizes.heads
    if heads % key_heads:
        raise view.error("linear_num_key_heads", f"it does not divide the {heads} value heads.", key_heads)
    dim_k = view.optional_integer("linear_key_head_dim") or int(0.75 * sizes.hidden / key_heads)
    dim_v = view.optional_integer("linear_value_head_dim") or 2 * dim_k
    widths = {"q": key_heads * dim_k, "k": key_heads * dim_k, "v": heads * dim_v}
    more = {"g": heads * dim_v, "b": heads, "a": heads}
    mixer = GatedDeltaSpec(
        heads=heads, key_heads=key_heads, dim_k=dim_k, dim_v=dim_v,
        taps=view.integer("linear_conv_kernel_dim", minimum=2), activation=view.choice("hidden_act", ACTIVATIONS),
        inputs=tuple((f"linear_attn.{name}_proj", rows, None) for name, rows in (widths | more).items()),
        convs=tuple((f"linear_attn.{name}_conv1d", columns) for name, columns in widths.items()),
        norm=NormSpec("linear_attn.o_norm", 1e-5), out="linear_attn.o_proj",
        beta_scale=2.0 if view.flag("linear_allow_neg_eigval") else 1.0,
    )  # fmt: skip
    before = replace(rms_last(view, "attention_layer_norm"), alias="input_layernorm")
    before_mlp = replace(rms_last(view, "feedforward_layer_norm"), alias="post_attention_layernorm")
    return LayerSpec(mixer, mlp(view, sizes), before, before_mlp)
