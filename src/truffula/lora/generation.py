"""What the pool knows of one generation, and the keys that lead to generations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from truffula.kernels.backend import AdapterImage
from truffula.types import AdapterRef, AdapterState

Place = tuple[str, str, str | None]
Key = tuple[Place, str]


def key_of(ref: AdapterRef) -> Key:
    """``(place, fingerprint)`` of what ``ref`` names."""
    return (ref.kind, ref.locator, ref.revision), ref.fingerprint


@dataclass
class Generation:
    """One generation whose image is mapped."""

    image: AdapterImage
    nbytes: int  # what residency costs: the mapped image and what the executable makes of it
    keys: dict[Key, set[str]] = field(default_factory=dict)  # what leads here, and the names that asked by it
    slot: int | None = None
    leases: int = 0
    holds: int = 0
    pinned: bool = False
    former: list[str] = field(default_factory=list)  # its last names, for when no key leads here any more
    used_at: float = 0.0
    asked_in: int = 0  # the last poll after which somebody asked for it, or that brought it
    commit: str = ""

    @property
    def idle(self) -> bool:
        return self.slot is not None and not self.leases and not self.pinned

    @property
    def names(self) -> list[str]:
        return sorted(set().union(*self.keys.values())) or self.former

    def state(self, name: str) -> AdapterState:
        """Its row under one of its names."""
        status: Literal["ready", "resident", "retired"] = "ready" if self.slot is None else "resident"
        return AdapterState(
            name=name,
            generation=self.image.generation,
            status=status if self.keys else "retired",
            nbytes=self.nbytes,
            rank=self.image.rank,
            commit=self.commit,
            leases=self.leases,
            pinned=self.pinned,
        )
