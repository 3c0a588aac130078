"""``LoadingWorker``: starts, supervises and stops the loading worker processes, for the engine.

    start(ref) ─► queue ─► worker process (niced, limited, killable) ─► image in a staging folder ─► poll() ─► pool

A worker does one load at a time. Workers are started when they are needed: up to ``max_workers`` for local adapters,
and up to ``MAX_DOWNLOADS`` for others, of which one origin (a host, a bucket, the Hub) has at most
``ORIGIN_DOWNLOADS``; beyond them each origin still has one, up to ``MOST_DOWNLOADS`` in all. So slow sources delay
neither local adapters nor other sources. When a worker dies, hangs or computes for too long, only its own load fails;
queued loads go to another worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from truffula.errors import AdapterLoadError, WireError
from truffula.frames import Channel, Disconnected
from truffula.lora.locations import origin_of
from truffula.lora.staging import Staging
from truffula.lora.worker import VERSION, LoadLimits, LoadRequest, LoadResponse, Setup
from truffula.types import AdapterRef

logger = logging.getLogger(__name__)

NICE = 5
"""Added to the niceness of the workers: three that compute take a third of two cores from a busy engine."""
IDLE_WORKER_S = 60.0
STARTUP_S = 60.0
MAX_DOWNLOADS, ORIGIN_DOWNLOADS, MOST_DOWNLOADS = 8, 4, 16
_STDERR_BYTES = 4096


class _Worker:
    """One worker process and its socket. ``request`` is its current load."""

    def __init__(self, setup: Setup, folders: Sequence[Path]) -> None:
        near, far = socket.socketpair()
        with contextlib.ExitStack() as undo, far:
            undo.callback(near.close)
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "truffula.lora.worker", str(far.fileno()), *map(str, folders)],
                pass_fds=(far.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                # The engine handles a terminal's Ctrl-C. A session of its own would do, too, but Linux may share the
                # processors out by sessions, and then niceness has no effect against the engine.
                process_group=0,
            )
            undo.pop_all()
        with contextlib.suppress(OSError):  # the process has ended already
            os.setpriority(os.PRIO_PROCESS, self.process.pid, os.getpriority(os.PRIO_PROCESS, 0) + NICE)
        assert self.process.stderr is not None
        os.set_blocking(self.process.stderr.fileno(), False)
        self._channel = Channel(near, msgspec.msgpack.Decoder(LoadResponse).decode, VERSION)
        self._stderr = bytearray()
        self._eof = False
        self.request: LoadRequest | None = None
        self.exhausted = False
        self.deadline = self.idle_since = float("inf")
        self.send(setup)

    def send(self, frame: Setup | LoadRequest) -> None:
        """Send as much as the socket accepts; ``io`` sends the rest."""
        try:
            self._channel.post(frame)
        except Disconnected:
            self._eof = True

    def io(self) -> list[LoadResponse]:
        """Send and receive what the socket accepts and has. ``WireError`` when a frame is malformed."""
        self._drain_stderr()
        received: list[LoadResponse] = []
        with contextlib.suppress(Disconnected):
            self._channel.flush()
        while not self._eof and (frames := self._channel.receive()) != []:
            received += frames or []
            self._eof = frames is None
        return received

    @property
    def unsent(self) -> bool:
        """Whether the socket has not taken all that was sent: the setup of a model of many sites."""
        return bool(self._channel.unsent)

    def poll_events(self) -> tuple[int, int]:
        """Its descriptor, and the events after which ``io`` has something to do."""
        return self._channel.fileno(), select.POLLIN | (select.POLLOUT if self.unsent else 0)

    def ended(self) -> bool:
        """Whether the process has ended. One that has closed its socket is killed."""
        if self._eof and self.process.poll() is None:
            self.process.kill()
        return self.process.poll() is not None

    def describe_exit(self, limits: LoadLimits) -> str:
        """Why it ended."""
        code = self.process.returncode
        if code is None:
            return "it stopped responding"
        if code == -signal.SIGXCPU:
            return f"preparing the adapter took more than {limits.cpu_s:g} s of computing (--adapter-load-timeout)"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"the loading worker was ended by {signal.Signals(-code).name}"
        return f"the loading worker ended with status {code}"

    def take_stderr(self) -> str:
        """The end of what it wrote to stderr since the last call."""
        self._drain_stderr()
        text = self._stderr.decode(errors="replace").strip()
        self._stderr.clear()
        return text

    def close(self) -> None:
        """Close the socket: the worker ends then."""
        self._channel.close()
        if self.process.stderr is not None:
            self.process.stderr.close()

    def _drain_stderr(self) -> None:
        assert self.process.stderr is not None
        with contextlib.suppress(BlockingIOError, ValueError, OSError):
            while data := os.read(self.process.stderr.fileno(), 4096):
                self._stderr += data
                del self._stderr[:-_STDERR_BYTES]


class LoadingWorker:
    """Loads adapters in other processes. One thread; no call blocks: responses come through ``poll``.

    Args:
        setup: The base, the layout and the limits of all loads; sent to each worker once.
        max_workers: Processes that load local adapters at most.
        staging_roots: Where to make the staging folders; None: in shared memory and the temporary folder.
        clock: Monotonic seconds.

    A worker is started when a load finds none free, or by ``prepare``. After ``IDLE_WORKER_S`` without a load ``poll``
    stops all but one. The staging folders are made with the first worker. A server that has no adapters has neither.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        max_workers: int = 3,
        staging_roots: Sequence[Path] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._setup = setup
        self._max_workers = max_workers
        self._clock = clock
        self._staging_roots = staging_roots
        self._staging: Staging | None = None
        self._queue: deque[LoadRequest] = deque()
        self._paused = False
        self._retried: set[int] = set()  # tickets of open loads
        self._workers: list[_Worker] = []
        self._ending: list[subprocess.Popen[bytes]] = []
        self._responses: list[LoadResponse] = []
        self._next_ticket = 0

    def start(self, ref: AdapterRef, has: str = "") -> int:
        """Queue one load; returns its ticket. ``has``: as in ``LoadRequest``."""
        self._next_ticket += 1
        self._queue.append(LoadRequest(ticket=self._next_ticket, ref=ref, has=has))
        self._dispatch()
        return self._next_ticket

    def prepare(self) -> None:
        """Start a worker where there is none, so that the first load waits for no start."""
        if self._workers:
            return
        try:
            self._start_worker()
        except OSError as error:
            logger.warning("no loading worker can be started now (%s); each load tries it again", error)

    def poll(self, *, paused: bool = False) -> list[LoadResponse]:
        """Loads that ended since the last call, each ticket once. ``paused``: until the next call no queued load is
        begun.
        """
        self._paused = paused
        now = self._clock()
        for worker in list(self._workers):
            self._poll_worker(worker, now)
        self._ending = [process for process in self._ending if process.poll() is None]
        self._dispatch()
        responses, self._responses = self._responses, []
        return responses

    def poll_fds(self) -> dict[int, int]:
        """File descriptors and ``select.poll`` events that announce work for ``poll``."""
        busy = (worker for worker in self._workers if worker.request is not None or worker.unsent)
        return dict(worker.poll_events() for worker in busy)

    def poll_timeout(self) -> float | None:
        """Seconds until ``poll`` has work without an event on ``poll_fds``; None: never."""
        return 0.0 if self._responses else None

    def cancel(self, ticket: int) -> None:
        """Remove a load from the queue. One that a worker has begun ends and is reported: a restart would cost more
        than the rest of a load.
        """
        self._queue = deque(request for request in self._queue if request.ticket != ticket)

    def close(self) -> None:
        """End everything. Idempotent."""
        self._queue.clear()
        for worker in list(self._workers):
            self._stop(worker)
        if self._staging is not None:
            self._staging.close()
        for process in self._ending:
            try:
                process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel: it ends when that returns
                    process.wait(timeout=1.0)

    def pids(self) -> list[int]:
        """The workers' process ids, for operators and tests."""
        return [worker.process.pid for worker in self._workers]

    def _poll_worker(self, worker: _Worker, now: float) -> None:
        try:
            for response in worker.io():
                self._on_response(worker, response, now)
        except WireError as error:
            self._on_worker_death(worker, f"the loading worker sent an unreadable message ({error.message})")
            return
        if worker.exhausted:
            self._stop(worker)
        elif worker.ended():
            with contextlib.suppress(WireError):
                for response in worker.io():  # frames sent before it ended
                    self._on_response(worker, response, now)
            code = worker.process.returncode
            killed = code is not None and code < 0 and code != -signal.SIGXCPU
            self._on_worker_death(worker, worker.describe_exit(self._setup.limits), retry=killed)
        elif worker.request is not None and now > worker.deadline:
            self._on_worker_death(worker, f"it took longer than {self._seconds(worker.request):g} s")
        elif worker.request is None and now - worker.idle_since > IDLE_WORKER_S and len(self._workers) > 1:
            self._stop(worker)  # the last one stays: a start takes longer than most loads

    def _on_response(self, worker: _Worker, response: LoadResponse, now: float) -> None:
        request = worker.request
        if request is None or response.ticket != request.ticket:
            raise WireError("a response without a request")
        assert self._staging is not None
        if response.image_path is not None and not self._staging.holds(Path(response.image_path)):
            raise WireError("an image outside the staging folders")
        if response.error is not None and response.error.data.get("unexpected"):
            logger.error("loading adapter %r failed unexpectedly:\n%s", request.ref.name, worker.take_stderr())
        worker.request = None
        worker.idle_since = now
        worker.exhausted = response.last
        self._retried.discard(request.ticket)
        self._responses.append(response)

    def _on_worker_death(self, worker: _Worker, reason: str, *, retry: bool = False) -> None:
        """Remove a worker that died, hangs or breaks the protocol. Its load fails; the others are not affected.

        ``retry``: the process was killed from outside, which counts against the adapter only if it happens again.
        """
        request, stderr = worker.request, worker.take_stderr()
        worker.process.kill()
        self._stop(worker)
        output = f"; its last output:\n{stderr}" if stderr else ""
        if request is None:
            logger.error("loading worker %d died: %s; it was idle%s", worker.process.pid, reason, output)
            return
        assert self._staging is not None
        self._staging.discard(request.ticket)
        retry = retry and request.ticket not in self._retried
        outcome = "is tried again" if retry else "failed with it"
        logger.error(
            "loading worker %d died: %s; loading adapter %r %s%s",
            worker.process.pid, reason, request.ref.name, outcome, output,
        )  # fmt: skip
        if retry:
            self._retried.add(request.ticket)
            self._queue.appendleft(request)
        else:
            self._retried.discard(request.ticket)
            self._responses.append(_failed(request, reason, stderr))

    def _stop(self, worker: _Worker) -> None:
        worker.close()
        self._workers.remove(worker)
        self._ending.append(worker.process)

    def _dispatch(self) -> None:
        """Send queued loads to free workers; start workers for the others, as many as are allowed."""
        while self._queue and not self._paused:
            loading = Counter(origin_of(worker.request.ref) for worker in self._workers if worker.request is not None)
            request = next((one for one in self._queue if self._has_room(one.ref, loading)), None)
            if request is None:
                return
            worker = next((w for w in self._workers if w.request is None and not w.exhausted), None)
            self._queue.remove(request)
            startup_s = 0.0
            if worker is None:
                try:
                    worker = self._start_worker()
                except OSError as error:
                    self._responses.append(_failed(request, f"no loading worker can be started ({error})", ""))
                    continue
                startup_s = STARTUP_S
            worker.request = request
            worker.deadline = self._clock() + startup_s + self._seconds(request)
            worker.send(request)

    def _has_room(self, ref: AdapterRef, loading: Counter[str]) -> bool:
        """Whether another load of this kind may begin. ``loading``: how many there are by origin."""
        origin = origin_of(ref)
        if origin == "local":
            return loading[origin] < self._max_workers
        downloads = loading.total() - loading["local"]
        share = ORIGIN_DOWNLOADS if downloads < MAX_DOWNLOADS else 1
        return loading[origin] < share and downloads < MOST_DOWNLOADS

    def _start_worker(self) -> _Worker:
        if self._staging is None:
            self._staging = Staging(self._staging_roots)
        worker = _Worker(self._setup, self._staging.folders)
        self._workers.append(worker)
        return worker

    def _seconds(self, request: LoadRequest) -> float:
        limits = self._setup.limits
        return limits.wall_s if request.ref.kind == "local" else limits.download_s


def _failed(request: LoadRequest, reason: str, stderr: str) -> LoadResponse:
    error = AdapterLoadError(f"Loading adapter {request.ref.name!r} failed: {reason}.", param="adapter")
    error.data = {"stderr": stderr} if stderr else {}
    return LoadResponse(ticket=request.ticket, error=error.info())
