"""``ProcessClient``: the engine in a process of its own, started, watched and restarted by one supervising thread.

    any thread            submit, abort, adapters ──► Channel.post (never blocks; the supervisor flushes what is left)
    supervising thread    spawn ► Start ► Starting ► Ready
    it or a loop          Events, Stats, AdapterReply ──► Journal, PendingCommands
    one consumer          events() ◄── Journal

Where an event loop listens, it reads the frames of a ready engine itself; the supervisor reads what the loop has left
for half a second, so that a loop that is busy does not make the engine look silent.

An engine process ends when its socket closes (it also exits by itself when its device is lost or a step breaks it), or
when the supervisor kills it because it stayed unhealthy (silent, or stuck in a step) for ``hang_timeout_s``; an
unhealthy engine gets no new requests. Then every open request ends with ``engine_died``, the reason is logged as an
error, and the next process starts after a pause that doubles, at most ``max_restarts`` times in ``restart_window_s``;
until it is ready, requests are refused immediately. A restarted engine gets what the first one reported (files, dtype,
lengths, memory) and decides nothing anew. When the model's files have changed, it is not restarted.
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
from typing import TYPE_CHECKING

from msgspec.structs import replace

from truffula.config import EngineConfig
from truffula.engine import wire
from truffula.engine.engine_process import EngineProcess, describe_exit
from truffula.engine.journal import Journal, PendingCommands
from truffula.engine.loop_reader import LoopReader
from truffula.errors import (
    CheckpointChanged,
    EngineDied,
    InvalidRequest,
    ShuttingDown,
    TruffulaError,
    WireError,
)
from truffula.frames import Disconnected, Frame
from truffula.logs import LogSettings
from truffula.types import (
    MAX_VOCABULARIES,
    AdapterCommand,
    AdapterState,
    EngineAction,
    EngineInfo,
    EngineRequest,
    EngineRestarts,
    EngineStats,
    Progress,
    TokenEvent,
    Vocabulary,
)

if TYPE_CHECKING:  # not needed before the engine's process starts
    import asyncio

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
logger = logging.getLogger(__name__)


class ProcessClient:
    """An ``EngineClient`` that restarts an engine that died; usable after ``wait_until_ready``."""

    info: EngineInfo

    def __init__(self, config: EngineConfig, progress: Progress | None = None, logs: LogSettings | None = None) -> None:
        self._config = config
        self._logs = logs
        self._progress = progress
        self._journal = Journal()
        self._commands = PendingCommands()
        self._lock = threading.Lock()  # guards the fields down to _vocabularies
        self._process: EngineProcess | None = None  # the one that takes requests
        self._unavailable: TruffulaError = EngineDied("The engine is starting.")  # of requests while there is none
        self._fatal_error: TruffulaError | None = None
        self._restarts = EngineRestarts()
        self._closing = threading.Event()
        self._loop_reader: LoopReader | None = None
        self._pinned: dict[str, AdapterCommand] = {}
        self._vocabularies: dict[str, Vocabulary] = {}
        self._wake_in, self._wake_out = os.pipe()
        os.set_blocking(self._wake_in, False)
        os.set_blocking(self._wake_out, False)
        self._model_path: Future[Path | None] = Future()
        self._started: Future[EngineInfo] = Future()  # of the first process; later ones repeat it
        self._started.add_done_callback(lambda _: self._set_model_path(None))
        self._thread = threading.Thread(target=self._run, name="truffula-supervisor", daemon=True)
        self._thread.start()

    def model_path(self) -> Path | None:
        """Where the model's files are, as soon as the engine has opened them; None when it cannot start."""
        return self._model_path.result()

    def wait_until_ready(self) -> ProcessClient:
        """Wait for the first engine; returns this client. Raises why it cannot start."""
        try:
            self.info = self._started.result()
        except BaseException:
            self.close()
            raise
        return self

    @property
    def pid(self) -> int | None:
        """Process id of the engine; None while there is none."""
        process = self._process
        return None if process is None else process.pid

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        with self._lock:
            self._vocabularies.pop(vocabulary.key, None)
            self._vocabularies[vocabulary.key] = vocabulary
            while len(self._vocabularies) > MAX_VOCABULARIES:
                del self._vocabularies[next(key for key in self._vocabularies if key)]
        self._post(wire.SetVocabulary(vocabulary))  # an engine that is not ready gets it when it is

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        self._journal.open(requests)
        groups: list[wire.RequestGroup] = []
        for same in wire.group_requests(requests):
            try:
                groups.append(wire.encode_group(same))
            except InvalidRequest as error:
                self._journal.fail([request.request_id for request in same], error)
        if groups:
            post_error = self._post(wire.Submit(groups))
            if post_error is not None:
                self._journal.fail([request_id for group in groups for request_id in group.request_ids], post_error)

    def abort(self, request_ids: Sequence[str]) -> None:
        self._post(wire.Abort(list(request_ids)))  # the requests of an engine that died have ended already

    def wait(self, timeout: float | None) -> bool:
        return self._journal.wait(timeout)

    def events(self, timeout: float | None) -> list[TokenEvent]:
        return self._journal.take(timeout)

    def listen(self, listener: Callable[[], None] | None, loop: asyncio.AbstractEventLoop | None = None) -> bool:
        with self._lock:
            before, self._loop_reader = self._loop_reader, None
            if listener is not None and loop is not None:
                self._loop_reader = LoopReader(loop, listener, self._receive)
                listener = self._loop_reader.notify
                if self._process is not None:
                    self._loop_reader.attach(self._process)
        if before is not None:
            before.detach()
        self._journal.listen(listener)
        return True

    def adapters(self, command: AdapterCommand, timeout: float = 300) -> list[AdapterState]:
        states = self._command(lambda number: wire.Adapter(number, command), timeout)
        if command.ref is not None and command.action != "list":
            with self._lock:
                before = self._pinned.pop(command.ref.name, None)
                if command.action == "load" and (command.pinned or before is not None):
                    self._pinned[command.ref.name] = replace(command, pinned=True)
        return states

    def control(self, action: EngineAction) -> None:
        self._command(lambda number: wire.Control(number, action), None)

    def _command(self, frame: Callable[[int], Frame], timeout: float | None) -> list[AdapterState]:
        """Send the command that ``frame`` makes of its number, and wait for the answer."""
        number, reply = self._commands.open()
        error = self._post(frame(number))
        if error is not None:
            self._commands.answer(number, (), error)
        return self._commands.wait(number, reply, timeout)

    def stats(self) -> EngineStats:
        process = self._process
        return EngineStats(monotonic=time.monotonic()) if process is None or process.stats is None else process.stats

    def alive(self) -> bool:
        process = self._process
        return process is not None and process.healthy(time.monotonic())

    def restarts(self) -> EngineRestarts:
        return self._restarts

    def fatal_error(self) -> TruffulaError | None:
        return self._fatal_error

    def close(self) -> None:
        with self._lock:
            self._closing.set()
            self._unavailable = ShuttingDown("The engine is closed.")
            self._wake()
        self._thread.join()
        self._journal.close(self._unavailable)
        with self._lock:
            for fd in (self._wake_in, self._wake_out):
                if fd >= 0:
                    os.close(fd)
            self._wake_in = self._wake_out = -1

    def _post(self, frame: Frame) -> TruffulaError | None:
        """Send ``frame`` to the engine process; returns the error instead when that is not possible."""
        with self._lock:
            if self._process is None:
                return self._unavailable
            # Aborts are sent to an unresponsive engine too: should it recover, it must not compute their requests.
            if not isinstance(frame, wire.Abort) and not self._process.healthy(time.monotonic()):
                return EngineDied("The engine does not respond; it is killed and restarted unless it responds soon.")
            try:
                if self._process.channel.post(frame):
                    self._wake()
            except Disconnected:
                return EngineDied("The engine has just died; it is being restarted.")
            except WireError as error:
                return error
        return None

    def _wake(self) -> None:
        """Wake the supervising thread. The caller holds the lock."""
        if self._wake_out >= 0:
            with contextlib.suppress(BlockingIOError):  # a full pipe wakes it anyway
                os.write(self._wake_out, b"w")

    def _run(self) -> None:
        try:
            self._supervise()
        except BaseException as error:  # noqa: BLE001  callers must not wait forever for a thread that has died
            traceback.print_exception(error, file=sys.stderr)
            self._mark_failed(EngineDied(f"The supervisor failed: {type(error).__name__}: {error}."))
            if not self._started.done():
                self._started.set_exception(error)

    def _supervise(self) -> None:
        """Run one engine process after another until ``close`` is called or restarting is given up."""
        deaths: deque[float] = deque()
        window = self._config.restart_window_s
        while True:
            pid, error = self._run_process()
            if self._closing.is_set() or not self._started.done():
                self._end_open(error)
                if not self._started.done():
                    self._started.set_exception(self._unavailable if self._closing.is_set() else error)
                return
            self._restarts = replace(self._restarts, last_reason=error.message)
            now = time.monotonic()
            deaths.append(now)
            while now - deaths[0] > window:
                deaths.popleft()
            count, most = len(deaths), self._config.max_restarts
            if isinstance(error, CheckpointChanged):
                failed = self._mark_failed(error)
                _log_death(pid, error, failed, "not restarted, because it would not serve the same model")
                return
            if count > most:
                died = f"it died {count} time{'s' * (count != 1)} within {window:g} s, and --max-restarts is {most}"
                final = EngineDied(f"The engine is not restarted: {died}. Last: {error}", **error.data)
                _log_death(pid, error, self._mark_failed(final), f"not restarted: {died}")
                return
            pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (count - 1))
            failed = self._end_open(EngineDied(f"The engine died and is being restarted: {error}", **error.data))
            self._restarts = replace(self._restarts, count=self._restarts.count + 1)
            _log_death(pid, error, failed, f"restart {count} of {most} within {window:g} s begins in {pause:g} s")
            if self._closing.wait(pause):
                return

    def _run_process(self) -> tuple[int | None, TruffulaError]:
        """Run one engine process from its start to its end; returns its process id and why it ended."""
        try:
            process = EngineProcess(self._config)
        except OSError as error:
            return None, EngineDied(f"The engine process cannot be started: {error}.")
        reason: TruffulaError | None = None
        try:
            reason = self._serve(process)
        except Disconnected:
            pass
        except WireError as error:
            reason = error
            process.kill()
        if self._closing.is_set():
            process.stop()
        status = process.end()
        if reason is None:
            reason = EngineDied(f"The engine process ended {describe_exit(status)}.", status=status)
        return process.pid, reason

    def _serve(self, process: EngineProcess) -> TruffulaError | None:
        """Receive frames until the process ends, must be killed, or ``close`` is called. Returns its reason."""
        waiter = select.poll()
        waiter.register(self._wake_in, select.POLLIN)
        first = self._started.result() if self._started.done() else None
        process.channel.post(wire.Start(self._config, self._logs, first))
        while not self._closing.is_set():
            # Without POLLIN too, poll tells that the process has closed its end.
            wanted = (0 if process.is_shared else select.POLLIN) | (select.POLLOUT if process.channel.unsent else 0)
            waiter.register(process.channel, wanted)
            ready = dict(waiter.poll(process.poll_timeout(time.monotonic()) * 1000))
            if self._wake_in in ready:
                self._drain_wakes()
            if process.channel.fileno() in ready:
                process.channel.flush()
            if not self._receive(process):
                if process.read_error is not None:
                    raise process.read_error
                return process.end_reason
            reason = process.kill_reason(time.monotonic())
            if reason is not None:
                process.kill()
                return EngineDied(reason)
        return None

    def _receive(self, process: EngineProcess) -> bool:
        """Handle the frames that have arrived; False at their end. The supervisor or the event loop calls it."""
        with process.reading:
            if process.is_over:
                return False
            try:
                frames = process.channel.receive()
                for frame in frames or ():
                    if isinstance(frame, wire.Died):
                        process.end_reason = TruffulaError.from_info(frame.error)
                        frames = None
                        break
                    self._handle(process, frame)
            except Exception as error:  # noqa: BLE001  the supervisor raises it
                process.read_error, frames = error, None
            if frames is not None:
                return True
            process.is_over = True
        with self._lock:
            self._wake()
        return False

    def _handle(self, process: EngineProcess, frame: wire.FromEngine) -> None:
        process.on_frame(time.monotonic())
        match frame:
            case wire.Events(events):
                self._journal.deliver(events)
            case wire.Stats(stats, step_since):
                process.stats, process.step_since = stats, step_since
            case wire.AdapterReply(ticket, states, error):
                self._commands.answer(ticket, states, None if error is None else TruffulaError.from_info(error))
            case wire.Starting(stage, done, total):
                if process.on_progress(frame) and self._progress is not None:
                    self._progress(stage, done, total)
            case wire.ModelPath(path):
                self._set_model_path(Path(path))
            case wire.Ready(info):
                self._on_ready(process, info)

    def _set_model_path(self, path: Path | None) -> None:
        if not self._model_path.done():
            self._model_path.set_result(path)

    def _on_ready(self, process: EngineProcess, info: EngineInfo) -> None:
        process.ready = True
        with self._lock:
            for vocabulary in self._vocabularies.values():  # before any request
                process.channel.post(wire.SetVocabulary(vocabulary))
            self._process = process
            if self._loop_reader is not None:
                self._loop_reader.attach(process)
            pinned = list(self._pinned.values())
        for command in pinned:
            # No caller waits for these replies; a failed load shows in the list of adapters.
            process.channel.post(wire.Adapter(0, command))
        if not self._started.done():
            self._started.set_result(info)
        else:
            logger.warning("engine process %d is ready and accepts requests again", process.pid)

    def _mark_failed(self, error: TruffulaError) -> int:
        """Record that no engine will be started again; returns how many open requests it ended."""
        failed = self._end_open(error)
        if not self._closing.is_set():
            self._fatal_error = error
        return failed

    def _end_open(self, error: TruffulaError) -> int:
        """Accept no requests from now on and end the open ones with ``error``; returns how many there were."""
        with self._lock:
            self._process = None
            if not self._closing.is_set():
                self._unavailable = error
            reason = self._unavailable
        self._commands.fail_all(reason)
        return self._journal.fail_all(reason)

    def _drain_wakes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_in, 4096):
                pass


def _log_death(pid: int | None, reason: TruffulaError, failed: int, then: str) -> None:
    logger.error(
        "engine process %s died: %s %d open request%s failed; %s",
        "-" if pid is None else pid, reason.message, failed, "s" * (failed != 1), then,
    )  # fmt: skip
