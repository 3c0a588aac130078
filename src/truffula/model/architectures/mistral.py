"""Mistral and Ministral, whose ``layer_types`` mixes windowed and full layers."""

from __future__ import annotations

from truffula.model.architectures.pieces import finish_spec, llama_layer, read_sizes, rms, windows
from truffula.model.config_view import ConfigView
from truffula.model.rope import read_rope
from truffula.model.spec import ModelSpec


def mistral(view: ConfigView) -> ModelSpec:
    """Llama without biases and with a window, if not null, on every layer or on those of ``layer_types``."""
    sizes = read_sizes(view)
    # transformers reads a mistral config with layer_types as a ministral one; otherwise the two are the same.
    kinds = view.strings("layer_types", sizes.layers)
    per_layer = windows(view, sizes.layers, view.optional_integer("sliding_window"), kinds)
    layers = [llama_layer(view, sizes, window) for window in per_layer]
    return finish_spec(view, layers, (read_rope(view, sizes.head_dim),), rms(view, "norm"))
