"""Mapped files and their pages."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from typing import Any

import numpy as np

from truffula.kernels.inputs import Array, Uint8

HUGE = 2 << 20
"""Bytes of a huge page, and its alignment."""
_MAP_FIXED, _MADV_COLLAPSE = 0x10, 25  # of Linux; Python's mmap does not name them


def map_file(fd: int, size: int, *, shared: bool = False) -> Uint8:
    """The first ``size`` bytes of an open file, writable: for all that map it when ``shared``, else privately.

    On Linux the mapping begins at a multiple of ``HUGE``: only then are huge pages of the file mapped as such. It ends
    with the last reference to the array. Raises ``OSError`` as the system gives it.
    """
    if sys.platform != "linux":
        access = mmap.ACCESS_WRITE if shared else mmap.ACCESS_COPY
        return np.frombuffer(mmap.mmap(fd, size, access=access), np.uint8)
    # Python's mmap cannot choose the address: it reserves the range (read-only, which commits no memory) and ends it.
    reserved = mmap.mmap(-1, size + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
    address = -(-np.frombuffer(reserved, np.uint8).ctypes.data // HUGE) * HUGE
    libc = _libc()
    flags = _MAP_FIXED | (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
    at, length, start = ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_size_t(0)
    if libc.mmap(at, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, start) != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return np.asarray(_Mapping(reserved, address, size))


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    return libc


class _Mapping:
    """Shows ``size`` bytes at ``address`` within ``reserved`` as a writable array, which keeps them mapped."""

    def __init__(self, reserved: mmap.mmap, address: int, size: int) -> None:
        self._reserved = reserved
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (size,), "data": (address, False)}


def map_new_file(fd: int, size: int) -> Uint8:
    """An open file that is empty or of zeros, made ``size`` bytes, all of them allocated, and mapped for all that map
    it.

    Its pages are huge where the system has them for files in memory (Linux 6.1), except for what does not fill one.
    They are so before anything is written: small pages first would be allocated, mapped one by one and copied. Raises
    ``OSError`` when there is no room.
    """
    os.ftruncate(fd, size)
    whole = size // HUGE * HUGE if sys.platform == "linux" else 0
    for start in range(0, whole, HUGE):
        os.pwrite(fd, b"\0", start)  # a range without any page is not made huge
    mapped = map_file(fd, size, shared=True)
    if whole:  # without huge pages (another kernel, a file on disk, fragmented memory) this changes nothing
        _libc().madvise(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(whole), _MADV_COLLAPSE)
    os.posix_fallocate(fd, 0, size)
    return mapped


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
