"""A Hub on this machine that misbehaves as the repository asked for is named: ``org/status-500``, ``org/cut``.

``org/split`` has a GGUF model in three parts, ``org/part`` lacks the last of them.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40
FILES = ("config.json", "model.safetensors", "model.gguf", "adapter_config.json", "adapter_model.safetensors")
PARTS = tuple(f"q4/m-{number:05d}-of-00003.gguf" for number in (1, 2, 3))
NOTHING = "http://127.0.0.1:9"
"""An address where nothing listens."""


def environment(endpoint: str) -> dict[str, str]:
    """By which the Hub's library asks ``endpoint`` alone."""
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/models")
        repo, listed = path.split("/")[2], self.path.startswith("/api/models")
        names = (*FILES, *PARTS) if repo == "split" else (*FILES, *PARTS[:2]) if repo == "part" else FILES
        match repo.split("-"):
            case ["status", code]:
                self._send(b"secret words of the server", int(code))
            case ["missing"]:
                self._send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
            case ["gated"]:
                self._send(b"{}", 403, {"X-Error-Code": "GatedRepo"})
            case ["garbage"]:
                self._send(b"<html>a captive portal</html>")
            case ["list"]:
                self._send(b"[]")
            case _ if listed and "/tree/" in path:
                files = [{"type": "file", "path": name, "size": 100, "oid": "0" * 40} for name in names]
                self._send(json.dumps(files).encode())
            case _ if listed:
                rows = [{"rfilename": name, "size": 100} for name in names]
                self._send(json.dumps({"id": f"org/{repo}", "sha": COMMIT, "siblings": rows}).encode())
            case ["cut"]:
                self._send(b"x" * 100, cut=50)
            case _:
                self._send(b"x" * 100)

    def _send(
        self, body: bytes, status: int = 200, headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status == 200:
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        self.close_connection = True


@contextmanager
def misbehaving_hub() -> Iterator[str]:
    """Its address while the context lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
