"""OpenAI's Responses API: ``/v1/responses`` and the routes of a stored response."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any, NoReturn

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from truffula.errors import InvalidRequest
from truffula.server.body import note_ignored, raw_body
from truffula.server.errors import NoResponse
from truffula.server.generating import count_prompt, event_stream, frames_of
from truffula.server.prepare import read_requests
from truffula.server.replies import json_reply
from truffula.server.response_store import StoredResponse
from truffula.server.responses_bodies import ResponsesBody
from truffula.server.responses_events import ResponseWriter
from truffula.server.responses_kept import (
    BackgroundRun,
    Draft,
    KeptResponses,
    response_of,
    split_frames,
    tenant_of,
)
from truffula.server.sse import connection_of, unless_gone
from truffula.server.state import record_of, state_of

MAX_PAGE = 100


def kept_of(request: Request) -> KeptResponses:
    found: KeptResponses = request.app.state.responses
    return found


class _Given(msgspec.Struct):
    """The request's input as it was sent."""

    input: msgspec.Raw


async def create(request: Request) -> Response:
    """Answers an input with items: messages, reasoning, calls of tools.

    A stored response can be retrieved, and continued with `previous_response_id`.
    """
    kept = kept_of(request)
    read = await read_requests(request, "responses", kept.items)
    body = read.body
    assert isinstance(body, ResponsesBody)
    stored = body.store is not False and kept.store is not None
    if body.store and not stored:
        note_ignored(request, ["store"])
    background = bool(body.background)
    top = _top(request, body, stored=stored)
    streamed = bool(body.stream)
    writer = ResponseWriter(top, body.tool_set, logprobs=body.wants_logprobs, silent=not streamed)
    row = StoredResponse(
        id=top["id"], tenant=tenant_of(request), created=time.time(), previous=body.previous_response_id,
        input=_items_of(raw_body(request)) if stored else b"[]", body=b"{}",
    )  # fmt: skip
    draft = Draft(request, writer, row)
    if background:
        kept.needed("background")
        writer.status = "queued"
        run = await kept.start(draft, read.requests, keep_events=streamed)
        record_of(request).generates = False  # the run has a record of its own
        return await event_stream(request, run.follow(-1)) if streamed else json_reply({**top, **writer.response()})
    frames = frames_of(request, read.requests, writer)
    if streamed:
        return await event_stream(request, _saving(kept, draft, frames) if stored else frames)
    await unless_gone(connection_of(request.scope), _exhaust(frames))
    if writer.error is not None:
        raise writer.error
    if stored:
        await kept.save(draft)
    return json_reply(writer.response())


async def count_tokens(request: Request) -> Response:
    """The number of tokens of the prompt that `/v1/responses` would make of the same body."""
    read = await read_requests(request, "responses", kept_of(request).items)
    record_of(request).generates = False
    count = await count_prompt(request, read.requests[0])
    return json_reply({"object": "response.input_tokens", "input_tokens": count})


def _top(request: Request, body: ResponsesBody, *, stored: bool) -> dict[str, Any]:
    """What the response object has from the start."""
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "model": body.model or state_of(request).model_id,
        **body.echo(),
        "store": stored,
    }


def _items_of(raw: bytes) -> bytes:
    """``input`` of a body, as a JSON array of items."""
    given = bytes(msgspec.json.decode(raw, type=_Given).input)
    return b'[{"type":"message","role":"user","content":' + given + b"}]" if given.startswith(b'"') else given


async def _saving(
    kept: KeptResponses, draft: Draft, frames: AsyncGenerator[bytes, None]
) -> AsyncGenerator[bytes, None]:
    """``frames``; the response is stored before the last one, as its client may continue it immediately."""
    saved = False
    try:
        async for chunk in frames:
            if draft.writer.ended and not saved:
                saved = True
                await kept.save(draft)
            yield chunk
    finally:
        await frames.aclose()


async def _exhaust(frames: AsyncGenerator[bytes, None]) -> None:
    try:
        async for _ in frames:
            pass
    finally:
        await frames.aclose()


async def retrieve(request: Request) -> Response:
    """A stored response. With `stream=true`, the events of a background response that was streamed."""
    kept, response_id = kept_of(request), str(request.path_params["response_id"])
    run, row = _run_of(request), None
    if run is None:
        row = await _row(request)
    _note_query(request, "include", "include_obfuscation")
    if not _flag(request, "stream"):
        return json_reply(run.draft.writer.response() if run is not None else await _whole(request, row, response_id))
    after = _number(request, "starting_after", -1)
    if run is not None and run.keep_events:
        return await event_stream(request, run.follow(after))
    if row is None or not row.events:
        raise InvalidRequest(
            "Only a response that was created with background: true and stream: true can be streamed again.",
            param="stream",
        )
    assert kept is not None
    return await event_stream(request, _replay(split_frames(row.events)[after + 1 :]))


