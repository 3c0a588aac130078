"""``AdapterPool``: which adapters are in memory. The only writer of that; it knows names and numbers, never a tensor.

    alias (a place and its names) ──► generation (hash of the bytes) ──► leases (loaded or resident)

- Lookups of one place and fingerprint share one load; places with equal bytes share one generation.
- A changed fingerprint is read again. The place then leads to the new generation and the former one is *retired*:
  sequences that have a lease keep it, and it is dropped with its last lease. Until then its bytes count.
- A waiting or preempted sequence has a ``loaded`` lease: when its generation is evicted, the image stays mapped, so
  that it returns without its source, which may have changed or disappeared.
- Mapped images without a slot are outside the budget, so they are bounded: no load begins while they exceed
  ``mapped_limit``, and one without a lease is dropped unless a lookup asked for it since the last poll but one.
- In one step one adapter at most is mapped and one at most is given to the executable.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from truffula.errors import (
    AdapterLoadError,
    AdapterNotFound,
    ErrorInfo,
    InsufficientMemory,
    ShuttingDown,
    TruffulaError,
)
from truffula.lora.generations import NO_SLOT, OWNER, Budget, Generation, Generations, Place, Slots, place_of
from truffula.lora.generations import AdapterLease as AdapterLease
from truffula.lora.generations import AdapterStatus as AdapterStatus
from truffula.lora.image import map_image
from truffula.lora.loading import AdapterLoader
from truffula.lora.worker import LoadResponse
from truffula.types import AdapterCommand, AdapterRef, AdapterState

logger = logging.getLogger(__name__)

MAX_NAMES = 32
"""Names kept of one place: a client may have many names for it."""
MAX_COUNTED_NAMES = 1000
"""Names with a load counter of their own; the others share ``OTHER_NAMES``."""
OTHER_NAMES = "__other__"
ROOM_TIMEOUT_S = 60.0
"""How long a load command waits for memory that running requests use, once the adapter is read."""
RETRY_POLL_S = 0.002
"""How often an upload, or the room for a load, is looked at when nothing else is to be done."""

Key = tuple[Place, str]
"""One state of a place: the place and its fingerprint."""


@dataclass
class _Alias:
    """What a place leads to: the fingerprints that were read as ``generation``, and the names that asked for it."""

    generation: str
    fingerprints: set[str]
    names: set[str]


@dataclass(frozen=True)
class _Load:
    """A load that is with the loader, or whose image is laid out but not mapped yet."""

    key: Key
    ref: AdapterRef
    ticket: int


@dataclass(frozen=True)
class _Failure:
    name: str
    error: ErrorInfo
    expires: float


@dataclass
class _LoadCommand:
    """An operator's load that is not answered yet. ``ready_at``: when only memory was missing."""

    ref: AdapterRef
    future: Future[list[AdapterState]] = field(default_factory=Future)
    lease: AdapterLease | None = None
    ready_at: float | None = None


