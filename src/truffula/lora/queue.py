"""``LoadQueue``: loads begun or waiting to begin, and what failed lately. One owner, the pool, and one thread."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from truffula.errors import ErrorInfo
from truffula.lora.generation import Key, Place
from truffula.lora.loading import AdapterLoader, LoadResult
from truffula.types import AdapterRef, AdapterState

logger = logging.getLogger(__name__)

MAX_COUNTED_NAMES = 1000
"""Names with a count of loads of their own; the rest share ``OTHER_NAMES``."""
OTHER_NAMES = "__other__"


@dataclass
class _Load:
    """One load, begun (``ticket``) or waiting for spare room."""

    ref: AdapterRef
    ticket: int | None = None


@dataclass(frozen=True)
class _Failure:
    name: str
    error: ErrorInfo
    expires: float


class LoadQueue:
    """At most one load a key. At most ``max_in_flight`` of a kind of source are with the loader at a time; a failed one
    is remembered for ``failure_ttl_s``.
    """

    def __init__(self, loader: AdapterLoader, *, failure_ttl_s: float, max_in_flight: int) -> None:
        self._loader = loader
        self._failure_ttl_s = failure_ttl_s
        self._max_in_flight = max_in_flight
        self._loads: dict[Key, _Load] = {}
        self._tickets: dict[int, Key] = {}
        self._failures: dict[Key, _Failure] = {}
        self.done = 0
        self.done_by_name: Counter[str] = Counter()
        self.failed = 0

    def __len__(self) -> int:
        return len(self._loads)

    def __contains__(self, key: Key) -> bool:
        """Whether a load of ``key`` was begun or waits."""
        return key in self._loads

    @property
    def in_flight(self) -> int:
        """Loads that are with the loader."""
        return len(self._tickets)

    def add(self, key: Key, ref: AdapterRef) -> None:
        self._loads[key] = _Load(ref)

    def begin(self) -> None:
        """Give the loader what it may have, oldest first."""
        in_flight = Counter(load.ref.kind for load in self._loads.values() if load.ticket is not None)
        for key, load in self._loads.items():
            # Counted per kind: slow downloads may not keep local folders from being read.
            if load.ticket is None and in_flight[load.ref.kind] < self._max_in_flight:
                in_flight[load.ref.kind] += 1
                load.ticket = self._loader.start(load.ref)
                self._tickets[load.ticket] = key

    def finished(self) -> Iterator[tuple[Key, AdapterRef, LoadResult]]:
        """What the loader finished and somebody waits for; the images of other loads are removed."""
        for result in self._loader.poll():
            key = self._tickets.pop(result.ticket, None)
            load = self._loads.pop(key, None) if key is not None else None
            if key is None or load is None:
                discard(result.image_path)
                continue
            yield key, load.ref, result

    def count(self, ref: AdapterRef, result: LoadResult) -> None:
        """Count and log a load that ended well."""
        self.done += 1
        known = ref.name in self.done_by_name or len(self.done_by_name) < MAX_COUNTED_NAMES
        self.done_by_name[ref.name if known else OTHER_NAMES] += 1
        where = f"{ref.locator}@{result.commit}" if result.commit else ref.locator
        logger.info(
            "adapter %r (%s) loaded in %.2f s: rank %d, %d bytes, generation %s",
            ref.name, where, result.seconds, result.rank, result.nbytes, result.generation[:12],
        )  # fmt: skip
        for warning in result.warnings:
            logger.warning("adapter %r (%s): %s", ref.name, ref.locator, warning)

    def cancel(self, name: str) -> list[Key]:
        """Forget the loads that ``name`` asked for; their keys."""
        keys = [key for key, load in self._loads.items() if load.ref.name == name]
        for key in keys:
            ticket = self._loads.pop(key).ticket
            if ticket is not None:
                del self._tickets[ticket]
                self._loader.cancel(ticket)
        return keys

    # ---- failures

    def fail(self, key: Key, name: str, error: ErrorInfo, now: float) -> None:
        self.failed += 1
        logger.warning("adapter %r (%s) is not loaded (%s): %s", name, key[0][1], error.code, error.message)
        self._failures[key] = _Failure(name, error, now + self._failure_ttl_s)

    def refusal(self, key: Key, now: float) -> ErrorInfo | None:
        """Why ``key`` is not to be loaded yet; a failure whose time is over is forgotten."""
        failure = self._failures.get(key)
        if failure is not None and now >= failure.expires:
            del self._failures[key]
        return self.failure(key)

    def failure(self, key: Key) -> ErrorInfo | None:
        """How the last load of ``key`` failed, as long as that is remembered."""
        failure = self._failures.get(key)
        return None if failure is None else failure.error

    def expire(self, now: float) -> None:
        """Forget the failures whose time is over."""
        for key in [k for k, failure in self._failures.items() if now >= failure.expires]:
            del self._failures[key]

    def retry(self, place: Place) -> None:
        """Forget what failed at ``place``."""
        for key in [key for key in self._failures if key[0] == place]:
            del self._failures[key]

    def forgive(self, name: str) -> bool:
        """Forget the failures of ``name``; whether there were any."""
        keys = [key for key, failure in self._failures.items() if failure.name == name]
        for key in keys:
            del self._failures[key]
        return bool(keys)

    def states(self) -> list[AdapterState]:
        """A row per load and per failure."""
        rows = [AdapterState(name=load.ref.name, status="loading") for load in self._loads.values()]
        return rows + [AdapterState(name=f.name, status="failed", error=f.error) for f in self._failures.values()]

    def close(self) -> None:
        self._loader.close()
        self._loads.clear()
        self._tickets.clear()

    def check(self) -> None:
        """Assert that every number agrees with every other."""
        tickets = {load.ticket for load in self._loads.values()} - {None}
        assert tickets == set(self._tickets), "tickets do not match loads"


def discard(path: str | None) -> None:
    """Remove a laid-out image's file."""
    if path is not None:
        Path(path).unlink(missing_ok=True)
