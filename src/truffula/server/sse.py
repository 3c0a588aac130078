"""Server-sent events: the one frame writer, and a response that aborts its work when the client goes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
STREAM_HEADERS: tuple[tuple[str, str], ...] = (
    ("content-type", "text/event-stream"),
    ("cache-control", "no-cache"),
    ("x-accel-buffering", "no"),
)
CONNECTION = "truffula.connection"
"""The ASGI extension whose ``connection`` is the ``ClientConnection`` of a request."""
# JSON leaves these as they are, but clients that split text (not bytes) into lines split at them too.
_LINE_ENDS = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085"))

_encoder = msgspec.json.Encoder()


class ClientGone(Exception):
    """The client closed its connection before the answer was sent."""


def frame(value: Any) -> bytes:
    """``value`` as one event on one line: clients split by line and know neither multi-line data nor ``event:``."""
    return frame_of(encode(value))


def encode(value: Any) -> bytes:
    """``value`` as JSON."""
    return _encoder.encode(value)


def frame_of(payload: bytes) -> bytes:
    """``frame`` of a value that is JSON already."""
    for raw, escaped in _LINE_ENDS:
        if raw in payload:
            payload = payload.replace(raw, escaped)
    return b"data: " + payload + b"\n\n"


class ClientConnection(Protocol):
    """The connection of a request, as the server's protocol knows it: past the middleware, and without a task that
    waits for its end.
    """

    @property
    def gone(self) -> bool:
        """Whether the connection has ended."""

    @property
    def writable(self) -> bool:
        """Whether ``write`` would send a chunk."""

    @property
    def written_at(self) -> float:
        """When ``write`` sent a chunk last, in seconds of the monotonic clock; 0.0 before."""

    def take_body(self) -> bytes | None:
        """The request's body where all of it has arrived and none was received yet, once; None where it has not."""

    def write(self, chunk: bytes) -> bool:
        """Whether a chunk of a streamed answer was sent; to one that is slow or gone it is not."""

    def when_gone(self, callback: Callable[[], None] | None) -> None:
        """Call ``callback`` when the connection ends; None: no longer."""


def connection_of(scope: Scope) -> ClientConnection:
    connection: ClientConnection = scope["extensions"][CONNECTION]["connection"]
    return connection


async def unless_gone(connection: ClientConnection, work: Awaitable[T]) -> T:
    """``work``'s result; ``ClientGone``, once ``work`` was cancelled and has ended, when the client leaves first.

    ``work`` runs in the calling task: another would cost a small answer as much as its text does.
    """
    task, left = asyncio.current_task(), False
    assert task is not None

    def leave() -> None:
        nonlocal left
        if not left:  # the end of its sending, then that of the connection: cancelled twice, ``work`` ends as a task
            left = True
            task.cancel()

    # One that has left already cancels ``work`` where it waits, as one that leaves later.
    early = asyncio.get_running_loop().call_soon(leave) if connection.gone else None
    connection.when_gone(leave)
    try:
        return await work
    except asyncio.CancelledError as error:
        if left and task.uncancel() == 0:
            raise ClientGone from error
        raise
    finally:
        connection.when_gone(None)
        if early is not None:
            early.cancel()


async def end_tasks(*tasks: asyncio.Future[Any]) -> None:
    """Cancels what still runs and waits for it, so that nothing outlives its request."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Sends ``first`` and then what ``frames`` yields, and ``keep_alive`` when nothing was sent for ``keep_alive_s``.

    ``frames`` yields one or more whole frames at a time and never raises an error of a request: that is a frame.
    It is closed, which ends its work, when the client leaves; then ``ClientGone`` is raised.
    """

    def __init__(
        self,
        first: bytes,
        frames: AsyncGenerator[bytes, None],
        headers: Mapping[str, str] | None,
        keep_alive_s: float,
        keep_alive: bytes = KEEP_ALIVE,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._first = first
        self._frames = frames
        self._keep_alive_s = keep_alive_s
        self._keep_alive = keep_alive
        self._sent_at = 0.0
        self.raw_headers = [(k.encode(), v.encode("latin-1")) for k, v in (*STREAM_HEADERS, *(headers or {}).items())]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = connection_of(scope)
        try:
            # A task of its own: to resume the caller's for each token is to pass through the frames of all middleware.
            await unless_gone(connection, asyncio.ensure_future(self._send_all(send, connection)))
        finally:
            await self._frames.aclose()

    async def _send_all(self, send: Send, connection: ClientConnection) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        self._sent_at = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(self._keep_alive_s, self._stay_alive, connection)
        try:
            async for chunk in self._frames:
                self._sent_at = time.monotonic()
                if not chunk:
                    continue  # a chunk without bytes would be the end
                if not connection.write(chunk):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except OSError as error:  # what a server of ASGI spec 2.4 raises when the client is gone
            raise ClientGone from error
        finally:
            self._timer.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _stay_alive(self, connection: ClientConnection) -> None:
        """Send ``keep_alive`` if nothing else was sent for so long, and look again when that may be so. A method, as a
        function that names itself is freed by a collection only.
        """
        self._sent_at = max(self._sent_at, connection.written_at)
        if time.monotonic() - self._sent_at >= self._keep_alive_s:
            self._sent_at = time.monotonic()
            connection.write(self._keep_alive)  # one that is slow has bytes to read
        delay = max(0.01, self._sent_at + self._keep_alive_s - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(delay, self._stay_alive, connection)
