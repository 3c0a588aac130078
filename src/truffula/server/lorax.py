"""LoRAX's and TGI's routes: ``/``, ``/generate``, ``/generate_stream``, ``/invocations``.

Response objects have both spellings where LoRAX's and TGI's differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from truffula.errors import TruffulaError
from truffula.server.errors import error_body
from truffula.server.generating import stream, whole
from truffula.server.headers import reply_headers, stream_headers
from truffula.server.lorax_bodies import GenerateBody, Parameters
from truffula.server.openai import complete, finite
from truffula.server.openai_bodies import ChatBody, CompletionBody
from truffula.server.openai_chat import chat
from truffula.server.prepare import Read, read_requests
from truffula.server.replies import encoded, json_reply
from truffula.server.sse import frame
from truffula.types import ChoiceTotals, Completion, CompletionChoice, PromptPart, TextDelta, TokenPiece


async def compatible(request: Request) -> Response:
    """Continues a text. The answer is a list with one object, or events with `stream: true`."""
    return await _list_or_stream(request, await read_requests(request, "native"))


async def generate(request: Request) -> Response:
    """Continues a text. The answer is one object; `stream` has no effect."""
    return await _whole(request, await read_requests(request, "native_whole"), as_list=False)


async def generate_stream(request: Request) -> Response:
    """Continues a text. The answer is server-sent events, one for each token."""
    return await _stream(request, await read_requests(request, "native_stream"))


async def invocations(request: Request) -> Response:
    """For SageMaker: takes `inputs` as `/` does, `messages` as a chat, `prompt` as a completion."""
    read = await read_requests(request, "invocations")
    if isinstance(read.body, ChatBody):
        return await chat(request, read)
    if isinstance(read.body, CompletionBody):
        return await complete(request, read)
    return await _list_or_stream(request, read)


async def _list_or_stream(request: Request, read: Read) -> Response:
    return await _stream(request, read) if _body(read).stream else await _whole(request, read, as_list=True)


def _body(read: Read) -> GenerateBody:
    assert isinstance(read.body, GenerateBody)
    return read.body


async def _whole(request: Request, read: Read, *, as_list: bool) -> Response:
    body = _body(read)

    def answer(found: list[Completion]) -> Response:
        choice, *others = best_first(found[0].choices)
        prompt, params = found[0].prompt, body.params
        reply: dict[str, Any] = {"generated_text": body.shown_inputs + choice.text}
        if params.wants_details:
            reply["details"] = details(choice, prompt, params)
            for other in others:
                row = {"generated_text": body.shown_inputs + other.text, **details(other, prompt, params)}
                reply["details"].setdefault("best_of_sequences", []).append(encoded(row))
        headers = reply_headers(request, read, choice.totals.completion_tokens)
        return json_reply([reply] if as_list else reply, headers=headers)

    return await whole(request, read.requests, answer)


async def _stream(request: Request, read: Read) -> Response:
    return await stream(request, read.requests, NativeWriter(_body(read)), stream_headers(request, read))


def finish_reason(ended: TextDelta | CompletionChoice) -> str:
    """One of the three words clients know; the true reason, also on the last allowed token. Where a constraint ended
    the answer, as nothing may follow, TGI says ``eos_token``.
    """
    if ended.finish_reason == "length":
        return "length"
    return "eos_token" if ended.eos or ended.stop_reason is None else "stop_sequence"


def token(piece: TokenPiece, params: Parameters) -> dict[str, Any]:
    """One generated token. A logprob is always a finite number: clients reject null."""
    out: dict[str, Any] = {
        "id": piece.id,
        "text": piece.text,
        "logprob": finite(piece.logprob),
        "special": piece.special,
        "skipped": False,
    }
    if params.return_k_alternatives:
        out["alternative_tokens"] = _alternatives(piece, params.return_k_alternatives)
    return out


def _alternatives(piece: TokenPiece, count: int) -> list[dict[str, Any]]:
    return [{"id": top.id, "text": top.text, "logprob": finite(top.logprob)} for top in piece.top[:count]]


def top_tokens(piece: TokenPiece, count: int) -> list[dict[str, Any]]:
    """TGI's spelling of the alternatives."""
    return [{**alternative, "special": False} for alternative in _alternatives(piece, count)]


def prefill(prompt: PromptPart | None, params: Parameters) -> list[dict[str, Any]]:
    """The prompt's tokens; the first has no logprob. Empty unless asked for."""
    if prompt is None or not params.decoder_input_details:
        return []
    return [
        {"id": p.id, "text": p.text, "logprob": None if p.logprob is None else finite(p.logprob)} for p in prompt.tokens
    ]


def _summary(ended: CompletionChoice | TextDelta, totals: ChoiceTotals) -> dict[str, Any]:
    """What ``details`` of a whole answer and of a stream's last event share."""
    return {
        "finish_reason": finish_reason(ended),
        "prompt_tokens": totals.prompt_tokens,
        "input_length": totals.prompt_tokens,
        "generated_tokens": totals.completion_tokens,
        "skipped_tokens": 0,
        "seed": totals.seed,
    }


def details(choice: CompletionChoice, prompt: PromptPart | None, params: Parameters) -> dict[str, Any]:
    """``details`` of a whole answer."""
    out = _summary(choice, choice.totals)
    out["prefill"] = prefill(prompt, params)
    out["tokens"] = [token(piece, params) for piece in choice.tokens]
    if params.top_n_tokens:
        out["top_tokens"] = [top_tokens(piece, params.top_n_tokens) for piece in choice.tokens]
    return out


def best_first(choices: Sequence[CompletionChoice]) -> list[CompletionChoice]:
    """The winner of ``best_of`` in front: the highest mean logprob, the earlier of equals."""

    def loss(choice: CompletionChoice) -> float:
        mean = choice.totals.mean_logprob
        return math.inf if mean is None else -mean

    return sorted(choices, key=loss)


class NativeWriter:
    """One event a token, EOS included; the summary rides on the last. Never ``[DONE]``: clients would parse it."""

    def __init__(self, body: GenerateBody) -> None:
        self._body = body
        self._params = body.params
        self._text: list[str] = []
        self._count = 0

    def begin(self) -> bytes:
        return b""

    def delta(self, prompt: int, delta: TextDelta) -> bytes:
        self._text.append(delta.text)
        pieces = list(delta.tokens)
        if delta.finish_reason is not None and not pieces:
            pieces = [TokenPiece(0, "", None, special=True)]  # nothing was generated; clients still need an event
        last = len(pieces) - 1 if delta.finish_reason is not None else -1
        return b"".join(self._event(piece, delta if i == last else None) for i, piece in enumerate(pieces))

    def _event(self, piece: TokenPiece, last: TextDelta | None) -> bytes:
        self._count += 1
        event: dict[str, Any] = {
            "index": self._count,
            "token": token(piece, self._params),
            "generated_text": None,
            "details": None,
        }
        if self._params.top_n_tokens:
            event["top_tokens"] = top_tokens(piece, self._params.top_n_tokens)
        if last is not None:
            event["generated_text"] = self._body.shown_inputs + "".join(self._text)
            if self._params.wants_details:
                event["details"] = _summary(last, last.totals or ChoiceTotals())
        return frame(event)

    def fail(self, error: TruffulaError) -> bytes:
        return frame(error_body(error, "native"))

    def end(self) -> bytes:
        return b""
