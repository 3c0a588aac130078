"""``POST /v1/completions``."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from truffula.server.generating import stream, whole
from truffula.server.headers import reply_headers
from truffula.server.openai_bodies import CompletionBody
from truffula.server.openai_parts import (
    CompletionLogprobs,
    OpenAIWriter,
    head,
    prompt_ids,
    prompt_logprobs,
    shown,
    stop_reason,
    usage_of,
)
from truffula.server.prepare import Read, read_requests
from truffula.server.replies import encoded, json_reply
from truffula.types import Completion, CompletionChoice, PromptPart, TextDelta


async def completions(request: Request) -> Response:
    """Continues a prompt, or several: text or token ids."""
    return await complete(request, await read_requests(request, "completion"))


async def complete(request: Request, read: Read) -> Response:
    body = read.body
    assert isinstance(body, CompletionBody)
    top = head("text_completion", "cmpl", body, request)
    if body.stream:
        return await stream(request, read.requests, CompletionWriter(request, body, top))

    def reply(found: list[Completion]) -> Response:
        choices = []
        for i, one in enumerate(found):
            for choice in one.choices:
                as_ids = bool(body.return_tokens_as_token_ids)
                logprobs = None if body.logprobs is None else CompletionLogprobs(as_ids)
                made = _choice(body, i * (body.n or 1) + choice.index, choice, one.prompt, logprobs)
                if body.prompt_logprobs is not None:
                    made["prompt_logprobs"] = prompt_logprobs(one.prompt)
                choices.append(encoded(made))
        headers = reply_headers(request, read, sum(one.completion_tokens for one in found))
        return json_reply({**top, "choices": choices, "usage": usage_of(found)}, headers=headers)

    return await whole(request, read.requests, reply)


def _choice(
    body: CompletionBody,
    index: int,
    found: CompletionChoice | TextDelta,
    prompt: PromptPart | None,
    logprobs: CompletionLogprobs | None,
) -> dict[str, Any]:
    """A choice, or the next part of one in a stream. ``prompt`` comes with the first."""
    given = prompt if body.echo else None
    out: dict[str, Any] = {
        "index": index,
        "text": (given.text if given else "") + found.text,
        "logprobs": None if logprobs is None else logprobs.of([*(given.tokens if given else ()), *shown(found.tokens)]),
        "finish_reason": found.finish_reason,
    }
    if found.finish_reason is not None:
        out["stop_reason"] = stop_reason(found)
    if body.return_token_ids:
        out["token_ids"] = [piece.id for piece in found.tokens]
        if prompt is not None:
            out["prompt_token_ids"] = prompt_ids(prompt)
    return out


class CompletionWriter(OpenAIWriter):
    """Chunks of a streamed completion; choices interleave and are identified by their index."""

    def __init__(self, request: Request, body: CompletionBody, top: dict[str, Any]) -> None:
        super().__init__(request, body, top)
        self._body = body
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def delta(self, prompt: int, delta: TextDelta) -> bytes:
        body, index = self._body, prompt * (self._body.n or 1) + delta.choice
        self.count(prompt, delta)
        if body.logprobs is not None and index not in self._logprobs:
            self._logprobs[index] = CompletionLogprobs(bool(body.return_tokens_as_token_ids))
        choice = _choice(body, index, delta, delta.prompt, self._logprobs.get(index))
        silent = not (choice["text"] or shown(delta.tokens) or (body.echo and delta.prompt))
        if silent and delta.finish_reason is None and not body.return_token_ids:
            return b""
        return self.chunk(choice)
