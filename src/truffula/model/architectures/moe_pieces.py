"""Common parts of architectures with experts: counts under several names, and which layers have experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from truffula.model.architectures.pieces import Sizes, finish_spec, llama_layer, rms
from truffula.model.config_view import ConfigView
from truffula.model.parts.moe import MoeSpec
from truffula.model.rope import read_rope
from truffula.model.spec import ModelSpec

MOST_EXPERTS = 4096
"""Far above the number of any model; bounds the lists that an invalid file can create."""


def read_experts(view: ConfigView, *keys: str) -> tuple[int, int]:
    """The number of experts, written under one of ``keys`` (the first is the class's own), and how many a row uses."""
    written = [key for key in keys if view.written(key)] or [keys[0]]
    experts = view.integer(written[0])
    for key in written[1:]:
        if view.integer(key) != experts:
            raise view.error(key, f"{written[0]} is {experts}; the two are the same number.")
    if experts > MOST_EXPERTS:
        raise view.error(written[0], f"at most {MOST_EXPERTS} experts are served.", experts)
    return experts, read_top_k(view, "num_experts_per_tok", experts)


def read_top_k(view: ConfigView, key: str, experts: int) -> int:
    """How many of ``experts`` a row uses."""
    top_k = view.integer(key)
    if top_k > experts:
        raise view.error(key, f"the model has {experts} experts.", top_k)
    return top_k


def dense_first(view: ConfigView, key: str, layers: int) -> list[bool]:
    """Which layers have experts: all but the first ones, whose number is under ``key``."""
    first = view.integer(key, minimum=0)
    return [index >= first for index in range(layers)]


def sparse_layers(view: ConfigView, layers: int) -> list[bool]:
    """Which layers have experts, by ``decoder_sparse_step`` and ``mlp_only_layers`` (Qwen)."""
    step, dense = view.integer("decoder_sparse_step"), view.raw("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(index) is not int for index in dense):
        raise view.error("mlp_only_layers", "expected a list of layer numbers.", dense)
    return [index not in dense and (index + 1) % step == 0 for index in range(layers)]


def moe_model(
    view: ConfigView,
    sizes: Sizes,
    windows: Sequence[int | None],
    moe: MoeSpec,
    sparse: Sequence[bool] | None = None,
    **options: Any,
) -> ModelSpec:
    """A model of Llama's layers, one for each window, with ``moe`` in those that are ``sparse`` (None: all).

    ``options`` as of ``llama_layer``.
    """
    dense = [llama_layer(view, sizes, window, **options) for window in windows]
    layers = [
        replace(layer, mlp=moe) if has_experts else layer
        for layer, has_experts in zip(dense, sparse or [True] * sizes.layers, strict=True)
    ]
    return finish_spec(view, layers, (read_rope(view, sizes.head_dim),), rms(view, "norm"))
