"""Memory that a start has freed goes back to the system; the C library would keep it for later."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager


def give_back() -> None:
    """Collect what is unreachable and have the C library return its free pages, where it can (glibc). Milliseconds."""
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim(0)


@contextmanager
def collecting_later() -> Iterator[None]:
    """No collections until ``settle``: what a start makes, modules and vocabularies, is there to stay."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def settle() -> None:
    """The start has made what it makes: what it took for that goes back, and collections go on."""
    give_back()
    gc.enable()
