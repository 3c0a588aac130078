"""Memory after a start: garbage is collected once, and free pages are returned to the system."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def defer_gc() -> Iterator[None]:
    """No garbage collections until ``trim_memory``: nearly all that a start allocates (modules, vocabularies) stays."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def trim_memory() -> None:
    """Collect garbage, return the C library's free pages to the system (glibc), and enable collections. Milliseconds.

    Called at the end of a start, before requests arrive. Later collections skip what is here now: a full one of all
    objects takes as long as several steps.
    """
    gc.collect()
    gc.freeze()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        trim = None
    if trim is not None:
        trim(0)
    gc.enable()
