"""The image of an adapter, one file that is mapped: a header, a table with a row per part, then aligned tensors.

    magic "TRFLORA2" · u64 header length · header (msgpack) · zeros to 64 · table · zeros to 64 · data

The loading worker writes it in the layout of the engine's kernels (``kernels/adapters.py``: parts, layouts, the table's
columns); the engine maps it and reads no byte of the data. Scales are in the table, in float32.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from truffula.errors import AdapterLoadError
from truffula.kernels.adapters import (
    ALIGN,
    COLUMNS,
    DTYPE,
    DTYPES,
    KIND,
    KINDS,
    MAX_TENSORS,
    NBYTES,
    OFFSET,
    SCALE,
    SHAPE,
    SITE,
    STORED,
    TENSOR_COLUMNS,
    TENSORS,
    AdapterImage,
    AdapterLayout,
    PlacedParts,
    SiteTensors,
    pack,
    place,
)
from truffula.kernels.mapped import map_file, use_huge_pages

MAGIC = b"TRFLORA2"
MAX_HEADER_BYTES = 1 << 20
MAX_PARTS = 1 << 20
MAX_SCALE = 1e30  # far within float32; the comparison also fails for NaN and infinity


class AdapterTensors(Protocol):
    """What ``ImageWriter`` needs of an adapter; a ``PeftAdapter`` has it."""

    @property
    def generation(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def sites(self) -> Sequence[SiteTensors]: ...


class _Header(msgspec.Struct, frozen=True):
    layout: str
    generation: str
    rank: int
    kinds: tuple[str, ...]  # by their numbers in the table
    parts: int
    data_bytes: int


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN


class ImageWriter:
    """An adapter packed for ``layout``, ready to be written: ``nbytes`` is the size of its file.

    Raises ``KernelError`` (``kernels.adapters.pack``) for what the layout does not serve.
    """

    def __init__(self, adapter: AdapterTensors, layout: AdapterLayout = STORED) -> None:
        self._placed: PlacedParts = place(pack(layout, adapter.sites))
        table = self._placed.table
        header = _Header(
            layout.name, adapter.generation, adapter.rank, tuple(KINDS), len(table), self._placed.data_bytes
        )
        encoded = msgspec.msgpack.encode(header)
        head = MAGIC + len(encoded).to_bytes(8, "little") + encoded
        self._head = head.ljust(_aligned(len(head)), b"\0") + table.tobytes()
        self._start = _aligned(len(self._head))
        self.nbytes = self._start + self._placed.data_bytes

    def write(self, path: Path) -> None:
        """Make the file at ``path``, which must not exist, and pack into it where it is mapped.

        Its pages are allocated first: raises the system's ``OSError`` when there is no room, after removing the file.
        """
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, self.nbytes)
            mapped = map_file(fd, self.nbytes, shared=True)
            mapped[: len(self._head)] = np.frombuffer(self._head, np.uint8)
            self._placed.write(mapped[self._start :])
            use_huge_pages(mapped)  # kernels read all of it in each step
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)


def map_image(source: Path | int) -> AdapterImage:
    """Map the file at a path (or an open descriptor, which stays the caller's) as an ``AdapterImage``.

    The mapping is private: nothing is written to the file through it, and it may be unlinked immediately. Its memory is
    released with the last reference to the image's data. Costs microseconds for a file of any size: header and table
    are checked, the data is not touched.

    Raises ``AdapterLoadError`` when header or table is invalid, or names an unknown kind of part.
    """
    fd = source if isinstance(source, int) else os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if size == 0:
            raise _damaged("it is empty")
        mapped = map_file(fd, size)
    finally:
        if not isinstance(source, int):
            os.close(fd)
    header, start = _read_header(mapped.data)
    data_start = _aligned(start + header.parts * COLUMNS * 8)
    if data_start + header.data_bytes != size:
        raise _damaged(f"{size} bytes where {data_start + header.data_bytes} were written")
    table = np.frombuffer(mapped, np.int64, header.parts * COLUMNS, start).reshape(header.parts, COLUMNS).copy()
    _check_table(table, header)
    data = mapped[data_start:]
    return AdapterImage(header.generation, header.rank, size, header.layout, table, data)


def _damaged(what: str) -> AdapterLoadError:
    return AdapterLoadError(f"The prepared adapter file is damaged: {what}. Load the adapter again.")


def _read_header(view: memoryview) -> tuple[_Header, int]:
    """The header, and where the table begins."""
    if len(view) < len(MAGIC) + 8 or view[: len(MAGIC)] != MAGIC:
        raise _damaged("it has no valid header")
    length = int.from_bytes(view[len(MAGIC) : len(MAGIC) + 8], "little")
    if length > min(MAX_HEADER_BYTES, len(view) - len(MAGIC) - 8):
        raise _damaged(f"a header of {length} bytes in a file of {len(view)}")
    try:
        header = msgspec.msgpack.decode(view[len(MAGIC) + 8 : len(MAGIC) + 8 + length], type=_Header)
    except (msgspec.MsgspecError, ValueError) as error:  # ValueError: text that is not UTF-8
        raise _damaged(f"its header cannot be read ({error})") from error
    start = _aligned(len(MAGIC) + 8 + length)
    if not (0 <= header.parts <= MAX_PARTS and 0 <= header.data_bytes <= len(view) and header.rank >= 0):
        raise _damaged("a number of its header is out of range")
    if unknown := [kind for kind in header.kinds if kind not in KINDS]:
        raise AdapterLoadError(
            f"The prepared adapter file has parts of an unknown kind: {', '.join(unknown)[:200]}.",
            param=unknown[0][:200],
        )
    return header, start


def _check_table(table: npt.NDArray[np.int64], header: _Header) -> None:
    """Check that every number is in its range and every tensor in the data. Renumbers kinds as in ``KINDS``."""
    tensors = table[:, TENSORS:].reshape(len(table), MAX_TENSORS, TENSOR_COLUMNS)
    offset, nbytes, shape = tensors[..., OFFSET], tensors[..., NBYTES], tensors[..., SHAPE:]
    fits = (
        ((table[:, KIND] >= 0) & (table[:, KIND] < len(header.kinds))).all()
        and ((table[:, SITE] >= 0) & (np.diff(table[:, SITE], prepend=0) >= 0)).all()
        and bool((np.abs(table[:, SCALE].view(np.float64)) <= MAX_SCALE).all())
        and ((tensors[..., DTYPE] >= 0) & (tensors[..., DTYPE] < len(DTYPES))).all()
        and ((offset >= 0) & (offset % ALIGN == 0) & (offset <= header.data_bytes)).all()
        and ((nbytes >= 0) & (nbytes <= header.data_bytes - offset)).all()
        and ((shape >= 0) & (shape < 1 << 31)).all()
    )
    if not fits:
        raise _damaged("a number of its table is out of range")
    if len(table):
        table[:, KIND] = np.array([tuple(KINDS).index(kind) for kind in header.kinds])[table[:, KIND]]
