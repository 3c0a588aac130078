"""An adapter's place on disk: the names of its files, and whether they are still the same. Reads nothing of them."""

from __future__ import annotations

from pathlib import Path

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"


def fingerprint(folder: Path) -> str:
    """Sizes, times and inodes of both files: what tells two states of a place apart without reading it."""
    return ";".join(_stamp(folder / name) for name in (CONFIG, TENSORS))


def files_nbytes(folder: Path) -> int:
    """Size of both files; 0 for one that is missing."""
    return sum((folder / name).stat().st_size for name in (CONFIG, TENSORS) if (folder / name).is_file())


def _stamp(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return "-"
    return f"{found.st_size}:{found.st_mtime_ns}:{found.st_ino}"
