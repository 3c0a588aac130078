"""What the API side records of an engine: requests without a final event, and adapter commands without an answer."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

from truffula.errors import AdapterLoadError, InvalidRequest, TruffulaError
from truffula.types import AdapterState, EngineRequest, TokenEvent


class Journal:
    """Open requests and their undelivered events: each request gets exactly one final event.

    Thread-safe; one consumer calls ``take``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._arrived = threading.Condition()
        self._open: set[str] = set()
        self._events: list[TokenEvent] = []
        self._closed = False
        self._listener: Callable[[], None] | None = None

    @property
    def outstanding(self) -> frozenset[str]:
        """Ids of the requests whose final event was not delivered yet."""
        with self._arrived:
            return frozenset(self._open)

    def open(self, requests: Sequence[EngineRequest]) -> None:
        """Record requests, before they are passed to the engine.

        Raises:
            InvalidRequest: An id is open already or occurs twice; nothing is recorded then.
        """
        ids: set[str] = set()
        with self._arrived:
            for request in requests:
                if request.request_id in self._open or request.request_id in ids:
                    raise InvalidRequest(f"Request id {request.request_id!r} is in use.", param="request_id")
                ids.add(request.request_id)
            self._open |= ids

    def deliver(self, events: Sequence[TokenEvent]) -> None:
        """Record events of open requests. Late events of requests that have ended are dropped."""
        with self._arrived:
            listener = None if self._events else self._listener
            for event in events:
                if event.request_id in self._open:
                    self._events.append(event)
                    if event.finish_reason is not None:
                        self._open.discard(event.request_id)
            self._arrived.notify_all()
            waiting = bool(self._events)
        if waiting and listener is not None:
            listener()

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Call ``listener``, in the delivering thread, whenever events arrive and none were undelivered; None: stop."""
        with self._arrived:
            self._listener = listener
            waiting = bool(self._events)
        if waiting and listener is not None:
            listener()

    def fail(self, request_ids: Sequence[str], error: TruffulaError) -> None:
        """End these requests with ``error``."""
        info = error.info()
        self.deliver([TokenEvent(request_id=r, finish_reason="error", error=info) for r in request_ids])

    def fail_all(self, error: TruffulaError) -> int:
        """End every open request with ``error``; returns how many there were."""
        outstanding = sorted(self.outstanding)
        self.fail(outstanding, error)
        return len(outstanding)

    def wait(self, timeout: float | None) -> bool:
        """Whether there are undelivered events; waits up to ``timeout`` seconds (None: without limit) for some.

        False when the time is up, and immediately when the journal is closed and everything was taken.
        """
        deadline = None if timeout is None else self._clock() + timeout
        with self._arrived:
            while not self._events and not self._closed:
                left = None if deadline is None else deadline - self._clock()
                if left is not None and left <= 0:
                    break
                self._arrived.wait(left)
            return bool(self._events)

    def take(self, timeout: float | None) -> list[TokenEvent]:
        """All undelivered events, after ``wait(timeout)``."""
        self.wait(timeout)
        with self._arrived:
            taken, self._events = self._events, []
            return taken

    def close(self, error: TruffulaError) -> None:
        """Fail the open requests; ``take`` never waits again. Idempotent."""
        self.fail_all(error)
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()


Reply = Future[list[AdapterState]]


def outcome(reply: Reply) -> tuple[list[AdapterState], TruffulaError | None]:
    """The states and the error of a reply that is done; one of them is empty."""
    error = reply.exception()
    if error is None:
        return reply.result(), None
    assert isinstance(error, TruffulaError), error
    return [], error


class PendingCommands:
    """Commands that are not answered yet, by number. Thread-safe."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._replies: dict[int, Reply] = {}
        self._lock = threading.Lock()

    def open(self) -> tuple[int, Reply]:
        """The number of a new command, and its reply."""
        reply: Reply = Future()
        with self._lock:
            number = next(self._numbers)
            self._replies[number] = reply
        return number, reply

    def answer(self, number: int, states: Sequence[AdapterState], error: TruffulaError | None) -> None:
        """Wake the caller; one that has stopped waiting is ignored."""
        with self._lock:
            reply = self._replies.pop(number, None)
        if reply is None:
            return
        if error is None:
            reply.set_result(list(states))
        else:
            reply.set_exception(error)

    def fail_all(self, error: TruffulaError) -> None:
        with self._lock:
            numbers = list(self._replies)
        for number in numbers:
            self.answer(number, (), error)

    def wait(self, number: int, reply: Reply, timeout: float | None, waited: float = 0.0) -> list[AdapterState]:
        """The answer. Raises its error, or ``AdapterLoadError`` after ``timeout`` seconds (None: never), ``waited`` of
        them ago.
        """
        try:
            return reply.result(None if timeout is None else max(0.0, timeout - waited))
        except FutureTimeout:
            with self._lock:
                self._replies.pop(number, None)
            raise AdapterLoadError(f"The adapter command took more than {timeout:g} s.", timeout_s=timeout) from None
