"""``ProcessClient``: the engine in a process of its own, started, watched and restarted by one supervising thread.

    any thread            submit, abort, adapters ──► Channel.post (never blocks; what is left over, supervise flushes)
    supervising thread    spawn ► Start ► Starting ► Ready ► Events, Stats, AdapterReply ──► Journal, Tickets
    one consumer          events() ◄── Journal

One life of the engine ends when its socket closes, or when the supervisor kills it because it stayed unhealthy (silent,
or stuck in a step) for ``hang_timeout_s``; an unhealthy engine is given no new requests. Then every open request ends
with ``engine_died``, the reason is logged as an error, and the next life begins after a pause that doubles, at most
``max_restarts`` times in ``restart_window_s``; until it is ready, requests are refused immediately. A later life
decides nothing anew: it gets what the first one found out (files, dtype, lengths, memory). When the model's files have
changed there is no next life.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from msgspec.structs import replace

from truffula.config import EngineConfig
from truffula.engine import wire
from truffula.engine.client import Tickets, refuse_uncrossable
from truffula.engine.journal import Journal
from truffula.engine.life import Life, manner
from truffula.errors import CheckpointChanged, EngineDied, ShuttingDown, TruffulaError, WireError, from_info
from truffula.logs import LogSettings
from truffula.types import (
    AdapterCommand,
    AdapterState,
    EngineInfo,
    EngineRequest,
    EngineRestarts,
    EngineStats,
    Progress,
    TokenEvent,
)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
logger = logging.getLogger(__name__)


class ProcessOpening:
    """An ``Opening`` of an engine in a process of its own, which begins at once."""

    def __init__(self, config: EngineConfig, progress: Progress | None, logs: LogSettings | None) -> None:
        self._client = ProcessClient(config, progress, logs)

    def files(self) -> Path | None:
        return self._client.located.result()

    def client(self) -> ProcessClient:
        self._client.wait()
        return self._client

    def close(self) -> None:
        self._client.close()


class ProcessClient:
    """An ``EngineClient`` whose engine may die: no caller waits forever. Call ``wait`` first.

    ``located`` is the path of the model's files, None when the first life ended before it knew.
    """

    info: EngineInfo

    def __init__(self, config: EngineConfig, progress: Progress | None = None, logs: LogSettings | None = None) -> None:
        self._config = config
        self._logs = logs
        self._progress = progress
        self._journal = Journal()
        self._tickets = Tickets()
        self._lock = threading.Lock()  # guards the fields down to _pinned
        self._life: Life | None = None  # the engine that takes requests
        self._refusal: TruffulaError = EngineDied("The engine is starting.")  # what requests get while there is none
        self._lost: TruffulaError | None = None
        self._restarts = EngineRestarts()
        self._closing = False
        self._pinned: dict[str, AdapterCommand] = {}
        self._wake_in, self._wake_out = os.pipe()
        os.set_blocking(self._wake_in, False)
        os.set_blocking(self._wake_out, False)
        self.located: Future[Path | None] = Future()
        self._started: Future[EngineInfo] = Future()  # of the first life, which later ones repeat
        self._started.add_done_callback(lambda _: self._locate(None))
        self._thread = threading.Thread(target=self._supervise, name="truffula-supervisor", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the engine is ready. Raises why it can't start, and closes then."""
        try:
            self.info = self._started.result()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int | None:
        """Of the engine's process; None while there is none."""
        life = self._life
        return None if life is None else life.pid

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        self._journal.open(requests)
        good = refuse_uncrossable(requests, self._journal)
        if good:
            refusal = self._post(wire.Submit(good))
            if refusal is not None:
                self._journal.fail([r.request_id for r in good], refusal)

    def abort(self, request_ids: Sequence[str]) -> None:
        # An engine that is gone has ended them already.
        self._post(wire.Abort(list(request_ids)))

    def events(self, timeout: float | None) -> list[TokenEvent]:
        return self._journal.take(timeout)

    def listen(self, listener: Callable[[], None] | None) -> bool:
        self._journal.listen(listener)
        return True

    def adapters(self, command: AdapterCommand, timeout: float = 300) -> list[AdapterState]:
        ticket, future = self._tickets.take()
        refusal = self._post(wire.Adapter(ticket, command))
        if refusal is not None:
            self._tickets.answer(ticket, (), refusal)
        states = self._tickets.wait(ticket, future, timeout)
        if command.ref is not None and command.action != "list":
            with self._lock:
                self._pinned.pop(command.ref.name, None)
                if command.action == "load" and command.pinned:
                    self._pinned[command.ref.name] = command
        return states

    def stats(self) -> EngineStats:
        life = self._life
        return EngineStats(monotonic=time.monotonic()) if life is None or life.stats is None else life.stats

    def alive(self) -> bool:
        life = self._life
        return life is not None and life.healthy(time.monotonic())

    def restarts(self) -> EngineRestarts:
        return self._restarts

    def lost(self) -> TruffulaError | None:
        return self._lost

    def close(self) -> None:
        with self._lock:
            self._closing = True
            self._refusal = ShuttingDown("The engine is closed.")
        self._wake()
        self._thread.join()
        self._journal.close(self._refusal)
        with self._lock:
            for fd in (self._wake_in, self._wake_out):
                if fd >= 0:
                    os.close(fd)
            self._wake_in = self._wake_out = -1

    def _post(self, frame: wire.Frame) -> TruffulaError | None:
        """Send to the engine that takes requests; or why that can't be."""
        with self._lock:
            if self._life is None:
                return self._refusal
            # Ends are told even to an engine that hangs: should it go on, nobody wants them any more.
            if not isinstance(frame, wire.Abort) and not self._life.healthy(time.monotonic()):
                return EngineDied("The engine does not respond; it is killed and restarted unless it responds soon.")
            try:
                if self._life.channel.post(frame):
                    self._wake_now()
            except wire.Disconnected:
                return EngineDied("The engine has just died; it is being restarted.")
            except WireError as error:
                return error
        return None

    def _wake(self) -> None:
        with self._lock:
            self._wake_now()

    def _wake_now(self) -> None:
        if self._wake_out >= 0:
            with contextlib.suppress(BlockingIOError):  # full: it will wake anyway
                os.write(self._wake_out, b"w")

    def _supervise(self) -> None:
        try:
            self._live_on()
        except BaseException as error:  # noqa: BLE001  callers must not wait forever for a thread that has died
            traceback.print_exception(error, file=sys.stderr)
            self._give_up(EngineDied(f"The supervisor failed: {type(error).__name__}: {error}."))
            if not self._started.done():
                self._started.set_exception(error)

    def _live_on(self) -> None:
        """Run one life after another until close, or until the engine may not be restarted."""
        deaths: deque[float] = deque()
        window = self._config.restart_window_s
        while True:
            pid, error = self._live()
            if self._closing or not self._started.done():
                self._refuse(error)
                if not self._started.done():
                    self._started.set_exception(error)
                return
            self._restarts = replace(self._restarts, last_reason=error.message)
            now = time.monotonic()
            deaths.append(now)
            while now - deaths[0] > window:
                deaths.popleft()
            count, most = len(deaths), self._config.max_restarts
            if isinstance(error, CheckpointChanged):
                _log_death(pid, error, self._give_up(error), "not restarted, because it would not serve the same model")
                return
            if count > most:
                died = f"it died {count} time{'s' * (count != 1)} within {window:g} s, and --max-restarts is {most}"
                final = EngineDied(f"The engine is not restarted: {died}. Last: {error}", **error.data)
                _log_death(pid, error, self._give_up(final), f"not restarted: {died}")
                return
            pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (count - 1))
            failed = self._refuse(EngineDied(f"The engine died and is being restarted: {error}", **error.data))
            self._restarts = replace(self._restarts, count=self._restarts.count + 1)
            _log_death(pid, error, failed, f"restart {count} of {most} within {window:g} s begins in {pause:g} s")
            if self._paused(pause):
                return

    def _paused(self, seconds: float) -> bool:
        """Wait before the next life; True when close was called."""
        deadline = time.monotonic() + seconds
        while not self._closing and (left := deadline - time.monotonic()) > 0:
            self._wait_for_wake(left)
        return self._closing

    def _wait_for_wake(self, seconds: float) -> None:
        waiter = select.poll()
        waiter.register(self._wake_in, select.POLLIN)
        if waiter.poll(seconds * 1000):
            self._drain_wakes()

    def _drain_wakes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_in, 4096):
                pass

    def _give_up(self, error: TruffulaError) -> int:
        failed = self._refuse(error)
        if not self._closing:
            self._lost = error
        return failed

    def _refuse(self, error: TruffulaError) -> int:
        """Take no requests from now on and end those that are open; returns how many that were."""
        with self._lock:
            self._life = None
            if not self._closing:
                self._refusal = error
            refusal = self._refusal
        self._tickets.fail_all(refusal)
        return self._journal.fail_all(refusal)

    def _live(self) -> tuple[int | None, TruffulaError]:
        """Run one engine from its start to its end; returns its process id and why it ended."""
        try:
            life = Life(self._config)
        except OSError as error:
            return None, EngineDied(f"The engine process cannot be started: {error}.")
        reason: TruffulaError | None = None
        try:
            reason = self._follow(life)
        except wire.Disconnected:
            pass
        except WireError as error:
            reason = error
            life.kill()
        if self._closing:
            life.stop()
        status = life.end()
        if reason is None:
            reason = EngineDied(f"The engine process ended {manner(status)}.", status=status)
        return life.pid, reason

    def _follow(self, life: Life) -> TruffulaError | None:
        """Take in what the engine says until it ends, or until close. Returns the reason, when it told one."""
        waiter = select.poll()
        waiter.register(self._wake_in, select.POLLIN)
        first = self._started.result() if self._started.done() else None
        life.channel.post(wire.Start(self._config, self._logs, first))
        while not self._closing:
            waiter.register(life.channel, select.POLLIN | (select.POLLOUT if life.channel.unsent else 0))
            ready = dict(waiter.poll(max(0.0, life.patience(time.monotonic())) * 1000))
            if self._wake_in in ready:
                self._drain_wakes()
            if life.channel.fileno() in ready:
                life.channel.flush()
                frames = life.channel.receive()
                if frames is None:
                    return None
                for frame in frames:
                    if isinstance(frame, wire.Died):
                        return from_info(frame.error)
                    self._handle(life, frame)
            hang = life.hang(time.monotonic())
            if hang is not None:
                life.kill()
                return EngineDied(hang)
        return None

    def _handle(self, life: Life, frame: wire.FromEngine) -> None:
        life.heard(time.monotonic())
        match frame:
            case wire.Events(events):
                self._journal.deliver(events)
            case wire.Stats(stats, step_since):
                life.stats, life.step_since = stats, step_since
            case wire.AdapterReply(ticket, states, error):
                self._tickets.answer(ticket, states, None if error is None else from_info(error))
            case wire.Starting(stage, done, total):
                if life.progressed((stage, done, total)) and self._progress is not None:
                    self._progress(stage, done, total)
            case wire.Located(path):
                self._locate(Path(path))
            case wire.Ready(info):
                self._ready(life, info)
            case _:
                raise WireError(f"A {type(frame).__name__} frame is not expected here.")

    def _locate(self, path: Path | None) -> None:
        if not self.located.done():
            self.located.set_result(path)

    def _ready(self, life: Life, info: EngineInfo) -> None:
        life.ready = True
        with self._lock:
            self._life = life
            pinned = list(self._pinned.values())
        for command in pinned:
            # No caller waits for these; one that fails now shows in the list of adapters.
            life.channel.post(wire.Adapter(0, command))
        if not self._started.done():
            self._started.set_result(info)
        else:
            logger.warning("engine process %d is ready and accepts requests again", life.pid)


def _log_death(pid: int | None, reason: TruffulaError, failed: int, then: str) -> None:
    logger.error(
        "engine process %s died: %s %d open request%s failed; %s",
        "-" if pid is None else pid, reason.message, failed, "s" * (failed != 1), then,
    )  # fmt: skip
