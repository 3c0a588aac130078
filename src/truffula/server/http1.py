"""``Http1``: uvicorn's protocol on httptools, whose refusals are errors of ours and which ignores ``Upgrade``."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from truffula.errors import TruffulaError
from truffula.server.errors import HttpVersion, MalformedBody, dialect_of_request, render
from truffula.server.sse import CONNECTION

NO_VERSION = "0.0"
"""httptools' version of a head that ended before it was known."""


class RequestConnection:
    """The ``ClientConnection`` of one request. While it has a callback it is one of ``watched``."""

    __slots__ = ("_callback", "_cycle", "_watched", "written_at")

    def __init__(self, cycle: RequestResponseCycle, watched: dict[RequestConnection, None]) -> None:
        self._cycle = cycle
        self._watched = watched
        self.written_at = 0.0
        self._callback: Callable[[], None] | None = None

    @property
    def gone(self) -> bool:
        return self._cycle.disconnected or self._cycle.transport.is_closing()

    def take_body(self) -> bytes | None:
        cycle = self._cycle
        if cycle.more_body or cycle.disconnected:
            return None
        body, cycle.body = bytes(cycle.body), bytearray()
        return body

    @property
    def writable(self) -> bool:
        cycle = self._cycle
        return bool(cycle.chunked_encoding) and not (cycle.flow.write_paused or cycle.disconnected)

    def write(self, chunk: bytes) -> bool:
        if not self.writable:
            return False
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        self.written_at = time.monotonic()
        return True

    def when_gone(self, callback: Callable[[], None] | None) -> None:
        self._callback = callback
        if callback is None:
            self._watched.pop(self, None)
        else:
            self._watched[self] = None
            self._cycle.flow.resume_reading()  # a large body has paused it, and the end would not be seen

    def lost(self) -> None:
        if self._callback is not None:
            self._callback()


class Http1(HttpToolsProtocol):
    """Differs from uvicorn's in what is no valid request, and in requests that ask for another protocol.

    The first is answered in JSON, where no answer is being sent, and ends the connection. A request to change to
    another protocol is served as if it had not asked, as RFC 9110, 7.8 allows: Java's client asks for HTTP/2 in each
    first request. httptools does not read the body of such a request, uvicorn would answer without it.
    """

    _data = b""
    _ended = False

    def data_received(self, data: bytes) -> None:
        if not self._ended:
            self._data = data
            super().data_received(data)
            self._data = b""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watched: dict[RequestConnection, None] = {}

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for one in list(self._watched):
            one.lost()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:
            self.scope["extensions"] = {CONNECTION: {"connection": RequestConnection(self.cycle, self._watched)}}

    def _should_upgrade(self) -> bool:
        return True  # ``handle_websocket_upgrade`` is called in place of the application

    def handle_websocket_upgrade(self) -> None:
        """Parse the head again without its ``Upgrade``, and what follows it."""
        method = self.scope["method"]
        if method == "CONNECT":
            self.send_400_response("CONNECT is not supported.")
            return
        stopped = sys.exception()
        assert isinstance(stopped, httptools.HttpParserUpgrade)
        rest = self._data[stopped.args[0] :]
        head = [method.encode() + b" " + self.url + b" HTTP/1.1"]
        head += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join(head) + b"\r\n\r\n" + rest)

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be parsed. ``msg``: uvicorn's sentence, which httptools' error completes."""
        self._ended = True
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            cycle.keep_alive = False  # a whole request came before: its answer ends the connection
        elif cycle is not None and not cycle.response_complete and (cycle.response_started or self.pipeline):
            self.transport.abort()
        else:
            self.transport.write(self._answer(self._refusal(msg)))
            self.transport.close()

    def _refusal(self, msg: str) -> TruffulaError:
        version, found = self.parser.get_http_version(), sys.exception()
        if version not in (NO_VERSION, "1.0", "1.1"):
            return HttpVersion(f"HTTP/{version} is not supported; use HTTP/1.1.")
        said: Any = found.args[0] if isinstance(found, httptools.HttpParserError) and found.args else ""
        return MalformedBody(f"{msg} {said}".strip())

    def _answer(self, error: TruffulaError) -> bytes:
        request_id, path = uuid.uuid4().hex, self.url.partition(b"?")[0].decode("latin-1")
        dialect = dialect_of_request({"path": path, "headers": self.headers})
        found = render(error, dialect, request_id)
        names = (b"x-request-id",) + (b"request-id",) * (dialect == "anthropic")
        headers = [*found.raw_headers, *((name, request_id.encode()) for name in names), (b"connection", b"close")]
        status = f"HTTP/1.1 {found.status_code} {HTTPStatus(found.status_code).phrase}\r\n".encode()
        return status + b"".join(name + b": " + value + b"\r\n" for name, value in headers) + b"\r\n" + found.body
