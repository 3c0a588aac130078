"""The image of an adapter, one file that is mapped: a table with a row per part · zeros to 64 · aligned tensors.

The loading worker writes it in the layout of the engine's kernels (``kernels/adapters.py``: parts, layouts, the table's
columns) and sends its ``ImageHeader``; the engine maps it and reads no byte of the data. Scales are in the table, in
float32.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from truffula.errors import AdapterLoadError, InsufficientMemory
from truffula.kernels import adapters
from truffula.kernels.adapters import ALIGN, COLUMNS, STORED, AdapterImage, AdapterLayout, SiteTensors, pack, place
from truffula.kernels.mapped import map_file, map_new_file

MAX_SCALE = 1e30  # far within float32; the comparison also fails for NaN and infinity
MAX_RESERVE, _FREE_TIMES = 32 << 20, 8
_Count = Annotated[int, msgspec.Meta(ge=0)]


class AdapterFacts(msgspec.Struct, frozen=True):
    """What the scheduler must know of an adapter, besides its parts.

    ``invocation``: the adapter acts from the last occurrence of these ids in a prompt on, and nowhere without one
    (activated LoRA); empty: everywhere. ``virtual_ids`` come before the first token of every sequence. They are beyond
    the vocabulary: the adapter's own rows of the embedding table or, with ``kv_ops``, no input at all: their keys and
    values are the adapter's (``KvPrefix``), of the attention with these numbers. ``vocab_size``: the ids that its own
    tables have rows for; 0: those of the base.
    """

    invocation: tuple[int, ...] = ()
    virtual_ids: tuple[int, ...] = ()
    kv_ops: tuple[int, ...] = ()
    vocab_size: int = 0

    def acts_from(self, prompt_ids: Sequence[int]) -> int | None:
        """The token of a prompt from which on the adapter acts; None: it does not act on this prompt."""
        part = self.invocation
        if not part:
            return 0
        if len(prompt_ids) < len(part):
            return None
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(prompt_ids), len(part))
        found = np.flatnonzero((windows == np.asarray(part)).all(axis=1))
        return int(found[-1]) if len(found) else None


NO_FACTS = AdapterFacts()


@dataclass(frozen=True, eq=False)
class KvPrefix:
    """Keys and values of an adapter's virtual tokens: ``values`` float32 ``[ops, 2, n, width]``, keys before values."""

    ops: tuple[int, ...]
    values: npt.NDArray[np.float32]


