"""An HTTP server on this machine that has adapters, and misbehaves as a test says."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


@dataclass
class Source:
    """``files`` by path. ``tokens``: the bearer token (or Basic login) that a first path component needs.

    ``redirects``: path → location. ``cut``: how many bytes of a path's body are sent, once. ``hangs``: paths that are
    not answered until ``go``. ``then``: files that replace others after so many requests for a path. ``marks``: ETags.
    ``asked``: method and path of every request, ``seen`` its credentials.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    status: dict[str, int] = field(default_factory=dict)
    then: dict[str, tuple[int, dict[str, bytes]]] = field(default_factory=dict)
    hangs: set[str] = field(default_factory=set)
    ranges: bool = True
    marks: bool = True
    head: bool = True
    lengths: bool = True
    asked: list[str] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def put(self, name: str, folder: Path) -> str:
        """Offer the adapter in ``folder`` as ``name``; returns its URL."""
        for path in folder.iterdir():
            self.files[f"/{name}/{path.name}"] = path.read_bytes()
        return f"{self.url}/{name}"

    def bodies(self) -> list[str]:
        """The paths of which a body was asked for."""
        return [line.removeprefix("GET ") for line in self.asked if line.startswith("GET ")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    source: Source

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        source, path = self.source, unquote(self.path)
        source.asked.append(f"{self.command} {path}")
        source.seen.append(self.headers.get("Authorization", ""))
        if path in source.then:
            left, files = source.then[path]
            source.then[path] = (left - 1, files)
            if left == 0:
                source.files.update(files)
        if path in source.hangs:
            source.go.wait(30)
        if path in source.status:
            return self._send(b"secret words", source.status[path])
        token = source.tokens.get(path.split("/")[1])
        if token is not None and self.headers.get("Authorization") not in (f"Bearer {token}", f"Basic {token}"):
            return self._send(b"who are you? secret words", 403)
        if path in source.redirects:
            return self._send(b"", 302, {"Location": source.redirects[path]})
        if self.command == "HEAD" and not source.head:
            return self._send(b"", 405)
        body = source.files.get(path)
        if body is None:
            return self._send(b"no such thing", 404)
        headers = {"ETag": f'"{hashlib.md5(body).hexdigest()}"'} if source.marks else {}
        headers["Last-Modified"] = "Mon, 05 Jan 2026 10:00:00 GMT" if source.marks else ""
        begin, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if begin and source.ranges:
            end = min(int(last or len(body)), len(body) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(body)}"
            return self._send(body[int(begin) : end + 1], 206, headers)
        return self._send(body, 200, headers)

    def _send(self, body: bytes, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        if self.source.lengths or status != 200:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.close_connection = True
        self.end_headers()
        if self.command == "GET":
            cut = self.source.cut.pop(unquote(self.path), None) if status in (200, 206) else None
            self.wfile.write(body[:cut])
            self.close_connection |= cut is not None


@contextmanager
def source_server() -> Iterator[Source]:
    source = Source()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"source": source}))
    server.daemon_threads = True
    source.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield source
    finally:
        source.go.set()
        server.shutdown()
        thread.join()
        server.server_close()
