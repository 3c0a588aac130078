"""``AsyncService``: the service under an event loop. Servers use the engine through it only.

All events of a step come to the loop in one call. On the loop they become deltas and wake the streams they belong to.
The loop reads them from the engine's process; for an engine that steps only inside ``events``, a dispatcher thread
waits there. Nothing here polls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from truffula.engine.client import EngineClient
from truffula.errors import EngineDied, ShuttingDown, TruffulaError
from truffula.service.choices import choice_error
from truffula.service.core import RequestState, Service
from truffula.service.grammars import Grammars
from truffula.service.prompt_maker import PromptMaker
from truffula.service.submissions import Submissions
from truffula.service.workers import TextWorkers
from truffula.types import (
    AdapterCommand,
    AdapterState,
    EngineAction,
    EngineInfo,
    EngineRestarts,
    EngineStats,
    GenerateRequest,
    TextDelta,
    TokenEvent,
)

T = TypeVar("T")
logger = logging.getLogger(__name__)


class TextStream:
    """One running request: ``async for deltas in stream``; each item is a non-empty list, choices may interleave.

    An error that strikes before the first delta is raised from the first ``__anext__`` (so that a server can still
    answer with a status); a later one is a terminal delta with ``error``. ``aclose`` (or leaving ``async with``) aborts
    what still runs, within a step. One consumer.
    """

    def __init__(self, state: RequestState, abandon: Callable[[TextStream], None]) -> None:
        self.state = state
        self._abandon = abandon
        self._ready: list[TextDelta] = []
        self._waiter: asyncio.Future[None] | None = None
        self._begun = False
        self._closed = False
        self.wake_after = 1  # deltas: a consumer that only wants the whole answer need not run for each token
        # Called with deltas while the consumer waits for them; True: they are consumed, and it need not run.
        self.sink: Callable[[list[TextDelta]], bool] | None = None
        self.on_arrival: Callable[[list[TextDelta]], None] | None = None  # called with deltas before they are read

    def feed(self, deltas: list[TextDelta]) -> None:
        """Called on the loop with what the request's events released."""
        self._ready += deltas
        if deltas and self.on_arrival is not None:
            self.on_arrival(deltas)
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if self.sink is not None and not self.state.done and len(self._ready) == len(deltas) and self.sink(deltas):
            self._ready = []
            return
        if len(self._ready) >= self.wake_after or self.state.done or any(one.finish_reason for one in deltas):
            waiter.set_result(None)

    def __aiter__(self) -> TextStream:
        return self

    async def __anext__(self) -> list[TextDelta]:
        while not self._ready:
            if self._closed or self.state.done:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            except BaseException:
                await self.aclose()
                raise
            finally:
                self._waiter = None
        deltas, self._ready = self._ready, []
        if not self._begun:
            for delta in deltas:
                error = choice_error(delta)
                if error is not None:
                    await self.aclose()
                    raise error
            self._begun = True
        return deltas

    async def aclose(self) -> None:
        """Abort what still runs. Idempotent; what was not read is lost."""
        if self._closed:
            return
        self._closed = True
        self._ready = []
        self._abandon(self)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __aenter__(self) -> TextStream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


