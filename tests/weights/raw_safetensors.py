"""Writes safetensors files with any header, for tests of a reader's errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_raw_safetensors(path: Path | str, header: Mapping[str, Any] | bytes, data: bytes) -> Path:
    """Write a file with a header that is not checked."""
    raw = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    path = Path(path)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path
