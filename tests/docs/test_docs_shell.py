"""Every fenced sh block runs, page by page, in the repository's root with ``truffula`` on the PATH.

A block that starts ``truffula serve`` goes to the background until the page ends; the next begins once it is healthy.
The port 8000 of the pages is a free one here: 8000 may be somebody else's.
``sh make`` blocks name make targets, which must exist; ``make demo`` and ``make test`` themselves are what CI runs.
Blocks with another word run in a client's environment (tests/clients/test_clients_slow.py).
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import ROOT, Block, blocks, pages

from clients import PACKAGES

PAGES = [page for page in pages() if any(not block.info for block in blocks(page, "sh"))]


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def served(block: Block, port: int) -> Iterator[None]:
    code = block.code.strip().replace("truffula serve", f"exec truffula serve --port {port}", 1)
    process = subprocess.Popen(["bash", "-ec", code], cwd=ROOT, env=environment())
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None, f"{block.page}:{block.line}: the server ended"
            assert time.monotonic() < deadline, f"{block.page}:{block.line}: the server was not healthy in time"
            with contextlib.suppress(OSError):  # URLError, timeouts and resets are all of these
                if urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200:
                    break
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_shell_blocks_run(page: Path) -> None:
    port = free_port()
    with contextlib.ExitStack() as background:
        for block in blocks(page, "sh"):
            if block.info:
                continue
            if block.code.lstrip().startswith("truffula serve"):
                background.enter_context(served(block, port))
                continue
            code = block.code.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
            done = subprocess.run(
                ["bash", "-ec", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, f"{block.page}:{block.line}\n{done.stdout}\n{done.stderr}"


def test_words_after_sh_name_a_test() -> None:
    assert {block.info for page in pages() for block in blocks(page, "sh")} <= {"", "make", *PACKAGES}


def test_make_targets_exist() -> None:
    for page in pages():
        for block in blocks(page, "sh"):
            for target in re.findall(r"^make(?: [A-Z]+=\S+)* ([a-z-]+)", block.code, re.MULTILINE):
                done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
                assert done.returncode == 0, f"{block.page}:{block.line} names make {target}: {done.stderr}"
