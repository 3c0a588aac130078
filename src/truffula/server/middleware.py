"""The way of every request to its handler, as plain ASGI: id, log line, metrics, rules, limits, and a reply for
unexpected exceptions.

It is one layer, as each costs a request a coroutine or two.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from truffula.config import ServerConfig
from truffula.errors import Overloaded, TruffulaError
from truffula.metrics import Metrics, RequestRecord
from truffula.server.auth import KeyCheck, WebRules
from truffula.server.body import as_sent, safe_header
from truffula.server.errors import BodyTooLarge, HttpVersion, MalformedBody, SlowBody, dialect_of_request, render
from truffula.server.sse import ClientGone, connection_of

log = logging.getLogger(__name__)
access = logging.getLogger("truffula.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
QUIET_PATHS = frozenset({"/health", "/ping", "/metrics", "/load", "/get_load"})
CLIENT_CLOSED = 499  # nginx's number for a client that left before its answer; only in logs and metrics


def rejection(scope: Scope, error: TruffulaError, *, close: bool = False) -> Response:
    """The answer to a request that is rejected with ``error``, whose code the log line and the metrics have too."""
    scope["state"]["record"].error_code = error.code
    if (body := scope["state"].get("body")) is not None:
        error = as_sent(error, body)
    response = render(error, dialect_of_request(scope), scope["state"]["record"].request_id)
    if close:
        response.headers["connection"] = "close"
    return response


def request_id(given: str | None) -> str:
    """The client's id where it is safe in a header and a log line, else a new one."""
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return secrets.token_hex(16)


class RequestPipeline:
    """All that comes before a request's handler, in one layer, and the log line and the counts after it.

    A request is refused by its head, then by ``web`` and ``keys``, then by its body. A handler whose path has no
    parameters is found in ``handlers``, by method and path; ``others`` is the application of all other paths.
    """

    def __init__(
        self,
        others: ASGIApp,
        config: ServerConfig,
        metrics: Metrics,
        web: WebRules,
        keys: KeyCheck | None,
        routes: Sequence[Route],
    ) -> None:
        self._others = others
        self._metrics = metrics
        self._web = web
        self._keys = keys
        self._body = BodyLimits(self._handle, config)
        self._cors = web.cors(self._checked)
        self._routes = {
            (method, route.path): route for route in routes if "{" not in route.path for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._others(scope, receive, send)
            return
        given = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"x-request-id"), None)
        record = RequestRecord(request_id=request_id(given), method=scope["method"], path=scope["path"])
        scope.setdefault("state", {})["record"] = record
        started = time.monotonic()
        cors = None if self._web.is_closed(scope) else self._cors
        from_page = any(name == b"origin" for name, _ in scope["headers"])
        varies = False  # with the page, as ``cors`` would say

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                extra = [(b"x-request-id", record.request_id.encode())]
                if dialect_of_request(scope) == "anthropic":
                    extra.append((b"request-id", record.request_id.encode()))
                if record.adapter and record.status < 400:  # it answered
                    extra.append((b"x-truffula-adapter", safe_header(record.adapter).encode("latin-1")))
                    if record.generation:
                        extra.append((b"x-truffula-generation", record.generation.encode()))
                if record.ignored:
                    extra.append((b"x-truffula-ignored", record.ignored.encode("latin-1", "replace")))
                if varies:
                    extra.append((b"vary", b"Origin"))
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        try:
            if (error := head_error(scope)) is not None:
                await rejection(scope, error, close=True)(scope, receive, with_id)
            elif (error := self._web.error(scope)) is not None:
                await rejection(scope, error)(scope, receive, with_id)
            elif cors is not None and from_page:
                await cors(scope, receive, with_id)
            else:
                varies = cors is not None
                await self._checked(scope, receive, with_id)
        except ClientGone:
            record.error_code = "client_gone"
        except Exception:
            log.exception("request %s failed with an internal error", record.request_id)
            record.error_code = "internal_error"
            if not record.status:
                error = TruffulaError(f"Internal server error (request {record.request_id}); see the server's log.")
                await render(error, dialect_of_request(scope), record.request_id)(scope, receive, with_id)
        finally:
            self._ended(record, scope, time.monotonic() - started)

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._keys is not None and (error := self._keys.error(scope)) is not None:
            await rejection(scope, error)(scope, receive, send)
        elif scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._handle(scope, receive, send)
        else:
            await self._body(scope, receive, send)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get((scope["method"], scope["path"]))
        if route is None:
            await self._others(scope, receive, send)
            return
        scope["route"] = route
        try:
            response = await route.endpoint(Request(scope, receive, send))
        except TruffulaError as error:
            response = rejection(scope, error)
        await response(scope, receive, send)

    def _ended(self, record: RequestRecord, scope: Scope, total_s: float) -> None:
        record.total_s = total_s
        record.status = record.status or CLIENT_CLOSED
        route = scope.get("route")
        record.route = getattr(route, "path", "") or record.route
        self._metrics.request_ended(record)
        # Successful probes come every second and are not worth a line.
        level = logging.DEBUG if record.path in QUIET_PATHS and record.status < 400 else logging.INFO
        if access.isEnabledFor(level):
            fields = {name: getattr(record, name) for name in RequestRecord.__slots__}
            access.log(level, "%s", access_line(record), extra={"fields": fields})


