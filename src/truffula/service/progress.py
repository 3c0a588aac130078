"""``ProgressBar``: how far a batch is, as one line on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

FIRST_S, EVERY_S = 1.0, 0.2
WIDTH = 20


class ProgressBar:
    """Call it with (requests ended, requests, tokens generated); nothing is written unless ``stream`` is a terminal.

    The bar appears when a batch takes longer than a second, so that short ones leave no trace, and stays at the end.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._began = clock()
        self._next = self._began + FIRST_S
        self._last = ""
        self._terminal = self._stream.isatty()

    def __call__(self, done: int, total: int, tokens: int) -> None:
        now = self._clock()
        if not self._terminal or (now < self._next and not (self._last and done == total)):
            return
        self._next = now + EVERY_S
        filled = WIDTH * done // total
        seconds = now - self._began
        self._last = (
            f"[{'#' * filled}{'.' * (WIDTH - filled)}] {done}/{total} requests, {tokens / seconds:.0f} tokens/s, "
            f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
        )
        self._stream.write(f"\r\x1b[2K{self._last}")
        self._stream.flush()

    def close(self) -> None:
        """End the line, when one was written."""
        if self._last:
            self._stream.write("\n")
            self._stream.flush()
            self._last = ""
