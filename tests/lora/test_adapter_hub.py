"""Fetching from a Hub on this machine whose branch moves while an adapter is fetched."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from truffula.lora.fields import MAX_CONFIG_BYTES

OLD, NEW = "a" * 40, "b" * 40
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Files = dict[str, bytes]

CALLS = """
import json, sys
from pathlib import Path
from truffula.errors import TruffulaError
from truffula.lora.disk_cache import DiskCache
from truffula.lora.hub import download
from truffula.lora.remote import fetch
from truffula.types import AdapterRef, Credential
for line in sys.stdin:
    cache, how, token = json.loads(line)
    try:
        if token:
            right = Credential(f"id of {token}", token)
            ref = AdapterRef(name="org/x", kind="hub", locator="org/x", fingerprint=how, credential=right)
            own = DiskCache(Path(cache) / "own", 1 << 20)
            with fetch(ref, "", own, offline=how == "offline", max_file_bytes=64) as fetched:
                found = (fetched.folder / "adapter_model.safetensors").read_bytes().decode()
        else:
            found = str(download("org/x", None, cache_dir=Path(cache), offline=how == "offline", max_file_bytes=64))
    except TruffulaError as error:
        found = f"{error.code} {error.param} {error.message}"
    print(json.dumps(found), flush=True)
"""


class Hub(ThreadingHTTPServer):
    """Lists the branch at ``OLD``; by then it has moved to ``NEW``. ``asked``: what was fetched."""

    def __init__(self, old: Files, new: Files) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits = {OLD: old, NEW: new}
        self.asked: list[str] = []
        self.token = ""  # that reading it needs
        self.stalled: threading.Event | None = None  # set once half of the tensors were sent, after which nothing comes
        self.go = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.send_response(401)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if path.startswith("/api/models/"):
            files = [{"rfilename": name, "size": len(data)} for name, data in self.server.commits[OLD].items()]
            body, commit = json.dumps({"id": "org/x", "sha": OLD, "siblings": files}).encode(), OLD
        else:
            _, _, _, _, revision, name = path.split("/", 5)
            commit = revision if revision in self.server.commits else NEW
            body = self.server.commits[commit].get(name, b"")
            if with_body:
                self.server.asked.append(name)
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body and path.endswith(TENSORS) and self.server.stalled is not None:
            self.wfile.write(body[: len(body) // 2])
            self.server.stalled.set()
            self.server.go.wait(60)
        elif with_body:
            self.wfile.write(body)


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    made = Hub({}, {})
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def hub(server: Hub) -> Hub:
    server.commits = {OLD: {CONFIG: b"{}", TENSORS: b"old"}, NEW: {CONFIG: b"{}", TENSORS: b"new" * 1000}}
    server.asked, server.token = [], ""
    return server


Download = Callable[..., str]


@contextmanager
def process(server: Hub, **more: str) -> Iterator[subprocess.Popen[str]]:
    """One that answers ``CALLS``: the Hub's address is read at its import."""
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1", **more}
    for name in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        env.pop(name, None)
    with subprocess.Popen(
        [sys.executable, "-c", CALLS], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as made:
        yield made


@pytest.fixture(scope="module")
def download(server: Hub) -> Iterator[Download]:
    """``download(cache, how)`` in another process, one for the module."""
    with process(server) as made:
        assert made.stdin is not None and made.stdout is not None
        asked, answers = made.stdin, made.stdout

        def call(cache: Path, how: str = "online", token: str = "") -> str:
            print(json.dumps([str(cache), how, token]), file=asked, flush=True)
            found: str = json.loads(answers.readline())
            return found

        yield call
        asked.close()
        assert made.wait(60) == 0


def test_what_was_checked_is_what_is_fetched_and_found_again_offline(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    hub.commits[OLD]["chat_template.jinja"] = b"{{ messages }}"
    folder = download(tmp_path)
    assert (Path(folder) / TENSORS).read_bytes() == b"old"
    assert (Path(folder) / "chat_template.jinja").read_bytes() == b"{{ messages }}"
    assert download(tmp_path, "offline") == folder


@pytest.mark.parametrize(("name", "nbytes"), [(TENSORS, 65), (CONFIG, 65), (CONFIG, MAX_CONFIG_BYTES + 1)])
def test_a_file_too_large_is_not_fetched(hub: Hub, download: Download, tmp_path: Path, name: str, nbytes: int) -> None:
    hub.commits[OLD][name] = b" " * nbytes
    assert download(tmp_path).startswith(f"adapter_invalid {name} ")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ([CONFIG, "adapter_model.bin"], ["pickle", "save_pretrained"]),
        ([CONFIG, "adapters.safetensors"], ["MLX"]),
        (["config.json", "model.safetensors"], ["full model"]),
        (["README.md", f"checkpoint-5/{CONFIG}", f"checkpoint-5/{TENSORS}"], ["checkpoint-5", "hf download org/x"]),
    ],
    ids=["a pickle", "MLX", "a model", "a subfolder"],
)
def test_a_repository_without_an_adapter_says_what_it_holds(
    hub: Hub, download: Download, tmp_path: Path, listed: list[str], words: list[str]
) -> None:
    hub.commits[OLD] = dict.fromkeys(listed, b"x")
    said = download(tmp_path)
    assert said.startswith("adapter_invalid ") and "org/x is not a PEFT adapter" in said
    assert [word for word in words if word not in said] == []
    assert hub.asked == []


def test_a_clients_token_opens_a_private_repository_for_those_who_send_it(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    """Its files are not in the Hub library's cache, from which everybody is served offline; and a token is asked for
    each time, while the bytes are fetched once.
    """
    hub.token = "right"
    assert download(tmp_path, token="right") == "old"
    assert sorted(hub.asked) == [CONFIG, TENSORS]
    unknown = "adapter_not_found model There is no model or adapter 'org/x'; GET /v1/models lists them."
    assert download(tmp_path, token="wrong") == unknown
    assert download(tmp_path).startswith("adapter_not_found ")
    assert download(tmp_path, token="right") == "old" and len(hub.asked) == 2
    assert download(tmp_path, "offline").startswith("adapter_load_failed ")
    assert "offline" in download(tmp_path, "offline", "right")
    hub.token = "another"
    assert download(tmp_path, token="right") == unknown
    hub.token = ""
    hub.commits = {OLD: {CONFIG: b"{}", TENSORS: b" " * 65}, NEW: {}}
    assert "the limit is 64" in download(tmp_path / "other", token="right")


def test_what_a_killed_process_downloaded_by_a_token_is_removed_by_the_next(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    (tmp_path / "tmp").mkdir()
    hub.token, hub.stalled = "right", threading.Event()
    with process(hub, TMPDIR=str(tmp_path / "tmp")) as made:
        assert made.stdin is not None
        print(json.dumps([str(tmp_path), "1", "right"]), file=made.stdin, flush=True)
        assert hub.stalled.wait(60)
        made.kill()
    hub.go.set()
    hub.stalled = None
    assert list((tmp_path / "tmp").iterdir()) == []
    assert len(list((tmp_path / "own" / "scratch").iterdir())) == 2
    assert download(tmp_path, "1", "right") == "old"
    assert list((tmp_path / "own" / "scratch").iterdir()) == []
