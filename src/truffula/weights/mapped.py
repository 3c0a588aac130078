"""One file mapped into memory: pages are read when touched, shared with the page cache, and given back on demand."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt

from truffula.errors import CheckpointError


class MappedFile:
    """A file of fixed size, mapped privately on first use.

    Views are flagged writable because torch warns about those that are not; nobody writes to them, and a write would
    stay in this process. ``size`` is what the caller saw when it checked the file; one that changed since is refused.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._map: mmap.mmap | None = None

    def view(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """``[nbytes]`` uint8 view of the file from ``offset``. The range must lie within the file."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise CheckpointError(
                f"{self.path}: bytes {offset} to {offset + nbytes} lie outside the file of {self.size} bytes.",
                param=str(self.path),
            )
        if nbytes == 0:
            return np.empty(0, np.uint8)
        return np.frombuffer(self._mapped(), np.uint8, count=nbytes, offset=offset)

    def data(self) -> memoryview:
        """All of the file; while it is alive, so is the mapping."""
        return memoryview(self._mapped() if self.size else b"")

    def release(self, offset: int, nbytes: int) -> None:
        """Drop the pages of a range from this process; the next touch reads them again. A hint: never fails."""
        if self._map is None or nbytes == 0 or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)

    def close(self) -> None:
        """Unmap; where views are still alive, the mapping goes with the last of them."""
        mapped, self._map = self._map, None
        if mapped is not None:
            with contextlib.suppress(BufferError):
                mapped.close()

    def _mapped(self) -> mmap.mmap:
        if self._map is not None:
            return self._map
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                if size != self.size:
                    raise CheckpointError(
                        f"{self.path} changed while it was in use: {self.size} bytes when opened, {size} now.",
                        param=str(self.path),
                    )
                try:
                    self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
                except OSError:
                    # A private writable mapping counts against the commit limit: one file above memory plus swap is
                    # refused. Read-only it is not counted; torch then warns, and that is all.
                    self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be mapped: {error}.", param=str(self.path)) from error
        return self._map