async def _replay(frames: list[bytes]) -> AsyncGenerator[bytes, None]:
    yield b"".join(frames)


async def cancel(request: Request) -> Response:
    """Ends a background response. One that has ended stays as it is."""
    run = _run_of(request)
    if run is not None:
        await run.cancel()
        return json_reply(run.draft.writer.response())
    response = await _whole(request, await _row(request), request.path_params["response_id"])
    if not response["background"]:
        raise InvalidRequest("Only responses that were created with background: true can be cancelled.")
    if response["status"] in ("queued", "in_progress"):
        raise InvalidRequest("The response is being generated by another server; cancel it there.")
    return json_reply(response)


async def delete(request: Request) -> Response:
    """Removes a stored response; one that is being generated in the background is ended."""
    response_id = str(request.path_params["response_id"])
    run = _run_of(request)
    if run is not None:
        run.deleted = True
        await run.cancel()
    store = kept_of(request).store
    if store is None or not await store.delete(tenant_of(request), response_id):
        _missing(response_id)
    return json_reply({"id": response_id, "object": "response", "deleted": True})


async def input_items(request: Request) -> Response:
    """The input items of a stored response, newest first unless `order=asc`."""
    response_id = str(request.path_params["response_id"])
    row = _found(await _row(request), response_id)
    limit, order = _number(request, "limit", 20), request.query_params.get("order", "desc")
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequest(f"limit is {limit}; it must be from 1 to {MAX_PAGE}.", param="limit")
    if order not in ("asc", "desc"):
        raise InvalidRequest(f"order is {order[:40]!r}; use asc or desc.", param="order")
    _note_query(request, "include")
    items = await state_of(request).service.texts.in_thread(len(row.input), lambda: _all_shown(row))
    if order == "desc":
        items.reverse()
    start, after = 0, request.query_params.get("after")
    if after is not None:
        start = 1 + next((i for i, item in enumerate(items) if item["id"] == after), -1)
        if not start:
            raise InvalidRequest(f"after is {after[:80]!r}, which is no item of this response.", param="after")
    page = items[start : start + limit]
    return json_reply(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": start + limit < len(items),
        }
    )


def _all_shown(row: StoredResponse) -> list[dict[str, Any]]:
    return [_shown(item, row.id, i) for i, item in enumerate(msgspec.json.decode(row.input))]


def _shown(item: dict[str, Any], response_id: str, index: int) -> dict[str, Any]:
    """An input item in its full form, with an id."""
    kind = item.get("type") or "message"
    found = {**item, "type": kind}
    if not found.get("id"):
        found["id"] = f"{'msg' if kind == 'message' else 'item'}_{response_id.removeprefix('resp_')}_in{index}"
    if kind == "message" and isinstance(item.get("content"), str):
        part = "output_text" if item.get("role") == "assistant" else "input_text"
        found["content"] = [{"type": part, "text": item["content"]}]
    if kind in ("message", "function_call"):
        found.setdefault("status", "completed")
    return found


def _run_of(request: Request) -> BackgroundRun | None:
    run = kept_of(request).running.get(request.path_params["response_id"])
    return run if run is not None and run.draft.row.tenant == tenant_of(request) else None


async def _row(request: Request) -> StoredResponse | None:
    """The stored response that the path names, if the tenant has it."""
    store = kept_of(request).store
    return None if store is None else await store.get(tenant_of(request), str(request.path_params["response_id"]))


async def _whole(request: Request, row: StoredResponse | None, response_id: str) -> dict[str, Any]:
    """The response object of a row. Raises ``NoResponse`` where there is none."""
    found = _found(row, response_id)
    return await state_of(request).service.texts.in_thread(len(found.body), lambda: response_of(found))


def _found(row: StoredResponse | None, response_id: str) -> StoredResponse:
    if row is None:
        _missing(response_id)
    return row


def _missing(response_id: str) -> NoReturn:
    raise NoResponse(f"Response with id '{response_id[:80]}' not found.")


def _note_query(request: Request, *names: str) -> None:
    """Lists those of the parameters ``names``, which have no effect, that the request has; a list's end in ``[]``."""
    given = {name.removesuffix("[]") for name in request.query_params}
    note_ignored(request, [name for name in names if name in given])


def _number(request: Request, name: str, default: int) -> int:
    given = request.query_params.get(name)
    if given is None:
        return default
    if not (given.isascii() and given.isdigit() and len(given) < 10):
        raise InvalidRequest(f"{name} is {given[:40]!r}, which is not a number.", param=name)
    return int(given)


def _flag(request: Request, name: str) -> bool:
    given = request.query_params.get(name, "false").lower()
    if given not in ("true", "false"):
        raise InvalidRequest(f"{name} is {given[:40]!r}; use true or false.", param=name)
    return given == "true"
