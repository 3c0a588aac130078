"""``KeptResponses``: responses beyond their request, the stored ones and those generated in the background."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request

from truffula.errors import InvalidRequest, Overloaded, TruffulaError, internal_error
from truffula.metrics import RequestRecord
from truffula.server.errors import NoPreviousResponse
from truffula.server.generating import frames_of
from truffula.server.response_store import TOUCH_S, ResponseStore, StoredResponse, StoreFailed
from truffula.server.responses_events import ResponseWriter
from truffula.server.state import record_of, state_of
from truffula.types import GenerateRequest

log = logging.getLogger(__name__)
_ITEM_ID = re.compile(r"[a-z]+_(?P<response>[0-9a-f]{32})_(?P<input>in)?(?P<index>\d{1,6})")
MAX_HISTORY_BYTES = 2**24
"""Of one conversation, the stored items before a request's own."""


def tenant_of(request: Request) -> str:
    """To whom the request's responses belong: the digest of its API key, "" without keys."""
    return str(getattr(request.state, "tenant", None) or "")


class Draft:
    """A response that is being written, and the request that asked for it."""

    def __init__(self, request: Request, writer: ResponseWriter, row: StoredResponse) -> None:
        self.request, self.writer, self.row = request, writer, row

    def finished(self, events: bytes = b"") -> StoredResponse:
        """The row as it is stored, once the writer has ended."""
        found = self.writer.response()
        output = found.pop("output")
        body, items = msgspec.json.encode(found), msgspec.json.encode(output)
        return msgspec.structs.replace(self.row, body=body, output=items, events=events, finished=self.writer.ended)


class KeptResponses:
    """The owner of the store and of the tasks of background responses. ``store`` None: nothing is kept."""

    def __init__(self, store: ResponseStore | None, max_running: int) -> None:
        self.store = store
        self._max_running = max_running
        self.running: dict[str, BackgroundRun] = {}
        self._touching: asyncio.Task[None] | None = None

    def needed(self, param: str) -> ResponseStore:
        """The store. Raises ``InvalidRequest`` where responses are not kept."""
        if self.store is None:
            raise InvalidRequest(
                f"{param} needs stored responses, and this server keeps none (--response-store off); send the whole "
                "conversation in input.",
                param=param,
            )
        return self.store

    async def save(self, draft: Draft) -> None:
        """Stores the response, which otherwise says that it is not. Its client gets it in any case: a store that fails
        is the operator's affair, and logged.
        """
        assert self.store is not None
        try:
            kept = await self.store.put(draft.finished())
        except StoreFailed as error:
            log.error("response %s was not stored: %s", draft.row.id, error.message)
            kept = False
        if not kept:
            draft.writer.not_stored()

    async def items(self, request: Request, wanted: Sequence[str]) -> bytes:
        """The items of stored responses (``response:`` and an id) and of stored items (``item:`` and an id): a JSON
        object of lists.
        """
        parts = []
        for one in wanted:
            kind, _, wanted_id = one.partition(":")
            read = self._history if kind == "response" else self._item
            found = await read(request, wanted_id)
            parts.append(msgspec.json.encode(one) + b":" + found)
        return b"{" + b",".join(parts) + b"}"

    async def _item(self, request: Request, item_id: str) -> bytes:
        """A list with the item, which is of a response's output or input."""
        named, param = _ITEM_ID.fullmatch(item_id), "input"
        row = None
        if named is not None:
            row = await self.needed("item_reference").get(tenant_of(request), f"resp_{named['response']}")
        items = [] if row is None or named is None else msgspec.json.decode(row.input if named["input"] else row.output)
        at = len(items) if named is None else int(named["index"])
        if at >= len(items):
            raise NoPreviousResponse(f"Item with id '{item_id[:80]}' not found; send the item itself.", param=param)
        return msgspec.json.encode([items[at]])

    async def _history(self, request: Request, response_id: str) -> bytes:
        """The items of the conversation that ends with ``response_id``, as a JSON array."""
        param = "previous_response_id"
        run = self.running.get(response_id)
        if run is not None and run.draft.row.tenant == tenant_of(request):
            raise InvalidRequest(f"{param} {response_id[:80]!r} is still being generated.", param=param)
        found = await self.needed(param).history(tenant_of(request), response_id)
        if not found or isinstance(found[0], str):
            missing = str(found[0]) if found else response_id
            text = f"Previous response with id '{missing[:80]}' not found"
            raise NoPreviousResponse(f"{text}; send the whole conversation in input.", param=param)
        parts = [part[1:-1] for row in found if isinstance(row, StoredResponse) for part in (row.input, row.output)]
        if sum(map(len, parts)) > MAX_HISTORY_BYTES:
            raise InvalidRequest(
                f"The conversation of {param} has more than {MAX_HISTORY_BYTES} bytes; send a shorter one in input.",
                param=param,
            )
        return b"[" + b",".join(part for part in parts if part.strip()) + b"]"

    async def start(self, draft: Draft, requests: Sequence[GenerateRequest], *, keep_events: bool) -> BackgroundRun:
        """Generate ``draft`` in a task of its own. Raises ``Overloaded``, ``StoreFailed``."""
        if len(self.running) >= self._max_running:
            raise Overloaded(
                f"{len(self.running)} background responses are running, which is this server's limit "
                "(--max-open-requests).",
                retry_after_s=1,
            )
        store = self.needed("background")
        await store.put(draft.finished())
        run = BackgroundRun(draft, requests, keep_events)
        self.running[draft.row.id] = run
        run.task = asyncio.ensure_future(self._finish(run))
        if self._touching is None or self._touching.done():
            self._touching = asyncio.ensure_future(self._touch())
        return run

    async def _finish(self, run: BackgroundRun) -> None:
        try:
            await run.generate()
        finally:
            try:
                if not run.deleted and self.store is not None:
                    await self.store.finish(run.draft.finished(b"".join(run.events) if run.keep_events else b""))
            except StoreFailed as error:
                log.error("response %s was not stored: %s", run.draft.row.id, error.message)
            finally:
                del self.running[run.draft.row.id]

    async def _touch(self) -> None:
        """Tell other servers on the same file that these responses are still written."""
        while self.running:
            await asyncio.sleep(TOUCH_S)
            with contextlib.suppress(StoreFailed):  # ``_finish`` reports it
                await self.needed("background").touch(list(self.running))

    async def close(self) -> None:
        """End what runs, and close the store."""
        for run in list(self.running.values()):
            await run.cancel()
        if self._touching is not None:
            self._touching.cancel()
        if self.store is not None:
            await asyncio.get_running_loop().run_in_executor(None, self.store.close)


