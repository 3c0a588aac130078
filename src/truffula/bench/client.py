"""The load generator for a server.

It usually shares the machine with the server, so it only stores the received lines with their times during a run and
parses them afterwards.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from truffula.bench.load import Load
from truffula.bench.results import LoadResult, Stream

TIMEOUT_S = 1200.0


class Dialect(Protocol):
    """The API of a kind of server for streamed completions at ``path``."""

    @property
    def path(self) -> str: ...

    def body(self, prompt: list[int], max_tokens: int, adapter: str | None) -> dict[str, Any]:
        """The request's JSON body."""
        ...

    def read(self, frame: dict[str, Any], now: float, stream: Stream) -> None:
        """Add an event that arrived at ``now`` to ``stream``."""
        ...


@dataclass(frozen=True)
class OpenAI:
    """``/v1/completions`` with token ids; an adapter is a model name, ``model`` the base's."""

    model: str = ""
    path: str = "/v1/completions"

    def body(self, prompt: list[int], max_tokens: int, adapter: str | None) -> dict[str, Any]:
        return {
            "model": adapter or self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def read(self, frame: dict[str, Any], now: float, stream: Stream) -> None:
        if "error" in frame:
            stream.error = str(frame["error"])[:300]
        if frame.get("choices"):
            stream.tokens.append(now)
        if usage := frame.get("usage"):
            stream.output_tokens = usage["completion_tokens"]
            stream.prompt_tokens = usage["prompt_tokens"]
            stream.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


@dataclass(frozen=True)
class Target:
    """A server and its dialect."""

    url: str
    dialect: Dialect


def closed_loop(target: Target, load: Load) -> LoadResult:
    """Run ``load``: each client sends its next request when its last one has ended."""

    def client(number: int) -> list[_Response]:
        return [_exchange(target, load, number, request, time.monotonic()) for request in range(load.requests)]

    return _run(target, load.clients, client)


def open_loop(target: Target, load: Load, at: list[float]) -> LoadResult:
    """Run ``load``: request i is sent ``at[i]`` seconds after the start, whether or not earlier ones have ended."""
    begun = time.monotonic()

    def client(number: int) -> list[_Response]:
        due = begun + at[number]
        time.sleep(max(0.0, due - time.monotonic()))
        return [_exchange(target, load, number, 0, due)]

    return _run(target, load.clients, client)


def _run(target: Target, clients: int, client: Callable[[int], list[_Response]]) -> LoadResult:
    """Run all clients concurrently, each in its own thread."""
    begun = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        responses = [response for made in pool.map(client, range(clients)) for response in made]
    return LoadResult(time.monotonic() - begun, [response.stream(target.dialect) for response in responses])


@dataclass
class _Response:
    """The response to one request: its status, and each line of the body with its time."""

    due: float
    sent: float
    status: int = 0
    lines: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None

    def stream(self, dialect: Dialect) -> Stream:
        made = Stream(self.due, self.sent, error=self.error)
        if self.error is None and self.status != 200:
            body = b" ".join(line for _, line in self.lines).decode(errors="replace")
            made.error = f"status {self.status}: {body[:300]}"
        if made.error is not None:
            return made
        for now, line in self.lines:
            if line.startswith(b"data: {"):
                dialect.read(json.loads(line[6:]), now, made)
        if made.error is None and not made.output_tokens:
            made.error = "The stream ended without a token count."
        return made


def _exchange(target: Target, load: Load, client: int, request: int, due: float) -> _Response:
    body = target.dialect.body(load.prompt(client, request), load.max_tokens, load.adapter(client, request))
    content = json.dumps(body).encode()
    url = urlsplit(target.url)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.netloc, timeout=TIMEOUT_S)
    response = _Response(due, time.monotonic())
    try:
        connection.request(
            "POST", url.path.rstrip("/") + target.dialect.path, content, {"Content-Type": "application/json"}
        )
        http_response = connection.getresponse()
        response.status = http_response.status
        while line := http_response.readline():
            if line.strip():
                response.lines.append((time.monotonic(), line.strip()))
    except (OSError, http.client.HTTPException) as error:
        response.error = f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    return response
