"""``AdapterPool``: which adapters are in memory. The only writer of that; it knows numbers and names, never a tensor.

    want(ref) ──► loading ──► ready ──► resident ──► evicted (by one LRU with cached KV blocks) or retired
                    │          image mapped,   bytes reserved, in a slot of the
                    ▼          not charged     executable; leases keep it there
                  failed (for ``failure_ttl_s``)

- A *place* is (kind, locator, revision); with a fingerprint it is a *key*. A key leads to a *generation*: the hash of
  the adapter's bytes. Many waiters of a key share one load; two places with equal bytes share one generation.
- A place whose fingerprint changed is read again. Its former generation is *retired*: sequences that hold it keep it,
  new ones get the new one, and it is dropped with its last lease and hold. Until then its bytes count.
- Bytes are reserved from the ``MemoryBudget`` before the executable sees the image. An image that is mapped but not
  resident is not charged: those kept for somebody (``hold``, ``claim``, or wanted within ``keep_s``) are few, and no
  further load is begun while they exceed ``spare_bytes``. Then those that nobody came for go, so that it begins.
- A preempted sequence keeps its generation by ``hold``: evicted, its image stays mapped, so that it comes back without
  its source, which may have changed or gone meanwhile.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from truffula.errors import AdapterLoadError, ErrorInfo, InsufficientMemory, TruffulaError, from_info
from truffula.lora.generation import Generation, Key, Place, key_of
from truffula.lora.image import map_image
from truffula.lora.leases import AdapterLease, Budget, Slots, Want
from truffula.lora.loading import AdapterLoader, LoadResult
from truffula.lora.queue import LoadQueue, discard
from truffula.lora.residency import OWNER, Residency
from truffula.types import AdapterRef, AdapterState

MAX_NAMES = 32
"""Names that are kept of those by which one key was asked for. A client may have many words for one place."""


class AdapterPool:
    """Residency of adapters. One owner, one thread.

    ``clock`` is the one the budget's other reclaimers stamp with. A failed load is not tried again for
    ``failure_ttl_s``. At most ``max_in_flight`` loads of a kind of source are with the loader at a time.
    ``spare_bytes`` is an eighth of the budget's limit unless given.
    """

    def __init__(
        self,
        slots: Slots,
        loader: AdapterLoader,
        budget: Budget,
        clock: Callable[[], float],
        *,
        failure_ttl_s: float = 10.0,
        keep_s: float = 5.0,
        spare_bytes: int | None = None,
        max_in_flight: int = 8,
    ) -> None:
        self._queue = LoadQueue(loader, failure_ttl_s=failure_ttl_s, max_in_flight=max_in_flight)
        self._budget = budget
        self._clock = clock
        self._keep_s = keep_s
        self._spare_bytes = budget.limit // 8 if spare_bytes is None else spare_bytes
        self._entries = Residency(slots, budget)
        self._current: dict[Key, str] = {}
        self._places: dict[Place, str] = {}  # all keys of a place lead to one generation
        self._pins: set[Place] = set()
        self._claims: Counter[Place] = Counter()
        self._polls = 0
        self._leases: dict[int, str] = {}
        self._next_lease = 0
        self.evictions = 0
        budget.register_reclaimer(OWNER, self)

    # ---- what the scheduler asks

    def want(self, ref: AdapterRef, now: float) -> Want:
        """Where ``ref`` stands now; begins a load when nobody has yet. Never waits, never raises.

        Waiting sequences ask again each step: that also keeps what they wait for from being dropped. ``generation`` is
        to be acquired at once; whoever keeps it for later calls ``hold``.
        """
        key = key_of(ref)
        generation = self._current.get(key)
        if generation is not None:
            entry = self._entries[generation]
            if len(entry.keys[key]) < MAX_NAMES:
                entry.keys[key].add(ref.name)
            entry.asked_in = self._polls
            self._entries.touch(generation, now)
            return Want("ready", generation)
        error = self._queue.refusal(key, now)
        if error is not None:
            return Want("failed", error=error)
        if key not in self._queue:
            self._queue.add(key, ref)
            self._begin_loads()
        return Want("loading")

    def here(self, ref: AdapterRef) -> bool:
        """Whether ``want`` would be answered at once with a generation. Begins nothing."""
        return key_of(ref) in self._current

    def acquire(self, generation: str) -> AdapterLease | None:
        """A lease on a generation, made resident for it; None when its bytes do not fit right now.

        Raises ``InsufficientMemory`` when they never can, ``AdapterLoadError`` (or the executable's ``KernelError``)
        when it is not here any more or cannot be used.
        """
        entry = self._entries.get(generation)
        if entry is None:
            raise AdapterLoadError(
                f"Adapter generation {generation[:12]} is no longer loaded; send the request again.",
                generation=generation,
            )
        if entry.slot is None and not self._make_resident(generation, entry):
            return None
        assert entry.slot is not None
        entry.leases += 1
        self._entries.touch(generation, self._clock())
        self._next_lease += 1
        self._leases[self._next_lease] = generation
        return AdapterLease(self._next_lease, generation, entry.slot)

    def release(self, lease: AdapterLease) -> None:
        """Give a lease back: once. The adapter stays resident until its bytes are wanted for something else."""
        generation = self._leases.pop(lease.id)
        entry = self._entries[generation]
        entry.leases -= 1
        self._entries.touch(generation, self._clock())
        self._drop_if_forgotten(generation, entry)

    def hold(self, generation: str) -> None:
        """Keep a loaded generation obtainable (not resident) until ``let_go``: for a sequence that may be preempted."""
        self._entries[generation].holds += 1

    def let_go(self, generation: str) -> None:
        """End one ``hold``."""
        entry = self._entries[generation]
        entry.holds -= 1
        self._drop_if_forgotten(generation, entry)

    def poll(self, now: float) -> None:
        """Take in what the loader finished, begin what waited, forget what nobody wants. Never raises for a load.

        Whoever waits for a load asks again before the next ``poll``, or has a ``claim``: until then it is kept for him.
        """
        self._polls += 1
        for key, ref, result in self._queue.finished():
            self._finish(key, ref, result, now)
        self._queue.expire(now)
        for generation in self._entries.spare():
            self._settle(generation, self._entries[generation], now)
        self._begin_loads()

    def _settle(self, generation: str, entry: Generation, now: float) -> None:
        """An image without a slot: a pinned one gets one as soon as it fits, one that nobody wants is dropped."""
        if entry.pinned:
            with contextlib.suppress(TruffulaError):  # recorded as the failure of its keys
                self._make_resident(generation, entry)
        elif not self._kept(entry) and now - entry.used_at > self._keep_s:
            self._drop(generation, entry)

    def _kept(self, entry: Generation) -> bool:
        return entry.holds > 0 or any(key[0] in self._claims for key in entry.keys)

    # ---- what the operator asks

    def pin(self, ref: AdapterRef) -> None:
        """Keep the adapter of this place resident once loaded, through reloads, until ``unload``."""
        place = key_of(ref)[0]
        self._pins.add(place)
        for generation, entry in self._entries.items():
            self._repin(generation, entry)

    def claim(self, ref: AdapterRef) -> None:
        """Keep what is or will be loaded of this place obtainable until ``disclaim``: for a load command."""
        self._claims[key_of(ref)[0]] += 1

    def disclaim(self, ref: AdapterRef) -> None:
        """End one ``claim``."""
        place = key_of(ref)[0]
        self._claims[place] -= 1
        if not self._claims[place]:
            del self._claims[place]

    def retry(self, ref: AdapterRef) -> None:
        """Forget what failed at the place of ``ref``: its next ``want`` reads again, whatever was said just now."""
        self._queue.retry(key_of(ref)[0])

    def settle(self, ref: AdapterRef) -> None:
        """Make what is loaded of this place resident if its bytes are to be had now; meanwhile it is kept.

        Raises ``InsufficientMemory`` when they never are, and what the executable says against it.
        """
        key = key_of(ref)
        generation = self._current.get(key, self._places.get(key[0]))
        if generation is not None and self._entries[generation].slot is None:
            self._entries.touch(generation, self._clock())
            self._make_resident(generation, self._entries[generation])

    def state(self, ref: AdapterRef) -> AdapterState | None:
        """Where the place of ``ref`` stands, under its name; None when nothing is known of it. Begins nothing."""
        key = key_of(ref)
        generation = self._current.get(key, self._places.get(key[0]))
        if key in self._queue:
            return AdapterState(name=ref.name, status="loading")
        resident = generation is not None and self._entries[generation].slot is not None
        error = self._queue.failure(key)
        if error is not None and not resident:
            return AdapterState(name=ref.name, status="failed", error=error)
        return None if generation is None else self._entries[generation].state(ref.name)

    def unload(self, name: str) -> bool:
        """Forget ``name``: new requests load it anew, running ones keep theirs. False when nothing was there."""
        cancelled = self._queue.cancel(name)
        self._pins.difference_update(key[0] for key in cancelled)
        found = self._queue.forgive(name) or bool(cancelled)
        for key, generation in list(self._current.items()):
            names = self._entries[generation].keys[key]
            if name in names:
                found = True
                self._pins.discard(key[0])
                if names == {name}:
                    self._detach(key)
                else:
                    names.discard(name)
                    self._repin(generation, self._entries[generation])
        return found

    def states(self) -> list[AdapterState]:
        """One row per name and generation, loads and failures included, by name."""
        rows = self._queue.states()
        for entry in self._entries.values():
            rows += [entry.state(name) for name in entry.names]
        return sorted(rows, key=lambda row: (row.name, row.status, row.generation or ""))

    @property
    def resident(self) -> int:
        """Adapters with a slot."""
        return sum(entry.slot is not None for entry in self._entries.values())

    @property
    def resident_bytes(self) -> int:
        """What the budget is charged for them."""
        return self._entries.resident_bytes

    @property
    def leased_bytes(self) -> int:
        """The part of ``resident_bytes`` that is leased or pinned: not to be had by evicting."""
        return self._entries.resident_bytes - self._entries.idle_bytes

    @property
    def spare(self) -> int:
        """Bytes of images mapped for somebody without being resident: outside the budget, see ``spare_bytes``."""
        return self._entries.spare_bytes

    @property
    def loading(self) -> int:
        """Loads begun or waiting to begin."""
        return len(self._queue)

    @property
    def loads(self) -> int:
        """Loads that ended well."""
        return self._queue.done

    @property
    def loads_by_name(self) -> Counter[str]:
        """The same by name, of a bounded number of names."""
        return self._queue.done_by_name

    @property
    def failures(self) -> int:
        """Loads that ended otherwise, and adapters that the executable refused."""
        return self._queue.failed

    # ---- what the budget asks

    def oldest(self) -> float | None:
        generation = self._entries.oldest()
        return None if generation is None else self._entries[generation].used_at

    def evict_oldest(self) -> int:
        generation = self._entries.oldest()
        if generation is None:
            return 0
        entry = self._entries[generation]
        self._entries.leave(generation)
        self.evictions += 1
        wanted = self._clock() - entry.used_at <= self._keep_s and self.spare <= self._spare_bytes
        if not (wanted or self._kept(entry)):
            self._drop(generation, entry)
        return entry.nbytes

    # ---- loading

    def _begin_loads(self) -> None:
        if self._queue.in_flight < len(self._queue) and self._clear_spare():
            self._queue.begin()

    def _clear_spare(self) -> bool:
        """Whether spare images leave room for a load. Those nobody came for go, pinned ones last, where that helps.

        A pin keeps memory that was given. One that is given none, because others are pinned, may not end all loading.
        """
        over = self.spare - self._spare_bytes
        if over <= 0:
            return True
        entries = [(generation, self._entries[generation]) for generation in self._entries.spare()]
        free = [(g, e) for g, e in entries if not self._kept(e) and e.asked_in < self._polls]
        if sum(entry.image.nbytes for _, entry in free) < over:
            return False
        for generation, entry in sorted(free, key=lambda item: (item[1].pinned, item[1].used_at)):
            if over > 0:
                over -= entry.image.nbytes
                self._drop(generation, entry)
        return True

    def _finish(self, key: Key, ref: AdapterRef, result: LoadResult, now: float) -> None:
        try:
            generation = self._take_in(result, now)
        except TruffulaError as error:
            self._queue.fail(key, ref.name, error.info(), now)
            return
        self._queue.count(ref, result)
        entry = self._entries[generation]
        entry.asked_in = self._polls
        entry.keys[key] = {ref.name}
        entry.commit = result.commit or entry.commit
        self._current[key] = generation
        former = self._places.get(key[0], generation)
        if former != generation:
            # The place has moved on: its former keys lead nowhere now, and what only they led to is retired.
            for other in [k for k in self._entries[former].keys if k[0] == key[0]]:
                self._detach(other)
        self._places[key[0]] = generation
        self._repin(generation, entry)
        if entry.slot is None:
            with contextlib.suppress(TruffulaError):  # recorded as the failure of its keys
                self._make_resident(generation, entry)

    def _take_in(self, result: LoadResult, now: float) -> str:
        """Map a finished load as an entry, or join the one of equal bytes; its file is gone afterwards in any case."""
        if result.error is not None or result.image_path is None:
            error = result.error or ErrorInfo(code=AdapterLoadError.code, message="The loader gave no reason.")
            raise from_info(error)
        try:
            if result.nbytes > self._budget.limit:
                raise self._too_large(result.nbytes)
            if result.generation in self._entries:
                return result.generation
            image = map_image(Path(result.image_path))
        except OSError as error:
            raise AdapterLoadError(f"The prepared adapter file cannot be mapped: {error}.") from error
        finally:
            discard(result.image_path)
        if image.generation != result.generation:
            raise AdapterLoadError(
                "The prepared adapter file is not of the adapter that was loaded; send the request again."
            )
        self._entries.add(image, now)
        return image.generation

    def _too_large(self, nbytes: int) -> InsufficientMemory:
        return InsufficientMemory(
            f"The adapter takes {nbytes} bytes and adapters may use {self._budget.limit}. "
            "Give the server more memory (--memory, --adapter-memory).",
            requested_bytes=nbytes,
            limit_bytes=self._budget.limit,
        )

    # ---- residency

    def _make_resident(self, generation: str, entry: Generation) -> bool:
        """Reserve, then hand to the executable. When that refuses, the keys fail and the generation is dropped."""
        if entry.nbytes > self._budget.limit:
            raise self._too_large(entry.nbytes)
        try:
            return self._entries.enter(generation)
        except TruffulaError as error:
            now = self._clock()
            for key, names in entry.keys.items():
                for name in names:
                    self._queue.fail(key, name, error.info(), now)
            if not entry.leases and not entry.holds:
                self._drop(generation, entry)
            raise

    def _repin(self, generation: str, entry: Generation) -> None:
        entry.pinned = any(key[0] in self._pins for key in entry.keys)
        self._entries.touch(generation, entry.used_at)

    def _detach(self, key: Key) -> None:
        """This key leads to its generation no longer."""
        generation = self._current.pop(key)
        entry = self._entries[generation]
        names = entry.keys.pop(key)
        if not any(other[0] == key[0] for other in entry.keys):
            del self._places[key[0]]
        if not entry.keys:
            entry.former = sorted(names)
        self._repin(generation, entry)
        self._drop_if_forgotten(generation, entry)

    def _drop_if_forgotten(self, generation: str, entry: Generation) -> None:
        if not entry.keys and not entry.leases and not entry.holds:
            self._drop(generation, entry)

    def _drop(self, generation: str, entry: Generation) -> None:
        self._entries.leave(generation)
        for key in entry.keys:
            del self._current[key]
            self._places.pop(key[0], None)
        self._entries.remove(generation)

    def close(self) -> None:
        """Drop everything; leases become invalid."""
        self._queue.close()
        self._leases.clear()
        self._claims.clear()
        for generation, entry in list(self._entries.items()):
            self._drop(generation, entry)

    def check(self) -> None:
        """Assert that every number agrees with every other. For tests and for an idle engine."""
        leased = Counter(self._leases.values())
        assert set(leased) <= set(self._entries), "a lease on a generation that is gone"
        self._entries.check()
        assert self._places == {k[0]: g for k, g in self._current.items()}, "a place that leads elsewhere than its keys"
        for generation, entry in self._entries.items():
            assert entry.leases == leased[generation] and entry.holds >= 0, "leases do not add up"
            assert not entry.leases or entry.slot is not None, "a leased adapter without a slot"
            assert entry.keys or entry.leases or entry.holds, "an unreachable generation"
            assert all(self._current.get(key) == generation for key in entry.keys), "a key that leads elsewhere"
        assert set(self._current) == {k for e in self._entries.values() for k in e.keys}, "a key without its entry"
        self._queue.check()
