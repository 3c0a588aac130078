"""Llama 1 to 3, and the many models published under its name (Vicuna, Yi, SOLAR-10.7B, CodeLlama, SmolLM2)."""

from __future__ import annotations

from truffula.model.architectures.pieces import ACTIVATIONS, finish_spec, read_sizes, rms
from truffula.model.config_view import ConfigView
from truffula.model.rope import read_rope
from truffula.model.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec


def llama(view: ConfigView) -> ModelSpec:
    """Pre-norm, gated MLP, one rope; ``attention_bias`` covers q, k, v and o, ``mlp_bias`` all three of the MLP."""
    sizes, bias, mlp_bias = read_sizes(view), view.flag("attention_bias"), view.flag("mlp_bias")
    attention = AttentionSpec(
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5,
        rope=0,
        qkv_bias=bias,
        out_bias=bias,
    )
    activation = view.choice("hidden_act", ACTIVATIONS)
    layer = LayerSpec(
        attention=attention,
        mlp=MlpSpec(sizes.mlp, activation, in_bias=mlp_bias, out_bias=mlp_bias),
        before_attention=rms(view, "input_layernorm"),
        before_mlp=rms(view, "post_attention_layernorm"),
    )
    return finish_spec(view, (layer,) * sizes.layers, (read_rope(view, sizes.head_dim),), rms(view, "norm"))