def access_line(record: RequestRecord) -> str:
    """The log line of a request. It never holds a prompt, an answer or a key."""
    parts = [f"id={record.request_id}", f'"{record.method} {_one_line(record.path)}"', f"status={record.status}"]
    if record.generates:
        parts += [
            f"adapter={_one_line(record.adapter) if record.adapter else '-'}",
            f"prompt_tokens={record.prompt_tokens} completion_tokens={record.completion_tokens}",
            f"queue_ms={_ms(record.queue_s)} ttft_ms={_ms(record.ttft_s)}",
            f"finish={record.finish or '-'}",
        ]
    parts.append(f"total_ms={_ms(record.total_s)}")
    if record.error_code:
        parts.append(f"error={record.error_code}")
    if record.ignored:
        parts.append(f'ignored="{record.ignored}"')
    return " ".join(parts)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"


def _one_line(text: str) -> str:
    """``text``, which a client chose, without characters that could start another line or field of the log."""
    return "".join(c if c.isprintable() and c not in ' "' else "?" for c in text[:200])


def head_error(scope: Scope) -> TruffulaError | None:
    """Why a head is refused whose framing or version could be read in two ways; its connection is closed then.

    A head with both Content-Length and Transfer-Encoding may be two requests to one server and one to another (RFC
    9112, 6.1).
    """
    if scope["http_version"] not in ("1.0", "1.1"):
        return HttpVersion(f"HTTP/{scope['http_version']} is not supported; use HTTP/1.1.")
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
        return MalformedBody("The request has both Content-Length and Transfer-Encoding; send one of them.")
    return None


class BodyLimits:
    """Reads a body whole before the app sees it, into the scope's state, and refuses what exceeds the limits of
    ``config``.

    429 while ``max_open_requests`` others with a body are open, those whose bodies still arrive included; 413 after
    ``max_body_bytes``, 408 after ``body_timeout_s``. Probes and other GETs do not come here: an overloaded server is
    alive.

    The rest of a body that is too large is read and dropped for a while before the connection closes: closing it now
    would reset it, and most clients would report that instead of reading the answer.
    """

    linger_bytes = 64 * 2**20
    linger_s = 5.0

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self.app = app
        self._config = config
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._open >= self._config.max_open_requests:
            text = f"{self._open} requests are open, which is this server's limit (--max-open-requests)."
            await rejection(scope, Overloaded(text, retry_after_s=1))(scope, receive, send)
            return
        self._open += 1
        try:
            scope["state"]["raw_body"] = await self._read(scope, receive)
        except SlowBody as error:
            await rejection(scope, error, close=True)(scope, receive, send)
        except BodyTooLarge as error:
            await self._reject_large(error, scope, receive, send)
        else:
            await self.app(scope, receive, send)
        finally:
            self._open -= 1

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The body. Raises ``BodyTooLarge``, ``SlowBody``, and ``ClientGone`` when the client leaves before its end."""
        limit, timeout_s = self._config.max_body_bytes, self._config.body_timeout_s

        def require(size: int) -> None:
            if size > limit:
                raise BodyTooLarge(f"The body is larger than {limit} bytes, this server's limit.", limit=limit)

        whole = connection_of(scope).take_body()
        if whole is not None:
            require(len(whole))
            return whole
        declared = dict(scope["headers"]).get(b"content-length", b"")
        require(int(declared) if declared.isdigit() else 0)
        body = bytearray()
        try:
            async with asyncio.timeout(timeout_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    require(len(body))
        except TimeoutError:
            raise SlowBody(f"The body did not arrive within {timeout_s:g} s, this server's limit.") from None
        return bytes(body)

    async def _reject_large(self, error: BodyTooLarge, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_linger(message: Message) -> None:
            if message["type"] == "http.response.body":
                await send({**message, "more_body": True})
                if b"expect" not in dict(scope["headers"]):
                    await self._discard(receive)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await rejection(scope, error, close=True)(scope, receive, send_and_linger)

    async def _discard(self, receive: Receive) -> None:
        left = self.linger_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.linger_s):
                while left > 0:
                    message = await receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return
                    left -= len(message.get("body", b""))
