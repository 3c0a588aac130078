"""Loading adapters without making anybody wait: the engine's side of the loading workers.

    start(ref) ─► queue ─► worker process (niced, limited, killable) ─► image file in a spool ─► poll() ─► AdapterPool

A worker does one load at a time. There are up to ``max_workers``, begun when they are needed, so that one slow source
does not hold up the others; downloads from the Hub never take the last of them. A worker that dies, hangs or computes
for too long takes its own load with it and nothing else: what is queued goes to the next.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from truffula.errors import AdapterLoadError, ErrorInfo, WireError
from truffula.kernels.adapters import STORED, AdapterLayout
from truffula.kernels.program import Site
from truffula.lora import frames
from truffula.lora.job import WORKER_VERSION, FromWorker, LoadLimits, Order, Outcome, Ready, Setup
from truffula.lora.loading import LoadResult
from truffula.lora.spool import Spool
from truffula.lora.tables import BaseTable
from truffula.types import AdapterRef

logger = logging.getLogger(__name__)

IDLE_WORKER_S = 60.0
STARTUP_S = 60.0
_STDERR_BYTES = 4096


class _Worker:
    """One worker process and its socket. ``order`` is what it is at."""

    def __init__(self, setup: Setup, nice: int, now: float) -> None:
        ours, theirs = socket.socketpair()
        arguments = [str(theirs.fileno()), str(nice), *setup.spools]
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "truffula.lora.worker", *arguments],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # a terminal's Ctrl-C is the engine's affair
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        assert self.process.stderr is not None
        os.set_blocking(self.process.stderr.fileno(), False)
        self._sock = ours
        self._frames: frames.Frames[FromWorker] = frames.Frames(FromWorker)
        self._out = bytearray(frames.encode(setup))
        self._stderr = bytearray()
        self._eof = False
        self.order: Order | None = None
        self.cancelled = False
        self.ready = False
        self.spent = False
        self.deadline = now + STARTUP_S
        self.idle_since = now

    def give(self, order: Order, now: float, seconds: float) -> None:
        self.order = order
        self.cancelled = False
        self.deadline = now + seconds + (0.0 if self.ready else STARTUP_S)
        self._out += frames.encode(order)

    def pump(self) -> list[FromWorker]:
        """Send and receive what the socket takes now. ``WireError`` when the worker talks nonsense."""
        self._drain_stderr()
        received: list[FromWorker] = []
        try:
            with contextlib.suppress(BlockingIOError):  # the rest goes with the next call
                while self._out and not self._eof:
                    del self._out[: self._sock.send(self._out)]
            with contextlib.suppress(BlockingIOError):
                while data := self._sock.recv(1 << 16):
                    received += self._frames.feed(data)
                self._eof = True
        except OSError:
            self._eof = True
        return received

    def gone(self) -> bool:
        """Whether the process has ended, or has hung up and will be ended."""
        if self._eof and self.process.poll() is None:
            self.process.kill()
        return self.process.poll() is not None

    def reason(self, limits: LoadLimits) -> str:
        """Why it ended, in words."""
        code = self.process.returncode
        if code is None:
            return "it stopped responding"
        if code == -signal.SIGXCPU:
            return f"reading the adapter took more than {limits.cpu_s:g} s of computing"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"the loading worker was ended by {signal.Signals(-code).name}"
        return f"the loading worker ended with status {code}"

    def take_stderr(self) -> str:
        """What it wrote to stderr since the last call, the end of it."""
        self._drain_stderr()
        said = self._stderr.decode(errors="replace").strip()
        self._stderr.clear()
        return said

    def kill(self) -> None:
        self.process.kill()
        self.close()

    def close(self) -> None:
        """Hang up: a worker ends when its socket does."""
        self._sock.close()
        if self.process.stderr is not None:
            self.process.stderr.close()

    def _drain_stderr(self) -> None:
        assert self.process.stderr is not None
        with contextlib.suppress(BlockingIOError, ValueError, OSError):
            while data := os.read(self.process.stderr.fileno(), 4096):
                self._stderr += data
                del self._stderr[:-_STDERR_BYTES]


class LoadingWorker:
    """The ``AdapterLoader`` of a serving engine. One thread; no call blocks.

    Args:
        sites: The program's; sent to each worker once.
        layout: How the executable reads adapters, likewise.
        tables: Where the base's tables lie, by kind of site.
        model: The base's name, for messages.
        limits: Of one load.
        max_workers: Processes at most.
        nice: Added to the workers' niceness.
        offline, cache_dir: For adapters of the Hub.
        spool: Where images pass; None makes one in shared memory and the temporary folder.
        clock: Monotonic seconds.

    A worker is begun by a load that finds none free, and ended by ``poll`` after ``IDLE_WORKER_S`` without one: a
    server of the base alone has none, and no start waits for one.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        model: str,
        layout: AdapterLayout = STORED,
        tables: Mapping[str, BaseTable] | None = None,
        limits: LoadLimits | None = None,
        max_workers: int = 3,
        nice: int = 10,
        offline: bool = False,
        cache_dir: Path | None = None,
        spool: Spool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits or LoadLimits()
        self._max_workers = max_workers
        self._nice = nice
        self._clock = clock
        self._spool = spool or Spool()
        self._setup = Setup(
            sites=list(sites),
            layout=layout,
            tables=dict(tables or {}),
            model=model,
            spools=[str(folder) for folder in self._spool.folders],
            limits=self._limits,
            offline=offline,
            cache_dir=str(cache_dir) if cache_dir is not None else None,
        )
        self._queue: deque[Order] = deque()
        self._workers: list[_Worker] = []
        self._dying: list[subprocess.Popen[bytes]] = []
        self._results: list[LoadResult] = []
        self._next_ticket = 0
        self._closed = False

    def start(self, ref: AdapterRef) -> int:
        self._next_ticket += 1
        self._queue.append(Order(ticket=self._next_ticket, ref=ref))
        self._dispatch()
        return self._next_ticket

    def poll(self) -> list[LoadResult]:
        if self._closed:
            return []
        now = self._clock()
        for worker in list(self._workers):
            self._attend(worker, now)
        self._dying = [process for process in self._dying if process.poll() is None]
        self._dispatch()
        results, self._results = self._results, []
        return results

    def cancel(self, ticket: int) -> None:
        for order in list(self._queue):
            if order.ticket == ticket:
                self._queue.remove(order)
        for worker in self._workers:
            if worker.order is not None and worker.order.ticket == ticket:
                worker.cancelled = True  # it finishes: a restart would cost more than the rest of a load

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._queue.clear()
        for worker in self._workers:
            worker.close()
            self._dying.append(worker.process)
        self._workers.clear()
        self._spool.close()
        for process in self._dying:
            try:
                process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the system: it goes when that lets go
                    process.wait(timeout=1.0)

    def pids(self) -> list[int]:
        """The workers' process ids, for operators and tests."""
        return [worker.process.pid for worker in self._workers]

    def _attend(self, worker: _Worker, now: float) -> None:
        try:
            for frame in worker.pump():
                self._take(worker, frame, now)
        except WireError as error:
            self._lose(worker, f"the loading worker sent an unreadable message ({error.message})")
            return
        if worker.gone():
            with contextlib.suppress(WireError):
                for frame in worker.pump():  # what it said last
                    self._take(worker, frame, now)
            self._lose(worker, worker.reason(self._limits))
        elif now > worker.deadline and (worker.order is not None or not worker.ready):
            self._lose(worker, f"it took longer than {self._seconds(worker.order):g} s")
        elif worker.spent or (worker.order is None and now - worker.idle_since > IDLE_WORKER_S):
            self._retire(worker)

    def _take(self, worker: _Worker, frame: FromWorker, now: float) -> None:
        if isinstance(frame, Ready):
            if frame.version != WORKER_VERSION:
                raise WireError(f"it speaks version {frame.version}, this process speaks {WORKER_VERSION}")
            worker.ready = True
            return
        assert isinstance(frame, Outcome)
        order, result = worker.order, frame.result
        if order is None or result.ticket != order.ticket:
            raise WireError("an answer without a request")
        if result.image_path is not None and not self._spool.holds(Path(result.image_path)):
            raise WireError("an image outside the spool")
        if result.error is not None and result.error.data.get("unexpected"):
            logger.error("loading adapter %r failed unexpectedly:\n%s", order.ref.name, worker.take_stderr())
        worker.order = None
        worker.idle_since = now
        worker.spent = frame.last
        if worker.cancelled:
            self._spool.discard(order.ticket)
        else:
            self._results.append(result)

    def _lose(self, worker: _Worker, reason: str) -> None:
        """Remove a worker that died, hangs or breaks the protocol. Its load fails; the others are not touched."""
        order, stderr = worker.order, worker.take_stderr()
        worker.kill()
        self._workers.remove(worker)
        self._dying.append(worker.process)
        at = "it was idle" if order is None else f"loading adapter {order.ref.name!r} failed with it"
        said = f"; its last output:\n{stderr}" if stderr else ""
        logger.error("loading worker %d died: %s; %s%s", worker.process.pid, reason, at, said)
        if order is None:
            return
        self._spool.discard(order.ticket)
        if not worker.cancelled:
            self._results.append(_failed(order, reason, stderr))

    def _retire(self, worker: _Worker) -> None:
        worker.close()
        self._workers.remove(worker)
        self._dying.append(worker.process)

    def _dispatch(self) -> None:
        while self._queue:
            on_hub = sum(w.order is not None and w.order.ref.kind == "hub" for w in self._workers)
            hub_room = on_hub < max(1, self._max_workers - 1)
            order = next((o for o in self._queue if o.ref.kind != "hub" or hub_room), None)
            if order is None:
                return
            worker = next((w for w in self._workers if w.order is None and not w.spent), None)
            if worker is None and len(self._workers) >= self._max_workers:
                return
            self._queue.remove(order)
            now = self._clock()
            if worker is None:
                try:
                    worker = _Worker(self._setup, self._nice, now)
                except OSError as error:
                    self._results.append(_failed(order, f"no loading worker can be started ({error})", ""))
                    continue
                self._workers.append(worker)
            worker.give(order, now, self._seconds(order))

    def _seconds(self, order: Order | None) -> float:
        if order is None:
            return STARTUP_S
        return self._limits.download_s if order.ref.kind == "hub" else self._limits.wall_s


def _failed(order: Order, reason: str, stderr: str) -> LoadResult:
    error = ErrorInfo(
        code=AdapterLoadError.code,
        message=f"Loading adapter {order.ref.name!r} failed: {reason}.",
        param="adapter",
        data={"stderr": stderr} if stderr else {},
    )
    return LoadResult(ticket=order.ticket, error=error)
