"""An adapter as one mapped file: a header, then tensors on 64-byte boundaries.

    magic "TRFLORA1" · u64 header length · header (msgpack) · zeros to 64 · tensor · zeros to 64 · tensor · …

The loading worker writes it, the engine maps it: nothing is parsed or copied on the step path. A tensor keeps its
stored bits and dtype; an A shared by several sites (a fused module) is in the file once; scales are in the header.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import msgspec
import numpy as np

from truffula.errors import AdapterLoadError
from truffula.kernels.backend import AdapterImage, Array, SiteTensors

MAGIC = b"TRFLORA1"
ALIGN = 64
MAX_HEADER_BYTES = 64 << 20
MAX_SCALE = 1e30  # far within float32; also what tells NaN and infinity apart from a scale
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class LaidOut(Protocol):
    """What can be written: a ``PeftAdapter`` is one."""

    @property
    def generation(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def sites(self) -> Sequence[SiteTensors]: ...


class _Tensor(msgspec.Struct, frozen=True, array_like=True):
    dtype: str
    rows: int
    columns: int
    offset: int  # from the start of the data, a multiple of ALIGN


class _Site(msgspec.Struct, frozen=True, array_like=True):
    site: int
    a: int  # position in tensors
    b: int
    scale: float


class _Header(msgspec.Struct, frozen=True):
    generation: str
    rank: int
    data_bytes: int
    tensors: tuple[_Tensor, ...]
    sites: tuple[_Site, ...]


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN


def dtype_name(array: Array) -> str:
    """``F32``, ``F16`` or ``BF16``; ``AdapterLoadError`` for any other."""
    for name, dtype in DTYPES.items():
        if array.dtype == dtype:
            return name
    raise AdapterLoadError(f"An adapter image contains float32, float16 or bfloat16, not {array.dtype}.")


def _plan(sites: Sequence[SiteTensors]) -> tuple[list[Array], list[_Tensor], list[_Site], int]:
    """Give every distinct array a place. Arrays are told apart by identity: a shared A is one object."""
    arrays: list[Array] = []
    tensors: list[_Tensor] = []
    index: dict[int, int] = {}
    end = 0

    def place(array: Array) -> int:
        nonlocal end
        if id(array) not in index:
            index[id(array)] = len(arrays)
            arrays.append(array)
            tensors.append(_Tensor(dtype_name(array), array.shape[0], array.shape[1], end))
            end = _aligned(end + array.nbytes)
        return index[id(array)]

    ordered = sorted(sites, key=lambda s: s.site)
    for s in ordered:
        # All A first: those of one fused weight then lie side by side, and one product shrinks for all, uncopied.
        place(s.a)
    laid = [_Site(s.site, place(s.a), place(s.b), float(s.scale)) for s in ordered]
    return arrays, tensors, laid, end


def image_nbytes(sites: Sequence[SiteTensors]) -> int:
    """Bytes that the file of these sites will take, but for its header: for a limit to be checked before writing."""
    return _plan(sites)[3]


def write_image(adapter: LaidOut, path: Path) -> int:
    """Write ``adapter`` to a new file at ``path``; returns its size in bytes.

    The file must not exist. Costs one pass over the tensors. Raises ``OSError`` (no room) as the system gives it, and
    then removes what it wrote.
    """
    arrays, tensors, sites, data_bytes = _plan(adapter.sites)
    header = msgspec.msgpack.encode(
        _Header(adapter.generation, adapter.rank, data_bytes, tuple(tensors), tuple(sites)),
    )
    start = _aligned(len(MAGIC) + 8 + len(header))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb", buffering=1 << 20) as file:
            file.write(MAGIC + len(header).to_bytes(8, "little") + header)
            file.write(bytes(start - file.tell()))
            for array in arrays:
                file.write(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
                file.write(bytes(_aligned(file.tell()) - file.tell()))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return start + data_bytes


def _damaged(what: str) -> AdapterLoadError:
    return AdapterLoadError(f"The prepared adapter file is damaged: {what}. Load the adapter again.")


def _header(view: memoryview) -> tuple[_Header, int]:
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
    if start + header.data_bytes != len(view):
        raise _damaged(f"{len(view)} bytes where {start + header.data_bytes} were written")
    return header, start


def _arrays(buffer: mmap.mmap, header: _Header, start: int) -> list[Array]:
    arrays: list[Array] = []
    end = 0
    for t in header.tensors:
        dtype = DTYPES.get(t.dtype)
        if dtype is None or t.rows < 1 or t.columns < 1:
            raise _damaged(f"a tensor of dtype {t.dtype} and shape [{t.rows}, {t.columns}]")
        nbytes = t.rows * t.columns * dtype.itemsize
        if t.offset % ALIGN or t.offset < end or t.offset + nbytes > header.data_bytes:
            raise _damaged(f"a tensor at byte {t.offset} of {header.data_bytes}")
        end = t.offset + nbytes
        flat = np.frombuffer(buffer, dtype, t.rows * t.columns, start + t.offset)
        arrays.append(flat.reshape(t.rows, t.columns))
    return arrays


def map_image(source: Path | int) -> AdapterImage:
    """Map the file at a path (or an open descriptor, which stays the caller's) as an ``AdapterImage``.

    The mapping is private and copy-on-write: nobody can change the file through it, and torch takes the views without a
    copy. The file may be unlinked at once. Memory returns when the last array of the image is dropped; ``close`` gives
    up the image's own hold on it, so drop executables' slots first, then close, then forget the image.

    Raises ``AdapterLoadError`` when anything about the file does not hold together.
    """
    fd = source if isinstance(source, int) else os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if size == 0:
            raise _damaged("it is empty")
        buffer = mmap.mmap(fd, size, access=mmap.ACCESS_COPY)
    finally:
        if not isinstance(source, int):
            os.close(fd)
    with memoryview(buffer) as view:
        header, start = _header(view)
    arrays = _arrays(buffer, header, start)
    sites: list[SiteTensors] = []
    last = -1
    for s in header.sites:
        if not (last < s.site and 0 <= s.a < len(arrays) and 0 <= s.b < len(arrays) and abs(s.scale) <= MAX_SCALE):
            raise _damaged(f"site {s.site}")
        a, b = arrays[s.a], arrays[s.b]
        if a.shape[0] != b.shape[1]:
            raise _damaged(f"site {s.site} has A {a.shape} and B {b.shape}")
        sites.append(SiteTensors(s.site, a, b, float(np.float32(s.scale))))
        last = s.site
    return AdapterImage(header.generation, tuple(sites), size, header.rank, _release(buffer))


def _release(buffer: mmap.mmap) -> Any:
    held = [buffer]

    def close() -> None:
        held.clear()  # arrays keep the mapping by themselves; it ends with the last of them, never under one

    return close
