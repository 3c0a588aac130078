"""A file mapped into memory: pages are read when touched and shared with the page cache."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from truffula.errors import CheckpointError
from truffula.types import FileStamp
from truffula.weights.watch import stamp_of


class MappedFile:
    """A file held open, and mapped privately on first use.

    All reads use one descriptor, so renaming another file to this path has no effect here. Views are flagged writable
    because torch warns about read-only arrays; they are never written to, and a write would stay in this process.
    ``size`` is the size when the file was opened; mapping a file whose size has changed is an error. ``descriptor`` is
    an open descriptor of the file that this object takes over; with None, ``path`` is opened. Raises
    ``CheckpointError`` when the file cannot be opened.
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
        """The current stamp of the open file; ``opened`` is the stamp when it was opened."""
        return stamp_of(self.path, os.fstat(self._descriptor))

    def duplicate(self) -> int:
        """A new descriptor of the file, which the caller closes."""
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
        self._check_range(offset, nbytes)
        if nbytes == 0:
            return np.empty(0, np.uint8)
        return np.frombuffer(self._mapped(), np.uint8, count=nbytes, offset=offset)

    def array(self, offset: int, nbytes: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """``shape`` values of ``dtype`` in the same range: a view, or a copy where they are not aligned."""
        self._check_range(offset, nbytes)
        if nbytes == 0:
            return np.empty(shape, dtype)
        view = np.frombuffer(self._mapped(), dtype, nbytes // dtype.itemsize, offset).reshape(shape)
        return view if offset % dtype.alignment == 0 else view.copy()

    def _check_range(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise CheckpointError(
                f"{self.path}: bytes {offset} to {offset + nbytes} lie outside the file of {self.size} bytes.",
                param=str(self.path),
            )

    def data(self) -> memoryview:
        """The whole file; it keeps the mapping alive."""
        return memoryview(self._mapped() if self.size else b"")

    def map_shared(self) -> None:
        """Map the file read-only, where it is not mapped yet: its pages then don't count as this process's memory."""
        if self._map is None and self.size:
            try:
                self._map = mmap.mmap(self._descriptor, self.size, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{self.path} cannot be mapped: {error}.", param=str(self.path)) from error

    def close(self) -> None:
        """Unmap and close; while views exist, the mapping lives until the last of them is freed."""
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
        size = self.stamp().size
        if size != self.size:
            raise CheckpointError(
                f"{self.path} changed while it was in use: {self.size} bytes when opened, {size} now.",
                param=str(self.path),
            )
        # A private writable mapping counts against the commit limit, so a file above memory plus swap cannot be mapped.
        # A read-only mapping does not count; the only effect is a warning of torch.
        try:
            with contextlib.suppress(OSError):
                self._map = mmap.mmap(self._descriptor, size, access=mmap.ACCESS_COPY)
            if self._map is None:
                self._map = mmap.mmap(self._descriptor, size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be mapped: {error}.", param=str(self.path)) from error
        return self._map
