"""Loading adapters in line, for tests of what stands behind the loader."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path

from truffula.kernels.adapters import STORED, AdapterLayout
from truffula.kernels.program import Site
from truffula.lora.job import LoadLimits, Order, Setup, load, out_of_memory
from truffula.lora.loading import LoadResult
from truffula.lora.spool import Spool
from truffula.types import AdapterRef


class InlineLoader:
    """The loading worker's interface without a process: each ``poll`` carries out one load, in the caller's thread.

    No limit but sizes holds here.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        model: str,
        layout: AdapterLayout = STORED,
        limits: LoadLimits | None = None,
        offline: bool = False,
        cache_dir: Path | None = None,
        spool: Spool | None = None,
    ) -> None:
        self._spool = spool or Spool()
        self._setup = Setup(
            sites=list(sites),
            layout=layout,
            model=model,
            spools=[str(folder) for folder in self._spool.folders],
            limits=limits or LoadLimits(),
            offline=offline,
            cache_dir=str(cache_dir) if cache_dir is not None else None,
        )
        self._queue: deque[Order] = deque()
        self._next_ticket = 0

    def start(self, ref: AdapterRef) -> int:
        self._next_ticket += 1
        self._queue.append(Order(ticket=self._next_ticket, ref=ref))
        return self._next_ticket

    def poll(self) -> list[LoadResult]:
        if not self._queue:
            return []
        order = self._queue.popleft()
        try:
            return [load(order, self._setup)]
        except MemoryError:
            return [out_of_memory(order, self._setup)]

    def cancel(self, ticket: int) -> None:
        self._queue = deque(order for order in self._queue if order.ticket != ticket)

    def close(self) -> None:
        self._queue.clear()
        self._spool.close()
