"""``Journal``: the API side's record of requests without a final event; whatever dies, each gets exactly one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from truffula.errors import InvalidRequest, TruffulaError
from truffula.types import EngineRequest, TokenEvent


class Journal:
    """Open requests and the events for them that nobody has taken yet. Thread-safe; one consumer calls ``take``."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._arrived = threading.Condition()
        self._open: set[str] = set()
        self._events: list[TokenEvent] = []
        self._closed = False
        self._listener: Callable[[], None] | None = None

    @property
    def outstanding(self) -> frozenset[str]:
        """Ids of requests whose final event was not delivered yet."""
        with self._arrived:
            return frozenset(self._open)

    def open(self, requests: Sequence[EngineRequest]) -> None:
        """Note requests before they are handed on.

        Raises:
            InvalidRequest: An id is open already or occurs twice; nothing is noted then.
        """
        ids = [request.request_id for request in requests]
        with self._arrived:
            for place, request_id in enumerate(ids):
                if request_id in self._open or request_id in ids[:place]:
                    raise InvalidRequest(f"Request id {request_id!r} is in use.", param="request_id")
            self._open.update(ids)

    def deliver(self, events: Sequence[TokenEvent]) -> None:
        """Pass on events of open requests. Events of others are late ones of requests that were failed: dropped."""
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
        """From now call ``listener``, in the thread that delivers, when events come and none waited; None: nobody."""
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

    def take(self, timeout: float | None) -> list[TokenEvent]:
        """All events there are, waiting up to ``timeout`` seconds (None: until some come) for the first.

        Empty when the time is up, and at once when the journal is closed and everything was taken.
        """
        deadline = None if timeout is None else self._clock() + timeout
        with self._arrived:
            while not self._events and not self._closed:
                left = None if deadline is None else deadline - self._clock()
                if left is not None and left <= 0:
                    break
                self._arrived.wait(left)
            taken, self._events = self._events, []
            return taken

    def close(self, error: TruffulaError) -> None:
        """Fail what is open and let ``take`` never wait again. Idempotent."""
        self.fail_all(error)
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()
