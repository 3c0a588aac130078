"""``ResponseWriter``: from an answer's deltas to the events of the Responses API and the response that they build."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from truffula.errors import TruffulaError
from truffula.items import Reasoning, Text, ToolCallPart
from truffula.server.openai import shown
from truffula.server.openai_chat import chat_logprobs
from truffula.server.responses_tools import CLIENT_TOOLS, ToolSet, custom_input
from truffula.server.sse import frame
from truffula.types import ChoiceTotals, TextDelta

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
_ERROR_CODES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("overloaded", "queue_timeout"), "rate_limit_exceeded"),
        **dict.fromkeys(("invalid_request", "template_error"), "invalid_prompt"),
        "prompt_too_long": "context_length_exceeded",  # not in OpenAI's list; Codex shortens its history then
    }
)


def error_object(error: TruffulaError) -> dict[str, Any]:
    """``error`` of a failed response."""
    return {"code": _ERROR_CODES.get(error.code, "server_error"), "message": error.message or error.code}


class ResponseWriter:
    """Events in OpenAI's order, numbered from 0. ``silent``: only the response is built, and all events are empty.

    ``output`` are the finished items. ``top`` is what the response object has beside them.
    """

    def __init__(self, top: Mapping[str, Any], tools: ToolSet, *, logprobs: bool, silent: bool) -> None:
        self._top, self._tools, self._logprobs, self._silent = top, tools, logprobs, silent
        self._number = 0
        self._item: _OpenMessage | _OpenCall | None = None
        self._held = ""  # white space that is a message only if text follows, or nothing at all
        self._scores: list[dict[str, Any]] = []
        self._totals: ChoiceTotals | None = None
        self.output: list[dict[str, Any]] = []
        self.status: Status = "in_progress"
        self.error: TruffulaError | None = None
        self.completed_at: int | None = None

    @property
    def ended(self) -> bool:
        return self.completed_at is not None

    def response(self) -> dict[str, Any]:
        """The response object as it is now."""
        cut = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        return {
            **self._top,
            "status": self.status,
            "completed_at": self.completed_at if self.status == "completed" else None,
            "error": None if self.error is None else error_object(self.error),
            "incomplete_details": cut,
            "output": self.output,
            "usage": None if self._totals is None else usage_of(self._totals),
        }

    def begin(self) -> bytes:
        created = self.event("response.created", response=self.response())
        self.status = "in_progress"
        return created + self.event("response.in_progress", response=self.response())

    def delta(self, prompt: int, delta: TextDelta) -> bytes:
        out = b""
        if self._logprobs:
            self._scores += chat_logprobs(shown(delta.tokens), as_ids=False)["content"]
        for part in delta.parts:
            if isinstance(part, ToolCallPart):
                out += self._call(part)
            elif part.text:
                out += self._text(part)
        if delta.finish_reason is not None:
            self._totals = delta.totals
            self.status = "incomplete" if delta.finish_reason == "length" else "completed"
            self.completed_at = int(time.time())
            out += self._finish()
        return out

    def _finish(self) -> bytes:
        out = b""
        if self._item is None and not self.output:
            out = self._open(lambda: _OpenMessage(self, reasoning=False)) + self._add(self._held)
        return out + self._close("incomplete" if self.status == "incomplete" else "completed")

    def fail(self, error: TruffulaError) -> bytes:
        out = self._close("incomplete")
        self.status, self.error, self.completed_at = "failed", error, int(time.time())
        return out + self.event("response.failed", response=self.response())

    def not_stored(self) -> None:
        """From now on, the response says that it is not stored."""
        self._top = {**self._top, "store": False}

    def end(self) -> bytes:
        return self.event(f"response.{self.status}", response=self.response())

    def cancel(self) -> None:
        """End the response without an event."""
        self._close("incomplete")
        self.status, self.completed_at = "cancelled", int(time.time())

    def event(self, kind: str, **fields: Any) -> bytes:
        """One event; ``event:`` names it, as its ``type`` does."""
        if self._silent:
            return b""
        number, self._number = self._number, self._number + 1
        return b"event: " + kind.encode() + b"\n" + frame({"type": kind, "sequence_number": number, **fields})

    def new_id(self, prefix: str) -> str:
        """The id of the next item, which tells the response that it is of."""
        return f"{prefix}_{str(self._top['id']).removeprefix('resp_')}_{len(self.output)}"

    def _text(self, part: Text | Reasoning) -> bytes:
        reasoning = isinstance(part, Reasoning)
        out, text = b"", part.text
        if not (isinstance(self._item, _OpenMessage) and self._item.reasoning == reasoning):
            if reasoning:
                self._held = ""
            elif not (self._held + text).strip():
                self._held += text
                return b""
            out = self._open(lambda: _OpenMessage(self, reasoning=reasoning))
            text, self._held = self._held + text, ""
        return out + self._add(text)

    def _add(self, text: str) -> bytes:
        assert isinstance(self._item, _OpenMessage)
        scores, self._scores = ([] if self._item.reasoning else self._scores), []
        return self._item.add(text, scores)

    def _call(self, part: ToolCallPart) -> bytes:
        out = b""
        if part.id or part.name:
            self._held = ""
            out = self._open(lambda: _OpenCall(self, part, self._tools))
        assert isinstance(self._item, _OpenCall), "a tool call begins with its name"
        return out + self._item.add(part.arguments)

    def _open(self, make: Callable[[], _OpenMessage | _OpenCall]) -> bytes:
        out = self._close("completed")
        self._item = make()  # now: its id and index follow the closed item's
        return out + self._item.open()

    def _close(self, status: str) -> bytes:
        item, self._item = self._item, None
        if item is None:
            return b""
        out, made = item.close(status)
        out += self.event("response.output_item.done", output_index=len(self.output), item=made)
        self.output.append(made)
        return out


class _OpenMessage:
    """A message, or the reasoning before it, that is being written."""

    def __init__(self, writer: ResponseWriter, *, reasoning: bool) -> None:
        self.reasoning = reasoning
        self._writer = writer
        self._pieces: list[str] = []
        self._scores: list[dict[str, Any]] = []
        self._id = writer.new_id("rs" if reasoning else "msg")
        self._index = len(writer.output)
        self._name = "response.reasoning_text" if reasoning else "response.output_text"

    def _made(self, content: Sequence[dict[str, Any]], status: str) -> dict[str, Any]:
        if self.reasoning:
            return {"id": self._id, "type": "reasoning", "summary": [], "content": content, "status": status}
        return {"id": self._id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self, text: str) -> dict[str, Any]:
        if self.reasoning:
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._scores}

    def _event(self, kind: str, **fields: Any) -> bytes:
        place = {"item_id": self._id, "output_index": self._index, "content_index": 0}
        return self._writer.event(kind, **place, **fields)

    def open(self) -> bytes:
        added = self._writer.event(
            "response.output_item.added", output_index=self._index, item=self._made([], "in_progress")
        )
        return added + self._event("response.content_part.added", part=self._part(""))

    def add(self, text: str, scores: list[dict[str, Any]]) -> bytes:
        self._pieces.append(text)
        self._scores = self._scores + scores
        return self._event(f"{self._name}.delta", delta=text, **self._logprobs(scores)) if text else b""

    def close(self, status: str) -> tuple[bytes, dict[str, Any]]:
        text = "".join(self._pieces)
        out = self._event(f"{self._name}.done", text=text, **self._logprobs(self._scores))
        out += self._event("response.content_part.done", part=self._part(text))
        return out, self._made([self._part(text)], status)

    def _logprobs(self, scores: list[dict[str, Any]]) -> dict[str, Any]:
        return {} if self.reasoning else {"logprobs": scores}


class _OpenCall:
    """A call of a tool that is being written. Only a function's arguments are sent as they come."""

    def __init__(self, writer: ResponseWriter, part: ToolCallPart, tools: ToolSet) -> None:
        self._writer, self._tools, self._name = writer, tools, part.name
        kind = tools.kinds.get(part.name, "function")
        self._kind = kind if kind == "custom" or kind in CLIENT_TOOLS else "function"
        self._ids = {"id": writer.new_id("ctc" if kind == "custom" else "fc"), "call_id": part.id}
        self._index = len(writer.output)
        self._pieces: list[str] = []

    def _event(self, kind: str, **fields: Any) -> bytes:
        return self._writer.event(kind, item_id=self._ids["id"], output_index=self._index, **fields)

    def _made(self, arguments: str, status: str) -> dict[str, Any]:
        return self._tools.call_item(self._name, arguments, {**self._ids, "status": status})

    def open(self) -> bytes:
        if self._kind in CLIENT_TOOLS:  # its item begins with the arguments
            return b""
        return self._added("")

    def _added(self, arguments: str) -> bytes:
        item = self._made(arguments, "in_progress")
        return self._writer.event("response.output_item.added", output_index=self._index, item=item)

    def add(self, arguments: str) -> bytes:
        self._pieces.append(arguments)
        if self._kind != "function" or not arguments:
            return b""
        return self._event("response.function_call_arguments.delta", delta=arguments)

    def close(self, status: str) -> tuple[bytes, dict[str, Any]]:
        arguments = "".join(self._pieces)
        if self._kind == "function":
            out = self._event("response.function_call_arguments.done", arguments=arguments)
        elif self._kind == "custom":
            text = custom_input(arguments)
            out = self._event("response.custom_tool_call_input.delta", delta=text)
            out += self._event("response.custom_tool_call_input.done", input=text)
        else:
            out = self._added(arguments)
        return out, self._made(arguments, status)


def usage_of(totals: ChoiceTotals) -> dict[str, Any]:
    """Usage in the form of the Responses API."""
    return {
        "input_tokens": totals.prompt_tokens,
        "input_tokens_details": {"cached_tokens": totals.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": totals.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": totals.reasoning_tokens},
        "total_tokens": totals.prompt_tokens + totals.completion_tokens,
    }
