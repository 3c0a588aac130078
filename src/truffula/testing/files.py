"""Writes safetensors files without torch and the safetensors package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from truffula.weights.safetensors import DTYPES

Array = npt.NDArray[Any]


def as_dtype(array: Array, dtype: str) -> Array:
    """``array`` in ``float32``, ``float16`` or ``bfloat16``."""
    return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def write_safetensors(
    path: Path | str, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write ``tensors`` (any dtype of the format, ``ml_dtypes`` ones included) to ``path`` in the order given.

    The data begin at a multiple of eight bytes, as in the safetensors package.
    Raises ``KeyError`` for a dtype the format lacks.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {}
    if metadata is not None:
        header["__metadata__"] = dict(metadata)
    parts: list[bytes] = []
    offset = 0
    for name, array in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        parts.append(data)
        offset += len(data)
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    path = Path(path)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(parts))
    return path
