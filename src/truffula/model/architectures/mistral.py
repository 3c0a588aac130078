"""Mistral, and Ministral where ``layer_types`` mixes windowed and full layers."""

from __future__ import annotations

from truffula.model.architectures.pieces import ACTIVATIONS, finish_spec, read_sizes, rms, windows
from truffula.model.config_view import ConfigView
from truffula.model.rope import read_rope
from truffula.model.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec


def mistral(view: ConfigView) -> ModelSpec:
    """Llama without biases whose window, when not null, is on every layer (or where ``layer_types`` says)."""
    sizes, activation = read_sizes(view), view.choice("hidden_act", ACTIVATIONS)
    # transformers reads a mistral config that has layer_types as a ministral one; the two agree otherwise.
    kinds = view.strings("layer_types", sizes.layers)
    per_layer = windows(view, sizes.layers, view.optional_integer("sliding_window"), kinds)

    def layer(window: int | None) -> LayerSpec:
        return LayerSpec(
            attention=AttentionSpec(
                heads=sizes.heads,
                kv_heads=sizes.kv_heads,
                head_dim=sizes.head_dim,
                scale=sizes.head_dim**-0.5,
                rope=0,
                window=window,
            ),
            mlp=MlpSpec(sizes.mlp, activation),
            before_attention=rms(view, "input_layernorm"),
            before_mlp=rms(view, "post_attention_layernorm"),
        )

    layers = [layer(window) for window in per_layer]
    return finish_spec(view, layers, (read_rope(view, sizes.head_dim),), rms(view, "norm"))
