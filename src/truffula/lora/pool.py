"""``AdapterPool``: which adapters are in memory. Its only writer; it handles names and numbers, never a tensor.

    source (kind, locator, revision; its names) ──► generation (hash of the bytes) ──► leases (loaded or resident)

- Lookups of one source and fingerprint share one load; sources with equal bytes share one generation.
- A changed fingerprint is read again. The source then has the new generation and the former one is *retired*:
  sequences that have a lease keep it, and it is dropped with its last lease. Until then its bytes count.
- The fingerprint of a remote source is the period in which it is checked once. While it is checked, requests get the
  generation that it had; those with a client's credential wait, since the check is the proof of its right.
- A waiting or preempted sequence has a ``loaded`` lease: when its generation is evicted, the image stays mapped, so
  that it returns without its source, which may have changed or disappeared.
- Mapped images without a slot are outside the budget, so they are bounded: no load begins while they exceed
  ``mapped_limit``, and one without a lease is dropped unless a lookup asked for it since the last poll but one.
- In one step one adapter at most is mapped and one at most is given to the executable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from msgspec.structs import replace

from truffula.errors import (
    AdapterLoadError,
    AdapterNotFound,
    ErrorInfo,
    GenerationMismatch,
    InsufficientMemory,
    InvalidRequest,
    ShuttingDown,
    TruffulaError,
)
from truffula.kernels.backend import Executable
from truffula.lora.generations import NO_SLOT, OWNER, Budget, Generation, Generations
from truffula.lora.generations import AdapterLease as AdapterLease
from truffula.lora.generations import AdapterStatus as AdapterStatus
from truffula.lora.loading import LoadingWorker
from truffula.lora.loads import AdapterLoads, AdapterSource, SourceState, source_of, source_state
from truffula.lora.worker import LoadResponse
from truffula.types import AdapterCommand, AdapterRef, AdapterState

MAX_NAMES = 32
"""Names kept of one source: clients may name it in many ways."""
MAX_FINGERPRINTS = 8
ROOM_TIMEOUT_S = 60.0
"""How long a load command waits for memory that running requests use, once the adapter is read."""
RETRY_POLL_S = 0.002
"""How often an idle engine checks whether an upload has finished, or a load may begin."""


@dataclass
class _LoadedSource:
    """A source whose bytes are mapped: its generation, the fingerprints they were read under, and the names used.
    ``private`` as of ``AdapterRef``; ``unchecked`` is the last fingerprint under which it could not be compared.
    """

    generation: Generation
    private: bool
    fingerprints: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    unchecked: str | None = None

    def add(self, fingerprint: str) -> None:
        """Keep the newest: a source that is checked every few minutes has ever new ones."""
        self.fingerprints = [*self.fingerprints[1 - MAX_FINGERPRINTS :], fingerprint]


@dataclass
class _LoadCommand:
    """An operator's load that is not answered yet. ``no_room_since``: when the image was mapped and had no room."""

    ref: AdapterRef
    future: Future[list[AdapterState]] = field(default_factory=Future)
    lease: AdapterLease | None = None
    no_room_since: float | None = None


