"""Dequantises the block formats of GGUF, vectorised, with the same bits as ggml's reference implementation.

A row of a tensor is a sequence of blocks; a block holds ``size`` values in ``nbytes`` bytes. Every function takes ``[N,
nbytes]`` uint8 blocks and fills ``[N, size]`` float32, in the order of operations (and so of roundings) of the format's
definition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from truffula.weights.checkpoint import Array
from truffula.weights.gguf import codebooks
from truffula.weights.gguf.header import SIZES

Blocks = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float32]
# The values of a 4-bit code: of IQ4_NL and IQ4_XS, and twice those of floats of 4 bits.
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
# Values per chunk: its blocks, values and temporaries fit into the L2 cache.
_CHUNK_VALUES = 1 << 16


@dataclass(frozen=True)
class BlockFormat:
    """One storage type: ``size`` values take ``nbytes`` bytes. ``dtype`` of unquantised types, ``unpack`` of quantised
    ones. ``scales``: the number of float16 at the start of a block of 32 that backends may take as it is; else 0.
    ``zeros``: the first bytes of a block of zeros, whose others are 0.
    """

    name: str
    size: int
    nbytes: int
    dtype: np.dtype[Any] | None = None
    unpack: Callable[[Blocks, Values], None] | None = None
    scales: int = 0
    zeros: bytes = b""


def dequantize(format: BlockFormat, data: Blocks, shape: tuple[int, ...]) -> Array:
    """The values of ``data`` (flat uint8) as an array of ``shape``: a view for unquantised types, else new float32."""
    if format.dtype is not None:
        view = data.view(format.dtype).reshape(shape)
        return view if view.flags.aligned else view.copy()
    assert format.unpack is not None
    blocks = data.reshape(-1, format.nbytes)
    values = np.empty((blocks.shape[0], format.size), np.float32)
    step = max(1, _CHUNK_VALUES // format.size)
    # A file may hold any bits as a scale; a later check reports values that are not finite.
    with np.errstate(all="ignore"):
        for start in range(0, blocks.shape[0], step):
            format.unpack(blocks[start : start + step], values[start : start + step])
    return values.reshape(shape)


def values_of_blocks(format: BlockFormat, blocks: Array) -> Array:
    """float32 ``[N, size]`` of ``[N, nbytes]`` blocks."""
    return dequantize(format, np.ascontiguousarray(blocks).reshape(-1), (len(blocks), format.size))


def _half(blocks: Blocks, start: int) -> Values:
    """``[N, 1]`` float32 from the float16 at byte ``start``."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Blocks) -> Blocks:
    """``[N, m]`` bytes to ``[N, 2 m]`` values: the low halves of all bytes, then the high halves."""
    out = np.empty((packed.shape[0], 2, packed.shape[1]), np.uint8)
    np.bitwise_and(packed, 0x0F, out=out[:, 0])
    np.right_shift(packed, 4, out=out[:, 1])
    return out.reshape(packed.shape[0], -1)


def _fifth_bits(packed: Blocks) -> Blocks:
    """``[N, 4]`` bytes to ``[N, 32]``: bit i of the little-endian word, moved to bit 4."""
    return np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)


def _q8_0(blocks: Blocks, out: Values) -> None:
    out[...] = blocks[:, 2:].view(np.int8)
    out *= _half(blocks, 0)


def _four_or_five_bits(blocks: Blocks, out: Values, *, fifth: bool = False, minimum: bool = False) -> None:
    """Write ``d * q + m`` with a ``minimum``, else ``d * (q - offset)``; the ``fifth`` bits precede the other four."""
    start = 4 if minimum else 2
    if fifth:
        out[...] = _nibbles(blocks[:, start + 4 :]) | _fifth_bits(blocks[:, start : start + 4])
    else:
        out[...] = _nibbles(blocks[:, start:])
    if not minimum:
        out -= np.float32(16 if fifth else 8)
    out *= _half(blocks, 0)
    if minimum:
        out += _half(blocks, 2)


def _scales_and_mins(packed: Blocks) -> tuple[Values, Values]:
    """``[N, 12]`` bytes to ``[N, 8]`` six-bit scales and ``[N, 8]`` six-bit minimums."""
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1)
    mins = np.concatenate([middle & 63, (high >> 4) | ((middle >> 2) & 48)], axis=1)
    return scales.astype(np.float32), mins.astype(np.float32)


