"""Dequantises the formats of GGUF whose blocks name vectors of a codebook: IQ1, IQ2, IQ3.

``codebooks.npz`` holds the codebooks of ggml (of the package ``gguf``, ``quants.py``), int8 ``[vectors, 8 or 4]``.
Each function fills ``[N, 256]`` float32 from ``[N, bytes]`` uint8 blocks, as in ``quants``.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

Blocks = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float32]
_DELTA = np.float32(0.125)


@cache
def _codebook(name: str) -> Values:
    with resources.files("truffula.weights.gguf").joinpath("codebooks.npz").open("rb") as file, np.load(file) as books:
        return np.asarray(books[name], np.float32)


@cache
def _signs() -> Values:
    """``[256, 8]``: 1 or -1 for each bit of a byte."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.float32(1) - np.float32(2) * bits.astype(np.float32)


@cache
def _even_signs() -> Values:
    """``[128, 8]``: the signs that 7 bits mean; the eighth makes the number of minus signs even."""
    index = np.arange(128)
    odd = np.unpackbits(index.astype(np.uint8)[:, None], axis=1).sum(1, dtype=np.int64) & 1
    signs: Values = _signs()[index | (odd << 7)]
    return signs


def _as(blocks: Blocks, start: int, stop: int, dtype: Any) -> npt.NDArray[Any]:
    return np.ascontiguousarray(blocks[:, start:stop]).view(dtype)


def _half(blocks: Blocks) -> Values:
    """``[N, 1]`` from the float16 at the start."""
    return np.asarray(_as(blocks, 0, 2, np.float16), np.float32)


def _nibbles(packed: npt.NDArray[Any]) -> Values:
    """``[N, m]`` bytes to ``[N, 2 m]``: the low and the high half of each, as float32."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1).astype(np.float32)


def _signed(out: Values, scales: Values, vectors: Values, signs: Values) -> None:
    """Write ``scale * vector * sign``; ``scales [N, g]``, vectors and signs with ``256 / g`` values for each."""
    count, groups = scales.shape
    shape = count, groups, 256 // groups
    out[...] = (scales[..., None] * vectors.reshape(shape) * signs.reshape(shape)).reshape(out.shape)


def iq2_xxs(blocks: Blocks, out: Values) -> None:
    words = _as(blocks, 2, 66, np.uint32).reshape(len(blocks), 8, 2)
    scales = _half(blocks) * (np.float32(0.5) + (words[..., 1] >> 28).astype(np.float32)) * np.float32(0.25)
    index = np.ascontiguousarray(words[..., 0]).view(np.uint8)
    signs = (words[..., 1, None] >> np.array([0, 7, 14, 21], np.uint32)) & np.uint32(127)
    _signed(out, scales, _codebook("IQ2_XXS")[index], _even_signs()[signs])


def iq2_xs(blocks: Blocks, out: Values) -> None:
    words = _as(blocks, 2, 66, np.uint16)
    scales = _half(blocks) * (np.float32(0.5) + _nibbles(blocks[:, 66:])) * np.float32(0.25)
    _signed(out, scales, _codebook("IQ2_XS")[words & 511], _even_signs()[words >> 9])


def iq2_s(blocks: Blocks, out: Values) -> None:
    high = (blocks[:, 66:74, None] >> np.array([0, 2, 4, 6], np.uint8)) & np.uint8(3)
    index = blocks[:, 2:34] | (high.reshape(len(blocks), 32).astype(np.uint16) << 8)
    scales = _half(blocks) * (np.float32(0.5) + _nibbles(blocks[:, 74:])) * np.float32(0.25)
    _signed(out, scales, _codebook("IQ2_S")[index], _signs()[blocks[:, 34:66]])


def iq3_xxs(blocks: Blocks, out: Values) -> None:
    words = _as(blocks, 66, 98, np.uint32)
    scales = _half(blocks) * (np.float32(0.5) + (words >> 28).astype(np.float32)) * np.float32(0.5)
    signs = (words[..., None] >> np.array([0, 7, 14, 21], np.uint32)) & np.uint32(127)
    _signed(out, scales, _codebook("IQ3_XXS")[blocks[:, 2:66]], _even_signs()[signs])


def iq3_s(blocks: Blocks, out: Values) -> None:
    high = np.unpackbits(blocks[:, 66:74], axis=1, bitorder="little").astype(np.uint16)
    scales = _half(blocks) * (np.float32(1) + np.float32(2) * _nibbles(blocks[:, 106:]))
    index = blocks[:, 2:66] | (high << 8)
    _signed(out, scales, _codebook("IQ3_S")[index], _signs()[blocks[:, 74:106]])


def iq1_s(blocks: Blocks, out: Values) -> None:
    high = _as(blocks, 34, 50, np.uint16)
    scales = _half(blocks) * (2 * ((high >> 12) & 7) + 1).astype(np.float32)
    delta = np.where((high & 0x8000) == 0, _DELTA, -_DELTA)[:, :, None, None]
    more = (high[..., None] >> np.array([0, 3, 6, 9], np.uint16)) & 7
    index = blocks[:, 2:34] | (more.reshape(len(blocks), 32) << 8)
    vectors = _codebook("IQ1_S")[index].reshape(-1, 8, 4, 8) + delta
    out[...] = (scales[:, :, None, None] * vectors).reshape(out.shape)


def iq1_m(blocks: Blocks, out: Values) -> None:
    packed = _as(blocks, 48, 56, np.uint16)
    quarters = (packed & 0xF000) >> np.array([12, 8, 4, 0], np.uint16)  # the scale lies in the highest bits of four
    whole = np.bitwise_or.reduce(quarters, axis=1).astype(np.uint16).view(np.float16).astype(np.float32)[:, None]
    small = ((packed[..., None] >> np.array([0, 3, 6, 9], np.uint16)) & 7).reshape(len(blocks), 16)
    scales = whole * (2 * small + 1).astype(np.float32)
    high = (blocks[:, 32:48, None] >> np.array([0, 4], np.uint8)).reshape(len(blocks), 32)
    index = blocks[:, :32] | ((high & 7).astype(np.uint16) << 8)
    delta = np.where((high & 8) == 0, _DELTA, -_DELTA)[..., None]
    vectors = (_codebook("IQ1_S")[index] + delta).reshape(-1, 16, 2, 8)
    out[...] = (scales[:, :, None, None] * vectors).reshape(out.shape)
