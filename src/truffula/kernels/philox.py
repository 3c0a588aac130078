"""Philox4x32-10 in numpy: a counter-based generator, so that a draw depends on its key and counter only.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", sec. 3.4 and the Random123 library.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10

Words = tuple[npt.NDArray[np.uint64], ...]


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> Words:
    """Four words of 32 bits (held in uint64) per counter and key; scalars and arrays broadcast."""
    x0, x1, x2, x3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = (np.asarray(word, np.uint64) for word in key)
    for _ in range(_ROUNDS):
        # Both factors are below 2**32, so the 64-bit product holds high and low words exactly.
        a, b = x0 * _M0, x2 * _M1
        x0, x1, x2, x3 = (b >> _HALF) ^ x1 ^ k0, b & _LOW, (a >> _HALF) ^ x3 ^ k1, a & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return x0, x1, x2, x3


def uniform(seed: Any, choice: Any, draw: Any) -> npt.NDArray[np.float64]:
    """float64 in (0, 1), ends excluded: word 0 of key ``seed`` (uint64), counter ``(choice, draw, 0, 0)``, plus a half.

    ``seed``, ``choice`` (which completion of a request) and ``draw`` (completion tokens so far) broadcast.
    """
    seeds = np.asarray(seed, np.uint64)
    word = philox4x32((choice, draw, 0, 0), (seeds & _LOW, seeds >> _HALF))[0]
    return (word.astype(np.float64) + 0.5) / 2.0**32
