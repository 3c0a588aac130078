"""Packs weights into blocks that the native kernels multiply: integers into GGUF's Q4_0, Q4_1, Q5_0 and Q8_0, floats of
8 bits into FP8_128 and FP8_32, bitsandbytes' nf4 into NF4, NVFP4 into FP4_16.

A block is 32 inputs with a float16 scale, so a group of 64 or 128 becomes several blocks with the same scale. Q4_1 has
a minimum, ``-zero * scale``, also in float16. A weight of these blocks is not rounded to the dtype of the file's
scales, as the libraries' values are, and a scale in bfloat16 below 2^-14 loses bits. FP8 has float32 scales, one per
128 or 32 inputs, before the numbers as they are stored; a larger run of inputs with one scale becomes several blocks.
NF4 likewise has one per 64 inputs. A block of FP4_16 has 64 inputs with four e4m3 scales, behind the two float32 by
which these are multiplied and divided: the file's scale of the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from truffula.weights.checkpoint import Array
from truffula.weights.finite import first_non_finite
from truffula.weights.gguf.quants import BY_NAME, BlockFormat
from truffula.weights.quantised.bits import affine, table, unpack_e2m1
from truffula.weights.quantised.logical import Logical

BLOCK = 32
_MIDDLE = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0}
"""What a block's numbers are stored with: value = scale * (number - middle)."""
_RANGES = {"Q4_0": (0, 15), "Q4_1": (0, 15), "Q5_0": (0, 31), "Q8_0": (-128, 127)}
Terms = tuple[Array, Array | None, Array, int | Array]
"""Quants ``[n, inputs]``, zeros and scales ``[n, groups]``, and the size of a group (or the group of each input)."""


def kind_for(bits: int, inputs: int, group: int, *, symmetric: bool) -> str:
    """The kind of blocks that hold such integers; empty when there is none."""
    if inputs % BLOCK or group % BLOCK or bits > 8 or (bits > 4 and not symmetric):
        return ""
    if not symmetric:
        return "Q4_1"
    return "Q4_0" if bits <= 4 else "Q5_0" if bits == 5 else "Q8_0"


def integers(
    name: str,
    shape: tuple[int, int],
    dtype: np.dtype[Any],
    kind: str,
    terms: Callable[[int, int], Terms],
    packed: str = "",
) -> Logical:
    """The weight ``(quants - zeros) * scales`` of ``terms(lo, hi)``, which may be kept in blocks of kind ``packed``."""

    def blocks(lo: int, hi: int) -> Array | None:
        return pack(packed, *terms(lo, hi))

    def compute(lo: int, hi: int) -> Array:
        return affine(*terms(lo, hi), dtype)

    return Logical(name, shape, dtype, kind, compute, packed, blocks if packed else None)


def pack_e2m1(values: Array, scales: Array) -> Array | None:
    """Blocks of Q5_0 for floats of 4 bits ``[n, inputs]`` with a scale per 32: twice a value is a whole number."""
    return pack("Q5_0", 2 * values, None, scales / 2, BLOCK)


def pack(kind: str, quants: Array, zeros: Array | None, scales: Array, groups: int | Array) -> Array | None:
    """``[n, inputs / 32, bytes of a block]`` uint8; None when a block cannot hold these numbers: groups out of order,
    zeros that differ although they are said not to, scales that are not finite in float16.
    """
    rows, inputs = quants.shape
    if not isinstance(groups, int):
        index = groups.reshape(-1, BLOCK)
        if (index != index[:, :1]).any():
            return None
        of_block = index[:, 0]
    else:
        of_block = np.arange(0, inputs, BLOCK) // groups
    with np.errstate(all="ignore"):
        scale = scales.astype(np.float16)
        minimum = None if zeros is None else (-zeros.astype(np.float32) * scales.astype(np.float32)).astype(np.float16)
    if not np.isfinite(scale).all() or (minimum is not None and not np.isfinite(minimum).all()):
        return None
    numbers = quants.astype(np.int16)
    parts = [scale]
    if kind == "Q4_1":
        assert minimum is not None
        parts.append(minimum)
    else:
        zero = 0 if zeros is None else int(zeros.flat[0])
        if zeros is not None and (zeros != zero).any():
            return None
        numbers += np.int16(_MIDDLE[kind] - zero)
    lowest, highest = _RANGES[kind]
    if numbers.min() < lowest or numbers.max() > highest:
        return None
    head = np.stack([np.take(part, of_block, 1) for part in parts], -1).view(np.uint8)
    return np.concatenate([head, _packed(kind, numbers.reshape(rows, -1, BLOCK))], -1)


def float8_kind(inputs: int, group: int) -> str:
    """The kind of blocks that hold e4m3 numbers of which ``group`` inputs share a scale; empty when there is none."""
    for kind, format in FLOAT8.items():
        if inputs % BLOCK == 0 and (group >= inputs or group % format.size == 0):
            return kind
    return ""


