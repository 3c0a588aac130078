"""OpenAI's route ``/v1/completions``, and what its objects share with those of a chat (``openai_chat.py``)."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from truffula import __version__
from truffula.errors import TruffulaError
from truffula.server.errors import error_body
from truffula.server.generating import stream, whole
from truffula.server.headers import reply_headers
from truffula.server.openai_bodies import CompletionBody, OpenAIBody
from truffula.server.prepare import Read, read_requests
from truffula.server.replies import encoded, json_reply
from truffula.server.sse import DONE, encode, frame, frame_of
from truffula.server.state import record_of, state_of
from truffula.text.detokenizer import is_utf8
from truffula.types import Completion, CompletionChoice, PromptPart, TextDelta, TokenPiece, TopToken

LEAST_LOGPROB = -9999.0  # JSON has no infinity, and clients reject null here


def head(kind: str, prefix: str, body: OpenAIBody, request: Request) -> dict[str, Any]:
    """What all chunks of one answer share. ``model`` is the name asked for, the base's where none was."""
    state = state_of(request)
    return {
        "id": f"{prefix}-{secrets.token_hex(16)}",
        "object": kind,
        "created": int(time.time()),
        "model": body.model or state.model_id,
        "system_fingerprint": f"truffula-{__version__}-{state.service.info.dtype}",
    }


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int, reasoning_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def usage_of(completions: Sequence[Completion]) -> dict[str, Any]:
    """Each prompt counts once, every choice's tokens count."""
    return usage(
        sum(c.prompt_tokens for c in completions),
        sum(c.completion_tokens for c in completions),
        sum(c.cached_tokens for c in completions),
        sum(c.reasoning_tokens for c in completions),
    )


def stop_reason(ended: CompletionChoice | TextDelta) -> int | str | None:
    """vLLM's extra: the stop id or string that ended a choice, null for the model's own end token."""
    return None if ended.eos else ended.stop_reason


class OpenAIWriter:
    """What the streams of both routes share: each chunk's head, the usage, the end."""

    def __init__(self, request: Request, body: OpenAIBody, top: dict[str, Any]) -> None:
        self._top = top
        self._start = encode(top)[:-1] + b',"choices":['  # of each chunk
        self._include_usage = body.include_usage
        self._continuous_usage = body.continuous_usage
        self._record = record_of(request)  # it has the prompt tokens from the start
        self._cached: dict[int, int] = {}
        self._completion: dict[tuple[int, int], int] = {}
        self._reasoning = 0

    def begin(self) -> bytes:
        return b""

    def fail(self, error: TruffulaError) -> bytes:
        return frame(error_body(error, "openai")) + DONE

    def end(self) -> bytes:
        if not self._include_usage:
            return DONE
        return frame({**self._top, "choices": [], "usage": self._usage()}) + DONE

    def chunk(self, choice: dict[str, Any], **more: Any) -> bytes:
        if self._include_usage:
            more["usage"] = self._usage() if self._continuous_usage else None
        end = b"]," + encode(more)[1:] if more else b"]}"
        return frame_of(self._start + encode(choice) + end)

    def count(self, prompt: int, delta: TextDelta) -> None:
        """Add ``delta`` to the usage."""
        key = (prompt, delta.choice)
        if delta.totals is None:
            self._completion[key] = self._completion.get(key, 0) + len(delta.tokens)
            return
        self._completion[key] = delta.totals.completion_tokens
        self._cached[prompt] = delta.totals.cached_tokens
        self._reasoning += delta.totals.reasoning_tokens

    def _usage(self) -> dict[str, Any]:
        generated, cached = sum(self._completion.values()), sum(self._cached.values())
        return usage(self._record.prompt_tokens, generated, cached, self._reasoning)


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
                made = _completion_choice(body, i * (body.n or 1) + choice.index, choice, one.prompt, logprobs)
                if body.prompt_logprobs is not None:
                    made["prompt_logprobs"] = prompt_logprobs(one.prompt)
                choices.append(encoded(made))
        headers = reply_headers(request, read, sum(one.completion_tokens for one in found))
        return json_reply({**top, "choices": choices, "usage": usage_of(found)}, headers=headers)

    return await whole(request, read.requests, reply)


