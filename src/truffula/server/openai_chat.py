"""OpenAI's route ``/v1/chat/completions`` and its response objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from truffula.items import Item, Part, Reasoning, Text, ToolCall, ToolCallPart
from truffula.server.generating import stream, whole
from truffula.server.openai import (
    OpenAIWriter,
    finite,
    head,
    prompt_ids,
    prompt_logprobs,
    reported,
    stop_reason,
    token_name,
    top_name,
    usage_of,
)
from truffula.server.openai_bodies import ChatBody
from truffula.server.prepare import Read, read_requests
from truffula.server.replies import encoded, json_reply
from truffula.server.sse import encode, frame_of
from truffula.types import Completion, CompletionChoice, TextDelta, TokenPiece

TGI = "tgi"
"""The model that text-generation's client always names, and by which its dialect of deltas is known."""


async def chat_completions(request: Request) -> Response:
    """Answers a conversation with its next message: text, reasoning, calls of tools."""
    return await chat(request, await read_requests(request, "chat"))


async def chat(request: Request, read: Read) -> Response:
    body = read.body
    assert isinstance(body, ChatBody)
    if body.stream:
        return await stream(request, read.requests, ChatWriter(request, body))
    reply = head("chat.completion", "chatcmpl", body, request)
    return await whole(request, read.requests, lambda found: _reply(body, reply, found[0]))


def _reply(body: ChatBody, reply: dict[str, Any], found: Completion) -> Response:
    reply["choices"] = [encoded(_choice(body, choice)) for choice in found.choices]
    reply["usage"] = usage_of([found])
    if body.prompt_logprobs is not None:
        reply["prompt_logprobs"] = encoded(prompt_logprobs(found.prompt))
    if body.return_token_ids:
        reply["prompt_token_ids"] = prompt_ids(found.prompt)
    return json_reply(reply)


