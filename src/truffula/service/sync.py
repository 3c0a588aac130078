"""``SyncService``: the service in the caller's thread, for ``LLM``, scripts and the command line."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from truffula.engine.client import EngineClient
from truffula.errors import ShuttingDown, TruffulaError
from truffula.lora.sources import AdapterPolicy
from truffula.service.core import RequestState, Service, ServiceLimits
from truffula.service.files import LoadedTexts, texts_of
from truffula.service.fold import collect, failure
from truffula.types import Completion, GenerateRequest, TextDelta, TokenEvent

logger = logging.getLogger(__name__)

Found = tuple[int, list[TextDelta] | TruffulaError]


class _Run:
    """One call: its requests by engine id, and what they released that the caller has not taken."""

    def __init__(self) -> None:
        self.places: dict[str, tuple[int, RequestState]] = {}
        self.in_engine: set[str] = set()
        self.inbox: deque[tuple[int, list[TextDelta]]] = deque()

    def add(self, index: int, state: RequestState) -> None:
        for one in state.engine_requests:
            self.places[one.request_id] = (index, state)
            self.in_engine.add(one.request_id)

    def push(self, event: TokenEvent) -> list[str]:
        """Take one event; engine requests that have ended early for the caller come back."""
        index, state = self.places[event.request_id]
        try:
            deltas = state.push(event)
        except Exception as fault:  # noqa: BLE001  it is this request's alone; the others' events go on
            deltas = state.break_off(fault)
        if event.finish_reason is not None:
            self.in_engine.discard(event.request_id)
        if deltas:
            self.inbox.append((index, deltas))
        return state.take_aborts()


class SyncService:
    """Runs requests to their end. Owns ``client``.

    Several calls may go on at once, from several threads or as iterators that take turns in one: their requests share
    the engine's batch, and whichever call waits for its own events hands the others theirs. Args: as of
    ``AsyncService``.
    """

    def __init__(
        self,
        client: EngineClient,
        *,
        policy: AdapterPolicy | None = None,
        limits: ServiceLimits | None = None,
        texts: LoadedTexts | None = None,
        templates: Mapping[str, str] | None = None,
    ) -> None:
        self.client = client
        self.core = Service(
            client.info,
            texts=texts if texts is not None else texts_of(client.info),
            policy=policy,
            limits=limits,
            templates=templates,
        )
        self._runs: dict[str, _Run] = {}
        self._pumping = threading.Lock()
        self._closed = False

    def run(
        self,
        requests: Sequence[GenerateRequest],
        *,
        progress: Callable[[int, int], None] | None = None,
        return_errors: bool = False,
    ) -> list[Completion | TruffulaError]:
        """All requests in one batch; answers in their order.

        Args:
            progress: Called with (requests ended, requests) whenever one has ended.
            return_errors: Put a request's error in its place. Otherwise the first error ends all and is raised.
        """
        deltas: list[list[TextDelta]] = [[] for _ in requests]
        left = [request.params.n for request in requests]
        errors: dict[int, TruffulaError] = {}
        for index, found in self.stream(requests, return_errors=return_errors):
            if isinstance(found, TruffulaError):
                errors[index], left[index] = found, 0
            else:
                deltas[index] += found
                left[index] -= sum(delta.finish_reason is not None for delta in found)
                for error in filter(None, map(failure, found)):
                    errors.setdefault(index, error)
            if progress is not None and not left[index]:
                progress(left.count(0), len(requests))
        return [errors[index] if index in errors else collect(deltas[index]) for index in range(len(requests))]

    def stream(self, requests: Sequence[GenerateRequest], *, return_errors: bool = False) -> Iterator[Found]:
        """``(index of the request, deltas)`` as they come. Closing the iterator aborts what still runs.

        With ``return_errors`` a request that can't begin gives its error once, and one that fails a delta that says so;
        without, the first error is raised and the others are aborted. Nothing is submitted before all were looked at.
        """
        if self._closed:
            raise ShuttingDown("This engine is closed.")
        run, refused, ignored = _Run(), [], set[str]()
        for index, request in enumerate(requests):
            try:
                state = self.core.open(request)
                run.add(index, state)
                ignored.update(state.ignored)
            except TruffulaError as error:
                if not return_errors:
                    raise
                refused.append((index, error))
        if ignored:
            logger.warning("the chat template does not use %s", ", ".join(sorted(ignored)))
        yield from refused
        self._runs.update(dict.fromkeys(run.places, run))
        try:
            states = {id(state): state for _, state in run.places.values()}
            self.client.submit([one for state in states.values() for one in state.engine_requests])
            yield from self._follow(run, return_errors)
        finally:
            self._leave(run)

    def close(self) -> None:
        """Close the client. Iterators that are still open end with ``ShuttingDown``."""
        self._closed = True
        self.client.close()

    def _follow(self, run: _Run, return_errors: bool) -> Iterator[Found]:
        while run.in_engine or run.inbox:
            if not run.inbox:
                self._pump(run)
            while run.inbox:
                index, deltas = run.inbox.popleft()
                if not return_errors:
                    for error in filter(None, map(failure, deltas)):
                        raise error
                yield index, deltas

    def _pump(self, run: _Run) -> None:
        """Wait until something came for somebody."""
        # Whoever holds the lock may be handing this run its events: look again before waiting for more.
        if not self._pumping.acquire(timeout=0.01):
            return
        try:
            if run.inbox or not run.in_engine:
                return
            events = self.client.events(None)
            if not events and self._closed:
                run.in_engine.clear()
            aborts: list[str] = []
            for event in events:
                owner = self._runs.get(event.request_id)
                if owner is not None:
                    aborts += owner.push(event)
            if aborts:
                self.client.abort(aborts)
        finally:
            self._pumping.release()

    def _leave(self, run: _Run) -> None:
        """See what still runs to its end, so that nothing of it stays in the engine."""
        if run.in_engine and not self._closed:
            self.client.abort(sorted(run.in_engine))
            while run.in_engine and not self._closed:
                run.inbox.clear()
                self._pump(run)
        for engine_id in run.places:
            self._runs.pop(engine_id, None)
