"""``MemoryBudget``: the byte limit that pools share. When it is full, idle entries are evicted.

Bytes are counted while their memory is committed: those of free KV blocks too, until they are evicted. Running KV and
leased adapters are never evicted from here (the scheduler preempts to free them). Free KV blocks, cached KV blocks and
idle adapters compete by the time of their last use: each pool says which of its entries is next (blocks: the least
recently used; adapters: ``lora/generations.py``), and the one that was used before the others is evicted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Reclaimer(Protocol):
    """A pool with idle entries: kept for a later use, and evictable."""

    def oldest(self) -> float | None:
        """When the idle entry that is next was last used (monotonic seconds); None when there is none."""

    def evict_oldest(self) -> int:
        """Evict that entry and release its bytes. Returns the bytes released."""


class MemoryBudget:
    """Counts bytes by owner under one limit, and under a limit of the owner's own if it has one. Allocates nothing."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit = limit_bytes
        self._used: dict[str, int] = {}
        self._limits: dict[str, int] = {}
        self._reclaimers: dict[str, Reclaimer] = {}

    def register_reclaimer(self, owner: str, reclaimer: Reclaimer) -> None:
        """Let idle entries of ``owner`` be evicted when a reservation does not fit."""
        self._reclaimers[owner] = reclaimer

    def set_limit(self, owner: str, nbytes: int) -> None:
        """Let ``owner`` use at most ``nbytes``: above that, its own idle entries are evicted."""
        self._limits[owner] = nbytes

    def limit_of(self, owner: str) -> int:
        """The most bytes that ``owner`` may use."""
        return min(self.limit, self._limits.get(owner, self.limit))

    def used(self, owner: str) -> int:
        return self._used.get(owner, 0)

    def total_used(self) -> int:
        return sum(self._used.values())

    def available(self) -> int:
        """Bytes free without evicting anything."""
        return self.limit - self.total_used()

    def fixed(self) -> int:
        """Bytes of owners that have no reclaimer."""
        return sum(used for owner, used in self._used.items() if owner not in self._reclaimers)

    def reserve(self, owner: str, nbytes: int) -> bool:
        """Reserve ``nbytes`` for ``owner``, evicting idle entries if needed. False, with nothing reserved, when they do
        not fit.

        Entries that were evicted before a False stay evicted: they were idle, and the next attempt needs the same room.
        """
        if nbytes > min(self.limit - self.fixed(), self.limit_of(owner)):
            return False
        while self.used(owner) + nbytes > self.limit_of(owner):
            if not self._evict_oldest([owner]):
                return False
        while self.available() < nbytes:
            if not self._evict_oldest(self._reclaimers):
                return False
        self._used[owner] = self.used(owner) + nbytes
        return True

    def release(self, owner: str, nbytes: int) -> None:
        """Release bytes that ``owner`` has reserved."""
        if nbytes < 0 or nbytes > self.used(owner):
            raise ValueError(f"{owner} releases {nbytes} of {self.used(owner)} bytes")
        self._used[owner] -= nbytes

    def oldest(self) -> float | None:
        """When the entry that is evicted next was last used."""
        stamps = [stamp for pool in self._reclaimers.values() if (stamp := pool.oldest()) is not None]
        return min(stamps, default=None)

    def _evict_oldest(self, owners: Iterable[str]) -> bool:
        """Evict the next idle entry of ``owners``; False when there is none."""
        pools = [(owner, self._reclaimers[owner]) for owner in owners if owner in self._reclaimers]
        stamps = [(stamp, owner) for owner, pool in pools if (stamp := pool.oldest()) is not None]
        if not stamps:
            return False
        _, owner = min(stamps)
        before = self.used(owner)
        self._reclaimers[owner].evict_oldest()
        return self.used(owner) < before
