"""``InlineClient``: the engine in this process. The calling threads drive it."""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from truffula.config import EngineConfig
from truffula.engine.build import build_engine
from truffula.engine.engine import FILES_CHECK_S, close_engine, engine_error
from truffula.engine.interrupts import uninterrupted
from truffula.engine.journal import Journal, PendingCommands, Reply, outcome
from truffula.errors import ShuttingDown, TruffulaError
from truffula.types import (
    AdapterCommand,
    AdapterState,
    EngineAction,
    EngineRequest,
    EngineRestarts,
    EngineStats,
    Progress,
    TokenEvent,
    Vocabulary,
)

if TYPE_CHECKING:
    import asyncio

LOAD_POLL_S = 0.005
"""How often finished loads are looked for: a condition cannot wait for the loading workers' sockets."""


class InlineClient:
    """An ``EngineClient`` whose engine steps while a thread waits in ``events`` or ``adapters``, and only then.

    ``submit`` and ``abort`` put calls into an inbox, which the next turn makes: they never wait for a step. Of several
    waiting threads one runs a turn and the others wait for its end. A Ctrl-C is delayed until the turn has ended, so
    that the engine stays usable.
    """

    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        self._engine, self.info = build_engine(config, progress)
        self._journal = Journal()
        self._commands = PendingCommands()
        self._changed = threading.Condition()  # guards the fields below; notified by each post and each turn's end
        self._inbox: list[Callable[[], None]] = []
        self._turning = False  # a thread runs a turn and alone may use the engine
        self._end: TruffulaError | None = None
        self._stats = self._engine.stats()
        _close_at_exit(self)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        self._post(partial(self._engine.set_vocabulary, vocabulary))

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        self._journal.open(requests)
        error = self._post(*(partial(self._engine.add, request) for request in requests))
        if error is not None:
            self._journal.fail([r.request_id for r in requests], error)

    def abort(self, request_ids: Sequence[str]) -> None:
        # A closed engine has ended them already.
        self._post(*(partial(self._engine.abort, request_id) for request_id in request_ids))

    def wait(self, timeout: float | None) -> bool:
        self._drive(lambda: self._journal.wait(0), timeout)
        return self._journal.wait(0)

    def events(self, timeout: float | None) -> list[TokenEvent]:
        self.wait(timeout)
        return self._journal.take(0)

    def listen(self, listener: Callable[[], None] | None, loop: asyncio.AbstractEventLoop | None = None) -> bool:
        """False: the engine steps only while a thread waits in ``events``."""
        return False

    def adapters(self, command: AdapterCommand, timeout: float = 300) -> list[AdapterState]:
        return self._command(lambda: self._engine.command(command), timeout)

    def control(self, action: EngineAction) -> None:
        self._command(lambda: self._engine.control(action), None)

    def _command(self, make: Callable[[], Reply], timeout: float | None) -> list[AdapterState]:
        """Have the next turn call ``make``, and drive the engine until its reply is there."""
        began = time.monotonic()
        number, reply = self._commands.open()

        def begin() -> None:
            make().add_done_callback(lambda answer: self._commands.answer(number, *outcome(answer)))

        error = self._post(begin)
        if error is not None:
            self._commands.answer(number, (), error)
        self._drive(reply.done, timeout)
        return self._commands.wait(number, reply, timeout, time.monotonic() - began)

    def stats(self) -> EngineStats:
        with self._changed:
            if not self._turning and self._end is None:
                self._stats = self._engine.stats()
            return self._stats

    def alive(self) -> bool:
        return self._end is None

    def restarts(self) -> EngineRestarts:
        return EngineRestarts()  # an engine in its client's process is never restarted

    def fatal_error(self) -> TruffulaError | None:
        return None if isinstance(self._end, ShuttingDown) else self._end

    def close(self) -> None:
        with uninterrupted(), self._changed:
            if self._end is None:
                self._end = ShuttingDown("The engine is closed.")
                while self._turning:
                    self._changed.wait()
                self._finish(self._end)
            self._journal.close(self._end)
            self._changed.notify_all()

    def _post(self, *calls: Callable[[], None]) -> TruffulaError | None:
        """Have the next turn make ``calls``; returns the error instead when the engine has ended."""
        with self._changed:
            if self._end is None:
                self._inbox += calls
                self._changed.notify_all()
            return self._end

    def _drive(self, done: Callable[[], bool], timeout: float | None) -> None:
        """Run turns, or wait for the thread that does, until ``done()``, the engine's end or ``timeout`` seconds."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while self._wait_for_turn(done, deadline):
            with uninterrupted():
                self._turn()

    def _wait_for_turn(self, done: Callable[[], bool], deadline: float) -> bool:
        """Wait until this thread must run a turn. False when ``done()`` is true, the engine has ended or time is up."""
        due = math.inf  # when an engine without work must be stepped again
        with self._changed:
            while not done() and self._end is None:
                now = time.monotonic()
                if not self._turning:
                    rest = 0.0 if self._inbox else self._engine.poll_timeout()
                    longest = LOAD_POLL_S if self._engine.is_loading() else FILES_CHECK_S
                    due = min(due, now + (longest if rest is None else min(rest, longest)))
                    if due <= now:
                        return True
                if now >= deadline:
                    return False
                until = deadline if self._turning else min(due, deadline)
                self._changed.wait(None if until == math.inf else until - now)
            return False

    def _turn(self) -> None:
        """Make the posted calls and one step, unless another thread is in a turn or the engine has ended."""
        with self._changed:
            if self._turning or self._end is not None:
                return
            self._turning = True
            calls, self._inbox = self._inbox, []
        failed: TruffulaError | None = None
        stats = self._stats
        try:
            for call in calls:
                call()
            self._journal.deliver(self._engine.step())
            stats = self._engine.stats()
        except Exception as error:  # noqa: BLE001  the engine's state is unknown after any
            failed = engine_error(error)
        with self._changed:
            self._turning = False
            self._stats = stats
            if failed is not None and self._end is None:
                self._end = failed
                self._finish(failed)
            self._changed.notify_all()

    def _finish(self, error: TruffulaError) -> None:
        self._inbox.clear()
        self._commands.fail_all(error)
        self._journal.fail_all(error)
        close_engine(self._engine)


def _close_at_exit(client: InlineClient) -> None:
    """Close ``client`` before the interpreter ends, should it still be open. It may be garbage collected earlier.

    A thread that returns from a native step to an interpreter that has ended is unwound through C++, which aborts.
    Registered with ``atexit`` directly, after the engine was built: callbacks run in reverse order, so this one runs
    before the native module's. (All of ``weakref.finalize`` run as one callback, registered with the first of them.)
    """
    atexit.register(_close_if_open, weakref.ref(client), os.getpid())


def _close_if_open(reference: weakref.ref[InlineClient], owner: int) -> None:
    client = reference()
    if client is not None and os.getpid() == owner:  # a forked child has no engine
        client.close()
