"""``Generations``: the adapters whose images are mapped, their leases, their slots in the executable and their bytes.

    mapped ── upload ──► uploading ── adapter_ready ──► resident ── evict ──► mapped ── drop ──► gone

A generation is the hash of an adapter's bytes. It has one reference count, of leases at two levels: a ``loaded`` lease
keeps the image mapped, a ``resident`` one keeps the generation in its slot. Bytes are reserved from the budget before
the executable sees the image; a mapped image without a slot is not charged.

Idle generations are evicted by 2Q (Johnson and Shasha, 1994): those that were used once wait in one queue, those that
were used again in another, and while the first has more than ``ONCE_SHARE`` of the idle bytes it loses its oldest, else
the other does. So a scan of adapters that are used once each, however long, evicts none that was used again while the
once-used ones have that share; and adapters of yesterday leave in the order of their last use. Uses that overlap count
once. A generation that was dropped not long ago and comes back counts as used again.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from truffula.errors import AdapterLoadError, ErrorInfo, TruffulaError
from truffula.kernels.adapters import KIND, KINDS, SITE
from truffula.kernels.backend import AdapterImage, Executable
from truffula.lora.image import NO_FACTS, AdapterFacts, KvPrefix, check_size, map_image
from truffula.lora.loads import AdapterSource, unlink_image
from truffula.lora.worker import LoadResponse
from truffula.types import AdapterState

OWNER = "adapters"
NO_SLOT = -1

ONCE_SHARE = 0.25
MIN_REMEMBERED = 4

Account = Literal["mapped", "uploading", "in use", "idle once", "idle often"]
"""Where a generation is counted: without a slot; in a slot that is being filled, is leased or pinned, or evictable."""
_IDLE: tuple[Account, ...] = ("idle once", "idle often")


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
    facts: AdapterFacts
    prefix: KvPrefix | None = None


@dataclass(eq=False)
class Generation:
    """One generation whose image is mapped."""

    image: AdapterImage
    nbytes: int  # charged while resident: the mapped image and the executable's own data for it
    used_at: float
    facts: AdapterFacts = NO_FACTS
    prefix: KvPrefix | None = None
    sources: set[AdapterSource] = field(default_factory=set)  # that have these bytes now; none: it is retired
    known: set[AdapterSource] = field(default_factory=set)  # that have or had them
    names: list[str] = field(default_factory=list)  # by which a retired one was last known
    private: bool = False  # whether these names are
    slot: int | None = None
    resident: bool = False  # in its slot, and uploaded
    leases: int = 0
    resident_leases: int = 0  # of ``leases``
    uses: int = 0  # that do not overlap
    pinned: bool = False
    commit: str = ""
    counted: Account | None = None

    def __post_init__(self) -> None:
        table, kinds = self.image.table, tuple(KINDS)
        # Not by np.unique, whose first call imports numpy.ma: ten milliseconds between two steps.
        self.parts = [kinds[kind] for kind in sorted(set(table[:, KIND].tolist()))]
        self.sites = len(set(table[:, SITE].tolist()))

    @property
    def id(self) -> str:
        return self.image.generation

    @property
    def account(self) -> Account:
        if self.slot is None:
            return "mapped"
        if not self.resident:
            return "uploading"
        if self.resident_leases or self.pinned:
            return "in use"
        return "idle often" if self.uses > 1 else "idle once"

    def nbytes_in(self, account: Account) -> int:
        """What an account counts for it: its image is outside the budget while it has no slot."""
        return self.image.nbytes if account == "mapped" else self.nbytes

    def state(self, name: str, *, private: bool = False) -> AdapterState:
        """Its row under one of its names."""
        loaded: Literal["ready", "uploading"] = "ready" if self.slot is None else "uploading"
        return AdapterState(
            name=name,
            generation=self.id,
            status="retired" if not self.sources else "resident" if self.resident else loaded,
            nbytes=self.nbytes,
            rank=self.image.rank,
            commit=self.commit,
            leases=self.resident_leases,
            pinned=self.pinned,
            parts=self.parts,
            sites=self.sites,
            used_at=self.used_at,
            private=private,
        )


class Generations:
    """The mapped generations by id. Totals are kept up to date, so that reading one costs nothing. One thread."""

    def __init__(self, executable: Executable, budget: Budget) -> None:
        self._executable = executable
        self._budget = budget
        self._entries: dict[str, Generation] = {}
        self._by_account: dict[Account, dict[str, Generation]] = defaultdict(dict)  # least recently used first
        self._bytes: Counter[Account] = Counter()
        self._of_source: dict[AdapterSource, list[Generation]] = {}  # that have or had its bytes
        self._dropped: dict[str, None] = {}  # ids of used ones, the last dropped last: as many as are mapped
        self.pins: dict[AdapterSource, set[str]] = {}  # names that keep the generation of a source resident
        self._stamp = 0.0

    def get(self, generation: str) -> Generation | None:
        return self._entries.get(generation)

    def __getitem__(self, generation: str) -> Generation:
        """Raises ``AdapterLoadError`` when it is not mapped."""
        entry = self._entries.get(generation)
        if entry is None:
            raise AdapterLoadError(
                f"Adapter generation {generation[:12]} is no longer loaded; send the request again.",
                generation=generation,
            )
        return entry

    def __iter__(self) -> Iterator[Generation]:
        return iter(list(self._entries.values()))

    def of_source(self, source: AdapterSource) -> list[Generation]:
        """Those that were read from ``source``, retired ones too."""
        return self._of_source.get(source, [])

    def attach(self, entry: Generation, source: AdapterSource) -> None:
        """Record that ``source`` has the bytes of ``entry`` now."""
        entry.sources.add(source)
        if source not in entry.known:
            entry.known.add(source)
            self._of_source.setdefault(source, []).append(entry)

    # Residency

    def add(self, response: LoadResponse, now: float) -> Generation:
        """The generation that was loaded: newly mapped, without a slot, unless one of equal bytes is mapped.

        The file is unlinked in any case. Raises the error that ended the load, or ``AdapterLoadError``.
        """
        header, path = response.image, response.image_path
        if header is None or path is None:
            raise TruffulaError.from_info(response.error or AdapterLoadError("The loader gave no reason.").info())
        try:
            entry = self._entries.get(header.generation)
            if entry is None:
                image = map_image(Path(path), header)
                nbytes = image.nbytes + self._executable.adapter_bytes(image)
                uses = int(header.generation in self._dropped)
                entry = Generation(image, nbytes, now, header.facts, header.prefix_of(image), uses=uses)
                self._entries[entry.id] = entry
        except OSError as error:
            raise AdapterLoadError(f"The prepared adapter file cannot be mapped: {error}.") from error
        finally:
            unlink_image(response)
        self.touch(entry, now)
        return entry

    def upload(self, entry: Generation) -> bool:
        """Reserve its bytes and give its image to the executable. False when the bytes are not available now.

        Raises ``InsufficientMemory`` when they never are; the executable's error, with the bytes released again, as an
        ``AdapterLoadError`` where it is not a ``TruffulaError``.
        """
        check_size(entry.nbytes, self.limit)
        if self.leased_bytes + entry.nbytes > self.limit or not self._budget.reserve(OWNER, entry.nbytes):
            return False
        try:
            entry.slot = self._executable.adapter(entry.image)
        except TruffulaError:
            self._budget.release(OWNER, entry.nbytes)
            raise
        except (MemoryError, RuntimeError, ValueError) as error:  # a backend that is out of memory
            self._budget.release(OWNER, entry.nbytes)
            raise AdapterLoadError(f"The backend cannot take the adapter: {error}.") from error
        self.touch(entry, entry.used_at)
        self.check_uploads()
        return True

    def check_uploads(self) -> list[Generation]:
        """Mark the generations whose upload has finished, and return them."""
        entries = list(self._by_account["uploading"].values())
        ready = [entry for entry in entries if entry.slot is not None and self._executable.adapter_ready(entry.slot)]
        for entry in ready:
            entry.resident = True
            self.touch(entry, entry.used_at)
        return ready

    def evict(self, entry: Generation) -> None:
        """Release its slot and bytes; the image stays mapped."""
        if entry.slot is not None:
            self._executable.drop_adapter(entry.slot)
            entry.slot = None
            entry.resident = False
            self._budget.release(OWNER, entry.nbytes)
            self.touch(entry, entry.used_at)

    def drop(self, entry: Generation) -> None:
        """Evict and unmap it."""
        self.evict(entry)
        self._count(entry, None)
        del self._entries[entry.id]
        for source in entry.known:
            self._of_source[source].remove(entry)
            if not self._of_source[source]:
                del self._of_source[source]
        if entry.uses:
            self._dropped.pop(entry.id, None)
            self._dropped[entry.id] = None
        while len(self._dropped) > max(len(self._entries), MIN_REMEMBERED):
            del self._dropped[next(iter(self._dropped))]

    def touch(self, entry: Generation, now: float) -> None:
        """Record a use or a change of state, and count its bytes accordingly. Stamps never decrease."""
        entry.used_at = self._stamp = max(self._stamp, now)
        entry.pinned = not entry.sources.isdisjoint(self.pins)
        self._count(entry, entry.account)

    def _count(self, entry: Generation, account: Account | None) -> None:
        if entry.counted is not None:
            del self._by_account[entry.counted][entry.id]
            self._bytes[entry.counted] -= entry.nbytes_in(entry.counted)
        entry.counted = account
        if account is not None:
            self._by_account[account][entry.id] = entry
            self._bytes[account] += entry.nbytes_in(account)

    # Leases

    def lease(self, entry: Generation, slot: int) -> AdapterLease:
        """A new lease: on its slot, or at the level ``loaded`` (NO_SLOT)."""
        entry.leases += 1
        entry.uses += slot != NO_SLOT and not entry.resident_leases
        entry.resident_leases += slot != NO_SLOT
        return AdapterLease(entry.id, slot, entry.facts, entry.prefix)

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

    @property
    def limit(self) -> int:
        """Bytes that adapters may use."""
        return self._budget.limit_of(OWNER)

    def victim(self) -> Generation | None:
        """The idle generation that is evicted next."""
        once, often = (self._by_account[account] for account in _IDLE)
        many = self._bytes["idle once"] > ONCE_SHARE * self._idle_bytes
        return next(iter((once if many or not often else often).values()), None)

    def newest(self) -> Iterator[Generation]:
        """The resident generations: those in use, then the idle ones, of both the last used first."""
        yield from reversed(self._by_account["in use"].values())
        idle = (reversed(self._by_account[account].values()) for account in _IDLE)
        yield from heapq.merge(*idle, key=lambda entry: entry.used_at, reverse=True)

    def mapped(self) -> list[Generation]:
        """Those without a slot."""
        return list(self._by_account["mapped"].values())

    @property
    def uploading(self) -> bool:
        return bool(self._by_account["uploading"])

    @property
    def mapped_bytes(self) -> int:
        """Of images without a slot; outside the budget."""
        return self._bytes["mapped"]

    @property
    def leased_bytes(self) -> int:
        """Charged bytes that no eviction can free: of leased, pinned and uploading generations."""
        return self._bytes["in use"] + self._bytes["uploading"]

    @property
    def resident_bytes(self) -> int:
        """What the budget is charged."""
        return self.leased_bytes + self._idle_bytes

    @property
    def _idle_bytes(self) -> int:
        return sum(self._bytes[account] for account in _IDLE)

    @property
    def resident(self) -> int:
        """Generations with a slot."""
        return len(self._entries) - len(self._by_account["mapped"])

    def check(self) -> None:
        """Raise AssertionError when a total, an index or a lease count is wrong."""
        entries = self._entries.values()
        slots = [entry.slot for entry in entries if entry.slot is not None]
        assert len(slots) == len(set(slots)) == self.resident, "two generations in one slot"
        for account, counted in self._by_account.items():
            assert counted.keys() == {entry.id for entry in entries if entry.account == account}, f"{account} is wrong"
            assert self._bytes[account] == sum(entry.nbytes_in(account) for entry in counted.values())
        for account in _IDLE:
            stamps = [entry.used_at for entry in self._by_account[account].values()]
            assert stamps == sorted(stamps), f"{account} is out of order"
        assert self._budget.used(OWNER) == self.resident_bytes
        known = {(source, entry.id) for entry in entries for source in entry.known}
        assert known == {(source, one.id) for source, held in self._of_source.items() for one in held}
        for entry in entries:
            assert entry.sources <= entry.known
            assert entry.pinned == (not entry.sources.isdisjoint(self.pins)), "a wrong pin"
            assert entry.leases >= entry.resident_leases >= 0, "a lease was released twice"
            assert not entry.resident_leases or entry.resident, "a resident lease without a slot"