def _k_nibbles(packed: Blocks) -> Blocks:
    """``[N, 128]`` bytes to ``[N, 8, 32]``: each run of 32 bytes gives its low halves, then its high halves."""
    runs = packed.reshape(-1, 4, 32)
    out = np.empty((packed.shape[0], 4, 2, 32), np.uint8)
    np.bitwise_and(runs, 0x0F, out=out[:, :, 0])
    np.right_shift(runs, 4, out=out[:, :, 1])
    return out.reshape(-1, 8, 32)


def _k_affine(blocks: Blocks, quants: Blocks, out: Values) -> None:
    """Write ``(d * scale) * q - (dmin * min)`` per sub-block of 32; ``quants`` is ``[N, 8, 32]``."""
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    grouped = out.reshape(-1, 8, 32)
    grouped[...] = quants
    grouped *= (_half(blocks, 0) * scales)[:, :, None]
    grouped -= (_half(blocks, 2) * mins)[:, :, None]


def _q4_k(blocks: Blocks, out: Values) -> None:
    _k_affine(blocks, _k_nibbles(blocks[:, 16:]), out)


def _q5_k(blocks: Blocks, out: Values) -> None:
    bits = (blocks[:, 16:48, None] >> np.arange(8, dtype=np.uint8)) & np.uint8(1)  # [N, 32, 8]
    fifth = bits.transpose(0, 2, 1) << np.uint8(4)
    _k_affine(blocks, _k_nibbles(blocks[:, 48:]) | fifth, out)


def _q6_k(blocks: Blocks, out: Values) -> None:
    low = blocks[:, :128].reshape(-1, 2, 2, 32)  # half of 128 values, run of 32 bytes
    high = blocks[:, 128:192].reshape(-1, 2, 32)
    quants = np.empty((blocks.shape[0], 2, 4, 32), np.uint8)
    np.bitwise_and(low, 0x0F, out=quants[:, :, 0:2])
    np.right_shift(low, 4, out=quants[:, :, 2:4])
    for run in range(4):
        quants[:, :, run] |= ((high >> np.uint8(2 * run)) & np.uint8(3)) << np.uint8(4)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    grouped = out.reshape(-1, 16, 16)
    grouped[...] = quants.reshape(-1, 16, 16)
    grouped -= np.float32(32)
    grouped *= (_half(blocks, 208) * scales)[:, :, None]


def _q2_k(blocks: Blocks, out: Values) -> None:
    scales = (_half(blocks, 80) * (blocks[:, :16] & 15).astype(np.float32))[..., None]
    mins = (_half(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32))[..., None]
    grouped = out.reshape(-1, 16, 16)
    grouped[...] = _pairs_of_bits(blocks[:, 16:80]).reshape(-1, 16, 16)
    grouped *= scales
    grouped -= mins


def _q3_k(blocks: Blocks, out: Values) -> None:
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = ((packed[:, 8:, None] >> np.array([0, 2, 4, 6], np.uint8)) & np.uint8(3)).transpose(0, 2, 1).reshape(-1, 16)
    scales = _half(blocks, 108) * ((low | (high << np.uint8(4))).astype(np.float32) - np.float32(32))
    third = np.unpackbits(blocks[:, :32, None], axis=2, bitorder="little").transpose(0, 2, 1)  # [N, 8, 32]
    quants = _pairs_of_bits(blocks[:, 32:96]).reshape(-1, 8, 32) | (third << np.uint8(2))
    grouped = out.reshape(-1, 16, 16)
    grouped[...] = quants.reshape(-1, 16, 16)
    grouped -= np.float32(4)
    grouped *= scales[..., None]


