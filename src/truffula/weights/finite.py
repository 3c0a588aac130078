"""Finds NaN and infinite values in a tensor by their bits, without converting it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from truffula.weights.checkpoint import Array

# A value is not finite when its bits without the sign are at least this number: the exponent is all ones.
_SMALLEST_NON_FINITE: Mapping[np.dtype[Any], int] = {
    np.dtype(np.float64): 0x7FF0_0000_0000_0000,
    np.dtype(np.float32): 0x7F80_0000,
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(ml_dtypes.float8_e5m2): 0x7C,
    np.dtype(ml_dtypes.float8_e4m3fn): 0x7F,
}
# Both passes over a chunk (mask, maximum) run in the L2 cache.
_CHUNK_BYTES = 1 << 18


class NonFinite(NamedTuple):
    """``number`` values of a tensor are NaN or infinite, the first of them at index ``first``."""

    number: int
    first: tuple[int, ...]


def first_non_finite(array: Array) -> NonFinite | None:
    """The number of NaN and infinite values of ``array`` (any shape) and the index of the first; None if all are
    finite.

    Integers and booleans are finite. Reads the data once and allocates one chunk.
    """
    limit = _SMALLEST_NON_FINITE.get(array.dtype)
    if limit is None or array.size == 0:
        return None
    unsigned = np.dtype(f"u{array.dtype.itemsize}")
    flat = np.ascontiguousarray(array).reshape(-1).view(unsigned)
    mask = unsigned.type(2 ** (8 * unsigned.itemsize - 1) - 1)
    step = _CHUNK_BYTES // unsigned.itemsize
    buffer = np.empty(min(step, flat.size), unsigned)
    count, first = 0, -1
    for start in range(0, flat.size, step):
        chunk = flat[start : start + step]
        bits = np.bitwise_and(chunk, mask, out=buffer[: chunk.size])
        if bits.max() >= limit:
            bad = np.flatnonzero(bits >= limit)
            first = start + int(bad[0]) if count == 0 else first
            count += bad.size
    if count == 0:
        return None
    return NonFinite(count, tuple(int(i) for i in np.unravel_index(first, array.shape)))
