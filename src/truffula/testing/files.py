"""Writes safetensors files for tests: small, exact, without torch or the safetensors package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from truffula.weights.safetensors import DTYPES


def write_safetensors(
    path: Path | str, tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write ``tensors`` (any dtype of the format, ``ml_dtypes`` ones included) to ``path`` in the order given.

    The data begin on a multiple of eight bytes, as the format's own writer does.
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
    return write_raw_safetensors(path, header, b"".join(parts))


def write_raw_safetensors(path: Path | str, header: Mapping[str, Any] | bytes, data: bytes) -> Path:
    """Write a file from a header as it is, right or wrong: for tests of what a reader must refuse."""
    raw = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    path = Path(path)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path
