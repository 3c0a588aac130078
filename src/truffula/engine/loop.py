"""``EngineLoop``: what one iteration of an engine's loop does, the same in both transports."""

from __future__ import annotations

import select
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from truffula.engine.engine import Engine
from truffula.engine.journal import Reply
from truffula.errors import CheckpointChanged, EngineDied, TruffulaError
from truffula.types import AdapterCommand, AdapterState, EngineRequest, EngineStats, TokenEvent

FILES_LOOK_S = 1.0
"""How often the files that weights are mapped from are checked, and the pool polled, while the engine is idle too."""
LOAD_POLL_S = 0.005
"""How often an engine that cannot wait for the loading workers' sockets checks for finished loads."""
DEADLINE_LOOK_S = 0.1
"""How often the deadlines of requests are checked while they all wait for adapters."""


class EngineLoop:
    """Owns the engine: every call to it is made here, by one thread at a time."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._looked_at_files = 0.0

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        for request in requests:
            self._engine.add(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._engine.abort(request_id)

    def command(self, command: AdapterCommand) -> Reply:
        """Begin an adapter command. The reply gets its result or its ``TruffulaError`` here or in a later ``turn``."""
        return self._engine.command(command)

    def turn(self) -> list[TokenEvent]:
        """Make one step at most; returns the events since the last one.

        Raises only when the engine itself has failed; it cannot be used any more then.
        """
        if self._clock() - self._looked_at_files >= FILES_LOOK_S:
            self._engine.check_files()
            self._looked_at_files = self._clock()
        return self._engine.step()

    def rest(self) -> float | None:
        """Seconds until the next turn has something to do without an event on the engine's ``poll_fds``: 0 with work,
        None when only a call or an event can bring some.
        """
        timeout = self._engine.poll_timeout()
        if self._engine.idle():
            return timeout
        return DEADLINE_LOOK_S if timeout is None else min(timeout, DEADLINE_LOOK_S)

    def is_loading(self) -> bool:
        """Whether a loading worker is at work."""
        return bool(self._engine.poll_fds())

    def wait(self, timeout: float | None, fd: int | None = None) -> None:
        """Wait until ``fd`` can be read, the engine has something to do, or ``timeout`` seconds have passed."""
        if timeout == 0:
            return
        waiter = select.poll()
        if fd is not None:
            waiter.register(fd, select.POLLIN)
        for other, events in self._engine.poll_fds().items():
            waiter.register(other, events)
        waiter.poll(None if timeout is None else timeout * 1000)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def close(self) -> None:
        self._engine.close()


def outcome(reply: Reply) -> tuple[list[AdapterState], TruffulaError | None]:
    """The states and the error of a reply that is there; one of them is empty."""
    error = reply.exception()
    if error is None:
        return reply.result(), None
    assert isinstance(error, TruffulaError), error
    return [], error


def engine_error(error: BaseException) -> TruffulaError:
    """What ended an engine, as the error of its open requests. An unexpected one prints its traceback to stderr."""
    if isinstance(error, CheckpointChanged):
        return error
    if isinstance(error, TruffulaError):  # one that the engine raises on purpose: its device is lost
        return EngineDied(f"The engine failed: {error.message}", cause=error.code)
    traceback.print_exception(error, file=sys.stderr)
    return EngineDied(f"The engine failed: {type(error).__name__}: {error}.", cause=type(error).__name__)


def close_engine(loop: EngineLoop) -> None:
    """Close an engine that may be broken; an exception of that is printed to stderr."""
    try:
        loop.close()
    except Exception as error:  # noqa: BLE001  the caller is ending the engine for another reason
        traceback.print_exception(error, file=sys.stderr)