class AdapterPool:
    """Residency of adapters. One owner, one thread.

    The scheduler uses these members:

    - ``lookup(ref, now)``: loading, ready (with the generation) or failed; begins the load if there is none.
    - ``is_loaded(ref)``: whether ``lookup`` would answer ready. Begins nothing.
    - ``retain(generation)``: a lease that keeps a loaded generation available (not resident).
    - ``acquire(generation)``: a lease on a resident generation, which its ``slot`` names; None when that is not
      possible in this step. ``is_pending(generation)`` then tells whether it only has to wait for a later step: no
      memory needs to be freed for it.
    - ``release(lease)``: ends a lease of either kind, once.
    - ``leased_bytes``: bytes that no eviction can free.

    The engine calls ``poll`` before each step, and ``command`` for operators.

    ``clock`` is the one the budget's other reclaimers use. A failed load is not tried again for ``failure_ttl_s``.
    ``mapped_limit`` (bytes) is an eighth of the budget's limit unless given.
    """

    def __init__(
        self,
        slots: Slots,
        loader: AdapterLoader,
        budget: Budget,
        clock: Callable[[], float],
        *,
        failure_ttl_s: float = 10.0,
        mapped_limit: int | None = None,
    ) -> None:
        self._loader = loader
        self._budget = budget
        self._clock = clock
        self._failure_ttl_s = failure_ttl_s
        self._mapped_limit = budget.limit // 8 if mapped_limit is None else mapped_limit
        self._generations = Generations(slots, budget)
        self._aliases: dict[Place, _Alias] = {}
        self._pins: set[Place] = set()
        self._loads: dict[Key, _Load] = {}
        self._laid_out: deque[LoadResponse] = deque()
        self._failures: dict[Key, _Failure] = {}
        self._commands: list[_LoadCommand] = []
        self._may_upload = True  # nothing was given to the executable since the last poll
        self._polled = (float("-inf"), float("-inf"))  # the last poll but one, the last poll
        self.evictions = 0
        self.loads = 0
        self.loads_by_name: Counter[str] = Counter()
        self.failures = 0  # loads that failed, and adapters that the executable refused
        budget.register_reclaimer(OWNER, self)

    # ---- for the scheduler

    def lookup(self, ref: AdapterRef, now: float) -> AdapterStatus:
        """Where ``ref`` stands now; begins a load if there is none. Never waits, never raises.

        A caller that wants to keep the ``generation`` of a ready one retains or acquires it before the next poll.
        """
        key = (place_of(ref), ref.fingerprint)
        alias = self._alias_of(key)
        if alias is not None:
            if len(alias.names) < MAX_NAMES:
                alias.names.add(ref.name)
            self._generations.touch(self._generations[alias.generation], now)
            return AdapterStatus("ready", alias.generation)
        failure = self._failures.get(key)
        if failure is not None and now < failure.expires:
            return AdapterStatus("failed", error=failure.error)
        if key not in self._loads:
            self._loads[key] = _Load(key, ref, self._loader.start(ref))
        return AdapterStatus("loading")

    def is_loaded(self, ref: AdapterRef) -> bool:
        """Whether ``lookup`` would answer ready."""
        return self._alias_of((place_of(ref), ref.fingerprint)) is not None

    def retain(self, generation: str) -> AdapterLease:
        """A lease that keeps a loaded generation available, though not resident."""
        return self._generations.lease(self._generations[generation], NO_SLOT)

    def acquire(self, generation: str) -> AdapterLease | None:
        """A lease on a generation that is resident; None when that is not possible in this step.

        Raises ``InsufficientMemory`` when its bytes never fit, ``AdapterLoadError`` (or the executable's
        ``KernelError``) when it is no longer loaded or cannot be used.
        """
        entry = self._generations.get(generation)
        if entry is None:
            raise AdapterLoadError(
                f"Adapter generation {generation[:12]} is no longer loaded; send the request again.",
                generation=generation,
            )
        if not self._ensure_resident(entry):
            return None
        assert entry.slot is not None
        lease = self._generations.lease(entry, entry.slot)
        self._generations.touch(entry, self._clock())
        return lease

    def is_pending(self, generation: str) -> bool:
        """Whether ``acquire`` gave None because its upload has not ended, or another one was begun in this step."""
        entry = self._generations.get(generation)
        return entry is not None and not entry.resident and (entry.slot is not None or not self._may_upload)

    def release(self, lease: AdapterLease) -> None:
        """End a lease. A resident adapter stays so until its bytes are needed for something else."""
        entry = self._generations.release(lease)
        self._generations.touch(entry, self._clock())
        self._drop_if_retired(entry)

    @property
    def leased_bytes(self) -> int:
        """The part of ``resident_bytes`` that no eviction can free."""
        return self._generations.leased_bytes

    # ---- for the engine

    def poll(self, now: float, *, idle: bool = False) -> None:
        """Map at most one loaded adapter, drop unused images, advance commands, begin loads. Never raises for an
        adapter.

        ``idle``: no request is left, so that waiting frees no memory for a command.
        """
        self._polled = (self._polled[1], now)
        self._may_upload = True
        for entry in self._generations.check_uploads():
            self._drop_if_retired(entry)
        self._laid_out += self._loader.poll(paused=self._is_crowded())
        self._map_one(now)
        for key in [key for key, failure in self._failures.items() if now >= failure.expires]:
            del self._failures[key]
        for command in list(self._commands):
            self._advance(command, now, idle)
        for entry in self._generations.mapped():
            self._place_or_drop(entry)

    def poll_fds(self) -> dict[int, int]:
        """File descriptors and events (``select.poll``) that announce work for ``poll``."""
        return self._loader.poll_fds()

    def poll_timeout(self) -> float | None:
        """Seconds until ``poll`` has work without an event on ``poll_fds``; None: never."""
        if self._laid_out:
            return 0.0
        retried = self._generations.uploading or (self._loads and self._is_crowded())
        return RETRY_POLL_S if retried else self._loader.poll_timeout()

    def states(self) -> list[AdapterState]:
        """One row per name and generation, loads and failures included, by name."""
        rows = [AdapterState(name=load.ref.name, status="loading") for load in self._loads.values()]
        rows += [AdapterState(name=f.name, status="failed", error=f.error) for f in self._failures.values()]
        for entry in self._generations:
            names = set().union(*(self._aliases[place].names for place in entry.aliases)) or entry.names
            rows += [entry.state(name) for name in names]
        return sorted(rows, key=lambda row: (row.name, row.status, row.generation or ""))

    @property
    def resident(self) -> int:
        """Adapters with a slot."""
        return self._generations.resident

    @property
    def resident_bytes(self) -> int:
        """What the budget is charged for them."""
        return self._generations.resident_bytes

    # ---- commands of an operator

    def command(self, command: AdapterCommand, now: float) -> Future[list[AdapterState]]:
        """Carry out a command; the states of what it concerns (``list``: all).

        The future of a load is done once the adapter is resident, or with the error that ended the load. The others
        are done immediately; ``AdapterNotFound`` is their error when there is nothing to unload.
        """
        ref = command.ref
        if command.action == "load" and ref is not None:
            return self._load(ref, command.pinned, now)
        done: Future[list[AdapterState]] = Future()
        if command.action == "unload" and ref is not None and not self._unload(ref.name):
            done.set_exception(AdapterNotFound(f"Adapter {ref.name!r} is not loaded.", param="adapter"))
        else:
            every = command.action == "list" or ref is None
            done.set_result([state for state in self.states() if every or (ref and state.name == ref.name)])
        return done

    def _load(self, ref: AdapterRef, pinned: bool, now: float) -> Future[list[AdapterState]]:
        """Load even what failed recently. ``pinned``: keep it resident, through reloads, until it is unloaded."""
        place = place_of(ref)
        if pinned:
            self._pins.add(place)
            self._repin(place)
        for key in [key for key in self._failures if key[0] == place]:
            del self._failures[key]
        self.lookup(ref, now)
        command = _LoadCommand(ref)
        self._commands.append(command)
        self._advance(command, now, idle=False)
        return command.future

    def _unload(self, name: str) -> bool:
        """Forget ``name``: new requests load it again, running ones keep it. False when it is not known."""
        keys = [key for key, load in self._loads.items() if load.ref.name == name]
        for key in keys:
            self._pins.discard(key[0])
            self._loader.cancel(self._loads.pop(key).ticket)
        failed = [key for key, failure in self._failures.items() if failure.name == name]
        for key in failed:
            del self._failures[key]
        named = [(place, alias) for place, alias in self._aliases.items() if name in alias.names]
        for place, alias in named:
            self._pins.discard(place)
            if alias.names == {name}:
                self._detach(place)
            else:
                alias.names.discard(name)
                self._repin(place)
        return bool(keys or failed or named)

    def _advance(self, command: _LoadCommand, now: float, idle: bool) -> None:
        """Complete a load command whose adapter is resident or has failed."""
        try:
            state = self._progress(command, now, idle)
            if state is None:
                return
            command.future.set_result([state])
        except TruffulaError as error:
            command.future.set_exception(error)
        self._commands.remove(command)
        if command.lease is not None:
            self.release(command.lease)

    def _progress(self, command: _LoadCommand, now: float, idle: bool) -> AdapterState | None:
        """The state that answers a load command; None while it waits. Raises the error that ends it."""
        ref, key = command.ref, (place_of(command.ref), command.ref.fingerprint)
        if key in self._loads:
            return None
        if key in self._failures and self._alias_of(key) is None:
            raise TruffulaError.from_info(self._failures[key].error)
        alias = self._aliases.get(key[0])
        if alias is None:
            raise AdapterNotFound(f"Adapter {ref.name!r} was unloaded while it was loading.", param="adapter")
        if command.lease is None or command.lease.generation != alias.generation:
            former, command.lease = command.lease, self.retain(alias.generation)
            if former is not None:
                self.release(former)
        entry = self._generations[alias.generation]
        if self._ensure_resident(entry):
            return entry.state(ref.name)
        if self.is_pending(entry.id):
            return None
        command.ready_at = now if command.ready_at is None else command.ready_at
        waited = now - command.ready_at
        if idle or waited >= ROOM_TIMEOUT_S:
            raise InsufficientMemory(
                f"Adapter {ref.name!r} takes {entry.nbytes} bytes, and running or pinned adapters leave no room "
                f"(waited {waited:.0f} s). Unload other adapters, try again later, or raise --memory.",
                requested_bytes=entry.nbytes,
            )
        return None

    # ---- loads

    def _is_crowded(self) -> bool:
        """Whether so many bytes are mapped without a slot that no load may begin."""
        return self._generations.mapped_bytes > self._mapped_limit

    def _map_one(self, now: float) -> None:
        """Record failed loads, and map the image of one that succeeded."""
        loads = {load.ticket: load for load in self._loads.values()}
        while self._laid_out:
            response = self._laid_out.popleft()
            load = loads.get(response.ticket)
            if load is None:  # cancelled meanwhile
                _unlink(response)
                continue
            del self._loads[load.key]
            try:
                entry = self._map(response, now)
            except TruffulaError as error:
                self._fail(load.key, load.ref.name, error.info(), now)
                continue
            self._count(load.ref, response)
            self._attach(load.key, load.ref.name, entry, response.commit)
            return

    def _map(self, response: LoadResponse, now: float) -> Generation:
        """Map a laid-out image, or join the generation of equal bytes; its file is unlinked in any case."""
        if response.error is not None or response.image_path is None:
            raise TruffulaError.from_info(response.error or AdapterLoadError("The loader gave no reason.").info())
        try:
            known = self._generations.get(response.generation)
            if known is not None:
                self._generations.touch(known, now)
                return known
            image = map_image(Path(response.image_path))
        except OSError as error:
            raise AdapterLoadError(f"The prepared adapter file cannot be mapped: {error}.") from error
        finally:
            _unlink(response)
        if image.generation != response.generation:
            raise AdapterLoadError(
                "The prepared adapter file is not of the adapter that was loaded; send the request again."
            )
        return self._generations.add(image, now)

    def _count(self, ref: AdapterRef, response: LoadResponse) -> None:
        self.loads += 1
        known = ref.name in self.loads_by_name or len(self.loads_by_name) < MAX_COUNTED_NAMES
        self.loads_by_name[ref.name if known else OTHER_NAMES] += 1
        where = f"{ref.locator}@{response.commit}" if response.commit else ref.locator
        logger.info(
            "adapter %r (%s) loaded in %.2f s: rank %d, %d bytes, generation %s",
            ref.name, where, response.seconds, response.rank, response.nbytes, response.generation[:12],
        )  # fmt: skip
        for warning in response.warnings:
            logger.warning("adapter %r (%s): %s", ref.name, ref.locator, warning)

    def _fail(self, key: Key, name: str, error: ErrorInfo, now: float) -> None:
        self.failures += 1
        logger.warning("adapter %r (%s) is not loaded (%s): %s", name, key[0][1], error.code, error.message)
        self._failures[key] = _Failure(name, error, now + self._failure_ttl_s)

    # ---- generations

    def _ensure_resident(self, entry: Generation) -> bool:
        """Whether it is resident; begins its upload when this step has none yet. One that is refused is retired."""
        if entry.slot is None and self._may_upload:
            try:
                self._may_upload = not self._generations.upload(entry)
            except TruffulaError as error:
                for place in list(entry.aliases):
                    alias = self._aliases[place]
                    for fingerprint in alias.fingerprints:
                        self._fail((place, fingerprint), min(alias.names), error.info(), self._clock())
                    self._detach(place)
                raise
        return entry.resident

    def _place_or_drop(self, entry: Generation) -> None:
        """Make a mapped image resident if it is pinned, or used and in the way of a load; drop an unused one.

        A pin keeps memory that was given. A pinned adapter that gets none, because others are pinned, must not prevent
        all loading.
        """
        in_the_way = bool(self._loads) and self._is_crowded()
        if entry.pinned or (in_the_way and entry.leases):
            with contextlib.suppress(TruffulaError):  # recorded as the failure of its places
                self._ensure_resident(entry)
        unused = not entry.leases and entry.used_at < self._polled[0]
        if entry.account == "mapped" and unused and (in_the_way or not entry.pinned):
            self._drop(entry)

    def _alias_of(self, key: Key) -> _Alias | None:
        """What this state of a place leads to; None when it is not loaded."""
        alias = self._aliases.get(key[0])
        return alias if alias is not None and key[1] in alias.fingerprints else None

    def _attach(self, key: Key, name: str, entry: Generation, commit: str) -> None:
        """Let the place lead to this generation; a former one that no other place leads to is retired."""
        place, fingerprint = key
        alias = self._aliases.get(place)
        if alias is not None and alias.generation != entry.id:
            self._detach(place)
        alias = self._aliases.setdefault(place, _Alias(entry.id, set(), set()))
        alias.fingerprints.add(fingerprint)
        alias.names.add(name)
        entry.aliases.add(place)
        entry.commit = commit or entry.commit
        self._repin(place)

    def _detach(self, place: Place) -> None:
        """This place leads to its generation no longer."""
        alias = self._aliases[place]
        entry = self._generations[alias.generation]
        entry.names = sorted(alias.names)
        entry.aliases.discard(place)
        self._repin(place)
        del self._aliases[place]
        self._drop_if_retired(entry)

    def _repin(self, place: Place) -> None:
        """Pin or unpin the generation that this place leads to."""
        alias = self._aliases.get(place)
        if alias is not None:
            entry = self._generations[alias.generation]
            entry.pinned = not self._pins.isdisjoint(entry.aliases)
            self._generations.touch(entry, entry.used_at)

    def _drop_if_retired(self, entry: Generation) -> None:
        uploading = entry.slot is not None and not entry.uploaded  # the executable reads the image: dropped later
        if not entry.aliases and not entry.leases and not uploading:
            self._drop(entry)

    def _drop(self, entry: Generation) -> None:
        for place in entry.aliases:
            del self._aliases[place]
        self._generations.drop(entry)

    # ---- for the budget

    def oldest(self) -> float | None:
        entry = self._generations.oldest()
        return None if entry is None else entry.used_at

    def evict_oldest(self) -> int:
        entry = self._generations.oldest()
        if entry is None:
            return 0
        self._generations.evict(entry)
        self.evictions += 1
        if not entry.leases:
            self._drop(entry)
        return entry.nbytes

    def close(self) -> None:
        """Drop everything; leases become invalid, commands end with ``shutting_down``."""
        for command in self._commands:
            command.future.set_exception(ShuttingDown("The engine was closed."))
        for response in self._laid_out:
            _unlink(response)
        self._commands.clear()
        self._laid_out.clear()
        self._loads.clear()
        self._aliases.clear()
        self._loader.close()
        self._generations.close()

    def check(self) -> None:
        """Assert that every number agrees with every other. For tests and for an idle engine."""
        self._generations.check()
        for entry in self._generations:
            assert all(self._aliases[place].generation == entry.id for place in entry.aliases)
            assert entry.aliases or entry.leases or not entry.uploaded, "an unreachable generation"
            assert entry.pinned == (not self._pins.isdisjoint(entry.aliases)), "a wrong pin"
        assert set(self._aliases) == {place for entry in self._generations for place in entry.aliases}


def _unlink(response: LoadResponse) -> None:
    """Remove a laid-out image's file."""
    if response.image_path is not None:
        Path(response.image_path).unlink(missing_ok=True)
