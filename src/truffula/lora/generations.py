"""``Generations``: the adapters whose images are mapped, their leases, their slots in the executable and their bytes.

    mapped ── upload ──► uploading ── adapter_ready ──► resident ── evict ──► mapped ── drop ──► gone

A generation is the hash of an adapter's bytes. It has one reference count, of leases at two levels: a ``loaded`` lease
keeps the image mapped, a ``resident`` one keeps the generation in its slot. Bytes are reserved from the budget before
the executable sees the image; a mapped image without a slot is not charged.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from truffula.errors import AdapterLoadError, ErrorInfo, InsufficientMemory, TruffulaError
from truffula.kernels.backend import AdapterImage, Executable
from truffula.lora.loads import AdapterSource
from truffula.types import AdapterState

OWNER = "adapters"
NO_SLOT = -1

Account = Literal["mapped", "idle", "in use"]
"""Where a generation's bytes are counted: without a slot, in a slot and evictable, in a slot and not evictable."""


class Budget(Protocol):
    """The part of ``engine.budget.MemoryBudget`` that the adapter pool uses."""

    def limit_of(self, owner: str) -> int: ...
    def reserve(self, owner: str, nbytes: int) -> bool: ...
    def release(self, owner: str, nbytes: int) -> None: ...
    def used(self, owner: str) -> int: ...
    def register_reclaimer(self, owner: str, reclaimer: Any) -> None: ...


@dataclass(frozen=True)
class AdapterStatus:
    """The state of an adapter. ``generation`` is set when it is ready, ``error`` when it failed."""

    status: Literal["loading", "ready", "failed"]
    generation: str | None = None
    error: ErrorInfo | None = None


@dataclass(frozen=True, eq=False)
class AdapterLease:
    """Keeps a generation until it is released: resident in ``slot``, or only loaded (``slot`` is NO_SLOT)."""

    generation: str
    slot: int


@dataclass(eq=False)
class Generation:
    """One generation whose image is mapped."""

    image: AdapterImage
    nbytes: int  # charged while resident: the mapped image and the executable's own data for it
    used_at: float
    sources: set[AdapterSource] = field(default_factory=set)  # that have these bytes now; none: it is retired
    names: list[str] = field(default_factory=list)  # by which a retired one was last known
    slot: int | None = None
    uploaded: bool = False
    leases: int = 0
    resident_leases: int = 0  # of ``leases``
    pinned: bool = False
    commit: str = ""
    account: Account | None = None

    @property
    def id(self) -> str:
        return self.image.generation

    @property
    def resident(self) -> bool:
        return self.slot is not None and self.uploaded

    def state(self, name: str) -> AdapterState:
        """Its row under one of its names."""
        status: Literal["ready", "uploading", "resident"]
        status = "ready" if self.slot is None else "resident" if self.uploaded else "uploading"
        return AdapterState(
            name=name,
            generation=self.id,
            status=status if self.sources else "retired",
            nbytes=self.nbytes,
            rank=self.image.rank,
            commit=self.commit,
            leases=self.resident_leases,
            pinned=self.pinned,
        )


