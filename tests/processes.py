"""What the system says of processes that tests start, freeze and end."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator

import psutil

from truffula.engine.process import ProcessClient


def running(pid: int) -> bool:
    """Whether ``pid`` is alive. A zombie is not: it has ended, and only waits to be told of to its parent."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def descendants(pid: int) -> list[int]:
    """``pid`` and the processes below it."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Stopped until the end, or until it is killed."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def watched(client: ProcessClient, **limits: float) -> Iterator[None]:
    """The engine that runs now is watched with these limits, until the end.

    A second of silence is enough to see that a frozen engine is noticed, and too little to ask of one that works on a
    busy machine: so such a limit holds for no more of a test than the freezing.
    """
    process = client._process
    assert process is not None
    usual = process._config
    process._config = dataclasses.replace(usual, **limits)
    try:
        yield
    finally:
        process._config = usual
