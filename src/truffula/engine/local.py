"""The engine in this process: in its caller's thread, or in a thread of its own."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Literal

from truffula.config import EngineConfig
from truffula.engine.build import build_engine
from truffula.engine.client import EngineClient, Tickets, refuse_uncrossable
from truffula.engine.journal import Journal
from truffula.engine.loop import FILES_LOOK_S, EngineLoop, Turn, close_engine, engine_fault
from truffula.errors import ShuttingDown, TruffulaError
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


class LocalOpening:
    """An ``Opening`` that does all in ``client``: what is built in line is built by who waits for it."""

    def __init__(self, config: EngineConfig, transport: Literal["inline", "thread"], progress: Progress | None) -> None:
        self._config = config
        self._transport = transport
        self._progress = progress

    def files(self) -> Path | None:
        return None

    def client(self) -> EngineClient:
        kind = InlineClient if self._transport == "inline" else ThreadClient
        return kind(self._config, self._progress)

    def close(self) -> None:
        """Nothing was begun."""


def publish(turn: Turn, journal: Journal, tickets: Tickets) -> None:
    """Hand what a turn gave to those who wait for it."""
    journal.deliver(turn.events)
    for answer in turn.answers:
        tickets.answer(answer.ticket, answer.states, answer.error)


def close_at_exit(client: EngineClient) -> None:
    """Have ``client`` closed before the interpreter ends, should it be open then. It may be forgotten earlier.

    A thread that comes back from a native step to an interpreter that has ended is unwound through C++, which aborts.
    Registered with ``atexit`` itself, once the engine is built: what was registered last goes first, so before the
    native module shuts its door. ``weakref.finalize`` shares one place for all, which others may have taken long ago.
    """
    atexit.register(_close_if_there, weakref.ref(client), os.getpid())


def _close_if_there(reference: weakref.ref[EngineClient], owner: int) -> None:
    client = reference()
    if client is not None and os.getpid() == owner:  # what is forked from the owner has no engine
        client.close()


class InlineClient:
    """The engine in the caller's thread: it steps while ``events`` or ``adapters`` waits, and only then.

    Nor does anything else happen meanwhile: a loading worker that is idle stays until the next step or the end.
    """

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

    def listen(self, listener: Callable[[], None] | None) -> bool:
        """Never: it steps while somebody waits in ``events``."""
        return False

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

    def restarts(self) -> EngineRestarts:
        return EngineRestarts()  # an engine in its client's process ends with it

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

    def listen(self, listener: Callable[[], None] | None) -> bool:
        self._journal.listen(listener)
        return True

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

    def restarts(self) -> EngineRestarts:
        return EngineRestarts()  # an engine in its client's process ends with it

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
