"""``TextWorker``: the server's side of one text worker process (``text/worker.py``)."""

from __future__ import annotations

import contextlib
import pickle
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import msgspec

from truffula.environment import text_worker_environment
from truffula.errors import ErrorInfo, TruffulaError
from truffula.text.worker import END, FAILED, PART, READY, Call, Setup, receive, send

START_TIMEOUT_S = 60.0
WALL_SECONDS = 10.0
"""Limit of a call's duration per second of its processor time: a busy machine gives it little."""
GRACE_S = 1.0


class WorkerStopped(TruffulaError):
    """A call took more time or memory than a text worker may use, or its process was ended from outside."""

    code = "overloaded"


class TextWorker:
    """One process, started with its first call, and started again after it was stopped. Used by one thread at a time.

    ``close`` may be called from any thread; a call that is running then ends with ``WorkerStopped``.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = msgspec.msgpack.encode(setup)
        self._memory_bytes = setup.memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return None if self._process is None else self._process.pid

    def call(self, function: str, argument: Any, seconds: float) -> list[bytes]:
        """What ``function`` (``module:name``) yields for ``argument``.

        Raises:
            WorkerStopped: It took longer than ``seconds`` of processor time, or more memory than allowed.
            TruffulaError: What the function raised.
        """
        try:
            sock = self._started()
            call = msgspec.msgpack.encode(Call(function, pickle.dumps(argument), seconds))
            return self._exchange(sock, call, WALL_SECONDS * seconds)
        except TimeoutError:
            self.close()
            raise WorkerStopped(f"it took longer than {WALL_SECONDS * seconds:g} s") from None
        except (OSError, EOFError):
            raise self._ended(seconds) from None

    def close(self) -> int | None:
        """Kill the process, if there is one. Idempotent. Returns its exit status."""
        process, self._process = self._process, None
        sock, self._socket = self._socket, None
        status = None
        if process is not None:
            process.kill()
            status = process.wait()
        if sock is not None:
            sock.close()
        return status

    def _exchange(self, sock: socket.socket, call: bytes, seconds: float) -> list[bytes]:
        deadline = time.monotonic() + seconds
        sock.settimeout(seconds)
        send(sock, b"C", call)
        parts: list[bytes] = []
        while True:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            frame = receive(sock)
            if frame is None:
                raise EOFError
            kind, body = frame
            if kind == PART:
                parts.append(body)
            elif kind == END:
                return parts
            elif kind == FAILED:
                raise TruffulaError.from_info(msgspec.msgpack.decode(body, type=ErrorInfo))

    def _ended(self, seconds: float) -> WorkerStopped:
        """Clean up after a process that has ended during a call, and say why."""
        process = self._process
        if process is None:
            return WorkerStopped("the server is closing")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        status = self.close()
        if status == -signal.SIGXCPU:
            return WorkerStopped(f"it took longer than {seconds:g} s of processor time")
        return WorkerStopped(f"it took more than {self._memory_bytes >> 20} MiB of memory (exit status {status})")

    def _started(self) -> socket.socket:
        if self._socket is not None:
            return self._socket
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # -P: the folder that the server was started in must not shadow modules.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "truffula.text.worker", "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=2, process_group=0,
                env=text_worker_environment(),
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._socket = ours
        ours.settimeout(START_TIMEOUT_S)
        send(ours, b"S", self._setup)
        frame = receive(ours)
        if frame is None or frame[0] != READY:
            raise OSError("the text worker ended while it started")
        return ours
