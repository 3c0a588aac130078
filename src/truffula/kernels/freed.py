"""Memory that a start has freed goes back to the system; the C library would keep it for later."""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Collect what is unreachable and have the C library return its free pages, where it can (glibc). Milliseconds."""
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim(0)