class AdapterPool:
    """Residency of adapters. Used by one thread.

    The engine calls ``poll`` before each step and ``command`` for operators. The scheduler calls ``lookup`` for waiting
    sequences, ``retain`` once their adapter is loaded, ``acquire`` when it admits one, and ``release`` for each lease.

    ``clock`` is the clock of the budget's other reclaimers. A failed load is not tried again for ``failure_ttl_s``.
    ``mapped_limit`` (bytes) is an eighth of the adapters' budget unless given. ``loads`` has open loads and counters.
    """

    def __init__(
        self,
        executable: Executable,
        loader: LoadingWorker,
        budget: Budget,
        clock: Callable[[], float],
        *,
        failure_ttl_s: float = 10.0,
        mapped_limit: int | None = None,
    ) -> None:
        self._clock = clock
        self._mapped_limit = budget.limit_of(OWNER) // 8 if mapped_limit is None else mapped_limit
        self._generations = Generations(executable, budget)
        self._sources: dict[AdapterSource, _LoadedSource] = {}
        self._commands: list[_LoadCommand] = []
        self._may_upload = True  # nothing was given to the executable since the last poll
        self._polled = (float("-inf"), float("-inf"))  # the last poll but one, the last poll
        self.loads = AdapterLoads(loader, failure_ttl_s)
        self.evictions = 0
        budget.register_reclaimer(OWNER, self)

    # For the scheduler

    def lookup(self, ref: AdapterRef, now: float) -> AdapterStatus:
        """The status of ``ref`` now; begins a load if there is none. Never waits, never raises.

        One that is ``wanted`` in a generation is ready in that one while it is mapped for its source, retired or not,
        or if it is what the source has now; else it has failed. A client's right is proven first.
        A caller that keeps the ``generation`` of a ready one must retain or acquire it before the next poll.
        """
        if not ref.wanted:
            return self._present(ref, now)
        held = self._held(ref)
        if held is None or ref.credential is not None:
            present = replace(ref, wanted="")
            status, held = self._present(present, now), self._held(ref)
            if status.generation is None:
                return status
            if held is None:
                checked = source_state(present) not in self.loads
                return AdapterStatus("failed", error=_other(ref, status)) if checked else AdapterStatus("loading")
        self._generations.touch(held, now)
        return AdapterStatus("ready", held.id)

    def _held(self, ref: AdapterRef) -> Generation | None:
        """The generation that ``ref`` is wanted in, of its source; None when it is not mapped."""
        held = self._generations.of_source(source_of(ref))
        return next((one for one in held if one.id.startswith(ref.wanted)), None)

    def _present(self, ref: AdapterRef, now: float) -> AdapterStatus:
        """``lookup`` of what the source has now."""
        state = source_state(ref)
        loaded = self._loaded(state)
        if loaded is None:
            loaded, error = self._checked_meanwhile(ref), self.loads.error(state, ref.name, now)
            if error is None:
                known = self._sources.get(state[0])
                self.loads.begin(ref, "" if known is None else known.generation.commit)
            elif loaded is None:
                return AdapterStatus("failed", error=error)
        if loaded is None:
            return AdapterStatus("loading")
        if len(loaded.names) < MAX_NAMES:
            loaded.names.add(ref.name)
        self._generations.touch(loaded.generation, now)
        return AdapterStatus("ready", loaded.generation.id)

    def is_loaded(self, ref: AdapterRef) -> bool:
        """Whether ``lookup`` would begin no load."""
        if ref.wanted and ref.credential is None and self._held(ref) is not None:
            return True
        present = replace(ref, wanted="")
        return (self._loaded(source_state(present)) or self._checked_meanwhile(present)) is not None

    def retain(self, generation: str) -> AdapterLease:
        """A lease that keeps a loaded generation available, though not resident."""
        return self._generations.lease(self._generations[generation], NO_SLOT)

    def acquire(self, generation: str) -> AdapterLease | None:
        """A lease on a generation that is resident; None when that is not possible in this step.

        Raises ``InsufficientMemory`` when its bytes never fit, ``AdapterLoadError`` (or the executable's
        ``KernelError``) when it is no longer loaded or cannot be used.
        """
        entry = self._generations[generation]
        if not self._ensure_resident(entry) or entry.slot is None:
            return None
        lease = self._generations.lease(entry, entry.slot)
        self._generations.touch(entry, self._clock())
        return lease

    def acquire_all(self, generations: Sequence[str]) -> tuple[AdapterLease, ...] | None:
        """A resident lease on each of ``generations``, in their order; None, and none taken, when that is not possible
        in this step.

        Raises as ``acquire``; ``InsufficientMemory`` also when their bytes never fit together.
        """
        needed, limit = sum(self._generations[one].nbytes for one in generations), self._generations.limit
        if len(generations) > 1 and needed > limit:
            raise InsufficientMemory(
                f"The {len(generations)} adapters of the request take {needed} bytes together, and adapters may use "
                f"{limit}. Name fewer adapters, or give the server more memory (--memory, --adapter-memory).",
                param="adapters", requested_bytes=needed, limit_bytes=limit,
            )  # fmt: skip
        leases: dict[str, AdapterLease] = {}
        try:
            # The resident ones first: the upload of another must not evict them.
            for one in sorted(generations, key=lambda one: not self._generations[one].resident):
                if (lease := self.acquire(one)) is None:
                    break
                leases[one] = lease
        finally:
            if len(leases) < len(generations):
                for lease in leases.values():
                    self.release(lease)
        return tuple(leases[one] for one in generations) if len(leases) == len(generations) else None

    def is_pending(self, generations: Sequence[str]) -> bool:
        """Whether ``acquire_all`` gave None only because an upload has not ended, of one of these or another."""
        entries = [entry for one in generations if (entry := self._generations.get(one)) is not None]
        return any(not entry.resident and (entry.slot is not None or not self._may_upload) for entry in entries)

    def release(self, lease: AdapterLease) -> None:
        """End a lease of either kind, once. A resident adapter stays resident until its bytes are needed."""
        entry = self._generations.release(lease)
        self._generations.touch(entry, self._clock())
        self._drop_if_retired(entry)

    @property
    def leased_bytes(self) -> int:
        """The part of ``resident_bytes`` that no eviction can free."""
        return self._generations.leased_bytes

    # For the engine

    def poll(self, now: float, *, idle: bool = False) -> None:
        """Map at most one loaded adapter, drop unused images, advance commands, begin loads. No adapter makes it raise.

        ``idle``: no request is left, so that waiting frees no memory for a command.
        """
        self._polled = (self._polled[1], now)
        self._may_upload = True
        for entry in self._generations.check_uploads():
            self._drop_if_retired(entry)
        self.loads.poll(now, paused=self._above_mapped_limit())
        self._map_one(now)
        for command in list(self._commands):
            self._advance(command, now, idle)
        for entry in self._generations.mapped():
            self._upload_or_drop(entry)

    def poll_fds(self) -> dict[int, int]:
        """File descriptors and events (``select.poll``) that announce work for ``poll``."""
        return self.loads.loader.poll_fds()

    def poll_timeout(self) -> float | None:
        """Seconds until ``poll`` has work without an event on ``poll_fds``; None: never."""
        if self.loads.has_responses():
            return 0.0
        retried = self._generations.uploading or (self.loads and self._above_mapped_limit())
        return RETRY_POLL_S if retried else self.loads.loader.poll_timeout()

    def states(self) -> list[AdapterState]:
        """One row per name and generation, loads and failures included, by name."""
        rows = self.loads.states()
        for entry in self._generations:
            names = dict.fromkeys(entry.names if not entry.sources else (), entry.private)
            for loaded in map(self._sources.__getitem__, entry.sources):
                names |= {name: loaded.private and names.get(name, True) for name in loaded.names}
            rows += [entry.state(name, private=private) for name, private in names.items()]
        return sorted(rows, key=lambda row: (row.name, row.status, row.generation or ""))

    def resident_names(self, most: int) -> list[str]:
        """The first ``most`` names of resident adapters, the last used first, of none that is retired or private."""
        names: list[str] = []
        for entry in self._generations.newest():
            for loaded in map(self._sources.__getitem__, entry.sources):
                names += () if loaded.private else loaded.names
            if len(names) >= most:
                break
        return list(dict.fromkeys(names))[:most]

    @property
    def resident(self) -> int:
        """Adapters with a slot."""
        return self._generations.resident

    @property
    def resident_bytes(self) -> int:
        """What the budget is charged for them."""
        return self._generations.resident_bytes

    # Commands of an operator

    def command(self, command: AdapterCommand, now: float) -> Future[list[AdapterState]]:
        """Carry out a command; the states of what it concerns (``list``: all).

        The future of a load is done once the adapter is resident, or with the error that ended the load. The others
        are done immediately; ``AdapterNotFound`` is their error when there is nothing to unload.
        """
        ref = command.ref
        done: Future[list[AdapterState]] = Future()
        if command.action == "load" and ref is not None:
            if not ref.wanted:
                return self._load(ref, command.pinned, now)
            text = f"{ref.name!r} is loaded as its source has it; a request may name a generation."
            done.set_exception(InvalidRequest(text, param="adapter"))
            return done
        if command.action == "prepare":
            self.loads.loader.prepare()
            done.set_result([])
        elif command.action == "list" or ref is None:
            done.set_result(self.states())
        elif command.action == "unpin" or self._unload(ref.name):
            if command.action == "unpin":
                self._unpin(source_of(ref), ref.name)
            done.set_result([state for state in self.states() if state.name == ref.name])
        else:
            done.set_exception(AdapterNotFound(f"Adapter {ref.name!r} is not loaded.", param="adapter"))
        return done

    def _load(self, ref: AdapterRef, pinned: bool, now: float) -> Future[list[AdapterState]]:
        """Load even what failed recently. ``pinned``: keep it resident, also through reloads, until it is unloaded."""
        source = source_of(ref)
        if pinned:
            self._generations.pins.setdefault(source, set()).add(ref.name)
            self._recount(source)
        self.loads.forget_failures(source=source)
        self.lookup(ref, now)
        command = _LoadCommand(ref)
        self._commands.append(command)
        self._advance(command, now, idle=False)
        return command.future

    def _unload(self, name: str) -> bool:
        """Forget ``name``: new requests load it again, running ones keep it. False when it is not known."""
        cancelled = self.loads.cancel(name)
        failed = self.loads.forget_failures(name=name)
        named = [source for source, loaded in self._sources.items() if name in loaded.names]
        for source in [source for source, names in self._generations.pins.items() if name in names]:
            self._unpin(source, name)
        for source in named:
            self._remove_name(source, name)
        return bool(cancelled or failed or named)

    def _remove_name(self, source: AdapterSource, name: str) -> None:
        """Remove a name of a source, and end its pin; a source without another name is forgotten."""
        self._unpin(source, name)
        loaded = self._sources[source]
        loaded.names = loaded.names - {name} | self._generations.pins.get(source, set())
        if not loaded.names:
            loaded.names = {name}
            self._detach(source)

    def _unpin(self, source: AdapterSource, name: str) -> None:
        """End the pin of a source by one of its names."""
        names = self._generations.pins.get(source, set())
        names.discard(name)
        if not names:
            self._generations.pins.pop(source, None)
        self._recount(source)

    def _advance(self, command: _LoadCommand, now: float, idle: bool) -> None:
        """Complete a load command whose adapter is resident or has failed."""
        try:
            if (state := self._progress(command, now, idle)) is None:
                return
            name, source = command.ref.name, source_of(command.ref)
            for other in [one for one, loaded in self._sources.items() if name in loaded.names and one != source]:
                self._remove_name(other, name)  # it meant another source before
            command.future.set_result([state])
        except TruffulaError as error:
            command.future.set_exception(error)
        self._commands.remove(command)
        if command.lease is not None:
            self.release(command.lease)

    def _progress(self, command: _LoadCommand, now: float, idle: bool) -> AdapterState | None:
        """The state that answers a load command; None while it waits. Raises the error that ends it."""
        ref, state = command.ref, source_state(command.ref)
        if state in self.loads:
            return None
        error = self.loads.error(state, ref.name, now)
        if error is not None and self._loaded(state) is None:
            raise TruffulaError.from_info(error)
        loaded = self._sources.get(source_of(ref))
        if loaded is None:
            raise AdapterNotFound(f"Adapter {ref.name!r} was unloaded while it was loading.", param="adapter")
        entry = loaded.generation
        if command.lease is None or command.lease.generation != entry.id:
            former, command.lease = command.lease, self.retain(entry.id)
            if former is not None:
                self.release(former)
        if self._ensure_resident(entry):
            return entry.state(ref.name)
        if self.is_pending([entry.id]):
            return None
        command.no_room_since = now if command.no_room_since is None else command.no_room_since
        waited = now - command.no_room_since
        if idle or waited >= ROOM_TIMEOUT_S:
            raise InsufficientMemory(
                f"Adapter {ref.name!r} takes {entry.nbytes} bytes, and running or pinned adapters leave no room "
                f"(waited {waited:.0f} s). Unload other adapters, try again later, or raise --memory.",
                requested_bytes=entry.nbytes,
            )
        return None

    # Loads

    def _above_mapped_limit(self) -> bool:
        """Whether so many bytes are mapped without a slot that no load may begin."""
        return self._generations.mapped_bytes > self._mapped_limit

    def _map_one(self, now: float) -> None:
        """Record failed loads, and map the image of one that succeeded."""
        while (ended := self.loads.next_response()) is not None:
            ref, response = ended
            if response.error is None and response.image is None:
                self._confirm(ref, response)
                continue
            try:
                entry = self._generations.add(response, now)
            except TruffulaError as error:
                self._on_failure(ref, error, now)
            else:
                self.loads.complete(ref, response, entry.image)
                return self._attach(ref, entry, response.commit)

    def _on_failure(self, ref: AdapterRef, error: TruffulaError, now: float) -> None:
        """A source that cannot be read now keeps what it had. One that has something else now does not."""
        loaded = self._checked_meanwhile(ref)
        outcome: str | None = "is not loaded"
        if loaded is not None and isinstance(error, AdapterLoadError):
            tried = loaded.unchecked == ref.fingerprint
            loaded.unchecked = ref.fingerprint
            outcome = None if tried else "is served as it was, since it cannot be compared with its source"
        elif loaded is not None:
            self._detach(source_of(ref))
        self.loads.fail(source_state(ref), ref.name, error.info(), now, outcome)

    def _confirm(self, ref: AdapterRef, response: LoadResponse) -> None:
        """A source still has the commit that was loaded. If that is no longer here, it is loaded."""
        source, fingerprint = source_state(ref)
        self.loads.warn(ref, response)
        loaded = self._sources.get(source)
        if loaded is None or loaded.generation.commit != response.commit:
            self.loads.begin(ref)
        else:
            loaded.add(fingerprint)

    # Generations

    def _ensure_resident(self, entry: Generation) -> bool:
        """Whether it is resident; begins its upload when this step has none yet. One that is rejected is retired."""
        if entry.slot is None and self._may_upload:
            try:
                self._may_upload = not self._generations.upload(entry)
            except TruffulaError as error:
                for source in list(entry.sources):
                    loaded = self._sources[source]
                    for fingerprint in loaded.fingerprints:
                        self.loads.fail((source, fingerprint), min(loaded.names), error.info(), self._clock())
                    self._detach(source)
                raise
        return entry.resident

    def _upload_or_drop(self, entry: Generation) -> None:
        """Upload a mapped image that is pinned, or leased and blocks a load by its size; drop an unused one, also a
        pinned one that blocks loads, because others leave no memory for it.
        """
        blocks_loads = bool(self.loads) and self._above_mapped_limit()
        if entry.pinned or (blocks_loads and entry.leases):
            with contextlib.suppress(TruffulaError):  # recorded as the failure of its sources
                self._ensure_resident(entry)
        unused = not entry.leases and entry.used_at < self._polled[0]
        if entry.slot is None and unused and (blocks_loads or not entry.pinned):
            self._drop(entry)

    def _loaded(self, state: SourceState) -> _LoadedSource | None:
        """The source, if this state of it is loaded."""
        loaded = self._sources.get(state[0])
        return loaded if loaded is not None and state[1] in loaded.fingerprints else None

    def _checked_meanwhile(self, ref: AdapterRef) -> _LoadedSource | None:
        """What a remote source of the operator had at its last check, which requests get while it is checked again."""
        usable = ref.kind not in ("local", "merged") and ref.credential is None
        return self._sources.get(source_of(ref)) if usable else None

    def _attach(self, ref: AdapterRef, entry: Generation, commit: str) -> None:
        """Make this the generation of the source; a former one that no other source has is retired."""
        source, fingerprint = source_state(ref)
        loaded = self._sources.get(source)
        if loaded is not None and loaded.generation is not entry:
            self._detach(source)
        loaded = self._sources.setdefault(source, _LoadedSource(entry, ref.private))
        loaded.add(fingerprint)
        loaded.names.add(ref.name)
        self._generations.attach(entry, source)
        entry.commit = commit or entry.commit
        self._recount(source)

    def _detach(self, source: AdapterSource) -> None:
        """Forget the generation of this source; one that no other source has is retired."""
        loaded = self._sources.pop(source)
        entry = loaded.generation
        entry.names, entry.private = sorted(loaded.names), loaded.private
        entry.sources.discard(source)
        self._generations.touch(entry, entry.used_at)
        self._drop_if_retired(entry)

    def _recount(self, source: AdapterSource) -> None:
        """Count the bytes of the source's generation again, since a pin or its sources have changed."""
        if (loaded := self._sources.get(source)) is not None:
            self._generations.touch(loaded.generation, loaded.generation.used_at)

    def _drop_if_retired(self, entry: Generation) -> None:
        if not entry.sources and not entry.leases and entry.account != "uploading":  # then it is dropped later
            self._drop(entry)

    def _drop(self, entry: Generation) -> None:
        for source in entry.sources:
            del self._sources[source]
        self._generations.drop(entry)

    # Reclaimer

    def oldest(self) -> float | None:
        entry = self._generations.victim()
        return None if entry is None else entry.used_at

    def evict_oldest(self) -> int:
        if (entry := self._generations.victim()) is None:
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
        self._commands.clear()
        self._sources.clear()
        self.loads.close()
        self._generations.close()

    def check(self) -> None:
        """Raise AssertionError when the sources and the generations disagree. For tests and for an idle engine."""
        self._generations.check()
        for entry in self._generations:
            assert all(self._sources[source].generation is entry for source in entry.sources)
            assert entry.sources or entry.leases or not entry.resident, "an unreachable generation"
        assert set(self._sources) == {source for entry in self._generations for source in entry.sources}


def _other(ref: AdapterRef, status: AdapterStatus) -> ErrorInfo:
    """The error of ``ref``, which is wanted in another generation than the source has."""
    return GenerationMismatch(
        f"Adapter {ref.name!r} is asked for as generation {ref.wanted}, and is generation {status.generation} now.",
        param="model",
        present=status.generation or "",
    ).info()
