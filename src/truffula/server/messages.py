"""Anthropic's routes ``/v1/messages`` and ``/v1/messages/count_tokens``, and their answers."""

from __future__ import annotations

import base64
import hashlib
import uuid
from typing import Any

from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from truffula.errors import TruffulaError
from truffula.items import Item, Part, Reasoning, Refusal, Text, ToolCallPart, ToolResult
from truffula.server.errors import error_body
from truffula.server.generating import count_prompt, stream, whole
from truffula.server.messages_bodies import MessagesBody
from truffula.server.prepare import read_requests
from truffula.server.replies import Reply, encoded, json_reply
from truffula.server.sse import frame
from truffula.server.state import record_of, state_of
from truffula.types import ChoiceTotals, Completion, CompletionChoice, TextDelta


async def messages(request: Request) -> Response:
    """Answers a conversation with its next message, in Anthropic's form."""
    read = await read_requests(request, "messages")
    body = read.body
    assert isinstance(body, MessagesBody)
    top = {
        "id": f"msg_{uuid.uuid4().hex[:24]}",
        "type": "message",
        "role": "assistant",
        "model": body.model or state_of(request).model_id,
    }
    if body.stream:
        return await stream(request, read.requests, MessagesWriter(request, body, top), keep_alive=PING)
    return await whole(request, read.requests, lambda found: message_reply(body, top, found[0]))


async def count_tokens(request: Request) -> Response:
    """Counts the tokens of a conversation's prompt."""
    read = await read_requests(request, "count_tokens")
    return json_reply({"input_tokens": await count_prompt(request, read.requests[0])})


def message_reply(body: MessagesBody, top: dict[str, Any], found: Completion) -> Reply:
    choice = found.choices[0]
    blocks = [block for item in choice.items if (block := _block(item, body.shows_thinking)) is not None]
    calls = any(block["type"] == "tool_use" for block in blocks)
    return json_reply(
        {
            **top,
            "content": [encoded(block) for block in blocks],
            **_ending(body, choice, calls),
            "usage": _usage(choice.totals),
        }
    )


def _block(item: Item, shows_thinking: bool) -> dict[str, Any] | None:
    """An item of an answer as a content block; None for text without characters."""
    if isinstance(item, Reasoning):
        thought = item.text if shows_thinking else ""
        return {"type": "thinking", "thinking": thought, "signature": _signature(_digest(item.text))}
    if isinstance(item, Text):
        return {"type": "text", "text": item.text} if item.text else None
    assert not isinstance(item, Refusal | ToolResult), "an answer has no such items"
    return {"type": "tool_use", "id": tool_use_id(item.id), "name": item.name, "input": _input(item.arguments)}


def tool_use_id(call_id: str) -> str:
    return f"toolu_{call_id.removeprefix('call_')}"


def _input(arguments: str) -> dict[str, Any]:
    """The arguments of a call; of one that max_tokens cut, what is there of them, as the client makes of a stream."""
    found = from_json(arguments, allow_partial=True) if arguments else {}
    return found if isinstance(found, dict) else {}


def _digest(text: str) -> hashlib.blake2b:
    return hashlib.blake2b(text.encode(), digest_size=24, person=b"truffula-think")


def _signature(digest: hashlib.blake2b) -> str:
    """What clients send back with the thinking. It is not checked: the history of a conversation is the client's."""
    return base64.b64encode(digest.digest()).decode()


def _ending(body: MessagesBody, ended: CompletionChoice | TextDelta, calls: bool) -> dict[str, Any]:
    """``stop_reason``, ``stop_sequence`` and ``stop_details``, which are about refusals."""
    reason, sequence = "end_turn", None
    if ended.finish_reason == "length":
        assert ended.totals is not None
        full = ended.totals.completion_tokens >= body.max_tokens
        reason = "max_tokens" if full else "model_context_window_exceeded"
    elif isinstance(ended.stop_reason, str):
        reason, sequence = "stop_sequence", ended.stop_reason
    elif calls:
        reason = "tool_use"
    return {"stop_reason": reason, "stop_sequence": sequence, "stop_details": None}


def _usage(totals: ChoiceTotals) -> dict[str, Any]:
    """In Anthropic's counts the whole prompt is the sum of the first three."""
    return {
        "input_tokens": totals.prompt_tokens - totals.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": totals.cached_tokens,
        "output_tokens": totals.completion_tokens,
        "output_tokens_details": {"thinking_tokens": totals.reasoning_tokens},
    }


def event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\n" + frame({"type": kind, **fields})


PING = event("ping")


class MessagesWriter:
    """The events of a streamed message. At most one content block is open; an answer without text has none."""

    def __init__(self, request: Request, body: MessagesBody, top: dict[str, Any]) -> None:
        self._body = body
        self._top = top
        self._record = record_of(request)  # it has the prompt tokens from the start
        self._index = -1
        self._open: tuple[type[Part], int] | None = None  # the kind of the open block, and the number of its call
        self._digest = _digest("")
        self._calls = False

    def begin(self) -> bytes:
        message = {**self._top, "content": [], "stop_reason": None, "stop_sequence": None, "stop_details": None}
        usage = _usage(ChoiceTotals(prompt_tokens=self._record.prompt_tokens))
        return event("message_start", message={**message, "usage": usage}) + PING

    def delta(self, prompt: int, delta: TextDelta) -> bytes:
        out = b"".join([self._part(part) for part in delta.parts])
        if delta.finish_reason is None:
            return out
        assert delta.totals is not None
        ending = _ending(self._body, delta, self._calls)
        return out + self._close() + event("message_delta", delta=ending, usage=_usage(delta.totals))

    def fail(self, error: TruffulaError) -> bytes:
        return b"event: error\n" + frame(error_body(error, "anthropic", self._record.request_id))

    def end(self) -> bytes:
        return event("message_stop")

    def _part(self, part: Part) -> bytes:
        key: tuple[type[Part], int]
        if isinstance(part, ToolCallPart):
            key, more = (ToolCallPart, part.index), {"type": "input_json_delta", "partial_json": part.arguments}
            shown = bool(part.arguments)
        elif isinstance(part, Reasoning):
            key, more = (Reasoning, 0), {"type": "thinking_delta", "thinking": part.text}
            shown = self._body.shows_thinking and bool(part.text)
        else:
            key, more = (Text, 0), {"type": "text_delta", "text": part.text}
            shown = bool(part.text)
            if not shown:
                return b""
        out = b"" if key == self._open else self._close() + self._start(key, part)
        if isinstance(part, Reasoning):
            self._digest.update(part.text.encode())
        return out + event("content_block_delta", index=self._index, delta=more) if shown else out

    def _start(self, key: tuple[type[Part], int], part: Part) -> bytes:
        self._index, self._open = self._index + 1, key
        block: dict[str, Any] = {"type": "text", "text": ""}
        if isinstance(part, Reasoning):
            block, self._digest = {"type": "thinking", "thinking": "", "signature": ""}, _digest("")
        elif isinstance(part, ToolCallPart):
            block = {"type": "tool_use", "id": tool_use_id(part.id), "name": part.name, "input": {}}
            self._calls = True
        return event("content_block_start", index=self._index, content_block=block)

    def _close(self) -> bytes:
        """The end of the open block, if there is one."""
        if self._open is None:
            return b""
        out = b""
        if self._open[0] is Reasoning:
            signature = {"type": "signature_delta", "signature": _signature(self._digest)}
            out = event("content_block_delta", index=self._index, delta=signature)
        self._open = None
        return out + event("content_block_stop", index=self._index)
