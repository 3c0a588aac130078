"""One file mapped into memory: pages are read when touched, shared with the page cache, and released on demand."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from truffula.errors import CheckpointError
from truffula.types import FileStamp
from truffula.weights.watch import stamp_of


class MappedFile:
    """A file held open, and mapped privately on first use.

    All that is read of it is read through one descriptor: a rename that puts another file in its place changes nothing
    here. Views are flagged writable because torch warns about those that are not; nothing writes to them, and a write
    would stay in this process. ``size`` is that of the file when it was opened; a file whose size changed before it was
    mapped is refused. ``descriptor``: of the file, opened by the caller and owned by this object from here on; None
    opens ``path``. Raises ``CheckpointError`` for a file that cannot be opened.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        self._descriptor = -1 if descriptor is None else descriptor
        try:
            if descriptor is None:
                self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.opened = self.stamp()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.", param=str(path)) from error
        self.size = self.opened.size

    def __del__(self) -> None:
        self.close()

    def stamp(self) -> FileStamp:
        """The open file as it is now, whatever lies under its name. ``opened`` is the first."""
        return stamp_of(self.path, os.fstat(self._descriptor))

    def duplicate(self) -> int:
        """A descriptor of the file for a caller that outlives this object and closes it."""
        return os.dup(self._descriptor)

    def head(self, nbytes: int) -> bytes:
        """The first ``nbytes`` bytes, fewer at the end of the file, read without mapping it."""
        parts: list[bytes] = []
        while nbytes and (part := os.pread(self._descriptor, nbytes, sum(map(len, parts)))):
            parts.append(part)
            nbytes -= len(part)
        return b"".join(parts)

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
        """Unmap and close; where views are still alive, the mapping goes with the last of them."""
        mapped, self._map = self._map, None
        if mapped is not None:
            with contextlib.suppress(BufferError):
                mapped.close()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _mapped(self) -> mmap.mmap:
        if self._map is not None:
            return self._map
        try:
            size = os.fstat(self._descriptor).st_size
            if size != self.size:
                raise CheckpointError(
                    f"{self.path} changed while it was in use: {self.size} bytes when opened, {size} now.",
                    param=str(self.path),
                )
            try:
                self._map = mmap.mmap(self._descriptor, size, access=mmap.ACCESS_COPY)
            except OSError:
                # A private writable mapping counts against the commit limit: one file above memory plus swap is
                # refused. Read-only it is not counted; torch then warns, and that is all.
                self._map = mmap.mmap(self._descriptor, size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be mapped: {error}.", param=str(self.path)) from error
        return self._map