class BackgroundRun:
    """One response that is generated without its client. ``events`` are its frames so far."""

    def __init__(self, draft: Draft, requests: Sequence[GenerateRequest], keep_events: bool) -> None:
        self.draft, self.keep_events = draft, keep_events
        self.events: list[bytes] = []
        self.deleted = False
        self._complete = False
        self.task: asyncio.Task[None] | None = None
        self._requests = requests
        self._news = asyncio.Event()

    async def generate(self) -> None:
        """Write the response to its end, whatever that is."""
        request, writer = self._own_request(), self.draft.writer
        started = time.monotonic()
        try:
            async for chunk in frames_of(request, self._requests, writer):
                self._add(chunk)
        except asyncio.CancelledError:
            writer.cancel()
        except TruffulaError as error:
            self._fail(request, error)
        except Exception as error:
            log.exception("background response %s failed", self.draft.row.id)
            self._fail(request, internal_error(error))
        finally:
            record = record_of(request)
            record.total_s = time.monotonic() - started
            state_of(request).metrics.request_ended(record)
            self._complete = True
            self._news.set()

    def _fail(self, request: Request, error: TruffulaError) -> None:
        record_of(request).error_code = error.code
        self._add(self.draft.writer.fail(error))

    def _own_request(self) -> Request:
        """The client's request with a record of its own: the client's ends when it has its answer."""
        scope = self.draft.request.scope
        given = record_of(self.draft.request)
        record = RequestRecord(request_id=given.request_id, method=given.method, path=given.path)
        record.route, record.generates, record.status = "/v1/responses", True, 200
        record.adapter, record.own_right, record.max_tokens = given.adapter, given.own_right, given.max_tokens
        return Request({**scope, "state": {**scope["state"], "record": record}})

    def _add(self, chunk: bytes) -> None:
        self.events += split_frames(chunk)
        self._news.set()

    async def follow(self, after: int) -> AsyncGenerator[bytes, None]:
        """The frames after number ``after``, as they come."""
        sent = after + 1
        while True:
            self._news.clear()
            complete = self._complete
            if chunk := b"".join(self.events[sent:]):
                sent = len(self.events)
                yield chunk
            if complete:
                yield b""  # a stream has a first chunk
                return
            await self._news.wait()

    async def cancel(self) -> None:
        """Returns when the response has ended, and is stored."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)


def split_frames(joined: bytes) -> list[bytes]:
    """The events in ``joined``; the number of each is its place in the stream."""
    return [one + b"\n\n" for one in joined.split(b"\n\n") if one]


def response_of(row: StoredResponse) -> dict[str, Any]:
    """The response object of a stored row."""
    found: dict[str, Any] = msgspec.json.decode(row.body)
    if found["status"] in ("queued", "in_progress") and row.finished:
        found["status"] = "failed"
        found["error"] = {"code": "server_error", "message": "The server ended before the response was complete."}
    return {**found, "output": msgspec.Raw(row.output)}
