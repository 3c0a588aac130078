"""The load that ``truffula bench`` puts on a server: which prompts, with which adapters, and when;
the client that sends it; and the statistics of the answers.

Prompts are random token ids that differ from their first token on, so they do not hit the prefix cache; the measured
hit rate is printed with the results. The seed determines everything. The client usually shares the machine with the
server, so it only stores the received lines with their times during a run and parses them afterwards.
"""

from __future__ import annotations

import http.client
import json
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any
from urllib.parse import urlsplit

KEPT_UP_S = 0.02
"""A load generator keeps up when 99 % of the requests are sent at most this many seconds late."""
TIMEOUT_S = 1200.0
MIXES = ("none", "shared", "distinct", "zipf")


@dataclass(frozen=True)
class Load:
    """The requests of a run: ``clients`` x ``requests`` prompts of ``prompt_tokens`` ids, ``max_tokens`` greedy tokens
    each.

    Client c uses ``adapters[c % len(adapters)]`` (None is the base). With ``zipf``, the exponent s, each request draws
    its adapter instead: the one of rank k with a probability in proportion to 1 / k**s.
    """

    clients: int
    requests: int
    prompt_tokens: int
    max_tokens: int
    adapters: tuple[str | None, ...]
    vocab_size: int
    seed: int = 0
    zipf: float | None = None

    def prompt(self, client: int, request: int) -> list[int]:
        rng = random.Random(f"{self.seed}/{client}/{request}")
        top = max(3, self.vocab_size - 1)
        return [rng.randrange(2, top) for _ in range(self.prompt_tokens)]

    def adapter(self, client: int, request: int = 0) -> str | None:
        if not self.adapters:
            return None
        if self.zipf is None:
            return self.adapters[client % len(self.adapters)]
        rng = random.Random(f"{self.seed}/adapter/{client}/{request}")
        return rng.choices(self.adapters, cum_weights=zipf_weights(len(self.adapters), self.zipf))[0]


