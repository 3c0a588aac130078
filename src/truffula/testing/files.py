"""Writes safetensors files without torch and the safetensors package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy.typing as npt

from truffula.weights.safetensors import DTYPES, write_tensors

Array = npt.NDArray[Any]


def as_dtype(array: Array, dtype: str) -> Array:
    """``array`` in ``float32``, ``float16`` or ``bfloat16``."""
    return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def write_safetensors(
    path: Path | str, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write ``tensors`` (any dtype of the format, ``ml_dtypes`` ones included) to ``path`` in the order given.

    Raises ``KeyError`` for a dtype the format lacks.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    declared = {name: (names[array.dtype], array.shape) for name, array in tensors.items()}
    write_tensors(Path(path), declared, tensors.values(), metadata)
    return Path(path)
