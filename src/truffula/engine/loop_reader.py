"""``LoopReader``: an event loop reads what the engine sends, so that no thread has to hand it each step's events."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from truffula.engine.engine_process import EngineProcess

if TYPE_CHECKING:
    import asyncio


class LoopReader:
    """Calls ``receive`` in the thread of ``loop`` when frames of an engine have arrived, and then ``listener``.

    It watches a copy of the channel's descriptor: the supervising thread may close its own at any time, and the loop
    sees the end of the stream then.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, listener: Callable[[], None], receive: Callable[[EngineProcess], bool]
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._receive = receive
        self._fd: int | None = None
        self._in_receive = False

    def notify(self) -> None:
        """Have ``listener`` called in the loop's thread. Any thread may call this."""
        if not self._in_receive:  # else it is called when ``receive`` returns
            self._call(self._listener)

    def attach(self, process: EngineProcess) -> None:
        """Read the channel of ``process`` from now on. Any thread may call this."""
        self._call(lambda: self._watch(process))

    def detach(self) -> None:
        """Stop reading. The loop's thread calls this."""
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None

    def _call(self, work: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(work)
        except RuntimeError:
            if not self._loop.is_closed():  # else the server has ended
                raise

    def _watch(self, process: EngineProcess) -> None:
        self.detach()
        self._fd = process.share()
        if self._fd is not None:
            self._loop.add_reader(self._fd, self._on_readable, process)

    def _on_readable(self, process: EngineProcess) -> None:
        self._in_receive = True
        try:
            more = self._receive(process)
        finally:
            self._in_receive = False
        if not more:
            self.detach()
        self._listener()
