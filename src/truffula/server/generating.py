"""From ``GenerateRequest``s to an answer, the same for every dialect: open, watch the client, fold or stream, count.

A dialect brings requests and a ``Writer``; this module decides when an error is a status and when it is an event.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Protocol, TypeVar

from starlette.requests import Request

from truffula.errors import TruffulaError
from truffula.metrics import Observer, RequestRecord
from truffula.server.body import note_left_out
from truffula.server.errors import Aborted
from truffula.server.sse import KEEP_ALIVE, ClientConnection, EventStream, connection_of, end_tasks, unless_gone
from truffula.server.state import ServerState, record_of, state_of
from truffula.service.aio import TextStream
from truffula.service.choices import choice_error, collect
from truffula.service.prompt_maker import INLINE_CHARS
from truffula.service.prompts import check_fits
from truffula.types import ChoiceTotals, Completion, GenerateRequest, TextDelta

T = TypeVar("T")
FOLD_DELTAS = 8
"""Deltas of an answer that is not streamed, which are looked at together."""
# One wake of the event loop: new deltas of one prompt or more, with the prompt's index.
Batch = list[tuple[int, list[TextDelta]]]


class Writer(Protocol):
    """One dialect's stream, as bytes of whole frames. ``begin`` is called once, with the first deltas at hand."""

    def begin(self) -> bytes: ...
    def delta(self, prompt: int, delta: TextDelta) -> bytes: ...
    def fail(self, error: TruffulaError) -> bytes: ...
    def end(self) -> bytes: ...


class _Watch:
    """Fills the request's record from its deltas as they arrive, and times the gaps between those of a choice.

    When they are read depends on how fast the client is.
    """

    def __init__(self, state: ServerState, record: RequestRecord) -> None:
        self._state = state
        self._record = record
        self._observer: Observer | None = None  # of the adapter, once it answers
        self._last: dict[tuple[int, int], tuple[float, int]] = {}  # of each choice, when it came and the tokens so far

    def arrived(self, prompt: int, generations: Iterable[str], deltas: Sequence[TextDelta]) -> None:
        now, record = time.monotonic(), self._record
        record.generation = record.generation or ", ".join(generations)
        for delta in deltas:
            key, count = (prompt, delta.choice), len(delta.tokens)
            before, seen = self._last.get(key, (None, 0))
            if count:
                if self._observer is None:
                    self._observer = self._state.metrics.observer(record.counted_as, answered=True)
                if before is not None:
                    self._observer.inter_token.observe((now - before) / count)
            self._last[key] = now, seen + count
            record.completion_tokens += count
            if delta.totals is not None:
                record.completion_tokens += delta.totals.completion_tokens - seen - count
                self._ended(delta.totals)
            if delta.finish_reason is not None:
                record.finish = delta.finish_reason
                self._state.succeeded |= delta.finish_reason in ("stop", "length")

    def _ended(self, totals: ChoiceTotals) -> None:
        record = self._record
        if totals.times is not None:
            record.queue_s = max(record.queue_s or 0.0, totals.times.queue_s)
            record.load_s = max(record.load_s, totals.times.load_s)
            ttft = totals.times.ttft_s
            record.ttft_s = ttft if record.ttft_s is None else min(record.ttft_s, ttft)


async def run(
    request: Request,
    requests: Sequence[GenerateRequest],
    wake_after: int = 1,
    sink: Callable[[int, list[TextDelta]], bool] | None = None,
) -> AsyncGenerator[Batch, None]:
    """Submits ``requests`` together and yields their deltas, of a choice that has not ended at least ``wake_after`` at
    a time. Those for which ``sink`` is true when they arrive are not yielded. Closing it aborts whatever still runs.
    """
    state, record = state_of(request), record_of(request)
    watch = _Watch(state, record)
    streams: list[TextStream] = []
    started = time.monotonic()
    try:
        streams = await state.service.open_all(requests)
        if (shadow := getattr(request.state, "shadow", None)) is not None:
            state.shadows.begin(shadow, requests)
        for i, one in enumerate(streams):
            one.on_arrival, one.wake_after = partial(watch.arrived, i, one.state.generations), wake_after
            one.sink = None if sink is None else partial(sink, i)
            record.prompt_tokens += one.state.prompt_tokens
        note_left_out(request, dict.fromkeys(name for one in streams for name in one.state.ignored))
        record.validation_s = time.monotonic() - started
        if len(streams) == 1:
            async for found in streams[0]:
                yield [(0, found)]
        else:
            async with aclosing(_merged(streams)) as batches:
                async for batch in batches:
                    yield batch
    finally:
        for stream in streams:
            await stream.aclose()


async def count_prompt(request: Request, made: GenerateRequest) -> int:
    """The number of tokens of the prompt of ``made``. Raises as its generation would."""
    service = state_of(request).service
    texts = await service.texts.of(made.adapter, made.salt)
    service.core.check(made, texts)
    prompt = await service.texts.prompt(made, texts)
    check_fits(len(prompt.ids), made.params, service.info)
    note_left_out(request, prompt.ignored)
    return len(prompt.ids)


async def _merged(streams: Sequence[TextStream]) -> AsyncGenerator[Batch, None]:
    """The deltas of many streams as they come. The first stream's exception ends all."""
    queue: asyncio.Queue[tuple[int, list[TextDelta]]] = asyncio.Queue()

    async def forward(index: int, stream: TextStream) -> None:
        async for found in stream:
            queue.put_nowait((index, found))

    tasks = [asyncio.ensure_future(forward(i, stream)) for i, stream in enumerate(streams)]
    for i, task in enumerate(tasks):
        task.add_done_callback(lambda _, i=i: queue.put_nowait((i, [])))  # type: ignore[misc]
    try:
        left = len(tasks)
        while left:
            found = [await queue.get()]
            while not queue.empty():
                found.append(queue.get_nowait())
            ended = [i for i, deltas in found if not deltas]
            if batch := [(i, deltas) for i, deltas in found if deltas]:
                yield batch
            for i in ended:
                tasks[i].result()
            left -= len(ended)
    finally:
        await end_tasks(*tasks)


