"""The client that puts a load on a server. It shares the machine with the server it measures, so each request only
stores the lines that arrive with their times; they are parsed after the run.
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
from truffula.bench.measured import Measured, Stream

TIMEOUT_S = 1200.0


class Dialect(Protocol):
    """How a kind of server is asked for a streamed completion at ``path``, and what its frames mean."""

    @property
    def path(self) -> str: ...

    def body(self, prompt: list[int], max_tokens: int, adapter: str | None) -> dict[str, Any]:
        """The request's JSON body."""
        ...

    def read(self, frame: dict[str, Any], now: float, stream: Stream) -> None:
        """Add a frame that arrived at ``now`` to ``stream``."""
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
            stream.failure = str(frame["error"])[:300]
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


def closed_loop(target: Target, load: Load) -> Measured:
    """Each client sends its next request when its last one has ended."""

    def client(number: int) -> list[_Raw]:
        return [_exchange(target, load, number, request, time.monotonic()) for request in range(load.requests)]

    return _run(target, load.clients, client)


def open_loop(target: Target, load: Load, at: list[float]) -> Measured:
    """Request i of ``load.clients`` is sent ``at[i]`` seconds after the start, whether or not earlier ones ended."""
    begun = time.monotonic()

    def client(number: int) -> list[_Raw]:
        due = begun + at[number]
        time.sleep(max(0.0, due - time.monotonic()))
        return [_exchange(target, load, number, 0, due)]

    return _run(target, load.clients, client)


def _run(target: Target, clients: int, client: Callable[[int], list[_Raw]]) -> Measured:
    """All clients at the same time, each in a thread of its own."""
    begun = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        raws = [raw for made in pool.map(client, range(clients)) for raw in made]
    return Measured(time.monotonic() - begun, [raw.stream(target.dialect) for raw in raws])


@dataclass
class _Raw:
    """What arrived for one request: the status, and each line of the body with its time."""

    due: float
    sent: float
    status: int = 0
    lines: list[tuple[float, bytes]] = field(default_factory=list)
    failure: str | None = None

    def stream(self, dialect: Dialect) -> Stream:
        made = Stream(self.due, self.sent, failure=self.failure)
        if self.failure is None and self.status != 200:
            body = b" ".join(line for _, line in self.lines).decode(errors="replace")
            made.failure = f"status {self.status}: {body[:300]}"
        if made.failure is not None:
            return made
        for now, line in self.lines:
            if line.startswith(b"data: {"):
                dialect.read(json.loads(line[6:]), now, made)
        if made.failure is None and not made.output_tokens:
            made.failure = "The stream ended without a token count."
        return made


def _exchange(target: Target, load: Load, client: int, request: int, due: float) -> _Raw:
    body = target.dialect.body(load.prompt(client, request), load.max_tokens, load.adapter(client, request))
    content = json.dumps(body).encode()
    url = urlsplit(target.url)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.netloc, timeout=TIMEOUT_S)
    raw = _Raw(due, time.monotonic())
    try:
        connection.request(
            "POST", url.path.rstrip("/") + target.dialect.path, content, {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        raw.status = response.status
        while line := response.readline():
            if line.strip():
                raw.lines.append((time.monotonic(), line.strip()))
    except (OSError, http.client.HTTPException) as error:
        raw.failure = f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    return raw
