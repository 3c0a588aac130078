"""What the pool asks of a loader: the only words the two share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from truffula.errors import ErrorInfo
from truffula.types import AdapterRef


@dataclass(frozen=True, kw_only=True)
class LoadResult:
    """How one load ended: an image to map (the receiver maps it, then unlinks it), or why there is none."""

    ticket: int
    image_path: str | None = None
    error: ErrorInfo | None = None
    generation: str = ""
    nbytes: int = 0
    rank: int = 0
    commit: str = ""  # of an adapter of the Hub
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0


class AdapterLoader(Protocol):
    """Reads and judges adapters somewhere else. No call waits: results come through ``poll``."""

    def start(self, ref: AdapterRef) -> int:
        """Begin (or queue) one load; returns its ticket."""

    def poll(self) -> list[LoadResult]:
        """Loads that ended since the last call: each ticket once, cancelled ones never."""

    def cancel(self, ticket: int) -> None:
        """Forget a load; a running one is ended when that is cheap. Unknown tickets are ignored."""

    def close(self) -> None:
        """End everything. Idempotent."""