def _completion_choice(
    body: CompletionBody,
    index: int,
    found: CompletionChoice | TextDelta,
    prompt: PromptPart | None,
    logprobs: CompletionLogprobs | None,
) -> dict[str, Any]:
    """A choice, or the next part of one in a stream. ``prompt`` comes with the first.

    After an echoed prompt the end token has logprobs, too: lm-eval scores a text with ``max_tokens: 1`` and takes the
    last entry for that of the generated token.
    """
    given = prompt if body.echo else None
    answer = found.tokens if body.echo else reported(body, found.tokens)
    out: dict[str, Any] = {
        "index": index,
        "text": (given.text if given else "") + found.text,
        "logprobs": None if logprobs is None else logprobs.of([*(given.tokens if given else ()), *answer]),
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
        choice = _completion_choice(body, index, delta, delta.prompt, self._logprobs.get(index))
        silent = not (choice["text"] or shown(delta.tokens) or (body.echo and delta.prompt))
        if silent and delta.finish_reason is None and not body.return_token_ids:
            return b""
        return self.chunk(choice)


def finite(logprob: float | None) -> float:
    """A logprob as every client can read it."""
    return LEAST_LOGPROB if logprob is None or not logprob > LEAST_LOGPROB else logprob


def token_name(token: int, text: str, as_ids: bool) -> str:
    return f"token_id:{token}" if as_ids else text


def top_name(top: TopToken, as_ids: bool) -> str:
    """How an alternative is spelled: its text, or (as OpenAI does) its bytes where it is part of a character."""
    if as_ids or top.raw is None or is_utf8(top.raw):
        return token_name(top.id, top.text, as_ids)
    # printable ASCII as it is, but for the backslash
    return "bytes:" + "".join(chr(b) if 32 <= b < 127 and b != 92 else f"\\x{b:02x}" for b in top.raw)


class CompletionLogprobs:
    """``/v1/completions``' four lists. ``text_offset`` counts characters from the start of the choice's text."""

    def __init__(self, as_ids: bool) -> None:
        self._as_ids = as_ids
        self._offset = 0

    def of(self, pieces: Iterable[TokenPiece]) -> dict[str, Any]:
        """The lists of ``pieces``, which follow those of earlier calls. A first prompt token has no logprob."""
        tokens: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for piece in pieces:
            name = token_name(piece.id, piece.text, self._as_ids)
            tokens.append(name)
            offsets.append(self._offset)
            self._offset += len(piece.text) if piece.shown else 0
            logprobs.append(None if piece.logprob is None else finite(piece.logprob))
            if piece.logprob is None:
                tops.append(None)
                continue
            tops.append(self._tops(piece, name))
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _tops(self, piece: TokenPiece, name: str) -> dict[str, float]:
        """An entry per token, best first. The chosen one is called as in ``tokens``, and only so; another token that
        would be called the same, or as a likelier one, is named by its id.
        """
        top: dict[str, float] = {}
        for other in piece.top:
            key = name if other.id == piece.id else top_name(other, self._as_ids)
            if other.id != piece.id and (key == name or key in top):
                key = token_name(other.id, "", as_ids=True)
            top[key] = finite(other.logprob)
        top[name] = finite(piece.logprob)
        return top


def shown(pieces: Iterable[TokenPiece]) -> list[TokenPiece]:
    return [piece for piece in pieces if piece.shown]


def reported(body: OpenAIBody, pieces: Iterable[TokenPiece]) -> list[TokenPiece]:
    """The tokens whose logprobs are reported: those of the text, or as many as ids where ids are reported too."""
    return list(pieces) if body.return_token_ids else shown(pieces)


def prompt_logprobs(prompt: PromptPart | None) -> list[dict[str, Any] | None]:
    """vLLM's extra: per prompt token the chosen id and the most likely ones, by id; the first has none."""
    rows: list[dict[str, Any] | None] = []
    for piece in prompt.tokens if prompt is not None else ():
        if piece.logprob is None:
            rows.append(None)
            continue
        row: dict[str, Any] = {}
        for rank, top in enumerate(piece.top, 1):
            row[str(top.id)] = {"logprob": finite(top.logprob), "rank": rank, "decoded_token": top.text}
        row.setdefault(str(piece.id), {"logprob": finite(piece.logprob), "rank": None, "decoded_token": piece.text})
        rows.append(row)
    return rows


def prompt_ids(prompt: PromptPart | None) -> list[int]:
    return [] if prompt is None else [piece.id for piece in prompt.tokens]
