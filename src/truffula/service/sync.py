"""``SyncService``: the service in the calling threads, for ``LLM``, scripts and the command line."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from truffula.engine.client import EngineClient
from truffula.engine.interrupts import uninterrupted
from truffula.errors import ShuttingDown, TruffulaError
from truffula.service.choices import choice_error, collect
from truffula.service.core import RequestState, Service
from truffula.service.grammars import Grammars
from truffula.service.submissions import Submissions
from truffula.types import (
    AdapterCommand,
    AdapterState,
    Completion,
    EngineRequest,
    EngineStats,
    GenerateRequest,
    TextDelta,
    TokenEvent,
)

logger = logging.getLogger(__name__)

Found = tuple[int, list[TextDelta] | TruffulaError]
Answer = Completion | TruffulaError


class _Call:
    """One call of ``stream``: its requests that are open, by engine id, and the deltas that its caller has not taken.

    ``waiting`` are the requests that were not submitted yet, with their index; the first ones may be opened already.
    """

    def __init__(self, requests: Sequence[GenerateRequest]) -> None:
        self.waiting: deque[tuple[int, GenerateRequest | RequestState]] = deque(enumerate(requests))
        self.states: dict[str, tuple[int, RequestState]] = {}
        self.inbox: deque[tuple[int, list[TextDelta]]] = deque()
        self.ignored: set[str] = set()


class SyncService:
    """Runs requests to their end, on a started engine that the service owns from here on; ``core`` gives them meaning.

    Several calls may be open at a time, from several threads or as iterators that take turns in one: their requests
    share the engine's batch. One waiting thread reads the engine's events, its own and the other calls'.
    """

    def __init__(self, client: EngineClient, core: Service | None = None) -> None:
        self.core = core or Service(client.info)
        self._client = client
        self._submissions = Submissions(client)
        self._grammars = Grammars(self.core.info, client.set_vocabulary)
        self._changed = threading.Condition()  # guards the fields below, the submissions and the calls
        self._calls: dict[str, _Call] = {}  # by engine id
        self._reader: _Call | None = None  # the call whose thread reads the engine's events
        self._closed = False

    def completions(
        self,
        requests: Sequence[GenerateRequest],
        *,
        progress: Callable[[int, int, int], None] | None = None,
        return_errors: bool = False,
    ) -> Iterator[tuple[int, Answer]]:
        """``(index of the request, its answer)``, each as soon as it is complete.

        Args:
            progress: Called with (requests ended, requests, tokens generated) whenever deltas arrive.
            return_errors: Give a request's error as its answer. Otherwise the first error ends all and is raised.
        """
        parts: dict[int, list[TextDelta]] = {}
        left = [request.params.n for request in requests]
        ended = tokens = 0
        for index, found in self.stream(requests, return_errors=return_errors):
            answer: Answer | None = None
            if isinstance(found, TruffulaError):
                answer = found
            else:
                parts.setdefault(index, []).extend(found)
                tokens += sum(len(delta.tokens) for delta in found)
                left[index] -= sum(delta.finish_reason is not None for delta in found)
                if not left[index]:
                    deltas = parts.pop(index)
                    errors = [error for error in map(choice_error, deltas) if error is not None]
                    answer = errors[0] if errors else collect(deltas)
            ended += answer is not None
            if progress is not None:
                progress(ended, len(requests), tokens)
            if answer is not None:
                yield index, answer

    def stream(self, requests: Sequence[GenerateRequest], *, return_errors: bool = False) -> Iterator[Found]:
        """``(index of the request, deltas)`` as they come. Closing the iterator aborts what still runs.

        The engine gets the requests as it drains, so that any number of them takes a bounded amount of memory.

        With ``return_errors`` a request that is refused gives its error once, and one that fails a delta that says so.
        Without, the first error is raised and the others are aborted; every request is checked before the first one is
        submitted.
        """
        if self._closed:
            raise ShuttingDown("This engine is closed.")
        call = _Call(requests)
        if not return_errors:
            self._check_all(call)
        try:
            while call.waiting or call.states or call.inbox:
                yield from self._fill(call)
                self._wait(call)
                while call.inbox:
                    index, deltas = call.inbox.popleft()
                    if not return_errors:
                        for error in filter(None, map(choice_error, deltas)):
                            raise error
                    yield index, deltas
        finally:
            self._leave(call)

    def stats(self) -> EngineStats:
        """The engine's latest heartbeat."""
        return self._client.stats()

    def adapters(self, command: AdapterCommand) -> list[AdapterState]:
        """Execute a command; raises ``TruffulaError``."""
        return self._client.adapters(command)

    def close(self) -> None:
        """Close the client. Iterators that are still open end with ``ShuttingDown``."""
        self._closed = True
        self._grammars.close()
        self._client.close()

    def _check_all(self, call: _Call) -> None:
        """Open every request, and keep the first ones for ``_fill``. Raises the error of the first that is refused."""
        for at, (index, request) in enumerate(call.waiting):
            state = self._open(call, request)
            if at < self._submissions.share:
                call.waiting[at] = index, state

    def _fill(self, call: _Call) -> Iterator[Found]:
        """Submit further requests of ``call`` while the engine has places for them; yields those that are refused."""
        with self._changed:
            room = self._room(call)
        opened: list[tuple[int, RequestState]] = []
        while call.waiting and room > 0:
            index, request = call.waiting.popleft()
            try:
                state = self._open(call, request)
            except TruffulaError as error:
                yield index, error
                continue
            opened.append((index, state))
            room -= len(state.engine_requests)
        if not opened:
            return
        with uninterrupted(), self._changed:
            submitted: list[EngineRequest] = []
            for index, state in opened:
                submitted += state.engine_requests
                call.states.update((one.request_id, (index, state)) for one in state.engine_requests)
                self._calls.update((one.request_id, call) for one in state.engine_requests)
            self._submissions.add(submitted)

    def _open(self, call: _Call, request: GenerateRequest | RequestState) -> RequestState:
        """The state of ``request``; what the chat template ignores is logged once per call."""
        if isinstance(request, RequestState):
            return request
        texts = self.core.text_sets.now(request.adapter)
        self.core.check(request, texts)
        prompt = self.core.prompt(request, texts)
        wanted = texts.answers.wanted(request, prompt.tail)
        grammar = None if wanted is None else self._grammars.compile_now(wanted, texts)
        state = self.core.begin(request, prompt, texts, grammar)
        if new := set(state.ignored) - call.ignored:
            call.ignored |= new
            logger.warning("the chat template does not use %s", ", ".join(sorted(new)))
        return state

    def _room(self, call: _Call) -> int:
        """How many further sequences of ``call`` the engine has places for."""
        return min(self._submissions.share - len(call.states), self._submissions.free)

    def _wait(self, call: _Call) -> None:
        """Wait until ``call`` has deltas, all its requests have ended, or the engine has a place for its next one."""
        with self._changed:
            while not self._ready(call):
                if self._reader is None:
                    self._reader = call
                    break
                self._changed.wait()
        try:
            if self._reader is call:
                self._client.wait(None)
        finally:
            with uninterrupted(), self._changed:
                if self._reader is call:
                    self._reader = None
                    self._deliver(self._client.events(0))
                    self._changed.notify_all()

    def _ready(self, call: _Call) -> bool:
        if call.inbox or not (call.states or call.waiting):
            return True
        return bool(call.waiting) and self._room(call) > 0

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        """Pass the engine's events to the calls that they belong to."""
        aborts: list[str] = []
        for event in events:
            call = self._calls.get(event.request_id)
            if call is None:
                continue
            index, state = call.states[event.request_id]
            if deltas := state.push(event):
                call.inbox.append((index, deltas))
            aborts += state.take_aborts()
            if event.finish_reason is not None:  # last: until then its caller waits for the deltas above
                self._forget(event.request_id)
        self._submissions.ended([event.request_id for event in events if event.finish_reason is not None])
        self._abort(aborts)

    def _abort(self, request_ids: Sequence[str]) -> None:
        for request_id in self._submissions.abort(request_ids):
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        call = self._calls.pop(request_id)
        del call.states[request_id]

    def _leave(self, call: _Call) -> None:
        """Abort what still runs, and wait for its end, so that nothing of it stays in the engine."""
        call.waiting.clear()
        with uninterrupted(), self._changed:
            self._abort(list(call.states))
        while call.states:
            call.inbox.clear()
            self._wait(call)
