"""Server-sent events: the one frame writer, and a response that aborts its work when the client goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

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
WRITE_CHUNK = "truffula.write_chunk"
"""The ASGI extension whose ``write(bytes) -> bool`` sends a chunk of a streamed answer, past the middleware. False: it
was not sent, since the client is slow or has left; ``send`` waits.
"""
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


async def wait_until_gone(receive: Receive) -> None:
    """Returns when the client has closed the connection; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """``work``'s result; ``ClientGone``, once ``work`` was cancelled and has ended, when the client leaves first.

    ``work`` runs in the calling task: another would cost a small answer as much as its text does.
    """
    task, gone = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal gone
        await wait_until_gone(receive)
        gone = True
        task.cancel()

    watching = asyncio.ensure_future(watch())
    try:
        try:
            return await work
        finally:
            await end_tasks(watching)
    except asyncio.CancelledError as error:
        if gone and task.uncancel() == 0:
            raise ClientGone from error
        raise


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
        self.raw_headers = [(k.encode(), v.encode("latin-1")) for k, v in (*STREAM_HEADERS, *(headers or {}).items())]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # A task of its own: to resume the caller's for each token is to pass through the frames of all middleware.
            write = scope.get("extensions", {}).get(WRITE_CHUNK, {}).get("write")
            await unless_gone(receive, asyncio.ensure_future(self._send_all(send, write)))
        finally:
            await self._frames.aclose()

    async def _send_all(self, send: Send, write: Callable[[bytes], bool] | None) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        loop = asyncio.get_running_loop()
        last = loop.time()

        async def keep_alive() -> None:
            nonlocal last
            while True:
                await asyncio.sleep(max(0.01, last + self._keep_alive_s - loop.time()))
                if loop.time() - last >= self._keep_alive_s:
                    last = loop.time()
                    await send({"type": "http.response.body", "body": self._keep_alive, "more_body": True})

        ticker = asyncio.ensure_future(keep_alive())
        try:
            async for chunk in self._frames:
                last = loop.time()
                if not chunk:
                    continue  # a chunk without bytes would be the end
                if write is None or not write(chunk):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except OSError as error:  # what a server of ASGI spec 2.4 raises when the client is gone
            raise ClientGone from error
        finally:
            await end_tasks(ticker)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
