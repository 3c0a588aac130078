"""Writes GGUF files for tests: small, exact, right or wrong as asked."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class GgufBlocks:
    """A quantised tensor for ``write_gguf``: its GGUF type number, its logical row-major shape, its blocks."""

    type: int
    shape: tuple[int, ...]
    data: bytes


def write_gguf(
    path: Path | str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, npt.NDArray[Any] | GgufBlocks],
    *,
    version: int = 3,
    alignment: int = 32,
) -> Path:
    """Write a GGUF file. Python ints become ``u32`` (``i64`` where they do not fit), floats ``f32``; lists are arrays.

    ``tensors`` are float32, float16 or bfloat16 arrays, or ``GgufBlocks``, under GGUF's names.
    """
    plain = {np.dtype("<f4"): 0, np.dtype("<f2"): 1, np.dtype(ml_dtypes.bfloat16): 30}
    items = {
        name: item if isinstance(item, GgufBlocks) else GgufBlocks(plain[item.dtype], item.shape, item.tobytes())
        for name, item in tensors.items()
    }
    pairs = dict(metadata) if alignment == 32 else {**metadata, "general.alignment": alignment}
    head = [b"GGUF", struct.pack("<IQQ", version, len(items), len(pairs))]
    head += [_gguf_string(key) + struct.pack("<I", kind) + raw for key, (kind, raw) in _gguf_pairs(pairs)]
    offset, body = 0, []
    for name, item in items.items():
        sizes = struct.pack(f"<{len(item.shape)}Q", *reversed(item.shape))
        head.append(_gguf_string(name) + struct.pack("<I", len(item.shape)) + sizes)
        head.append(struct.pack("<IQ", item.type, offset))
        padded = item.data + bytes(-len(item.data) % alignment)
        body.append(padded)
        offset += len(padded)
    header = b"".join(head)
    path = Path(path)
    path.write_bytes(header + bytes(-len(header) % alignment) + b"".join(body))
    return path


def _gguf_pairs(pairs: Mapping[str, Any]) -> list[tuple[str, tuple[int, bytes]]]:
    return [(key, _gguf_value(value)) for key, value in pairs.items()]


def _gguf_value(value: Any) -> tuple[int, bytes]:
    """Type number and bytes of a metadata value."""
    if isinstance(value, bool):
        return 7, struct.pack("<B", value)
    if isinstance(value, int):
        return (4, struct.pack("<I", value)) if 0 <= value < 2**32 else (11, struct.pack("<q", value))
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, _gguf_string(value)
    made = [_gguf_value(item) for item in value]
    kind = made[0][0] if made else 4
    return 9, struct.pack("<IQ", kind, len(made)) + b"".join(raw for _, raw in made)


def _gguf_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
