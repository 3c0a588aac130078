"""A client that puts a load on a server and does little else.

It shares the machine with what it measures, so it only writes down what arrives and when; frames are read as JSON after
the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from truffula.bench.dialects import Dialect
from truffula.bench.load import Load
from truffula.bench.measured import Measured, Stream

TIMEOUT_S = 1200.0
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Target:
    """A server and its dialect."""

    url: str
    dialect: Dialect
    api_key: str | None = None


async def closed_loop(target: Target, load: Load) -> Measured:
    """Each client sends its next request when the last one has ended."""
    raws: list[_Raw] = []

    async def worker(number: int) -> None:
        for request in range(load.requests):
            raws.append(raw := _Raw(time.monotonic()))
            await _exchange(target, load, number, request, raw)

    begun = time.monotonic()
    await asyncio.gather(*(worker(number) for number in range(load.clients)))
    return Measured(time.monotonic() - begun, [raw.stream(target.dialect) for raw in raws])


async def open_loop(target: Target, load: Load, at: list[float]) -> Measured:
    """Request i of ``load.clients`` is sent ``at[i]`` seconds after the start, however many are still running."""
    raws: list[_Raw] = []
    begun = time.monotonic()

    async def one(number: int) -> None:
        raws.append(raw := _Raw(begun + at[number]))
        await asyncio.sleep(begun + at[number] - time.monotonic())
        await _exchange(target, load, number, 0, raw)

    await asyncio.gather(*(one(number) for number in range(load.clients)))
    return Measured(time.monotonic() - begun, [raw.stream(target.dialect) for raw in raws])


@dataclass
class _Raw:
    """What came over the wire for one request: lines of an event stream with their times, or a refusal's body."""

    due: float
    sent: float = 0.0
    status: int = 0
    lines: list[tuple[float, bytes]] = field(default_factory=list)
    failure: str | None = None

    def stream(self, dialect: Dialect) -> Stream:
        made = Stream(self.due, self.sent or self.due, failure=self.failure)
        if self.failure is None and self.status != 200:
            said = b" ".join(line for _, line in self.lines).decode(errors="replace")
            made.failure = f"status {self.status}: {said[:300]}"
        if made.failure is not None:
            return made
        for now, line in self.lines:
            if line.startswith(b"data: {"):
                dialect.read(json.loads(line[6:]), now, made)
        if made.failure is None and not made.output_tokens:
            made.failure = "The stream ended without a token count."
        return made


async def _exchange(target: Target, load: Load, client: int, request: int, raw: _Raw) -> None:
    prompt = load.prompt(client, request)
    body = target.dialect.body(prompt, load.max_tokens, load.adapter(client, request))
    head = _request(target, json.dumps(body).encode())
    writer = None
    raw.sent = time.monotonic()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await _connect(target.url)
            writer.write(head)
            await _read(reader, raw)
    except (OSError, EOFError, TimeoutError, ValueError) as error:
        raw.failure = f"{type(error).__name__}: {error}"
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    secure = ssl.create_default_context() if parts.scheme == "https" else None
    port = parts.port or (443 if secure else 80)
    return await asyncio.open_connection(parts.hostname, port, ssl=secure)


def _request(target: Target, body: bytes) -> bytes:
    parts = urlsplit(target.url)
    lines = [
        f"POST {parts.path.rstrip('/')}{target.dialect.path} HTTP/1.1",
        f"Host: {parts.netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    if target.api_key:
        lines.append(f"Authorization: Bearer {target.api_key}")
    return "\r\n".join([*lines, "", ""]).encode() + body


async def _read(reader: asyncio.StreamReader, raw: _Raw) -> None:
    """Status, headers, then the body's lines as they arrive; raises ValueError of what is no HTTP/1.1."""
    raw.status, headers = _head(await reader.readuntil(b"\r\n\r\n"))
    chunks = Dechunker() if headers.get("transfer-encoding", "").lower() == "chunked" else None
    rest = b""
    while data := await reader.read(_CHUNK):
        now = time.monotonic()
        rest += b"".join(chunks.feed(data)) if chunks else data
        *lines, rest = rest.split(b"\n")
        raw.lines += [(now, line.rstrip(b"\r")) for line in lines if line.strip()]
    if rest.strip():
        raw.lines.append((time.monotonic(), rest))
    if chunks is not None and not chunks.ended:
        raise ValueError("the connection was closed in the middle of the answer")


def _head(data: bytes) -> tuple[int, Mapping[str, str]]:
    first, *lines = data.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


class Dechunker:
    """HTTP/1.1's chunked coding, piece by piece."""

    def __init__(self) -> None:
        self._data = b""
        self._left: int | None = None
        self.ended = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The content that ``data`` completes. Raises ValueError of a malformed size."""
        self._data += data
        while not self.ended:
            if self._left is None:
                size, found, after = self._data.partition(b"\r\n")
                if not found:
                    return
                self._left, self._data = int(size.split(b";")[0], 16), after
                self.ended = self._left == 0
            elif self._left:
                taken, self._data = self._data[: self._left], self._data[self._left :]
                self._left -= len(taken)
                if not taken:
                    return
                yield taken
            elif len(self._data) < 2:
                return
            else:  # the line end behind a chunk
                self._data, self._left = self._data[2:], None
