"""``TextStream``: one request's deltas from the engine to their one reader, on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from truffula.service.choices import choice_error
from truffula.service.core import RequestState
from truffula.types import TextDelta


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
        self.on_arrival: Callable[[list[TextDelta]], None] | None = None  # called with deltas before they are read

    def feed(self, deltas: list[TextDelta]) -> None:
        """Called on the loop with what the request's events released."""
        self._ready += deltas
        if deltas and self.on_arrival is not None:
            self.on_arrival(deltas)
        waiter = self._waiter
        if waiter is not None and not waiter.done() and (self._ready or self.state.done):
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
