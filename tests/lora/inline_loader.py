"""Loading adapters in the caller's thread, for tests of what uses a loader."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path

from truffula.lora.staging import Staging
from truffula.lora.worker import LoadRequest, LoadResponse, Setup, load, out_of_memory
from truffula.types import AdapterRef


class InlineLoader:
    """The loading worker's interface without a process: each ``poll`` carries out one load, in the caller's thread.

    Of the limits only the sizes are enforced.
    """

    def __init__(self, setup: Setup, *, staging_roots: Sequence[Path] | None = None) -> None:
        self.staging = Staging(staging_roots)
        self._setup = setup
        self._queue: deque[LoadRequest] = deque()
        self._next_ticket = 0

    def start(self, ref: AdapterRef, has: str = "") -> int:
        self._next_ticket += 1
        self._queue.append(LoadRequest(ticket=self._next_ticket, ref=ref, has=has))
        return self._next_ticket

    def poll(self, *, paused: bool = False) -> list[LoadResponse]:
        if not self._queue or paused:
            return []
        request = self._queue.popleft()
        try:
            return [load(request, self._setup, self.staging.folders)]
        except MemoryError:
            return [out_of_memory(request, self._setup)]

    def poll_fds(self) -> dict[int, int]:
        return {}

    def poll_timeout(self) -> float | None:
        return 0.0 if self._queue else None

    def cancel(self, ticket: int) -> None:
        self._queue = deque(request for request in self._queue if request.ticket != ticket)

    def close(self) -> None:
        self._queue.clear()
        self.staging.close()
