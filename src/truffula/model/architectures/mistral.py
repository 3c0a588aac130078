"""Mistral and Ministral, whose ``layer_types`` mixes windowed and full layers."""

from __future__ import annotations

from truffula.model.architectures.pieces import llama_model, read_sizes, windows
from truffula.model.config_view import ConfigView
from truffula.model.spec import ModelSpec


def mistral(view: ConfigView) -> ModelSpec:
    """Llama without biases and with a window, if not null, on every layer or on those of ``layer_types``."""
    sizes = read_sizes(view)
    # transformers reads a mistral config with layer_types as a ministral one; otherwise the two are the same.
    kinds = view.strings("layer_types", sizes.layers)
    return llama_model(view, sizes, windows(view, sizes.layers, view.optional_integer("sliding_window"), kinds))