def _choice(body: ChatBody, choice: CompletionChoice) -> dict[str, Any]:
    calls = [
        {"id": item.id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
        for item in choice.items
        if isinstance(item, ToolCall)
    ]
    return {
        "index": choice.index,
        "message": {
            "role": "assistant",
            "content": choice.text or (None if calls else ""),
            "refusal": None,
            **_reasoning(body, choice.items),
            **({"tool_calls": calls} if calls else {}),
        },
        **_tokens(body, choice.tokens),
        "finish_reason": _finish_reason(choice, bool(calls)),
        "stop_reason": stop_reason(choice),
    }


def _finish_reason(ended: CompletionChoice | TextDelta, calls: bool) -> str | None:
    return "tool_calls" if calls and ended.finish_reason == "stop" else ended.finish_reason


def _reasoning(body: ChatBody, items: Iterable[Item | Part]) -> dict[str, str]:
    """The reasoning, under the names that DeepSeek's API and vLLM's have for it; nothing where there is none."""
    text = "".join([item.text for item in items if isinstance(item, Reasoning)])
    return {"reasoning_content": text, "reasoning": text} if text and body.include_reasoning is not False else {}


def _tokens(body: ChatBody, tokens: Sequence[TokenPiece]) -> dict[str, Any]:
    """What a choice, or the next part of one, reports of its tokens."""
    as_ids = bool(body.return_tokens_as_token_ids)
    logprobs = chat_logprobs(reported(body, tokens), as_ids) if body.logprobs else None
    ids = {"token_ids": [piece.id for piece in tokens]} if body.return_token_ids else {}
    return {"logprobs": logprobs, **ids}


class ChatWriter(OpenAIWriter):
    """Chunks of a streamed chat.

    The role comes once per choice, and so do a call's id and name: accumulators concatenate strings. Only
    text-generation's client needs ``role`` and ``tool_calls`` in every delta, the latter as one object.
    """

    def __init__(self, request: Request, body: ChatBody) -> None:
        super().__init__(request, body, head("chat.completion.chunk", "chatcmpl", body, request))
        self._body = body
        self._calls: dict[tuple[int, int], str] = {}  # the id of each call, by choice and index
        special = (body.model == TGI, body.logprobs, body.return_token_ids, body.include_usage)
        # What stands around the text of a usual chunk; None where chunks have more than text.
        self._around = None if any(special) else (b',"delta":{"content":', b'},"logprobs":null,"finish_reason":null}]}')

    def begin(self) -> bytes:
        start = {"role": "assistant", "content": ""}
        return b"".join(self._choice_chunk({"index": i, "delta": start}) for i in range(self._body.n or 1))

    def delta(self, prompt: int, delta: TextDelta) -> bytes:
        body, parts = self._body, delta.parts
        self.count(prompt, delta)
        if self._around is not None and delta.finish_reason is None and len(parts) == 1 and type(parts[0]) is Text:
            before, after = self._around
            return frame_of(b'%b{"index":%d%b%b%b' % (self._start, delta.choice, before, encode(parts[0].text), after))
        out = b""
        calls = [part for part in delta.parts if isinstance(part, ToolCallPart)]
        for part in calls:
            self._calls.setdefault((delta.choice, part.index), part.id)
        content = self._content(delta, calls)
        if (
            content
            or (body.logprobs and reported(body, delta.tokens))
            or (body.return_token_ids and (delta.tokens or delta.prompt))
        ):
            choice = {"index": delta.choice, "delta": content or {"content": ""}, **_tokens(body, delta.tokens)}
            more = {"prompt_token_ids": prompt_ids(delta.prompt)} if body.return_token_ids and delta.prompt else {}
            out = self._choice_chunk(choice, **more)
        if body.model == TGI:
            out += b"".join(self._tgi_call(delta.choice, part) for part in calls)
        if delta.finish_reason is None:
            return out
        called = any(choice == delta.choice for choice, _ in self._calls)
        ended = {"finish_reason": _finish_reason(delta, called), "stop_reason": stop_reason(delta)}
        return out + self._choice_chunk({"index": delta.choice, "delta": {}, **ended})

    def _content(self, delta: TextDelta, calls: Sequence[ToolCallPart]) -> dict[str, Any]:
        """What ``delta`` adds to the message; one entry per call, since clients find a call by its place in a list."""
        content: dict[str, Any] = {"content": delta.text} if delta.text else {}
        content |= _reasoning(self._body, delta.parts)
        if self._body.model == TGI or not calls:
            return content
        entries: dict[int, dict[str, Any]] = {}
        for part in calls:
            entry = entries.setdefault(part.index, {"index": part.index, "function": {"arguments": ""}})
            if part.id:
                entry |= {"id": part.id, "type": "function"}
                entry["function"] = {"name": part.name, "arguments": ""}
            entry["function"]["arguments"] += part.arguments
        return {**content, "tool_calls": list(entries.values())}

    def _tgi_call(self, choice: int, part: ToolCallPart) -> bytes:
        function = {"name": part.name or None, "arguments": part.arguments}
        call_id = self._calls[choice, part.index]
        call = {"index": part.index, "id": call_id, "type": "function", "function": function}
        return self._choice_chunk({"index": choice, "delta": {"tool_calls": call}})

    def _choice_chunk(self, choice: dict[str, Any], **more: Any) -> bytes:
        if self._body.model == TGI:
            choice["delta"] = {"role": "assistant", "content": "", "tool_calls": None} | choice["delta"]
        choice.setdefault("logprobs", None)
        choice.setdefault("finish_reason", None)
        return self.chunk(choice, **more)


def chat_logprobs(pieces: Iterable[TokenPiece], as_ids: bool) -> dict[str, Any]:
    """``logprobs`` of a chat: one entry per token, those of reasoning and calls too."""
    content = []
    for piece in pieces:
        name = token_name(piece.id, piece.text, as_ids)
        entry = _logprob(name, piece.logprob, piece.raw)
        entry["top_logprobs"] = [
            _logprob(name, top.logprob, piece.raw)
            if top.id == piece.id
            else _logprob(top_name(top, as_ids), top.logprob, top.raw)
            for top in piece.top
        ]
        content.append(entry)
    return {"content": content, "refusal": None}


def _logprob(name: str, logprob: float | None, raw: bytes | None) -> dict[str, Any]:
    """``bytes`` are the token's own: a client joins the parts of a character. Null where they are not known."""
    return {"token": name, "logprob": finite(logprob), "bytes": None if raw is None else list(raw)}
