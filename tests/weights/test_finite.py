"""The finite check sees every NaN and infinity, in every dtype, and nothing else."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truffula.errors import CheckpointError
from truffula.kernels.cpu import CpuBackend, why_unavailable
from truffula.model.load import WeightReader, plan_model
from truffula.testing.programs import capacity_for
from truffula.testing.tiny import tiny_config, write_tiny_checkpoint
from truffula.weights import finite
from truffula.weights.finite import first_non_finite
from truffula.weights.open import open_checkpoint

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


@pytest.mark.skipif(why_unavailable() is not None, reason="needs the native kernels")
def test_all_of_a_tensor_that_is_read_in_pieces_are_counted(tmp_path: Path) -> None:
    """The native backend reads this table in two pieces, in a thread, which ends with the load."""
    config = tiny_config("llama", vocab_size=4500, hidden_size=1024, num_hidden_layers=1, head_dim=16)
    table = np.zeros((4500, 1024), ml_dtypes.bfloat16)
    table[4400, 3] = table[4499, 5] = np.nan
    name = "model.embed_tokens.weight"
    write_tiny_checkpoint(tmp_path, config, dtype="bfloat16", drop=[name], extra={name: table})
    with contextlib.closing(open_checkpoint(tmp_path)) as checkpoint:
        plan = plan_model(checkpoint)
        with pytest.raises(CheckpointError, match=r"embed_tokens.weight .* holds 2 NaN .* first at \(4400, 3\)"):
            CpuBackend(2).load(plan.program, "bfloat16", WeightReader(checkpoint, plan), capacity_for(4))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("truffula-weights")]