def raise_first(deltas: Sequence[TextDelta]) -> None:
    """Raises the error of the first delta that has one."""
    for delta in deltas:
        if (error := error_of(delta)) is not None:
            raise error


def error_of(delta: TextDelta) -> TruffulaError | None:
    """Why a choice ended without an answer; None while it runs, or when it ended well."""
    if delta.finish_reason is None:
        return None
    if delta.finish_reason == "abort" and delta.error is None:
        return Aborted("The server ended the request before its last token.")
    return choice_error(delta) if delta.error is None else TruffulaError.from_info(delta.error)


async def whole(request: Request, requests: Sequence[GenerateRequest], make: Callable[[list[Completion]], T]) -> T:
    """What ``make`` makes of one completion per request, each the fold of the deltas that a stream would show.

    A client that leaves aborts it. ``make`` runs in a thread when the answer is long.
    """
    return await unless_gone(connection_of(request.scope), _fold(request, requests, make))


async def _fold(request: Request, requests: Sequence[GenerateRequest], make: Callable[[list[Completion]], T]) -> T:
    parts: list[list[TextDelta]] = [[] for _ in requests]
    size = 0
    async with aclosing(run(request, requests, FOLD_DELTAS)) as batches:
        async for batch in batches:
            for prompt, deltas in batch:
                for delta in deltas:
                    if (error := error_of(delta)) is not None:
                        raise error
                    size += entries(delta)
                parts[prompt] += deltas
    batch = deltas = delta = None  # type: ignore[assignment]  # the thread frees what they hold

    def fold() -> T:
        try:
            return make([collect(deltas) for deltas in parts])
        finally:
            parts.clear()  # here: to free a million tokens takes 50 ms, which the event loop does not have

    return await state_of(request).service.texts.in_thread(size, fold)


def entries(delta: TextDelta) -> int:
    """How many tokens and alternatives ``delta`` has, those of the prompt included."""
    found = len(delta.tokens) + (0 if delta.prompt is None else delta.prompt.entries)
    for piece in delta.tokens:
        found += len(piece.top)
    return found


async def stream(
    request: Request,
    requests: Sequence[GenerateRequest],
    writer: Writer,
    headers: Mapping[str, str] | None = None,
    keep_alive: bytes = KEEP_ALIVE,
) -> EventStream:
    """The streamed answer. What fails before the first event is raised, so that it gets its real status."""
    frames = frames_of(request, requests, writer, connection_of(request.scope))
    return await event_stream(request, frames, headers, keep_alive)


async def event_stream(
    request: Request,
    frames: AsyncGenerator[bytes, None],
    headers: Mapping[str, str] | None = None,
    keep_alive: bytes = KEEP_ALIVE,
) -> EventStream:
    """The response that sends ``frames``; what the first of them raises is raised here."""
    try:
        first = await unless_gone(connection_of(request.scope), anext(frames))
    except BaseException:
        await frames.aclose()
        raise
    return EventStream(first, frames, headers, state_of(request).config.keep_alive_s, keep_alive)


async def frames_of(
    request: Request, requests: Sequence[GenerateRequest], writer: Writer, connection: ClientConnection | None = None
) -> AsyncGenerator[bytes, None]:
    """The frames of ``writer``. An error before the first is raised, a later one is a frame.

    With a ``connection``, where they are written anyway, usual ones go there as soon as their deltas arrive: to resume
    this generator and those around it for each token costs as much as the token's text.
    """
    begun = False
    failure: Exception | None = None
    texts = state_of(request).service.texts

    def sink(prompt: int, deltas: list[TextDelta]) -> bool:
        nonlocal failure
        usual = begun and all(delta.finish_reason is None and entries(delta) <= INLINE_CHARS for delta in deltas)
        if connection is None or not usual or not connection.writable:
            return False
        try:
            chunk = b"".join([writer.delta(prompt, delta) for delta in deltas])
        except Exception as error:  # noqa: BLE001  the caller serves other streams too: this one raises it below
            failure = error
            return False
        if chunk:
            connection.write(chunk)
        return True

    one = connection is not None and len(requests) == 1  # of many, deltas may wait in between
    async with aclosing(run(request, requests, sink=sink if one else None)) as batches:
        try:
            async for batch in batches:
                if failure is not None:  # the writer has seen some of these deltas
                    raise failure
                out: list[bytes] = []
                if not begun:
                    for _, deltas in batch:
                        raise_first(deltas)
                    out, begun = [writer.begin()], True
                for prompt, deltas in batch:
                    for delta in deltas:
                        if (error := error_of(delta)) is not None:
                            record_of(request).error_code = error.code
                            yield b"".join(out) + writer.fail(error)
                            return
                        if (size := entries(delta)) <= INLINE_CHARS:
                            out.append(writer.delta(prompt, delta))
                        else:
                            out.append(await texts.in_thread(size, partial(writer.delta, prompt, delta)))
                if chunk := b"".join(out):
                    yield chunk
        except TruffulaError as error:
            if not begun:
                raise
            record_of(request).error_code = error.code
            yield writer.fail(error)
            return
    yield writer.end()
