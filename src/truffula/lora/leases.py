"""What the pool of adapters shares with its neighbours: the budget, the executable, the scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from truffula.errors import ErrorInfo
from truffula.kernels.backend import AdapterImage


class Reclaimer(Protocol):
    """A pool's idle things, oldest first, for the budget's one LRU. Stamps are of the clock all pools share."""

    def oldest(self) -> float | None:
        """When the idle thing to give up first was last used; None when nothing is idle."""

    def evict_oldest(self) -> int:
        """Give it up: releases its bytes at the budget and returns how many; 0 when nothing is idle."""


class Budget(Protocol):
    """The part of ``engine.budget.MemoryBudget`` that this pool uses."""

    @property
    def limit(self) -> int: ...
    def reserve(self, owner: str, nbytes: int) -> bool: ...
    def release(self, owner: str, nbytes: int) -> None: ...
    def used(self, owner: str) -> int: ...
    def register_reclaimer(self, owner: str, reclaimer: Reclaimer) -> None: ...


class Slots(Protocol):
    """The part of an ``Executable`` that this pool uses."""

    def adapter_bytes(self, image: AdapterImage) -> int: ...
    def adapter(self, image: AdapterImage) -> int: ...
    def drop_adapter(self, slot: int) -> None: ...


@dataclass(frozen=True)
class Want:
    """Where an adapter stands. ``generation`` only when ready, ``error`` only when failed."""

    status: Literal["loading", "ready", "failed"]
    generation: str | None = None
    error: ErrorInfo | None = None


@dataclass(frozen=True)
class AdapterLease:
    """The right to use a generation until released. ``slot`` is the executable's."""

    id: int
    generation: str
    slot: int