def pack_float8(kind: str, codes: Array, scales: Array, group: int) -> Array | None:
    """``[n, blocks, 4 + size]`` uint8 of e4m3 ``codes [n, inputs]`` and ``scales [n, groups]``, zero behind the last
    input; None when a number or a scale is not finite.
    """
    (rows, inputs), size = codes.shape, FLOAT8[kind].size
    scales = np.take(scales, np.arange(0, inputs, size) // group, 1).astype(np.float32)
    if not np.isfinite(scales).all() or first_non_finite(codes.view(ml_dtypes.float8_e4m3fn)) is not None:
        return None
    blocks = np.zeros((rows, -(-inputs // size), 4 + size), np.uint8)
    blocks[..., :4] = scales[..., None].view(np.uint8)
    whole = inputs // size
    blocks[:, :whole, 4:] = codes[:, : whole * size].reshape(rows, whole, size)
    if inputs % size:
        blocks[:, whole, 4 : 4 + inputs % size] = codes[:, whole * size :]
    return blocks


def pack_nf4(codes: Array, scales: Array) -> Array | None:
    """``[n, inputs / 64, 36]`` uint8 of packed ``codes [n, inputs / 2]``, the first of a byte in its high half, and
    ``scales [n, inputs / 64]``; None when a scale is not finite.
    """
    if not np.isfinite(scales).all():
        return None
    head = np.ascontiguousarray(scales, np.float32)[..., None].view(np.uint8)
    return np.concatenate([head, codes.reshape(*scales.shape, 32)], -1)


def _unpack_nf4(blocks: Array, out: Array) -> None:
    codes = blocks[:, 4:]
    np.take(NF4_NUMBERS, np.stack([codes >> 4, codes & 15], -1).reshape(len(blocks), -1), out=out)
    out *= np.ascontiguousarray(blocks[:, :4]).view(np.float32)


def pack_fp4(codes: Array, scales: Array, times: np.float32, by: np.float32) -> Array | None:
    """``[n, blocks, 44]`` uint8 of packed e2m1 ``codes [n, inputs / 2]``, the first of a byte in its low half, and of
    the bytes of e4m3 ``scales [n, inputs / 16]``, which are multiplied by ``times`` and divided by ``by``; None when a
    scale is not finite then.
    """
    (rows, halves), blocks = codes.shape, -(-codes.shape[1] // 32)
    made = np.zeros((rows, blocks, FP4.nbytes), np.uint8)
    made[..., :8] = np.array([times, by], np.float32).view(np.uint8)
    padded = np.zeros((rows, 4 * blocks + 32 * blocks), np.uint8)
    padded[:, : scales.shape[1]], padded[:, 4 * blocks : 4 * blocks + halves] = scales, codes
    made[..., 8:12] = padded[:, : 4 * blocks].reshape(rows, blocks, 4)
    made[..., 12:] = padded[:, 4 * blocks :].reshape(rows, blocks, 32)
    with np.errstate(all="ignore"):
        finite = np.isfinite(_fp4_scales(made.reshape(-1, FP4.nbytes))).all()
    return made if finite else None


def _fp4_scales(blocks: Array) -> Array:
    """float32 ``[N, 4]``."""
    times, by = np.ascontiguousarray(blocks[:, :8]).view(np.float32).T
    scales: Array = np.take(table("float8_e4m3fn"), blocks[:, 8:12]) * times[:, None] / by[:, None]
    return scales


def _unpack_fp4(blocks: Array, out: Array) -> None:
    grouped = out.reshape(-1, 4, 16)
    grouped[...] = unpack_e2m1(blocks[:, 12:]).reshape(grouped.shape)
    grouped *= _fp4_scales(blocks)[..., None]


def _unpack_float8(blocks: Array, out: Array) -> None:
    np.take(table("float8_e4m3fn"), blocks[:, 4:], out=out)
    out *= np.ascontiguousarray(blocks[:, :4]).view(np.float32)


FLOAT8: Mapping[str, BlockFormat] = MappingProxyType(
    {f"FP8_{size}": BlockFormat(f"FP8_{size}", size, 4 + size, unpack=_unpack_float8) for size in (128, 32)}
)
NF4_NUMBERS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""The values of bitsandbytes' codes, which its files repeat; the native kernels know no others."""
NF4 = BlockFormat("NF4", 64, 36, unpack=_unpack_nf4)
FP4 = BlockFormat("FP4_16", 64, 44, unpack=_unpack_fp4, zeros=np.ones(2, np.float32).tobytes())
BY_KIND: Mapping[str, BlockFormat] = MappingProxyType({**BY_NAME, **FLOAT8, NF4.name: NF4, FP4.name: FP4})
"""Formats of blocks by the names that backends know."""


def _packed(kind: str, numbers: Array) -> Array:
    """``[n, blocks, 16, 20 or 32]`` bytes of ``numbers [n, blocks, 32]``."""
    if kind == "Q8_0":
        return numbers.astype(np.int8).view(np.uint8)
    halves = (numbers[..., :16] & 15) | ((numbers[..., 16:] & 15) << 4)
    nibbles = halves.astype(np.uint8)
    if kind != "Q5_0":
        return nibbles
    fifth = np.packbits((numbers >> 4).astype(np.uint8), axis=-1, bitorder="little")
    return np.concatenate([fifth, nibbles], -1)
