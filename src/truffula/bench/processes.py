"""Children of a benchmark: a server, or a script that answers lines. Each has a session of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import urlsplit

from truffula.config import installed_environment
from truffula.errors import ErrorInfo, ProcessFailed, TruffulaError, from_info

SAID = 2000
"""Characters of a child's last words in an error."""
_OWN_ERROR = re.compile(r"^error \((?P<code>\w+)\) (?P<message>.+)\Z", re.MULTILINE | re.DOTALL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def end_children_on_sigterm() -> None:
    """Let SIGTERM leave through the context managers, as Ctrl-C does.

    Children have sessions of their own and would stay. For a command's main thread, once.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def child_error(what: str, said: str) -> TruffulaError:
    """``what`` a child did wrong, with what it ``said``. A truffula command's own error keeps its code."""
    own = _OWN_ERROR.search(said)
    if own is not None:
        return from_info(ErrorInfo(code=own["code"], message=f"{what}: {own['message'].strip()}"))
    return ProcessFailed(f"{what}:\n{said.strip()[-SAID:]}" if said.strip() else f"{what} without output.")


class Child:
    """``argv`` in a session of its own: starts on entering, ends with all that it started on leaving."""

    def __init__(self, name: str, argv: Sequence[str], stdin: int | None = None, stdout: int | None = None) -> None:
        self.name = name
        self._argv, self._stdin, self._stdout = list(argv), stdin, stdout

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()
        out = self._log if self._stdout is None else self._stdout
        stdin = subprocess.DEVNULL if self._stdin is None else self._stdin
        try:
            self._process = subprocess.Popen(
                self._argv,
                stdin=stdin,
                stdout=out,
                stderr=self._log,
                start_new_session=True,
                env=installed_environment(),
            )
        except OSError as error:
            self._log.close()
            raise ProcessFailed(f"{self.name} did not start: {error}.") from error
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(ProcessLookupError):  # nobody else of its session is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._log.close()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def said(self) -> str:
        """All that it wrote to its log."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def pids(self) -> list[int]:
        """It and all its descendants that run."""
        return descendants(self._process.pid)


class Server(Child):
    """A child that listens on ``url``; ``wait`` returns once ``health`` answers 200."""

    def __init__(self, name: str, argv: Sequence[str], url: str, health: str = "/health") -> None:
        super().__init__(name, argv)
        self.url, self._health = url, health

    def wait(self, timeout_s: float = 600) -> str:
        """The address, once it is healthy.

        Raises ``ProcessFailed`` with what the server said when it ended instead; of a truffula server its own error.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.ended:
                raise child_error(f"{self.name} exited during its start", self.said())
            if self._healthy():
                return self.url
            time.sleep(0.05)
        raise ProcessFailed(f"{self.name} was not healthy within {timeout_s:g} seconds:\n{self.said()[-SAID:]}")

    def _healthy(self) -> bool:
        """Asked often while a server starts on the same cores, so by what costs least."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=5)
        try:
            connection.request("GET", self._health)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


class LineChild(Child):
    """A child that answers each JSON line on its standard input by one on its standard output."""

    def __init__(self, name: str, argv: Sequence[str]) -> None:
        super().__init__(name, argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def read(self) -> dict[str, Any]:
        """Its next line. What is no JSON object is its libraries' chatter and passed over."""
        pipe = self._pipe(self._process.stdout)
        while line := pipe.readline():
            if line.startswith(b"{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        self._process.wait()
        raise child_error(f"{self.name} exited before it answered", self.said())

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        pipe = self._pipe(self._process.stdin)
        with contextlib.suppress(BrokenPipeError):  # it has ended: read() says how
            pipe.write(json.dumps(question).encode() + b"\n")
            pipe.flush()
        return self.read()

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                self._pipe(pipe).close()

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None  # opened as a pipe above
        return pipe


def descendants(pid: int) -> list[int]:
    """``pid`` and the processes below it, by the parents that Linux's /proc names; only ``pid`` elsewhere."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        waiting += children.get(found[-1], [])
    return found
