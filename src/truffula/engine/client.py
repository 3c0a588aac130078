"""``EngineClient``: what the service sees of an engine, and ``begin`` and ``connect``, which make one.

Its transports are in line and in a thread (``engine/local.py``) and an own process (``engine/process.py``). All keep
the same promises, which one contract test holds (``tests/transport``): every submitted request ends with exactly one
final event, whatever happens to the engine; nothing but ``adapters`` raises for what a request or an engine did.
Nothing here computes: a server with its engine elsewhere imports this and no array.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Literal, Protocol

from truffula.config import EngineConfig
from truffula.engine.journal import Journal
from truffula.engine.wire import crosses
from truffula.errors import AdapterLoadError, InvalidRequest, TruffulaError
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

    def listen(self, listener: Callable[[], None] | None) -> bool:
        """Whether ``listener`` is called from now, in some thread, when events come and none waited for ``events(0)``.

        None: nobody listens any more. False when only asking makes events: then somebody must wait in ``events``.
        """

    def adapters(self, command: AdapterCommand, timeout: float = 300) -> list[AdapterState]:
        """Carry out a command; a load returns when the adapter is usable.

        Raises:
            TruffulaError: Why it can't be done; ``AdapterLoadError`` when ``timeout`` seconds were not enough.
        """

    def stats(self) -> EngineStats:
        """The latest heartbeat; never waits."""

    def alive(self) -> bool:
        """Whether the engine takes requests: started, heartbeat fresh, no step stuck."""

    def restarts(self) -> EngineRestarts:
        """How often a dead engine was started again, and why it ended last. Never waits."""

    def lost(self) -> TruffulaError | None:
        """Why no engine will answer ever again, though nobody closed it; None while one may."""

    def close(self) -> None:
        """End the engine; open requests end with ``shutting_down``. Idempotent."""


class Opening(Protocol):
    """An engine that is being started."""

    def files(self) -> Path | None:
        """Where its model's files are, as soon as they are known; what they are then, they are until it is ready.

        None when only the started engine tells (``EngineInfo.details``), or there will be none. Waits, never raises.
        """

    def client(self) -> EngineClient:
        """The engine, once it is ready. Raises ``TruffulaError``: why it can't start. Call it once."""

    def close(self) -> None:
        """Give up: ends what was begun. Not after ``client``, who has its own."""


def begin(
    config: EngineConfig, transport: Transport, progress: Progress | None = None, logs: LogSettings | None = None
) -> Opening:
    """Start an engine without waiting for it, where the transport can do so; the others start it in ``client``.

    ``progress`` is called with (stage, done, total or None), from the thread that loads. ``logs`` is for an engine in a
    process of its own: how it logs (None: warnings and errors, bare).
    """
    if transport == "process":
        from truffula.engine.process import ProcessOpening

        return ProcessOpening(config, progress, logs)
    from truffula.engine.local import LocalOpening

    return LocalOpening(config, transport, progress)


def connect(
    config: EngineConfig, transport: Transport, progress: Progress | None = None, logs: LogSettings | None = None
) -> EngineClient:
    """``begin``, and wait until the engine is ready.

    Raises:
        TruffulaError: Why it can't start, whatever the transport.
    """
    return begin(config, transport, progress, logs).client()


def refuse_uncrossable(requests: Sequence[EngineRequest], journal: Journal) -> list[EngineRequest]:
    """Fail the requests that no frame could carry (an integer beyond 64 bits, a lone surrogate); returns the others."""
    good = []
    for request in requests:
        fault = crosses(request)
        if fault is None:
            good.append(request)
        else:
            journal.fail([request.request_id], InvalidRequest(f"The request holds an invalid value: {fault}."))
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