class ImageHeader(msgspec.Struct, frozen=True):
    """What a process must know to map an image: numbers of parts (rows of the table) and of bytes of tensors.

    ``layout`` is the name of the layout it is packed for, ``generation`` the hash of the adapter's files. The last
    ``prefix_bytes`` of the data are a ``KvPrefix``.
    """

    layout: str
    generation: str
    rank: _Count
    parts: _Count
    data_bytes: _Count
    facts: AdapterFacts = NO_FACTS
    prefix_bytes: _Count = 0

    def prefix_of(self, image: AdapterImage) -> KvPrefix | None:
        """The ``KvPrefix`` in a mapped image, as a view."""
        if not self.prefix_bytes:
            return None
        values = image.data[-self.prefix_bytes :].view(np.float32)
        return KvPrefix(self.facts.kv_ops, values.reshape(len(self.facts.kv_ops), 2, len(self.facts.virtual_ids), -1))

    @property
    def data_start(self) -> int:
        return -(-self.parts * COLUMNS * 8 // ALIGN) * ALIGN

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return self.data_start + self.data_bytes


class Reserve:
    """An unnamed file of zeros in ``folder``, mapped, for the next image, which then waits for no memory: what was
    never used takes longer to get than all else that a load does, in a virtual machine. Without such files nothing is
    reserved."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: tuple[int, npt.NDArray[np.uint8]] | None = None

    def fill(self, nbytes: int) -> None:
        """Reserve ``nbytes`` for the next image, at most ``MAX_RESERVE`` and a small part of what is free."""
        nbytes = min(nbytes, MAX_RESERVE)
        if self._file is not None or not nbytes or not hasattr(os, "O_TMPFILE"):
            return
        with contextlib.suppress(OSError):  # a file system without unnamed files, or no room
            found = os.statvfs(self._folder)
            if found.f_bavail * found.f_frsize < _FREE_TIMES * nbytes:
                return
            fd = os.open(self._folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
            try:
                mapped = map_new_file(fd, nbytes)
                mapped[:: mmap.PAGESIZE] = 0  # so that the image is written without a fault for each page
            except OSError:
                os.close(fd)
                raise
            self._file = fd, mapped

    def take(self, path: Path, nbytes: int) -> tuple[int, npt.NDArray[np.uint8]] | None:
        """The descriptor of a file of ``nbytes``, whose name is now ``path``, and where it is mapped; None when there
        is none, or not for this folder."""
        if self._file is None:
            return None
        (fd, mapped), self._file = self._file, None
        try:
            os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd)  # with it, though unused, Python has the link followed
        except OSError:
            os.close(fd)
            return None
        try:
            if len(mapped) < nbytes:
                return fd, map_new_file(fd, nbytes)
            os.ftruncate(fd, nbytes)
            return fd, mapped[:nbytes]
        except OSError:
            os.close(fd)
            path.unlink()
            raise


class ImageWriter:
    """An adapter packed for ``layout``, ready to be written; ``prefix`` float32 as in ``KvPrefix``.

    Raises ``KernelError`` (``kernels.adapters.pack``) for what the layout does not serve.
    """

    def __init__(
        self,
        generation: str,
        rank: int,
        sites: Iterable[SiteTensors],
        layout: AdapterLayout = STORED,
        facts: AdapterFacts = NO_FACTS,
        prefix: npt.NDArray[np.float32] | None = None,
    ) -> None:
        self._placed, self._prefix = place(pack(layout, sites)), prefix
        parts, more = len(self._placed.table), 0 if prefix is None else prefix.nbytes
        nbytes = self._placed.data_bytes + more
        self.header = ImageHeader(layout.name, generation, rank, parts, nbytes, facts, more)

    def write(self, path: Path, reserve: Reserve | None = None) -> None:
        """Make the file at ``path``, which must not exist, and pack into it where it is mapped; of ``reserve`` if it
        has one.

        Its pages are allocated first: raises the system's ``OSError`` when there is no room, after removing the file.
        """
        taken = None if reserve is None else reserve.take(path, self.header.nbytes)
        fd = taken[0] if taken else os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            mapped = taken[1] if taken else map_new_file(fd, self.header.nbytes)  # kernels read all of it in each step
            mapped[: self._placed.table.nbytes] = self._placed.table.reshape(-1).view(np.uint8)
            data = mapped[self.header.data_start :]
            self._placed.write(data[: self._placed.data_bytes])
            if self._prefix is not None:
                data[self._placed.data_bytes :] = np.ascontiguousarray(self._prefix).reshape(-1).view(np.uint8)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)


def map_image(path: Path, header: ImageHeader) -> AdapterImage:
    """Map the file at ``path`` as an ``AdapterImage``.

    The mapping is private: nothing is written to the file through it, and it may be unlinked immediately. Its memory is
    released with the last reference to the image's data. Costs microseconds for a file of any size: the table is
    checked, the data is not touched.

    Raises ``AdapterLoadError`` when size or table do not agree with ``header``.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if size != header.nbytes or not (header.parts or header.prefix_bytes):
            raise _damaged(f"it has {size} bytes, and {header.nbytes} for {header.parts} parts were written")
        mapped = map_file(fd, size)
    finally:
        os.close(fd)
    table = np.frombuffer(mapped, np.int64, header.parts * COLUMNS).reshape(header.parts, COLUMNS).copy()
    _check_table(table, header)
    data = mapped[header.data_start :]
    return AdapterImage(header.generation, header.rank, size, header.layout, table, data)


def check_size(needed: int, limit: int | None) -> None:
    """Raise ``InsufficientMemory`` when an adapter takes more bytes than adapters may use."""
    if limit is not None and needed > limit:
        raise InsufficientMemory(
            f"The adapter takes {needed} bytes and adapters may use {limit}. "
            "Give the server more memory (--memory, --adapter-memory).",
            requested_bytes=needed,
            limit_bytes=limit,
        )


def _damaged(what: str) -> AdapterLoadError:
    return AdapterLoadError(f"The prepared adapter file is damaged: {what}. Load the adapter again.")


def _check_table(table: npt.NDArray[np.int64], header: ImageHeader) -> None:
    """Check that every number is in its range and every tensor in the data."""
    site, kind, scale = table[:, adapters.SITE], table[:, adapters.KIND], table[:, adapters.SCALE].view(np.float64)
    tensors = table[:, adapters.TENSORS :].reshape(len(table), adapters.MAX_TENSORS, adapters.TENSOR_COLUMNS)
    dtype, offset = tensors[..., adapters.DTYPE], tensors[..., adapters.OFFSET]
    nbytes, shape = tensors[..., adapters.NBYTES], tensors[..., adapters.SHAPE :]
    fits = (
        ((kind >= 0) & (kind < len(adapters.KINDS))).all()
        and ((site >= 0) & (np.diff(site, prepend=0) >= 0)).all()
        and bool((np.abs(scale) <= MAX_SCALE).all())
        and ((dtype >= 0) & (dtype < len(adapters.DTYPES))).all()
        and ((offset >= 0) & (offset % ALIGN == 0) & (offset <= header.data_bytes)).all()
        and ((nbytes >= 0) & (nbytes <= header.data_bytes - offset)).all()
        and ((shape >= 0) & (shape < 1 << 31)).all()
    )
    if not fits:
        raise _damaged("a number of its table is out of range")
