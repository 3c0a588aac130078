"""Connections: how long a head may take, how long a client may read nothing, how many may be open.

A connection that has not sent a whole request head in time is closed. When as many are open as are allowed, the one
that has waited longest for a head is closed in favour of the next: a client that opens many connections and sends
nothing, or half a head, does not keep other clients out, and file descriptors do not run out.

uvicorn has no such limits. ``GuardedProtocol`` stands between the transport and uvicorn's protocol and passes every
call on; that a head is whole is seen by the application being called (``Connections.watching``).
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, cast

from starlette.types import ASGIApp, Receive, Scope, Send

from truffula.config import ServerConfig

SPARE_CONNECTIONS = 100
"""Beside ``max_open_requests``: probes, and clients that keep a connection between requests."""
ACCEPT_BURST = 64
"""Connections that asyncio accepts before it serves any."""
OWN_FILES = 32
LOG_AGAIN_S = 10.0
MAX_HEAD_BYTES = 2**16
"""Of a request's head. uvicorn has no limit."""
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
    """The open connections. Owned by the event loop's thread."""

    def __init__(self, limit: int, head_timeout_s: float, send_timeout_s: float) -> None:
        self.head_timeout_s = head_timeout_s
        self.send_timeout_s = send_timeout_s
        # The connection whose bytes are being parsed; the task that answers its request inherits it.
        self.current: ContextVar[GuardedProtocol] = ContextVar("truffula-connection")
        self._limit = limit
        self._open: set[GuardedProtocol] = set()
        self._waiting: dict[GuardedProtocol, None] = {}  # without a whole head, the longest first

    def __len__(self) -> int:
        return len(self._open)

    def opened(self, one: GuardedProtocol) -> None:
        self._open.add(one)
        self._waiting[one] = None
        if len(self._open) > self._limit:
            oldest = next(iter(self._waiting), one)
            self.closed(oldest)
            oldest.transport.abort()

    def closed(self, one: GuardedProtocol) -> None:
        self._open.discard(one)
        self._waiting.pop(one, None)

    def waits(self, one: GuardedProtocol) -> bool:
        """Whether the connection's next head is awaited."""
        return one in self._waiting

    def watching(self, app: ASGIApp) -> ASGIApp:
        """``app``; while it is called for a connection, that one does not count as waiting."""

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            one = self.current.get()
            self._waiting.pop(one, None)
            one.head_ended()
            one.calls += 1
            try:
                await app(scope, receive, send)
            finally:
                scope["extensions"] = {}  # refers to the scope: only a collection would free both
                one.calls -= 1
                # The next request may have begun already: when the answer is sent, its task has not ended.
                if not one.calls and one in self._open:
                    self._waiting[one] = None

        return watched


class HeldHead:
    """A connection's transport, which sends the head of a response together with what follows it in the same turn of
    the event loop: a small answer is one packet and costs one system call.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""

    def write(self, data: bytes) -> None:
        if not self._head and data.startswith(b"HTTP/1."):
            self._head = data
            asyncio.get_running_loop().call_soon(self._flush)
        else:
            head, self._head = self._head, b""
            self._transport.write(head + data if head else data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._head:
            self.write(b"")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class GuardedProtocol(asyncio.Protocol):
    """Passes a connection on to ``inner``, uvicorn's protocol, with a time limit on each request head, and on how long
    the client may leave what was sent unread. Between requests uvicorn's own keep-alive limit holds.
    """

    transport: asyncio.Transport

    def __init__(self, connections: Connections, inner: Callable[..., asyncio.Protocol], **settings: Any) -> None:
        self._inner = inner(**settings)
        self._connections = connections
        self.calls = 0  # of the application, that have not ended
        self._timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0  # received while a head is awaited

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._connections.opened(self)
        self._start_timer()
        self._inner.connection_made(HeldHead(transport))  # type: ignore[arg-type]

    def connection_lost(self, exc: Exception | None) -> None:
        self.head_ended()
        self._stop_send_timer()
        self._connections.closed(self)
        self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # The application is called before the next data arrive, so these follow data that did not complete a head.
        if self._head_bytes > MAX_HEAD_BYTES:
            self.transport.abort()
            return
        if self._connections.waits(self):
            self._head_bytes += len(data)
        token = self._connections.current.set(self)
        try:
            self._inner.data_received(data)
        finally:
            self._connections.current.reset(token)
        if self._timer is None and self._connections.waits(self):
            self._start_timer()

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._send_timer = asyncio.get_running_loop().call_later(self._connections.send_timeout_s, self.transport.abort)
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._stop_send_timer()
        self._inner.resume_writing()

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _start_timer(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._connections.head_timeout_s, self.transport.close)

    def head_ended(self) -> None:
        """The request's head is whole, or the connection has ended."""
        self._head_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class AcceptErrors:
    """A loop's exception handler: it logs at most every ``LOG_AGAIN_S`` that connections cannot be accepted."""

    def __init__(self) -> None:
        self._logged_at = -LOG_AGAIN_S

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "socket.accept()" not in str(context.get("message")):
            loop.default_exception_handler(context)
            return
        now = time.monotonic()
        if now - self._logged_at >= LOG_AGAIN_S:
            self._logged_at = now
            log.error("connections cannot be accepted: %s; raise the limit (ulimit -n)", context.get("exception"))
