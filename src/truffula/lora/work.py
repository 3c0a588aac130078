"""What a loading worker does, one load at a time. Started by ``engine.loader`` through ``lora.worker``.

Own process, so that a hostile or huge adapter costs the engine nothing: it runs at low priority, under limits of memory
and computing time, and can be killed. It imports neither torch nor transformers. Its socket is its life: when that
closes it ends, in the middle of a load too, and removes what an engine that was killed has left in its spools.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import resource
import socket
import sys
import threading
import time
from pathlib import Path

from truffula.errors import WireError
from truffula.lora import frames
from truffula.lora.job import WORKER_VERSION, LoadLimits, Order, Outcome, Ready, Setup, ToWorker, load, out_of_memory
from truffula.lora.spool import remove_abandoned

CLEAN_UP_TRIES, CLEAN_UP_PAUSE_S = 10, 0.05


def serve(fd: int, spools: list[Path]) -> int:
    """Serve the socket ``fd`` until it closes."""
    sock = socket.socket(fileno=fd)
    inbox: queue.SimpleQueue[ToWorker] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sock, inbox, spools), name="listen", daemon=True).start()
    setup = inbox.get()
    if not isinstance(setup, Setup) or setup.version != WORKER_VERSION:
        raise WireError("The engine speaks another version of the loading worker's protocol.")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    allowed = _data_bytes() + setup.limits.memory_bytes
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the engine went away in mid-answer
        sock.sendall(frames.encode(Ready()))
        while True:
            order = inbox.get()
            if not isinstance(order, Order):
                raise WireError("The setup frame was sent twice.")
            _limit_cpu(setup.limits)
            _limit_memory(allowed)
            # The adapter's file is mapped privately, hence counted as data: it comes on top once its size is known.
            try:
                result = load(order, setup, on_files=lambda nbytes: _limit_memory(allowed + nbytes))
            except MemoryError:
                break
            sock.sendall(frames.encode(Outcome(result=result)))
        # What it took is not all given back, and the next load has the same right to memory: a fresh worker does that.
        _limit_memory(_data_bytes() + (16 << 20))
        sock.sendall(frames.encode(Outcome(result=out_of_memory(order, setup), last=True)))
    return 0


def _listen(sock: socket.socket, inbox: queue.SimpleQueue[ToWorker], spools: list[Path]) -> None:
    """Frames into ``inbox``; the end of the stream ends the process, whatever the other thread is at."""
    reader: frames.Frames[ToWorker] = frames.Frames(ToWorker)
    status = 0
    try:
        while data := sock.recv(1 << 16):
            for frame in reader.feed(data):
                inbox.put(frame)
    except ConnectionError:
        status = 0  # the engine died without a word: the same as a closed socket
    except (WireError, MemoryError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        status = 1
    _clean_up(spools)
    os._exit(status)


def _clean_up(spools: list[Path]) -> None:
    """After an engine that was killed. Its lock may outlast its socket by a moment; a living one keeps it."""
    for _ in range(CLEAN_UP_TRIES):
        if all(remove_abandoned(spool) for spool in spools):
            return
        time.sleep(CLEAN_UP_PAUSE_S)


def _data_bytes() -> int:
    """Private writable memory of this process, in the system's words its data; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmData"))


def _limit_memory(data_bytes: int) -> None:
    """Allocations that take this process's data above so much raise ``MemoryError`` from here on.

    Where the system does not offer the limit, the sizes that are checked before anything is read still hold.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = data_bytes if hard == resource.RLIM_INFINITY else min(data_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _limit_cpu(limits: LoadLimits) -> None:
    """So many seconds of computing for the next load; past them the system ends the process by SIGXCPU."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(usage.ru_utime + usage.ru_stime + limits.cpu_s)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
