"""``AdapterLoads``: the loads that are with the loader, and those that failed recently. Part of the adapter pool."""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from truffula.errors import AdapterNotFound, ErrorInfo, unknown_adapter
from truffula.kernels.backend import AdapterImage
from truffula.lora.loading import LoadingWorker
from truffula.lora.worker import LoadResponse
from truffula.types import AdapterRef, AdapterState

logger = logging.getLogger(__name__)

MAX_COUNTED_NAMES = 1000
"""Names with a load counter of their own; the others share ``OTHER_NAMES``."""
OTHER_NAMES = "__other__"

AdapterSource = tuple[str, str, str | None, str]
"""Where an adapter is read from, and by what right: kind, locator, revision, id of the client's credential or ""."""
SourceState = tuple[AdapterSource, str]
"""One state of a source: the source and its fingerprint."""


def source_of(ref: AdapterRef) -> AdapterSource:
    return ref.kind, ref.locator, ref.revision, "" if ref.credential is None else ref.credential.id


def source_state(ref: AdapterRef) -> SourceState:
    """With ``wanted``, requests for one generation have a state of their own."""
    return source_of(ref), ref.fingerprint + (f"@{ref.wanted}" if ref.wanted else "")


@dataclass(frozen=True)
class _Failure:
    name: str
    error: ErrorInfo
    expires: float

    def told(self, name: str) -> ErrorInfo:
        """The error for one that calls the adapter ``name``, and is not to learn by which name another client did."""
        error = self.error
        if name == self.name:
            return error
        if error.code == AdapterNotFound.code and "reason" in error.data:  # of ``unknown_adapter``
            return unknown_adapter(name, str(error.data["reason"]), error.param or "").info()
        return replace(error, message=error.message.replace(repr(self.name), repr(name)))


class AdapterLoads:
    """Loads by the state of the source that they read: at most one at a time for each.

    A failed load is not tried again for ``failure_ttl_s``. ``completed`` and ``failed`` count loads since the start;
    ``failed`` also counts adapters that the executable rejected.
    """

    def __init__(self, loader: LoadingWorker, failure_ttl_s: float) -> None:
        self.loader = loader
        self._failure_ttl_s = failure_ttl_s
        self._open: dict[SourceState, tuple[int, AdapterRef]] = {}  # with their tickets
        self._responses: deque[LoadResponse] = deque()
        self._failures: dict[SourceState, _Failure] = {}
        self.completed = 0
        self.completed_by_name: Counter[str] = Counter()
        self.failed = 0

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, state: SourceState) -> bool:
        """Whether this state is being loaded."""
        return state in self._open

    def begin(self, ref: AdapterRef, has: str = "") -> None:
        """Begin a load unless this state is being loaded already. ``has``: the commit that is loaded; with it the load
        may end without an image, because that is the current one.
        """
        state = source_state(ref)
        if state not in self._open:
            self._open[state] = self.loader.start(ref, has), ref

    def cancel(self, name: str) -> list[AdapterSource]:
        """Cancel the loads that ``name`` asked for; returns their sources."""
        states = [state for state, (_, ref) in self._open.items() if ref.name == name]
        for state in states:
            ticket, _ = self._open.pop(state)
            self.loader.cancel(ticket)
        return [source for source, _ in states]

    def poll(self, now: float, *, paused: bool) -> None:
        """Collect the loader's responses and forget expired failures. ``paused``: the loader begins no queued load."""
        self._responses += self.loader.poll(paused=paused)
        for state in [state for state, failure in self._failures.items() if now >= failure.expires]:
            del self._failures[state]

    def has_responses(self) -> bool:
        """Whether ``next_response`` may return one."""
        return bool(self._responses)

    def next_response(self) -> tuple[AdapterRef, LoadResponse] | None:
        """The next load that ended, which is no longer open from here on; None when there is none."""
        while self._responses:
            response = self._responses.popleft()
            for state, (ticket, ref) in self._open.items():
                if ticket == response.ticket:
                    del self._open[state]
                    return ref, response
            unlink_image(response)  # it was cancelled in the meantime
        return None

    def complete(self, ref: AdapterRef, response: LoadResponse, image: AdapterImage) -> None:
        """Count and log a load whose image is mapped."""
        self.completed += 1
        known = ref.label in self.completed_by_name or len(self.completed_by_name) < MAX_COUNTED_NAMES
        self.completed_by_name[ref.label if known and not ref.rights else OTHER_NAMES] += 1
        where = f"{ref.locator}@{response.commit}" if response.commit else ref.locator
        logger.info(
            "adapter %r (%s) loaded in %.2f s: rank %d, %d bytes, generation %s",
            ref.name, where, response.seconds, image.rank, image.nbytes, image.generation[:12],
        )  # fmt: skip
        self.warn(ref, response)

    def warn(self, ref: AdapterRef, response: LoadResponse) -> None:
        """Log the warnings of a load."""
        for warning in response.warnings:
            logger.warning("adapter %r (%s): %s", ref.name, ref.locator, warning)

    # Failures

    def fail(
        self, state: SourceState, name: str, error: ErrorInfo, now: float, outcome: str | None = "is not loaded"
    ) -> None:
        """Count, log and remember the failure of an adapter that ``name`` asked for. Logged with ``outcome``."""
        self.failed += 1
        why = error.data.get("reason", error.message)  # one that only the operator is told, if there is one
        if outcome is not None:
            logger.warning("adapter %r (%s) %s (%s): %s", name, state[0][1], outcome, error.code, why)
        self._failures[state] = _Failure(name, error, now + self._failure_ttl_s)

    def error(self, state: SourceState, name: str, now: float) -> ErrorInfo | None:
        """Why this state failed to load less than ``failure_ttl_s`` ago, for one that calls it ``name``; None when it
        did not.
        """
        failure = self._failures.get(state)
        return None if failure is None or now >= failure.expires else failure.told(name)

    def forget_failures(self, *, source: AdapterSource | None = None, name: str | None = None) -> bool:
        """Forget the failures of a source or of a name; whether there were any."""
        states = [state for state, failure in self._failures.items() if source == state[0] or name == failure.name]
        for state in states:
            del self._failures[state]
        return bool(states)

    def names(self) -> list[str]:
        """The names that open loads were asked for by, but for private ones."""
        return [ref.name for _, ref in self._open.values() if not ref.private]

    def states(self) -> list[AdapterState]:
        """One row per open load and per failure."""
        rows = [AdapterState(name=ref.name, status="loading", private=ref.private) for _, ref in self._open.values()]
        return rows + [AdapterState(name=f.name, status="failed", error=f.error) for f in self._failures.values()]

    def close(self) -> None:
        """End all loads and the loader."""
        for response in self._responses:
            unlink_image(response)
        self._responses.clear()
        self._open.clear()
        self.loader.close()


def unlink_image(response: LoadResponse) -> None:
    """Remove the image file of a response, if it has one."""
    if response.image_path is not None:
        Path(response.image_path).unlink(missing_ok=True)
