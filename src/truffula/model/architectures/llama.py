"""Llama 1 to 3, and the many models with its model type (Vicuna, Yi, SOLAR-10.7B, CodeLlama, SmolLM2)."""

from __future__ import annotations

from truffula.model.architectures.pieces import llama_model, read_sizes
from truffula.model.config_view import ConfigView
from truffula.model.spec import ModelSpec


def llama(view: ConfigView) -> ModelSpec:
    """``attention_bias`` is for q, k, v and o, ``mlp_bias`` for the three linears of the MLP."""
    sizes, bias, mlp_bias = read_sizes(view), view.flag("attention_bias"), view.flag("mlp_bias")
    return llama_model(view, sizes, [None] * sizes.layers, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)
