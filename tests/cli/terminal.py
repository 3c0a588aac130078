"""``truffula`` on a terminal of its own: what a user types, and what the screen is sent."""

from __future__ import annotations

import codecs
import contextlib
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Iterator

PATIENCE_S = 60.0
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x01\x02]")


class Terminal:
    """The screen's end of a pseudo-terminal."""

    def __init__(self, descriptor: int, process: subprocess.Popen[bytes]) -> None:
        self._descriptor = descriptor
        self.process = process
        self.raw = ""
        self._read = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def type(self, keys: str) -> None:
        os.write(self._descriptor, keys.encode())

    def wait_for(self, text: str) -> str:
        """What was shown, without escape sequences, since the last call up to ``text``."""
        while (at := self._unread().find(text)) < 0:
            self._read_more(repr(text))
        seen = self._unread()[:at]
        self._read += at + len(text)
        return seen

    def interrupt(self, until: str) -> None:
        """Type Ctrl-C and wait for what is shown then. CPython loses a signal that comes just before it waits for a
        key, so Ctrl-C is typed again after each second in which nothing is shown, as a user would.
        """
        while until not in self._unread():
            self.type("\x03")
            while until not in self._unread() and select.select([self._descriptor], [], [], 1.0)[0]:
                self._read_more(repr(until))
        self.wait_for(until)

    def wait_for_any(self, count: int) -> str:
        """The next ``count`` characters that are shown."""
        while len(self._unread()) < count:
            self._read_more(f"{count} characters")
        self._read += count
        return ESCAPES.sub("", self.raw)[self._read - count : self._read]

    def wait_for_end(self) -> int:
        """The exit status, once all that was shown is read: a process can't end before."""
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while True:
                self._read_more("the end was")
        return self.process.wait(PATIENCE_S)

    def _unread(self) -> str:
        return ESCAPES.sub("", self.raw)[self._read :]

    def _read_more(self, wanted: str) -> None:
        ready, _, _ = select.select([self._descriptor], [], [], PATIENCE_S)
        assert ready, f"{wanted} not shown; since the last wait: {self._unread()!r}"
        self.raw += self._decoder.decode(os.read(self._descriptor, 65536))

    def line(self, text: str, prompt: str = "base> ") -> str:
        """Type a line and wait for the next prompt; what was shown between."""
        self.type(f"{text}\r")
        self.wait_for("\n")
        return self.wait_for(prompt)


@contextlib.contextmanager
def terminal(*args: str, **env: str) -> Iterator[Terminal]:
    """``truffula ARGS`` on a terminal; it is killed at the end if it still runs."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "truffula", *args], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "400", **env},
        preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _take_terminal() -> None:
    """Make standard input the controlling terminal, so that Ctrl-C typed there is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
