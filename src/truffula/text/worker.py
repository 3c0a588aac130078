"""A text worker: ``python -m truffula.text.worker --fd N``, started by ``text/process.py``.

It runs one function at a time for the server: on text of any size, and on code of a model's folder (chat templates,
tokenizers). It has a limit of memory and is killed when a call takes too long. A function is named by its module and
gets the ``Worker`` and one argument; what it yields is sent as it comes. The process ends when its socket does.
"""

from __future__ import annotations

import importlib
import math
import os
import pickle
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from truffula.errors import TruffulaError, internal_error
from truffula.types import EngineInfo

READY, PART, END, FAILED = b"R", b"P", b"E", b"F"
_HEAD_BYTES = 5


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is started with.

    Attributes:
        info: Of the engine; ``texts_path`` is where the model's text files are, ``texts_digest`` their digest when the
            server read them, and ``templates`` replaces their chat templates.
        memory_bytes: What the worker may allocate beyond what it has after its start.
        niceness: Added to the process's own.
    """

    info: EngineInfo
    texts_path: str | None
    texts_digest: str
    templates: dict[str, str] | None
    memory_bytes: int
    niceness: int = 0


@dataclass
class Worker:
    """What a function gets: the ``setup``, and ``kept``, where functions keep what they made for later calls."""

    setup: Setup
    kept: dict[str, Any] = field(default_factory=dict)


class Call(msgspec.Struct, frozen=True):
    """``function`` is ``module:name`` of a function ``(Worker, argument) -> Iterator[bytes]``; ``argument`` is pickled:
    a worker trusts the server, which trusts no worker and decodes what comes back. The system ends the process after
    ``seconds`` of processor time (rounded up to a second).
    """

    function: str
    argument: bytes
    seconds: float


def send(sock: socket.socket, kind: bytes, body: bytes = b"") -> None:
    """Send one frame: its kind, the length of its body in 4 bytes, its body."""
    sock.sendall(kind + len(body).to_bytes(4, "big"))
    sock.sendall(body)


def receive(sock: socket.socket) -> tuple[bytes, bytes] | None:
    """The next frame's kind and body; None when the peer has closed."""
    head = _read(sock, _HEAD_BYTES)
    if head is None:
        return None
    body = _read(sock, int.from_bytes(head[1:], "big"))
    return None if body is None else (head[:1], body)


def _read(sock: socket.socket, nbytes: int) -> bytes | None:
    data = bytearray(nbytes)
    view = memoryview(data)
    while view:
        count = sock.recv_into(view)
        if not count:
            return None
        view = view[count:]
    return bytes(data)


def _limit_memory(extra: int) -> None:
    """Let this process allocate ``extra`` bytes more than it has now; further allocations fail."""
    with open("/proc/self/statm") as file:  # noqa: PTH123  # a pathlib import for one line
        now = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = now + extra if hard == resource.RLIM_INFINITY else min(hard, now + extra)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


def _limit_time(seconds: float) -> None:
    """Let this process use ``seconds`` more of processor time; then SIGXCPU ends it."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    wanted = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def serve(sock: socket.socket) -> None:
    """Answer calls until the socket closes."""
    first = receive(sock)
    if first is None:
        return
    setup = msgspec.msgpack.decode(first[1], type=Setup)
    os.nice(setup.niceness)
    if sys.platform == "linux":
        _limit_memory(setup.memory_bytes)
    worker = Worker(setup)
    send(sock, READY)
    while (frame := receive(sock)) is not None:
        call = msgspec.msgpack.decode(frame[1], type=Call)
        module, _, name = call.function.partition(":")
        _limit_time(call.seconds)
        try:
            function: Callable[[Worker, Any], Iterator[bytes]] = getattr(importlib.import_module(module), name)
            for part in function(worker, pickle.loads(call.argument)):
                send(sock, PART, part)
            send(sock, END)
        except MemoryError:
            return  # what is left of this process is in an unknown state; the server starts another
        except BaseException as error:  # noqa: BLE001  # the caller gets it; a Rust panic is no Exception
            send(sock, FAILED, msgspec.msgpack.encode(_described(error).info()))


def _described(error: BaseException) -> TruffulaError:
    return error if isinstance(error, TruffulaError) else internal_error(error)


def main(arguments: list[str] | None = None) -> Any:
    import argparse  # the server imports this module, too

    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    # Signals meant for the whole process group are the server's, which closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with socket.socket(fileno=parser.parse_args(arguments).fd) as sock:
        serve(sock)


if __name__ == "__main__":
    main()