def zipf_weights(count: int, exponent: float) -> list[float]:
    """Running sums of 1 / k**exponent for k = 1 .. count."""
    return list(accumulate(k**-exponent for k in range(1, count + 1)))


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds after the start at which ``count`` requests of a Poisson process of ``rate`` a second arrive, ascending.

    The first gap is random too, because the process does not start with an arrival.
    """
    rng = random.Random(f"{seed}/arrivals")
    return list(accumulate(rng.expovariate(rate) for _ in range(count)))


def used(load: Load) -> Sequence[str | None]:
    """The adapter of every request of ``load``, client after client."""
    return [load.adapter(c, r) for c in range(load.clients) for r in range(load.requests)]


@dataclass(frozen=True)
class OpenAI:
    """OpenAI's ``/v1/completions``; an adapter is a model name, ``model`` the base's.

    A subclass may use another API.
    """

    model: str = ""
    path: str = "/v1/completions"

    def body(self, prompt: list[int], max_tokens: int, adapter: str | None) -> dict[str, Any]:
        """The JSON body of a streamed completion of the ids of ``prompt``."""
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
        """Add an event that arrived at ``now`` to ``stream``."""
        if "error" in frame:
            stream.error = str(frame["error"])[:300]
        if frame.get("choices"):
            stream.tokens.append(now)
        if usage := frame.get("usage"):
            stream.output_tokens = usage["completion_tokens"]
            stream.prompt_tokens = usage["prompt_tokens"]
            stream.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def run_load(url: str, load: Load, dialect: OpenAI = OpenAI(), *, at: Sequence[float] | None = None) -> LoadResult:
    """Send ``load`` to the server at ``url``, each client in its own thread.

    A closed loop: each client sends its next request when its last one has ended. With ``at``, an open loop: each
    client sends its one request ``at[client]`` seconds after the start, whether or not earlier ones have ended.
    """
    begun = time.monotonic()

    def client(number: int) -> list[_Response]:
        if at is None:
            return [_exchange(url, dialect, load, number, i, time.monotonic()) for i in range(load.requests)]
        due = begun + at[number]
        time.sleep(max(0.0, due - time.monotonic()))
        return [_exchange(url, dialect, load, number, 0, due)]

    with ThreadPoolExecutor(load.clients) as pool:
        responses = [response for made in pool.map(client, range(load.clients)) for response in made]
    return LoadResult(time.monotonic() - begun, [response.stream(dialect) for response in responses])


@dataclass
class _Response:
    """The response to one request: its status, and each line of the body with its time."""

    due: float
    sent: float
    status: int = 0
    lines: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None

    def stream(self, dialect: OpenAI) -> Stream:
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


def _exchange(url: str, dialect: OpenAI, load: Load, client: int, request: int, due: float) -> _Response:
    body = dialect.body(load.prompt(client, request), load.max_tokens, load.adapter(client, request))
    content = json.dumps(body).encode()
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.netloc, timeout=TIMEOUT_S)
    response = _Response(due, time.monotonic())
    try:
        path = parts.path.rstrip("/") + dialect.path
        connection.request("POST", path, content, {"Content-Type": "application/json"})
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


@dataclass(frozen=True)
class Limits:
    """The limits of a good request: milliseconds to the first token, and average milliseconds between tokens."""

    ttft_ms: float = 2000.0
    itl_ms: float = 200.0


@dataclass
class Stream:
    """One request. Seconds on one clock: ``due`` when it should have been sent, ``sent`` when it was, ``tokens`` when
    each token arrived. The time to the first token counts from ``due``, so it includes delays of the generator.
    """

    due: float
    sent: float
    tokens: list[float] = field(default_factory=list)
    output_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.due

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.tokens, self.tokens[1:], strict=False)]

    def good(self, limits: Limits) -> bool:
        if self.error is not None or not self.tokens:
            return False
        mean_gap = statistics.fmean(self.gaps) if len(self.tokens) > 1 else 0.0
        return 1000 * self.ttft <= limits.ttft_ms and 1000 * mean_gap <= limits.itl_ms


@dataclass
class LoadResult:
    """The duration and the streams of one run."""

    wall_s: float = 0.0
    streams: list[Stream] = field(default_factory=list)

    @property
    def errors(self) -> list[str]:
        return [stream.error for stream in self.streams if stream.error is not None]

    @property
    def output_tokens(self) -> int:
        return sum(stream.output_tokens for stream in self.streams)

    def summary(self) -> dict[str, Any]:
        """The statistics that are printed, or written as JSON: tokens per second, latencies in milliseconds."""
        prompt = sum(stream.prompt_tokens for stream in self.streams)
        cached = sum(stream.cached_tokens for stream in self.streams)
        answered = [stream for stream in self.streams if stream.tokens]
        return {
            "output_tok_s": round(self.output_tokens / self.wall_s, 2) if self.wall_s else 0.0,
            "wall_s": round(self.wall_s, 3),
            "output_tokens": self.output_tokens,
            "prompt_tokens": prompt,
            "prefix_hit_rate": round(cached / prompt, 4) if prompt else 0.0,
            "ttft_ms": quantiles(stream.ttft for stream in answered),
            "itl_ms": quantiles(gap for stream in answered for gap in stream.gaps),
            "failures": len(self.errors),
        }

    def open_summary(self, rate: float, limits: Limits) -> dict[str, Any]:
        """``summary`` and the statistics of an open loop: goodput, and whether the generator kept up."""
        late = sorted(max(0.0, stream.sent - stream.due) for stream in self.streams)
        good = sum(stream.good(limits) for stream in self.streams)
        return {
            **self.summary(),
            "requests": len(self.streams),
            "rate": rate,
            "goodput_rps": round(good / self.wall_s, 3) if self.wall_s else 0.0,
            "good_requests": good,
            "sent_late_ms": quantiles(late),
            "kept_up": percentile(late, 0.99) <= KEPT_UP_S,
        }


def percentile(ordered: Sequence[float], share: float) -> float:
    """The ``share`` quantile of the ``ordered`` values."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def quantiles(seconds: Iterable[float]) -> dict[str, float]:
    """p50, p90, p99 and the maximum, in milliseconds; empty when there are no values."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    values = {"p50": statistics.median(ordered), "p90": percentile(ordered, 0.9), "p99": percentile(ordered, 0.99)}
    return {name: round(1000 * value, 2) for name, value in {**values, "max": ordered[-1]}.items()}
