"""``EngineClient``: what the service sees of an engine, and its transports in line and in a thread.

``connect`` makes one; the third transport, an own process, is ``engine/process.py``. All keep the same promises, which
one contract test holds (``tests/transport``): every submitted request ends with exactly one final event, whatever
happens to the engine; nothing but ``adapters`` raises for what a request or an engine did.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Literal, Protocol

from truffula.config import EngineConfig
from truffula.engine.build import Progress, build_engine
from truffula.engine.journal import Journal
from truffula.engine.loop import FILES_LOOK_S, EngineLoop, Turn, close_engine, engine_fault
from truffula.engine.wire import crosses
from truffula.errors import AdapterLoadError, InvalidRequest, ShuttingDown, TruffulaError
from truffula.logs import LogSettings
from truffula.types import AdapterCommand, AdapterState, EngineInfo, EngineRequest, EngineStats, TokenEvent

Transport = Literal["inline", "thread", "process"]


class EngineClient(Protocol):
    """A started engine. ``info`` stays while a dead engine is being restarted."""

    info: EngineInfo

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        """Queue requests; never waits. What is wrong with one, or with the engine, is its final event.

        Raises:
            InvalidRequest: A request id is in use.
        """

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests with finish reason ``abort``; ids that are not open are ignored. Never waits."""

    def events(self, timeout: float | None) -> list[TokenEvent]:
        """All events since the last call; waits up to ``timeout`` seconds (None: for ever) for some. One consumer."""

    def adapters(self, command: AdapterCommand, timeout: float = 300) -> list[AdapterState]:
        """Carry out a command; a load returns when the adapter is usable.

        Raises:
            TruffulaError: Why it can't be done; ``AdapterLoadError`` when ``timeout`` seconds were not enough.
        """

    def stats(self) -> EngineStats:
        """The latest heartbeat; never waits."""

    def alive(self) -> bool:
        """Whether the engine takes requests: started, heartbeat fresh, no step stuck."""

    def lost(self) -> TruffulaError | None:
        """Why no engine will answer ever again, though nobody closed it; None while one may."""

    def close(self) -> None:
        """End the engine; open requests end with ``shutting_down``. Idempotent."""


def connect(
    config: EngineConfig, transport: Transport, progress: Progress | None = None, logs: LogSettings | None = None
) -> EngineClient:
    """Start an engine and wait until it is ready.

    ``progress`` is called with (stage, done, total or None), from the thread that loads. ``logs`` is for an engine in a
    process of its own: how it logs (None: warnings and errors, bare).

    Raises:
        TruffulaError: Why it can't start, whatever the transport.
    """
    if transport == "inline":
        return InlineClient(config, progress)
    if transport == "thread":
        return ThreadClient(config, progress)
    from truffula.engine.process import ProcessClient

    return ProcessClient(config, progress, logs)


def refuse_uncrossable(requests: Sequence[EngineRequest], journal: Journal) -> list[EngineRequest]:
    """Fail the requests that no frame could carry (an integer beyond 64 bits, a lone surrogate); returns the others."""
    good = []
    for request in requests:
        fault = crosses(request)
        if fault is None:
            good.append(request)
        else:
            journal.fail(
                [request.request_id], InvalidRequest(f"The request holds a value that can't be used: {fault}.")
            )
    return good