def _pairs_of_bits(packed: Blocks) -> Blocks:
    """``[N, 64]`` bytes to ``[N, 2, 4, 32]``: each run of 32 bytes gives its lowest two bits, then the next two."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (packed.reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)


def _iq4_nl(blocks: Blocks, out: Values) -> None:
    out[...] = np.take(_IQ4, _nibbles(blocks[:, 2:]))
    out *= _half(blocks, 0)


def _iq4_xs(blocks: Blocks, out: Values) -> None:
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)
    scales = (low | ((high & 3) << 4)).astype(np.float32) - np.float32(32)
    grouped = out.reshape(-1, 8, 32)
    grouped[...] = np.take(_IQ4, _nibbles(blocks[:, 8:].reshape(-1, 16))).reshape(grouped.shape)
    grouped *= (_half(blocks, 0) * scales)[..., None]


def _mxfp4(blocks: Blocks, out: Values) -> None:
    out[...] = np.take(_E2M1, _nibbles(blocks[:, 1:]))  # twice the values, times half the scale
    exponent = blocks[:, :1].astype(np.uint32)
    small = np.uint32(0x00200000) << np.minimum(exponent, 1)
    out *= np.where(exponent < 2, small, (exponent - 1) << np.uint32(23)).view(np.float32)


def _nvfp4(blocks: Blocks, out: Values) -> None:
    scales = np.ldexp((blocks[:, :4] & 7) + np.where(blocks[:, :4] & 0x78, 8, 0), _nvfp4_exponents(blocks[:, :4]))
    scales = np.where((blocks[:, :4] == 0) | (blocks[:, :4] == 0x7F), 0, scales).astype(np.float32)
    grouped = out.reshape(-1, 4, 16)
    grouped[...] = np.take(_E2M1, _nibbles(blocks[:, 4:].reshape(-1, 8))).reshape(grouped.shape)
    grouped *= scales[..., None]


def _nvfp4_exponents(scales: Blocks) -> Array:
    """Of an unsigned e4m3 whose mantissa is taken as a whole number, and half its value."""
    exponent = ((scales >> 3) & 15).astype(np.int32)
    return np.maximum(exponent, 1) - 11


def _tq1_0(blocks: Blocks, out: Values) -> None:
    """Powers of three: five values in a byte of the first 48, four in the last four."""
    runs = ((blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4))
    digits = [
        (run[:, None, :] * np.array([1, 3, 9, 27, 81][:count], np.uint8)[:, None]).reshape(len(blocks), -1)
        for run, count in runs
    ]
    out[...] = (np.concatenate(digits, axis=1).astype(np.uint16) * 3) >> 8
    out -= np.float32(1)
    out *= _half(blocks, 52)


def _tq2_0(blocks: Blocks, out: Values) -> None:
    out[...] = _pairs_of_bits(blocks[:, :64]).reshape(-1, 256)
    out -= np.float32(1)
    out *= _half(blocks, 64)


FORMATS: Mapping[int, BlockFormat] = {
    0: BlockFormat(*SIZES[0], dtype=np.dtype("<f4")),
    1: BlockFormat(*SIZES[1], dtype=np.dtype("<f2")),
    2: BlockFormat(*SIZES[2], unpack=_four_or_five_bits, scales=1),
    3: BlockFormat(*SIZES[3], unpack=partial(_four_or_five_bits, minimum=True), scales=2),
    6: BlockFormat(*SIZES[6], unpack=partial(_four_or_five_bits, fifth=True), scales=1),
    7: BlockFormat(*SIZES[7], unpack=partial(_four_or_five_bits, fifth=True, minimum=True)),
    8: BlockFormat(*SIZES[8], unpack=_q8_0, scales=1),
    12: BlockFormat(*SIZES[12], unpack=_q4_k),
    13: BlockFormat(*SIZES[13], unpack=_q5_k),
    14: BlockFormat(*SIZES[14], unpack=_q6_k),
    10: BlockFormat(*SIZES[10], unpack=_q2_k),
    11: BlockFormat(*SIZES[11], unpack=_q3_k),
    16: BlockFormat(*SIZES[16], unpack=codebooks.iq2_xxs),
    17: BlockFormat(*SIZES[17], unpack=codebooks.iq2_xs),
    18: BlockFormat(*SIZES[18], unpack=codebooks.iq3_xxs),
    19: BlockFormat(*SIZES[19], unpack=codebooks.iq1_s),
    20: BlockFormat(*SIZES[20], unpack=_iq4_nl),
    21: BlockFormat(*SIZES[21], unpack=codebooks.iq3_s),
    22: BlockFormat(*SIZES[22], unpack=codebooks.iq2_s),
    23: BlockFormat(*SIZES[23], unpack=_iq4_xs),
    29: BlockFormat(*SIZES[29], unpack=codebooks.iq1_m),
    34: BlockFormat(*SIZES[34], unpack=_tq1_0),
    35: BlockFormat(*SIZES[35], unpack=_tq2_0),
    39: BlockFormat(*SIZES[39], unpack=_mxfp4),
    40: BlockFormat(*SIZES[40], unpack=_nvfp4),
    30: BlockFormat(*SIZES[30], dtype=np.dtype(ml_dtypes.bfloat16)),
}
BY_NAME: Mapping[str, BlockFormat] = {format.name: format for format in FORMATS.values()}
