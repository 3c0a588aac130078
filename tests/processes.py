"""What the system says of processes that tests start and end."""

from __future__ import annotations

import psutil


def running(pid: int) -> bool:
    """Whether ``pid`` is alive. A zombie is not: it has ended, and only waits to be told of to its parent."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