class Tickets:
    """Adapter commands that wait for their answer. Thread-safe."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Future[list[AdapterState]]] = {}
        self._lock = threading.Lock()

    def take(self) -> tuple[int, Future[list[AdapterState]]]:
        future: Future[list[AdapterState]] = Future()
        with self._lock:
            ticket = next(self._numbers)
            self._waiting[ticket] = future
        return ticket, future

    def answer(self, ticket: int, states: Sequence[AdapterState], error: TruffulaError | None) -> None:
        """Wake the caller; one that has stopped waiting is ignored."""
        with self._lock:
            future = self._waiting.pop(ticket, None)
        if future is None:
            return
        if error is None:
            future.set_result(list(states))
        else:
            future.set_exception(error)

    def fail_all(self, error: TruffulaError) -> None:
        with self._lock:
            tickets = list(self._waiting)
        for ticket in tickets:
            self.answer(ticket, (), error)

    def wait(self, ticket: int, future: Future[list[AdapterState]], timeout: float) -> list[AdapterState]:
        """The answer, or ``AdapterLoadError`` when ``timeout`` seconds have passed."""
        try:
            return future.result(timeout)
        except FutureTimeout:
            with self._lock:
                self._waiting.pop(ticket, None)
            raise AdapterLoadError(f"The adapter command took more than {timeout:g} s.", timeout_s=timeout) from None


def publish(turn: Turn, journal: Journal, tickets: Tickets) -> None:
    """Hand what a turn gave to those who wait for it."""
    journal.deliver(turn.events)
    for answer in turn.answers:
        tickets.answer(answer.ticket, answer.states, answer.error)


def close_at_exit(client: EngineClient) -> None:
    """Have ``client`` closed before the interpreter ends, should it be open then. It may be forgotten earlier.

    A thread that comes back from a native step to an interpreter that has ended is unwound through C++, which aborts.
    """
    weakref.finalize(client, _close_if_there, weakref.ref(client), os.getpid())


def _close_if_there(reference: weakref.ref[EngineClient], owner: int) -> None:
    client = reference()
    if client is not None and os.getpid() == owner:  # what is forked from the owner has no engine
        client.close()


class InlineClient:
    """The engine in the caller's thread: it steps while ``events`` or ``adapters`` waits, and only then."""

    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        engine, self.info = build_engine(config, progress)
        self._loop = EngineLoop(engine)
        self._journal = Journal()
        self._tickets = Tickets()
        self._lock = threading.RLock()  # held during a step
        self._end: TruffulaError | None = None
        self._stats = self._loop.stats()
        close_at_exit(self)

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        with self._lock:
            self._journal.open(requests)
            if self._end is not None:
                self._journal.fail([r.request_id for r in requests], self._end)
                return
            self._loop.submit(refuse_uncrossable(requests, self._journal))

    def abort(self, request_ids: Sequence[str]) -> None:
        with self._lock:
            if self._end is None:
                self._loop.abort(request_ids)

    def events(self, timeout: float | None) -> list[TokenEvent]:
        """As the protocol says; but returns at once when the engine has nothing to do, as nothing could come."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                events = self._journal.take(0)
                rest = None if self._end is not None else self._loop.rest()
                if events or rest is None or self._turn():
                    return events + self._journal.take(0)
            if deadline is not None and time.monotonic() >= deadline:
                return []
            if rest:
                time.sleep(rest)

    def adapters(self, command: AdapterCommand, timeout: float = 300) -> list[AdapterState]:
        deadline = time.monotonic() + timeout
        with self._lock:
            if self._end is not None:
                raise self._end
            ticket, future = self._tickets.take()
            self._loop.command(ticket, command)
        while not future.done() and time.monotonic() < deadline:
            with self._lock:
                if self._end is None:
                    self._turn()
                rest = 0.0 if self._end is not None else self._loop.rest()
            if rest and not future.done():
                time.sleep(rest)
        return self._tickets.wait(ticket, future, 0)

    def stats(self) -> EngineStats:
        with self._lock:
            if self._end is None:
                self._stats = self._loop.stats()
            return self._stats

    def alive(self) -> bool:
        return self._end is None

    def lost(self) -> TruffulaError | None:
        return None if isinstance(self._end, ShuttingDown) else self._end

    def close(self) -> None:
        with self._lock:
            if self._end is None:
                self._finish(ShuttingDown("The engine is closed."))
            self._journal.close(self._end or ShuttingDown("The engine is closed."))

    def _turn(self) -> bool:
        """One turn; True when events came of it."""
        try:
            turn = self._loop.turn()
        except Exception as error:  # noqa: BLE001  whatever it is, the engine's state can't be trusted any more
            self._finish(engine_fault(error))
            return True
        publish(turn, self._journal, self._tickets)
        return bool(turn.events)

    def _finish(self, error: TruffulaError) -> None:
        self._end = error
        self._tickets.fail_all(error)
        self._journal.fail_all(error)
        close_engine(self._loop)


Call = Callable[[EngineLoop], None]


class ThreadClient:
    """The engine in a thread of its own, which builds it, steps it and closes it."""

    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        self._config = config
        self._journal = Journal()
        self._tickets = Tickets()
        self._wake = threading.Condition()
        self._inbox: list[Call] = []
        self._closing = False
        self._end: TruffulaError | None = None
        self._step_since: float | None = None
        started: Future[tuple[EngineInfo, EngineStats]] = Future()
        self._thread = threading.Thread(target=self._run, args=(progress, started), name="truffula-engine", daemon=True)
        self._thread.start()
        self.info, self._stats = started.result()
        close_at_exit(self)

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        self._journal.open(requests)
        good = refuse_uncrossable(requests, self._journal)
        refusal = self._post(lambda loop: loop.submit(good))
        if refusal is not None:
            self._journal.fail([r.request_id for r in requests], refusal)

    def abort(self, request_ids: Sequence[str]) -> None:
        ids = list(request_ids)
        self._post(lambda loop: loop.abort(ids))

    def events(self, timeout: float | None) -> list[TokenEvent]:
        return self._journal.take(timeout)

    def adapters(self, command: AdapterCommand, timeout: float = 300) -> list[AdapterState]:
        ticket, future = self._tickets.take()
        refusal = self._post(lambda loop: loop.command(ticket, command))
        if refusal is not None:
            self._tickets.answer(ticket, (), refusal)
        return self._tickets.wait(ticket, future, timeout)

    def stats(self) -> EngineStats:
        return self._stats

    def alive(self) -> bool:
        since = self._step_since
        stuck = since is not None and time.monotonic() - since > self._config.step_timeout_s
        return self._end is None and not stuck

    def lost(self) -> TruffulaError | None:
        return None if isinstance(self._end, ShuttingDown) else self._end

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self._journal.close(self._end or ShuttingDown("The engine is closed."))

    def _post(self, call: Call) -> TruffulaError | None:
        """Have the engine's thread make ``call``; or why it won't."""
        with self._wake:
            if self._end is None and not self._closing:
                self._inbox.append(call)
                self._wake.notify()
                return None
            return self._end or ShuttingDown("The engine is closed.")

    def _run(self, progress: Progress | None, started: Future[tuple[EngineInfo, EngineStats]]) -> None:
        try:
            engine, info = build_engine(self._config, progress)
            loop = EngineLoop(engine)
            started.set_result((info, loop.stats()))
        except BaseException as error:  # noqa: BLE001  carried to the thread that waits for the start
            started.set_exception(error)
            return
        end: TruffulaError = ShuttingDown("The engine is closed.")
        try:
            self._serve(loop)
        except Exception as error:  # noqa: BLE001  whatever it is, the engine's state can't be trusted any more
            end = engine_fault(error)
        with self._wake:
            self._end = end
        self._tickets.fail_all(end)
        self._journal.fail_all(end)
        close_engine(loop)

    def _serve(self, loop: EngineLoop) -> None:
        while True:
            with self._wake:
                if not self._inbox and not self._closing:
                    rest = loop.rest()
                    if rest is None or rest > 0:
                        self._wake.wait(FILES_LOOK_S if rest is None else rest)
                if self._closing:
                    return
                calls, self._inbox = self._inbox, []
            for call in calls:
                call(loop)
            self._step_since = time.monotonic()
            turn = loop.turn()
            self._step_since = None
            self._stats = loop.stats()
            publish(turn, self._journal, self._tickets)