class Generations:
    """The mapped generations by id. Totals are kept up to date, so that reading one costs nothing. One thread."""

    def __init__(self, executable: Executable, budget: Budget) -> None:
        self._executable = executable
        self._budget = budget
        self._entries: dict[str, Generation] = {}
        self._mapped: dict[str, Generation] = {}  # without a slot
        self._idle: OrderedDict[str, Generation] = OrderedDict()  # may be evicted, least recently used first
        self._uploading: dict[str, Generation] = {}
        self._bytes: Counter[Account] = Counter()
        self._stamp = 0.0

    def get(self, generation: str) -> Generation | None:
        return self._entries.get(generation)

    def __getitem__(self, generation: str) -> Generation:
        return self._entries[generation]

    def __iter__(self) -> Iterator[Generation]:
        return iter(list(self._entries.values()))

    # Residency

    def add(self, image: AdapterImage, now: float) -> Generation:
        """A newly mapped image, without a slot."""
        entry = Generation(image, image.nbytes + self._executable.adapter_bytes(image), now)
        self._entries[image.generation] = entry
        self.touch(entry, now)
        return entry

    def upload(self, entry: Generation) -> bool:
        """Reserve its bytes and give its image to the executable. False when the bytes are not available now.

        Raises ``InsufficientMemory`` when they never are; the executable's error, with the bytes released again, as an
        ``AdapterLoadError`` where it is not a ``TruffulaError``.
        """
        limit = self._budget.limit_of(OWNER)
        if entry.nbytes > limit:
            raise InsufficientMemory(
                f"The adapter takes {entry.nbytes} bytes and adapters may use {limit}. "
                "Give the server more memory (--memory, --adapter-memory).",
                requested_bytes=entry.nbytes,
                limit_bytes=limit,
            )
        if self.leased_bytes + entry.nbytes > limit or not self._budget.reserve(OWNER, entry.nbytes):
            return False
        try:
            entry.slot = self._executable.adapter(entry.image)
        except TruffulaError:
            self._budget.release(OWNER, entry.nbytes)
            raise
        except (MemoryError, RuntimeError, ValueError) as error:  # a backend that is out of memory
            self._budget.release(OWNER, entry.nbytes)
            raise AdapterLoadError(f"The backend cannot take the adapter: {error}.") from error
        self._uploading[entry.id] = entry
        self.check_uploads()
        return True

    def check_uploads(self) -> list[Generation]:
        """Mark the generations whose upload has finished, and return them."""
        entries = list(self._uploading.values())
        for entry in entries:
            assert entry.slot is not None
            entry.uploaded = self._executable.adapter_ready(entry.slot)
            if entry.uploaded:
                del self._uploading[entry.id]
            self.touch(entry, entry.used_at)
        return [entry for entry in entries if entry.uploaded]

    def evict(self, entry: Generation) -> None:
        """Release its slot and bytes; the image stays mapped."""
        if entry.slot is not None:
            self._executable.drop_adapter(entry.slot)
            entry.slot = None
            entry.uploaded = False
            self._uploading.pop(entry.id, None)
            self._budget.release(OWNER, entry.nbytes)
            self.touch(entry, entry.used_at)

    def drop(self, entry: Generation) -> None:
        """Evict and unmap it."""
        self.evict(entry)
        self._set_account(entry, None)
        del self._entries[entry.id]

    def touch(self, entry: Generation, now: float) -> None:
        """Record a use or a change of state, and count its bytes accordingly. Stamps never decrease."""
        entry.used_at = self._stamp = max(self._stamp, now)
        idle = entry.uploaded and not entry.resident_leases and not entry.pinned
        self._set_account(entry, "mapped" if entry.slot is None else "idle" if idle else "in use")

    def _set_account(self, entry: Generation, account: Account | None) -> None:
        for counted, sign in ((entry.account, -1), (account, 1)):
            if counted is not None:
                self._bytes[counted] += sign * (entry.image.nbytes if counted == "mapped" else entry.nbytes)
        entry.account = account
        self._mapped.pop(entry.id, None)
        self._idle.pop(entry.id, None)
        if account == "mapped":
            self._mapped[entry.id] = entry
        elif account == "idle":
            self._idle[entry.id] = entry

    # Leases

    def lease(self, entry: Generation, slot: int) -> AdapterLease:
        """A new lease: on its slot, or at the level ``loaded`` (NO_SLOT)."""
        entry.leases += 1
        entry.resident_leases += slot != NO_SLOT
        return AdapterLease(entry.id, slot)

    def release(self, lease: AdapterLease) -> Generation:
        """End a lease; returns its generation."""
        entry = self._entries[lease.generation]
        entry.leases -= 1
        entry.resident_leases -= lease.slot != NO_SLOT
        return entry

    def close(self) -> None:
        """Drop everything; leases become invalid."""
        for entry in self:
            self.drop(entry)

    # Totals

    def oldest(self) -> Generation | None:
        """The idle generation that was not used for longest."""
        return next(iter(self._idle.values()), None)

    def mapped(self) -> list[Generation]:
        """Those without a slot."""
        return list(self._mapped.values())

    @property
    def uploading(self) -> bool:
        return bool(self._uploading)

    @property
    def mapped_bytes(self) -> int:
        """Of images without a slot; outside the budget."""
        return self._bytes["mapped"]

    @property
    def leased_bytes(self) -> int:
        """Charged bytes that no eviction can free: of leased, pinned and uploading generations."""
        return self._bytes["in use"]

    @property
    def resident_bytes(self) -> int:
        """What the budget is charged."""
        return self._bytes["in use"] + self._bytes["idle"]

    @property
    def resident(self) -> int:
        """Generations with a slot."""
        return len(self._entries) - len(self._mapped)

    def check(self) -> None:
        """Raise AssertionError when a total, an index or a lease count is wrong."""
        entries = self._entries.values()
        slots = [entry.slot for entry in entries if entry.slot is not None]
        assert len(slots) == len(set(slots)) == self.resident, "two generations in one slot"
        assert self._mapped.keys() == {e.id for e in entries if e.slot is None}, "the mapped ones are wrong"
        assert self._uploading.keys() == {e.id for e in entries if e.slot is not None and not e.uploaded}
        idle = {e.id for e in entries if e.uploaded and not e.resident_leases and not e.pinned}
        assert self._idle.keys() == idle, "the idle list is wrong"
        stamps = [entry.used_at for entry in self._idle.values()]
        assert stamps == sorted(stamps), "the idle list is out of order"
        assert self._budget.used(OWNER) == self.resident_bytes == sum(e.nbytes for e in entries if e.slot is not None)
        assert self.mapped_bytes == sum(e.image.nbytes for e in entries if e.slot is None)
        assert self.leased_bytes == self.resident_bytes - sum(self._entries[i].nbytes for i in idle)
        for entry in entries:
            assert entry.leases >= entry.resident_leases >= 0, "a lease was released twice"
            assert not entry.resident_leases or entry.resident, "a resident lease without a slot"
