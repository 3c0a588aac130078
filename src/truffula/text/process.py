"""``TextWorker``: the server's side of one text worker process (``text/worker.py``)."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any

import msgspec

from truffula.environment import text_worker_environment
from truffula.errors import ErrorInfo, Overloaded, ShuttingDown, TruffulaError
from truffula.types import EngineInfo

Job = Callable[[Any, Any], Iterator[bytes]]
"""A module's function of a ``Worker`` and an argument, which a text worker imports and calls."""
READY, PART, END, FAILED = b"R", b"P", b"E", b"F"
"""The first byte of what a worker sends; a part of a result, or an ``ErrorInfo``, follows."""
START_TIMEOUT_S = 60.0
WALL_SECONDS = 10.0
"""Limit of a call's duration per second of its processor time: a busy machine gives it little."""
GRACE_S = 1.0
NO_PROCESS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
"""What the system answers when it has no place for another process."""
log = logging.getLogger(__name__)


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is started with.

    Attributes:
        info: Of the engine.
        texts_path: Where the model's text files are; None where it has none.
        texts_digest: Their digest when the server read them.
        templates: The model's chat templates, name → source; or the operator's in their place, ``replaced_templates``.
        special_tokens: What these may write, name → text.
        memory_bytes: What the worker may allocate beyond what it has after its start.
        niceness: Added to the process's own.
    """

    info: EngineInfo
    texts_path: str | None
    texts_digest: str
    templates: dict[str, str]
    special_tokens: dict[str, str]
    replaced_templates: bool = False
    memory_bytes: int
    niceness: int = 0


class WorkerStopped(TruffulaError):
    """A call took more time or memory than a text worker may use."""

    code = "overloaded"


class TextWorker:
    """One process, started with its first call, and started again after it was stopped. Used by one thread at a time.

    ``close`` may be called from any thread; a call that is running then ends with ``ShuttingDown``.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return None if self._process is None else self._process.pid

    def call(self, job: Job, argument: Any, seconds: float) -> list[bytes]:
        """What ``job`` yields for ``argument``. A call whose process is killed from outside is tried once more.

        Raises:
            WorkerStopped: It took longer than ``seconds`` of processor time, or more memory than allowed.
            Overloaded: Its process was killed from outside twice, or none can be started.
            ShuttingDown: The worker was closed.
            TruffulaError: What the function raised.
        """
        for _ in range(2):
            if (parts := self._try(job, argument, seconds)) is not None:
                return parts
        raise Overloaded("The process that read this request was killed twice, as when memory runs out. Try later.")

    def _try(self, job: Job, argument: Any, seconds: float) -> list[bytes] | None:
        """As ``call``; None when the process was killed from outside."""
        limit = WALL_SECONDS * seconds
        try:
            process = self._process
            if process is not None and process.poll() is not None:
                self.close()  # it was ended from outside since the last call
            connection = self._connection or self._start()
            _set_timeout(connection, limit)
            connection.send((job, argument, seconds))
            return _parts(connection, time.monotonic() + limit)
        except (OSError, EOFError) as error:
            process = self._process
            if process is None and isinstance(error, OSError) and error.errno in NO_PROCESS:
                raise Overloaded(f"No process can be started for this request: {error.strerror}. Try later.") from error
            if process is None:
                raise ShuttingDown("The server is shutting down.") from None
            if isinstance(error, TimeoutError | BlockingIOError):
                self.close()
                raise WorkerStopped(f"it took longer than {limit:g} s") from None
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            status = process.poll()
            self.close()
            if status == -signal.SIGKILL:
                log.warning("text worker %d was killed (SIGKILL: kill -9, or the kernel's lack of memory)", process.pid)
                return None
            raise _exceeded(status, seconds, self._setup.memory_bytes) from None

    def close(self) -> int | None:
        """Kill the process, if there is one. Idempotent. Returns its exit status."""
        self._connection = None  # closed with its last reference: a call in another thread may still read it
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        return process.wait()

    def _start(self) -> Connection:
        connection, theirs = Pipe()
        with theirs:
            # -P: the folder that the server was started in must not shadow modules.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "truffula.text.worker", "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=2, process_group=0,
                env=text_worker_environment(),
            )  # fmt: skip
        _set_timeout(connection, START_TIMEOUT_S)
        connection.send(self._setup)
        if _receive(connection, time.monotonic() + START_TIMEOUT_S) != READY:
            raise OSError("the text worker sent something else before it was ready")
        self._connection = connection
        return connection


def _set_timeout(connection: Connection, seconds: float) -> None:
    """Let a read or write of ``connection`` raise ``BlockingIOError`` when the worker does nothing for ``seconds``."""
    value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def _exceeded(status: int | None, seconds: float, memory_bytes: int) -> WorkerStopped:
    """Which limit a process exceeded, by the exit status that this gave it."""
    if status == -signal.SIGXCPU:
        return WorkerStopped(f"it took longer than {seconds:g} s of processor time")
    limit = memory_bytes >> 20
    return WorkerStopped(
        f"the text worker ended with exit status {status}, as it does when it takes more than {limit} MiB of memory"
    )


def _parts(connection: Connection, deadline: float) -> list[bytes]:
    """The parts of a call's result, until its end."""
    parts: list[bytes] = []
    while (frame := _receive(connection, deadline)) != END:
        if frame[:1] == FAILED:
            raise TruffulaError.from_info(msgspec.msgpack.decode(frame[1:], type=ErrorInfo))
        parts.append(frame[1:])
    return parts


def _receive(connection: Connection, deadline: float) -> bytes:
    """The next frame. Raises ``TimeoutError``, and ``EOFError`` when the worker has ended."""
    if not connection.poll(max(0.0, deadline - time.monotonic())):
        raise TimeoutError
    return connection.recv_bytes()
