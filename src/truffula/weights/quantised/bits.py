"""Unpacks small integers and small floats from bytes."""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from truffula.weights.checkpoint import Array

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@cache
def _split(bits: int) -> Array:
    """``[256]``: the values of a byte of 1-, 2- or 4-bit integers, lowest bits first, as bytes of one integer."""
    count = 8 // bits
    values = (np.arange(256)[:, None] >> (bits * np.arange(count))) & ((1 << bits) - 1)
    return np.ascontiguousarray(values.astype(np.uint8)).view(f"<u{count}").reshape(-1)


def unpack(packed: Array, bits: int) -> Bytes:
    """``[n, m]`` integers of any width, each row a stream of ``bits``-bit integers from the lowest bit of its first
    byte on, to ``[n, 8 * bytes // bits]`` uint8.
    """
    data = np.ascontiguousarray(packed)
    data = data.view(np.uint8).reshape(len(data), -1)
    if bits == 8:
        return data
    if 8 % bits == 0:
        return np.take(_split(bits), data).view(np.uint8).reshape(len(data), -1)
    count = data.shape[1] * 8 // bits
    data = np.pad(data, ((0, 0), (0, -data.shape[1] % bits)))  # 8 values take ``bits`` bytes
    words = np.zeros((len(data), data.shape[1] // bits), np.uint64)
    for byte in range(bits):
        words |= data[:, byte::bits].astype(np.uint64) << np.uint64(8 * byte)
    values = np.empty((*words.shape, 8), np.uint8)
    for place in range(8):
        values[..., place] = (words >> np.uint64(bits * place)) & np.uint64((1 << bits) - 1)
    return values.reshape(len(data), -1)[:, :count]


@cache
def table(dtype: str) -> Floats:
    """``[256]`` float32: the value of each byte as a float of 8 bits (``float8_e4m3fn``), or ``e8m0``, 2^(b - 127)."""
    every = np.arange(256, dtype=np.uint8)
    kind: np.dtype[Any] = np.dtype(ml_dtypes.float8_e8m0fnu if dtype == "e8m0" else getattr(ml_dtypes, dtype))
    return np.asarray(every.view(kind), np.float32)


@cache
def pairs_of_e2m1() -> Array:
    """``[256]``: both 4-bit floats of a byte, the low half first, as one 64-bit integer of two float32."""
    values = np.array([*_E2M1, *(-value for value in _E2M1)], np.float32)
    every = np.arange(256)
    return np.ascontiguousarray(np.stack([values[every & 15], values[every >> 4]], 1)).view(np.uint64).reshape(-1)


def unpack_e2m1(packed: Bytes) -> Floats:
    """``[..., m]`` bytes of two 4-bit floats to ``[..., 2 m]`` float32."""
    values: Floats = np.take(pairs_of_e2m1(), packed).view(np.float32)
    return values.reshape(*packed.shape[:-1], -1)


def affine(quants: Array, zeros: Array | None, scales: Array, groups: int | Array, dtype: np.dtype[Any]) -> Array:
    """``(quants - zeros) * scales`` in float32, rounded once to ``dtype``.

    Args:
        quants: ``[n, inputs]`` integers, or float32 that may be written to.
        zeros: ``[n, number of groups]`` (or one row), or None for zero.
        scales: likewise, as stored.
        groups: The number of columns of a group, or the group of each column.
    """
    values = quants if quants.dtype == np.float32 else quants.astype(np.float32)
    scales = scales.astype(np.float32)
    zeros = None if zeros is None else zeros.astype(np.float32)
    rows, inputs = values.shape
    if isinstance(groups, int) and inputs == groups * scales.shape[1]:
        values = values.reshape(rows, -1, groups)
        scales, zeros = scales[..., None], None if zeros is None else zeros[..., None]
    else:
        index = np.arange(inputs) // groups if isinstance(groups, int) else groups
        scales, zeros = np.take(scales, index, 1), None if zeros is None else np.take(zeros, index, 1)
    with np.errstate(all="ignore"):  # a file may hold any bits as a scale; values that are not finite are reported
        if zeros is not None:
            values -= zeros
        values *= scales
        return values.reshape(rows, inputs).astype(dtype, copy=False)
