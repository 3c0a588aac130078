"""Mapped files and their pages."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from typing import Any

import numpy as np

from truffula.kernels.inputs import Array, Uint8

HUGE = 2 << 20
"""Bytes of a huge page, and its alignment."""
_MAP_FIXED, _MADV_COLLAPSE = 0x10, 25  # of Linux; Python's mmap does not name them


class _Mapping:
    """``size`` bytes at ``address``, mapped by ``map_file``; unmapped with the last array that shows them."""

    def __init__(self, libc: Any, start: int, length: int, address: int, size: int) -> None:
        self._unmap = libc.munmap, ctypes.c_void_p(start), ctypes.c_size_t(length)
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (size,), "data": (address, False)}

    def __del__(self) -> None:
        munmap, start, length = self._unmap
        munmap(start, length)


def map_file(fd: int, size: int, *, shared: bool = False) -> Uint8:
    """The first ``size`` bytes of an open file, writable: for all that map it when ``shared``, else privately.

    On Linux the mapping begins at a multiple of ``HUGE``: only then are huge pages of the file mapped as such. It ends
    with the last reference to the array. Raises ``OSError`` as the system gives it.
    """
    if sys.platform != "linux":
        access = mmap.ACCESS_WRITE if shared else mmap.ACCESS_COPY
        return np.frombuffer(mmap.mmap(fd, size, access=access), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p

    def map_at(address: int, length: int, protection: int, flags: int, of: int) -> int:
        fixed = _MAP_FIXED if address else 0
        place, long = ctypes.c_void_p(address), ctypes.c_size_t(length)
        found: int = libc.mmap(place, long, protection, flags | fixed, of, ctypes.c_size_t(0))
        if found == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return found

    length = size + HUGE
    start = map_at(0, length, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    mapping = _Mapping(libc, start, length, -(-start // HUGE) * HUGE, size)
    kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
    map_at(-(-start // HUGE) * HUGE, size, mmap.PROT_READ | mmap.PROT_WRITE, kind, fd)
    return np.asarray(mapping)


def use_huge_pages(mapped: Uint8) -> None:
    """Move a ``shared`` mapping of a file in memory to huge pages (Linux 6.1), except for what does not fill one.

    Without huge pages (another kernel, a file on disk, fragmented memory) nothing changes.
    """
    whole = len(mapped) // HUGE * HUGE
    if sys.platform == "linux" and whole:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(whole), _MADV_COLLAPSE)


def release_pages(array: Array) -> None:
    """Drop the pages of a mapped array from this process, such as one that has been converted; reading it maps them
    again. Does nothing for an array that is not a view of a mapped file.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if not isinstance(base, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (start + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        base.madvise(mmap.MADV_DONTNEED, first, length)