class AsyncService:
    """A started engine, which the service owns from here on, and ``core``, the meaning of requests.

    Made anywhere; ``await start()`` on the loop that will use it, ``await close()`` at the end.
    """

    def __init__(
        self, client: EngineClient, core: Service | None = None, *, workers: TextWorkers | None = None
    ) -> None:
        self.core = core or Service(client.info)
        self.texts = PromptMaker(self.core, workers)
        self._grammars = Grammars(self.core.info, client.set_vocabulary)
        self._client = client
        self._submissions = Submissions(client)
        self._active: set[TextStream] = set()
        self._by_id: dict[str, TextStream] = {}  # those of ``_active``, by the ids of their engine requests
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lookup_threads = ThreadPoolExecutor(4, thread_name_prefix="truffula-lookup")
        self._commands = ThreadPoolExecutor(8, thread_name_prefix="truffula-adapters")
        # Not those of adapters: a load may wait for what only ``resume`` ends.
        self._controls = ThreadPoolExecutor(8, thread_name_prefix="truffula-control")
        self._draining = False
        self._broken: EngineDied | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def info(self) -> EngineInfo:
        """What was loaded, and how."""
        return self.core.info

    async def start(self) -> None:
        """Take the running loop, and listen to the engine's events."""
        if self._loop is not None:
            return
        self._loop = asyncio.get_running_loop()
        if self._client.listen(self._take, self._loop):
            return  # a thread between would cost each token a switch more
        self._thread = threading.Thread(target=self._dispatch, name="truffula-events", daemon=True)
        self._thread.start()

    async def open(self, request: GenerateRequest) -> TextStream:
        """The stream of one request; raises as ``open_all``."""
        (stream,) = await self.open_all([request])
        return stream

    async def open_all(self, requests: Sequence[GenerateRequest]) -> list[TextStream]:
        """Template, tokenise, compile and check each request, then submit all together: if one is refused, none is.

        Raises ``InvalidRequest`` and its kinds, ``NoTokenizer``, ``Overloaded``, ``ShuttingDown``, ``EngineDied``. Long
        texts are tokenised in a thread.
        """
        self._require_running()
        self._submissions.require_place()
        states: list[RequestState] = []
        for one in requests:
            if states:
                await asyncio.sleep(0)  # other requests have their turn between the prompts of a large one
            texts = await self.texts.of(one.adapter, one.salt)
            self.core.check(one, texts)
            prompt = await self.texts.prompt(one, texts)
            wanted = texts.answers.wanted(one, prompt.tail)
            grammar = None if wanted is None else await self._grammars.compile(wanted, one.salt, texts)
            states.append(self.core.begin(one, prompt, texts, grammar))
        self.core.check_scores_of_call(states)
        self._require_running()
        self._submissions.require_place()
        streams = [TextStream(state, self._abandon) for state in states]
        self._active.update(streams)
        self._idle.clear()
        for stream in streams:
            self._by_id |= dict.fromkeys(stream.state.open_ids, stream)
        self._submissions.add([one for state in states for one in state.engine_requests])
        return streams

    async def look_up(self, work: Callable[..., T], *args: Any) -> T:
        """The result of ``work``, which asks the file system, from a thread that does nothing else."""
        return await asyncio.get_running_loop().run_in_executor(self._lookup_threads, work, *args)

    async def adapters(self, command: AdapterCommand, timeout: float = 300.0) -> list[AdapterState]:
        """Carry ``command`` out in the engine. A load returns when the adapter is usable, or raises why it is not."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._commands, self._client.adapters, command, timeout)

    async def control(self, action: EngineAction) -> None:
        """Carry ``action`` out in the engine. Raises why it failed."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._controls, self._client.control, action)

    def known_stats(self) -> EngineStats | None:
        """The latest heartbeat of an engine that lives and answers; None while there is none."""
        return self._client.stats() if self._client.alive() else None

    def healthy(self) -> bool:
        """Started, not draining, and the engine's heartbeat fresh."""
        return self._loop is not None and not self._draining and self._broken is None and self._client.alive()

    def restarts(self) -> EngineRestarts:
        """How often a dead engine was started again, and why it ended last."""
        return self._client.restarts()

    def fatal_error(self) -> TruffulaError | None:
        """The error after which no request can be answered any more; None while the engine runs or restarts."""
        return self._client.fatal_error() or self._broken

    @property
    def active(self) -> int:
        """Requests that are running or waiting now."""
        return len(self._active)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests (``ShuttingDown``), wait for the running ones; True when all ended in time.

        What is left then ends with ``ShuttingDown``.
        """
        self._draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        ended = not self._active
        self.end_all(ShuttingDown("The server ended before the request did."))
        return ended

    async def close(self) -> None:
        """End what runs, close the client, and wait for the dispatcher. Idempotent."""
        self._draining = True
        self.end_all(ShuttingDown("The server ended before the request did."))
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._client.close)
        self._client.listen(None)
        if self._thread is not None:
            await loop.run_in_executor(None, self._thread.join)
        await loop.run_in_executor(None, self.texts.close)
        await loop.run_in_executor(None, self._grammars.close)
        self._lookup_threads.shutdown(wait=False, cancel_futures=True)
        self._commands.shutdown(wait=False, cancel_futures=True)
        self._controls.shutdown(wait=False, cancel_futures=True)

    def _require_running(self) -> None:
        if self._draining:
            raise ShuttingDown("The server is shutting down and accepts no new requests.")
        if self._broken is not None:
            raise EngineDied(self._broken.message)
        if self._loop is None:
            raise RuntimeError("AsyncService.start() comes first")

    def _take(self) -> None:
        """On the loop: the events that wait."""
        if self._broken is not None:
            return
        try:
            events = self._client.events(0)
        except Exception as error:
            logger.exception("the engine's events can't be read")
            self._break(error)
            return
        self._pass_on(events)

    def _dispatch(self) -> None:
        """The dispatcher thread: events of the engine, to the loop, until the client is closed or the engine fails."""
        assert self._loop is not None
        try:
            while events := self._client.events(None):
                self._loop.call_soon_threadsafe(self._pass_on, events)
            if (error := self._client.fatal_error()) is not None:  # else the client is closed
                self._loop.call_soon_threadsafe(self._break, error)
        except Exception as error:
            logger.exception("the dispatcher ended")
            self._loop.call_soon_threadsafe(self._break, error)

    def _pass_on(self, events: list[TokenEvent]) -> None:
        """On the loop: events become deltas of their streams, and sequences that wait get the places of those ended."""
        self._submissions.ended([event.request_id for event in events if event.finish_reason is not None])
        aborts: list[str] = []
        for event in events:
            stream = self._by_id.get(event.request_id)
            if stream is None:
                continue  # ended for its client already: a stop string, an abort
            deltas = stream.state.push(event)
            aborts += stream.state.take_aborts()
            if stream.state.done:
                self._forget(stream)
            if deltas or stream.state.done:
                stream.feed(deltas)
        self._submissions.abort(aborts)

    def _break(self, error: Exception) -> None:
        self._broken = EngineDied(f"The engine's events can't be read any more: {error}")
        self.end_all(self._broken)

    def end_all(self, error: TruffulaError) -> None:
        """End every open request for its client, and in the engine."""
        for stream in list(self._active):
            open_ids = sorted(stream.state.open_ids)
            deltas = stream.state.fail(error.info())
            self._forget(stream)
            stream.feed(deltas)
            if self._broken is None:
                self._submissions.abort(open_ids)

    def _abandon(self, stream: TextStream) -> None:
        """Abort what still runs of ``stream``, whose client has left."""
        if stream in self._active:
            self._forget(stream)
            self._submissions.abort(sorted(stream.state.open_ids))

    def _forget(self, stream: TextStream) -> None:
        for one in stream.state.engine_requests:
            self._by_id.pop(one.request_id, None)
        self._active.discard(stream)
        if not self._active:
            self._idle.set()
