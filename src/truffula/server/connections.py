"""Connections before and between requests: how long a head may take, how many may be open, what the system allows.

A connection that has not said a whole request head in time is closed. When as many are open as there may be, the one
that has waited longest for a head makes room for the next, so that whoever opens many and says nothing (or half a head)
keeps nobody else out, and descriptors never run out.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from truffula.config import ServerConfig

SPARE_CONNECTIONS = 100
"""Beside ``max_open_requests``: probes, and clients that keep a connection between requests."""
ACCEPT_BURST = 64
"""Connections asyncio accepts before it attends to any."""
OWN_FILES = 32
SAY_AGAIN_S = 10.0
log = logging.getLogger(__name__)


def most_connections(config: ServerConfig) -> int:
    """How many may be open; warns when the system's limit of open files leaves less than the options ask for."""
    wanted = config.max_open_requests + SPARE_CONNECTIONS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft - ACCEPT_BURST - OWN_FILES >= wanted:
        return wanted
    most = max(8, soft - ACCEPT_BURST - OWN_FILES)
    log.warning(
        "the limit of %d open files allows %d connections instead of %d (--max-open-requests %d plus %d): "
        "raise the limit (ulimit -n) or lower the option",
        soft, most, wanted, config.max_open_requests, SPARE_CONNECTIONS,
    )  # fmt: skip
    return most


class Connections:
    """Who is connected. Owned by the event loop's thread."""

    def __init__(self, limit: int, head_timeout_s: float) -> None:
        self.head_timeout_s = head_timeout_s
        self._limit = limit
        self._open: set[GuardedProtocol] = set()
        self._waiting: dict[GuardedProtocol, None] = {}  # without a whole head, the longest first

    def __len__(self) -> int:
        return len(self._open)

    def opened(self, one: GuardedProtocol) -> None:
        self._open.add(one)
        self._waiting[one] = None
        if len(self._open) > self._limit:
            oldest = next(iter(self._waiting))
            self.closed(oldest)
            oldest.transport.abort()

    def closed(self, one: GuardedProtocol) -> None:
        self._open.discard(one)
        self._waiting.pop(one, None)

    def busy(self, one: GuardedProtocol) -> None:
        """It has said a whole head, and is being answered."""
        self._waiting.pop(one, None)

    def waits(self, one: GuardedProtocol) -> None:
        """It was answered; another head may follow."""
        if one in self._open:
            self._waiting[one] = None


class GuardedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]  # h11's or httptools', by what is installed
    """Uvicorn's protocol with a time limit on each request head. Between requests its own keep-alive limit holds."""

    def __init__(self, connections: Connections, **settings: Any) -> None:
        super().__init__(**settings)
        self._connections = connections
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._connections.opened(self)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._connections.closed(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._answering():
            self._stop_timer()
            self._connections.busy(self)
        elif self._timer is None and not self.transport.is_closing():
            self._start_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._answering():  # else the next request was in the same bytes
            self._connections.waits(self)

    def _answering(self) -> bool:
        """Whether a request's head is whole and its answer is not: the protocol makes a cycle of each head."""
        return self.cycle is not None and not self.cycle.response_complete

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self._connections.head_timeout_s, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if not self._answering():
            self.transport.close()


class AcceptErrors:
    """A loop's exception handler that says once in a while, not once a try, that no connection can be accepted."""

    def __init__(self) -> None:
        self._said_at = -SAY_AGAIN_S

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "socket.accept()" not in str(context.get("message")):
            loop.default_exception_handler(context)
            return
        now = time.monotonic()
        if now - self._said_at >= SAY_AGAIN_S:
            self._said_at = now
            log.error("connections cannot be accepted: %s; raise the limit (ulimit -n)", context.get("exception"))
