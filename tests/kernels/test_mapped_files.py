"""Mapped files: the bytes of the file, at an address for huge pages, unmapped with the last reference."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from truffula.kernels.mapped import HUGE, map_file, map_new_file


@pytest.mark.parametrize("size", [1, 4096, HUGE - 1, HUGE, 3 * HUGE + 5])
@pytest.mark.parametrize("root", ["/dev/shm", None])
def test_a_shared_mapping_writes_the_file_and_a_private_one_does_not(
    tmp_path: Path, size: int, root: str | None
) -> None:
    if root is not None and not Path(root).is_dir():
        root = None
    path = tmp_path / "file" if root is None else Path(root) / f"truffula-test-{os.getpid()}"
    content = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        shared = map_new_file(fd, size)
        assert not shared.any() and os.fstat(fd).st_blocks * 512 >= size
        shared[:] = content
        private = map_file(fd, size)
        assert (private == content).all()
        private[0] ^= 0xFF
        assert path.read_bytes() == content.tobytes()
        assert sys.platform != "linux" or private.ctypes.data % HUGE == shared.ctypes.data % HUGE == 0
    finally:
        os.close(fd)
        path.unlink()
    last = private[-1:]
    del shared, private
    gc.collect()
    assert last[0] == content[-1] or size == 1  # the file is closed and removed; the mapping is not


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_mapping_ends_with_the_last_array_over_it(tmp_path: Path) -> None:
    path = tmp_path / "a-file-of-this-test"
    path.write_bytes(bytes(5000))
    with path.open("rb") as file:
        part = map_file(file.fileno(), 5000)[100:200].view(np.int32)
    mapped = lambda: path.name in Path("/proc/self/maps").read_text()
    assert mapped()
    del part
    assert not mapped()


def test_a_file_that_cannot_be_mapped_is_the_systems_error(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)  # a directory
    try:
        with pytest.raises(OSError):
            map_file(fd, 10)
    finally:
        os.close(fd)
