"""The finite check sees every NaN and infinity, in every dtype, and nothing else."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truffula.weights import finite
from truffula.weights.finite import first_non_finite

FLOATS = [
    np.float64,
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e5m2,
    ml_dtypes.float8_e4m3fn,
]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn])
def test_every_bit_pattern(dtype: type) -> None:
    width = np.dtype(dtype).itemsize
    every = np.arange(256**width, dtype=f"u{width}").view(dtype)
    for value in (every, every[:1], every[-1:]):
        bad = np.flatnonzero(~np.isfinite(value.astype(np.float32)))
        found = first_non_finite(value)
        assert found == ((bad.size, (int(bad[0]),)) if bad.size else None)


@given(data=st.data(), dtype=st.sampled_from(FLOATS), rows=st.integers(1, 5), columns=st.integers(1, 7))
@settings(max_examples=80, deadline=None)
def test_against_isfinite(data: st.DataObject, dtype: type, rows: int, columns: int) -> None:
    array = np.ones((rows, columns), dtype)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
        array[at] = data.draw(st.sampled_from([np.nan, -np.nan, 0.0, -1.0]))
    if data.draw(st.booleans()):
        array = array.T
    bad = np.argwhere(~np.isfinite(array.astype(np.float64)))
    found = first_non_finite(array)
    assert found == ((len(bad), tuple(bad[0])) if len(bad) else None)


@pytest.mark.parametrize("dtype", FLOATS)
def test_across_chunks(dtype: type) -> None:
    step = finite._CHUNK_BYTES // np.dtype(dtype).itemsize
    array = np.zeros((3, step), dtype)
    assert first_non_finite(array) is None
    array[1, 5] = array[2, step - 1] = np.nan
    assert first_non_finite(array) == (2, (1, 5))


def test_infinities_empties_scalars_and_integers() -> None:
    assert first_non_finite(np.array([0, np.inf, -np.inf], np.float32)) == (2, (1,))
    assert first_non_finite(np.zeros((0, 4), np.float32)) is None
    assert first_non_finite(np.array(np.nan, np.float32)) == (1, ())
    assert first_non_finite(np.arange(4)) is None
    assert first_non_finite(np.finfo(np.float32).max * np.ones(3, np.float32)) is None
