"""How tensors of a Hugging Face checkpoint are made of those of a GGUF file: llama.cpp's converter's changes, reversed.

Functions of a ``Change`` take the config.json that the metadata describes, in which the sizes are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from truffula.weights.checkpoint import Array

Config = Mapping[str, Any]
Shape = tuple[int, ...]
Order = npt.NDArray[np.intp]


def _first(config: Config, *shapes: Shape) -> Shape:
    return shapes[0]


@dataclass(frozen=True)
class Change:
    """What makes a tensor of the stored ones, which are one, or several where the converter divided it.

    ``shape`` is its shape, from theirs. ``values`` computes it from their dequantised values; ``kept``: in their dtype,
    where they are not quantised. ``rows(config, n)`` is then the order of its n rows, ``columns`` that of its columns:
    where each is in the stored ones, of several one below another. An order has an entry for each row, or for each of
    equal runs of rows. ``joins``: a single stored tensor is not changed.
    """

    shape: Callable[..., Shape] = _first
    rows: Callable[[Config, int], Order] | None = None
    columns: Callable[[Config, int], Order] | None = None
    values: Callable[..., Array] | None = None
    kept: bool = False
    joins: bool = False


PLAIN = Change()


def grouped(outer: int, inner: int) -> Order:
    """The order of ``outer`` groups of ``inner`` entries, which are stored as ``inner`` groups of ``outer``."""
    return np.arange(outer * inner).reshape(inner, outer).T.reshape(-1)


def interleaved(heads: str) -> Change:
    """The rows of each head are stored as pairs, and become two halves. ``heads`` is the key of their number."""

    def rows(config: Config, n: int) -> Order:
        pairs = grouped(2, max(n // config[heads] // 2, 1))
        return (np.arange(config[heads])[:, None] * len(pairs) + pairs).reshape(-1)

    return Change(rows=rows)


def _less_one(config: Config, weight: Array) -> Array:
    return weight.astype(np.float32) - np.float32(1)


LESS_ONE = Change(values=_less_one)
"""Norms that are stored as 1 + weight."""


def less_one(*blocks: Mapping[str, str]) -> dict[str, Change]:
    """``LESS_ONE`` for the final norm and all norms of ``blocks``."""
    norms = {name for block in blocks for name in (*block.values(), "model.norm") if name.endswith("norm")}
    return {f"{name}.weight": LESS_ONE for name in norms}


def _interleaved_qkv(config: Config, n: int) -> Order:
    """q, k and v as one: the rows of q and k are interleaved."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = n // (heads + 2 * kv_heads)
    pairs = np.arange(heads + kv_heads)[:, None] * width + grouped(2, max(width // 2, 1))
    return np.concatenate([pairs.reshape(-1), np.arange((heads + kv_heads) * width, n)])


INTERLEAVED = {
    "self_attn.qkv_proj": Change(rows=_interleaved_qkv),
    "self_attn.q_proj": interleaved("num_attention_heads"),
    "self_attn.k_proj": interleaved("num_key_value_heads"),
}
ONE_ROW = Change(shape=lambda config, shape: (1, math.prod(shape)))
"""A matrix of one row, which is stored as a vector."""
CONV = Change(shape=lambda config, shape: (math.prod(shape[:-1]), 1, shape[-1]) if len(shape) > 1 else shape)
"""A depthwise convolution, which is stored as a matrix; its bias is not changed."""


def joined(rows: Callable[[Config, int], Order] | None = None) -> Change:
    """Matrices that are stored apart, one below another, or in this order of rows."""
    return Change(lambda config, *shapes: (sum(shape[0] for shape in shapes), *shapes[0][1:]), rows, joins=True)


def flat(values: Callable[..., Array] | None = None) -> Change:
    """A vector that is stored as a matrix."""
    return Change(lambda config, shape: (math.prod(shape),), values=values)


def log_of_minus(config: Config, rate: Array) -> Array:
    """A_log, which is stored as -exp(A_log): the checkpoint's, but for the rounding of that to float32."""
    return np.log(-rate.astype(np.float64)).astype(np.float32)


STACKED = joined()
"""A matrix of which each stored one has some of the rows."""


def _absorbed_shape(config: Config, key: Shape, value: Shape) -> Shape:
    (heads, rank, nope), (others, width, same) = key, value
    if (heads, rank) != (others, same):
        raise ValueError
    return heads * (nope + width), rank


def _absorbed(config: Config, key: Array, value: Array) -> Array:
    return np.concatenate([key.swapaxes(1, 2), value], axis=1)


ABSORBED = Change(shape=_absorbed_shape, values=_absorbed, kept=True)
"""``kv_b_proj`` of latent attention. Of each head, the rows of its keys are stored transposed, ``[H, rank, nope]``, and
apart from those of its values, ``[H, v, rank]``: they are read as values, as blocks cannot be transposed."""
