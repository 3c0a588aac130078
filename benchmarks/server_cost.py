"""What HTTP costs: processor time of the server's own process per request, per streamed token and per refusal, and what
streams hold that wait.

    python benchmarks/server_cost.py           # a tiny random model, on one core or more
    python benchmarks/server_cost.py --smoke

The engine runs in a process of its own and is not counted, except for the memory of waiting streams: the growth of the
PSS of all processes. Figures are processor time, the least of several rounds: other load only adds to it, by as much as
half on cores that others use too. A figure per token holds for about one frame in a write: where the server is too slow
for the engine, frames are merged, which costs less. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from start import ask, cpu_of, server

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "server"))
from live_server import tokenizer, write_model

CHAT, NATIVE, STREAM = "/v1/chat/completions", "/generate", "/generate_stream"
PROMPT_TOKENS = 105
STREAMS = 16
# Large enough that a step takes longer than the server needs for its tokens, so that each is sent on its own.
SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}


def prompt_of(tokens: int) -> str:
    """A text of ``tokens`` tokens, BOS included."""
    words = "The Truffula trees were bright, and the Lorax spoke for them. " * tokens
    offsets = tokenizer().encode(words).offsets
    return words[: offsets[tokens - 1][1]]


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "ignore_eos": True, **more}


def native(text: str, **parameters: Any) -> dict[str, Any]:
    return {"inputs": text, "parameters": {"ignore_eos_token": True, **parameters}}


REFUSALS: Sequence[tuple[str, str, dict[str, Any], int]] = (
    ("400, value out of range", CHAT, chat("Hello", top_p=2), 400),
    ("400, wrong type", CHAT, chat("Hello", n="2"), 400),
    ("400, field of another server", CHAT, chat("Hello", n_predict=4), 400),
    ("404, unknown model", CHAT, chat("Hello", model="robin"), 404),
    ("422, native", NATIVE, native("Hello", temperature=-1), 422),
)


def raw_request(path: str, body: Mapping[str, Any]) -> bytes:
    payload = json.dumps(body).encode()
    lines = (f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json")
    return "\r\n".join((*lines, f"content-length: {len(payload)}", "", "")).encode() + payload


class Connection:
    """One connection that is kept open, and sends the same request again and again."""

    def __init__(self, port: int, request: bytes) -> None:
        self._port, self._request = port, request

    async def __aenter__(self) -> Connection:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._writer.close()

    def send(self) -> None:
        self._writer.write(self._request)

    async def answer(self, status: int) -> tuple[int, int]:
        """The number of frames and of writes of the answer, 0 where it is not streamed."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        assert head.startswith(f"http/1.1 {status}".encode()), head
        if b"transfer-encoding: chunked" not in head:
            length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await self._reader.readexactly(length)
            return 0, 0
        frames = writes = 0
        while size := int(await self._reader.readline(), 16):
            frames += (await self._reader.readexactly(size + 2)).count(b"data: {")
            writes += 1
        await self._reader.readexactly(2)
        return frames, writes


async def answers(port: int, request: bytes, count: int, connections: int, status: int = 200) -> float:
    """Send ``request`` ``count`` times on each of ``connections``; the mean number of frames of a write."""
    total: Counter[str] = Counter()

    async def one() -> None:
        async with Connection(port, request) as connection:
            for _ in range(count):
                connection.send()
                frames, writes = await connection.answer(status)
                total.update(frames=frames, writes=writes)

    await asyncio.gather(*(one() for _ in range(connections)))
    return total["frames"] / max(1, total["writes"])


def pss(process: psutil.Process) -> float:
    """MB of ``process`` and its children."""
    return sum(one.memory_full_info().pss for one in (process, *process.children(recursive=True))) / 2**20


async def waiting(port: int, request: bytes, count: int, look: Callable[[], float]) -> float:
    """What ``look`` returns while ``count`` streams are open and none of them gets a token."""
    streams = [Connection(port, request) for _ in range(count)]
    for one in streams:
        await one.__aenter__()
        one.send()
    await asyncio.sleep(3)
    found = look()
    for one in streams:
        await one.__aexit__()
    return found


def measure(process: psutil.Process, port: int, given: argparse.Namespace) -> None:
    text = prompt_of(PROMPT_TOKENS)

    def per(
        what: str, unit: str, request: bytes, count: int, connections: int, status: int = 200, units: int = 1
    ) -> float:
        """Microseconds per unit, of which an answer has ``units``."""
        asyncio.run(answers(port, request, 1, connections, status))  # not counted
        rounds = []
        for _ in range(given.rounds):
            cpu, merged = cpu_of(process, lambda: asyncio.run(answers(port, request, count, connections, status)))
            rounds.append((1e6 * cpu / (units * count * connections), merged))
        found, merged = min(rounds)
        print(f"{what:45s} {found:7.0f} us per {unit}", end=f" ({merged:.2f} frames in a write)" if merged else "")
        return found

    for path, body in ((CHAT, chat(text, max_tokens=1)), (NATIVE, native(text, max_new_tokens=1))):
        per(f"a request of {PROMPT_TOKENS} tokens, {path}", "request", raw_request(path, body), given.count, 8)
        print()
    length = given.tokens
    for path, body in (
        (CHAT, chat("Hello", max_tokens=length, stream=True)),
        (STREAM, native("Hello", max_new_tokens=length)),
    ):
        per(f"{STREAMS} streams, {path}", "token", raw_request(path, body), 1, STREAMS, units=length)
        print()
    for what, path, body, status in REFUSALS:
        found = per(what, "refusal", raw_request(path, body), given.count, 8, status)
        print(f" ({1e6 / max(found, 1e-3):.0f} a second on one core)")
    busy = raw_request(CHAT, chat("Hello", max_tokens=3000, stream=True))
    before = pss(process)
    during = asyncio.run(waiting(port, busy, given.streams, lambda: pss(process)))
    print(f"{f'{given.streams} streams that wait':45s} {during - before:7.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=50, help="requests on each of 8 connections in a round")
    parser.add_argument("--tokens", type=int, default=100, help="tokens of a stream")
    parser.add_argument("--streams", type=int, default=1000, help="streams that wait")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    if given.smoke:
        given.rounds, given.count, given.tokens, given.streams = 1, 2, 4, 4
    with tempfile.TemporaryDirectory() as folder:
        shape = {} if given.smoke else SHAPE
        write_model(Path(folder), max_position_embeddings=4096, **shape)
        options = ["--max-running", str(STREAMS), "--threads", "1", "--memory", "256MiB"]
        with server([folder, *options]) as (process, port):
            deadline = time.monotonic() + 120
            while ask(port, "/health") != 200:
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit("the server did not start")
                time.sleep(0.05)
            measure(process, port, given)


if __name__ == "__main__":
    main()
