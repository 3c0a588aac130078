"""Middleware of every request, as plain ASGI: id, log line, metrics, limits, and a reply for unexpected exceptions.

Starlette's ``BaseHTTPMiddleware`` is not used: it copies every chunk of a stream through a queue and hides disconnects.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from truffula.errors import Overloaded, TruffulaError
from truffula.metrics import Metrics, RequestRecord
from truffula.server.errors import BodyTooLarge, HttpVersion, MalformedBody, SlowBody, dialect_of, render
from truffula.server.sse import ClientGone

log = logging.getLogger(__name__)
access = logging.getLogger("truffula.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
QUIET_PATHS = frozenset({"/health", "/ping", "/metrics"})
CLIENT_CLOSED = 499  # nginx's number for a client that left before its answer; only in logs and metrics


async def send_reply(send: Send, status: int, headers: Mapping[str, str], body: bytes) -> None:
    """A whole answer from outside the routes."""
    pairs = [(k.encode(), v.encode("latin-1")) for k, v in headers.items()]
    pairs.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def request_id(given: str | None) -> str:
    """The client's id where it is safe in a header and a log line, else a new one."""
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return uuid.uuid4().hex


class RequestScope:
    """Outermost: gives each request its ``RequestRecord`` and, when all is sent, one log line and its counts."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"x-request-id"), None)
        record = RequestRecord(request_id=request_id(given), method=scope["method"], path=scope["path"])
        scope.setdefault("state", {})["record"] = record
        started = time.monotonic()

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                extra = [(b"x-request-id", record.request_id.encode())]
                if record.ignored:
                    extra.append((b"x-truffula-ignored", record.ignored.encode("latin-1", "replace")))
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        try:
            await self.app(scope, receive, with_id)
        except ClientGone:
            record.error_code = "client_gone"
        except Exception:
            log.exception("request %s failed with an internal error", record.request_id)
            record.error_code = "internal_error"
            if not record.status:
                error = TruffulaError(f"Internal server error (request {record.request_id}); see the server's log.")
                await send_reply(with_id, *render(error, dialect_of(record.path)))
        finally:
            self._ended(record, scope, time.monotonic() - started)

    def _ended(self, record: RequestRecord, scope: Scope, total_s: float) -> None:
        record.total_s = total_s
        record.status = record.status or CLIENT_CLOSED
        route = scope.get("route")
        record.route = getattr(route, "path", "") or record.route
        self._metrics.request_ended(record)
        # Successful probes come every second and are not worth a line.
        level = logging.DEBUG if record.path in QUIET_PATHS and record.status < 400 else logging.INFO
        if access.isEnabledFor(level):
            access.log(level, "%s", AccessLine(record), extra={"fields": asdict(record)})


class AccessLine:
    """The log line of a request, formatted when it is written. It never holds a prompt, an answer or a key."""

    __slots__ = ("record",)

    def __init__(self, record: RequestRecord) -> None:
        self.record = record

    def __str__(self) -> str:
        r = self.record
        parts = [f"id={r.request_id}", f'"{r.method} {_one_line(r.path)}"', f"status={r.status}"]
        if r.generates:
            parts.append(f"adapter={_one_line(r.adapter) if r.adapter else '-'}")
            parts.append(f"prompt_tokens={r.prompt_tokens} completion_tokens={r.completion_tokens}")
            parts += [f"queue_ms={_ms(r.queue_s)}", f"ttft_ms={_ms(r.ttft_s)}"]
            parts.append(f"finish={r.finish or '-'}")
        parts.append(f"total_ms={_ms(r.total_s)}")
        if r.error_code:
            parts.append(f"error={r.error_code}")
        if r.ignored:
            parts.append(f'ignored="{r.ignored}"')
        return " ".join(parts)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"


def _one_line(text: str) -> str:
    """``text``, which a client chose, without characters that could start another line or field of the log."""
    return "".join(c if c.isprintable() and c not in ' "' else "?" for c in text[:200])


WITHOUT_BODY = frozenset({"GET", "HEAD", "OPTIONS"})


class HttpRules:
    """Refuses heads whose framing or version could be read in two ways, and closes their connections.

    A head with both Content-Length and Transfer-Encoding may be two requests to one server and one to another (RFC
    9112, 6.1).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error: TruffulaError | None = None
        if scope["type"] == "http":
            names = {name for name, _ in scope["headers"]}
            if scope["http_version"] not in ("1.0", "1.1"):
                error = HttpVersion(f"HTTP/{scope['http_version']} is not supported; use HTTP/1.1.")
            elif {b"content-length", b"transfer-encoding"} <= names:
                error = MalformedBody("The request has both Content-Length and Transfer-Encoding; send one of them.")
        if error is None:
            await self.app(scope, receive, send)
            return
        scope["state"]["record"].error_code = error.code
        status, headers, body = render(error, dialect_of(scope["path"]))
        await send_reply(send, status, {**headers, "connection": "close"}, body)


class OpenLimit:
    """Refuses a request with a body while ``limit`` others are open, those whose bodies still arrive included.

    Probes and other GETs pass: they are answered immediately, and an overloaded server is alive.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self._limit = limit
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in WITHOUT_BODY:
            await self.app(scope, receive, send)
            return
        if self._open >= self._limit:
            error = Overloaded(
                f"{self._open} requests are open, which is this server's limit (--max-open-requests).", retry_after_s=1
            )
            scope["state"]["record"].error_code = error.code
            await send_reply(send, *render(error, dialect_of(scope["path"])))
            return
        self._open += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._open -= 1


class BodyLimit:
    """Reads a body whole before the app sees it; stops at ``limit`` bytes with 413, after ``timeout_s`` with 408.

    The rest of a refused body is read and dropped for a while before the connection closes: closing it now would reset
    it, and most clients would report that instead of reading the answer.
    """

    linger_bytes = 64 * 2**20
    linger_s = 5.0

    def __init__(self, app: ASGIApp, limit: int, timeout_s: float) -> None:
        self.app = app
        self._limit = limit
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in WITHOUT_BODY:
            await self.app(scope, receive, send)
            return
        declared = next((v for k, v in scope["headers"] if k == b"content-length"), b"")
        body: bytes | TruffulaError | None
        if declared.isdigit() and int(declared) > self._limit:
            body = self._too_large()
        else:
            body = await self._read(receive)
        if body is None:
            return
        if isinstance(body, TruffulaError):
            await self._reject(body, scope, receive, send)
            return
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            if whole is not None:
                message, whole = whole, None
                return message
            return await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | TruffulaError | None:
        """The body, why it is refused, or None when the client left before its end."""
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._limit:
                        return self._too_large()
        except TimeoutError:
            return SlowBody(f"The body did not arrive within {self._timeout_s:g} s, this server's limit.")
        return bytes(body)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The body is larger than {self._limit} bytes, this server's limit.", limit=self._limit)

    async def _reject(self, error: TruffulaError, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["record"].error_code = error.code
        status, headers, body = render(error, dialect_of(scope["path"]))
        pairs = [(k.encode(), v.encode()) for k, v in headers.items()]
        pairs += [(b"content-length", str(len(body)).encode()), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        if isinstance(error, BodyTooLarge) and not any(k == b"expect" for k, _ in scope["headers"]):
            await self._discard(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _discard(self, receive: Receive) -> None:
        left = self.linger_bytes
        try:
            async with asyncio.timeout(self.linger_s):
                while left > 0:
                    message = await receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return
                    left -= len(message.get("body", b""))
        except TimeoutError:
            return
