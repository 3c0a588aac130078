"""The load that ``truffula bench`` puts on a server or on ``LLM``, and what it measures.

Closed loop: each client sends its next request when the last one has ended. Prompts are random token ids that differ
from
their first token on, so nothing is answered from the prefix cache; the hit rate is measured and printed beside the
figures.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Load:
    """What is asked: ``clients`` x ``requests`` prompts of ``prompt_tokens`` ids, ``max_tokens`` greedy tokens each.

    Client c uses ``adapters[c % len(adapters)]`` (None is the base).
    """

    clients: int
    requests: int
    prompt_tokens: int
    max_tokens: int
    adapters: tuple[str | None, ...]
    vocab_size: int
    seed: int = 0

    def prompt(self, client: int, request: int) -> list[int]:
        rng = random.Random(f"{self.seed}/{client}/{request}")
        top = max(3, self.vocab_size - 1)
        return [rng.randrange(2, top) for _ in range(self.prompt_tokens)]

    def adapter(self, client: int) -> str | None:
        return self.adapters[client % len(self.adapters)] if self.adapters else None


@dataclass
class Measured:
    """Seconds and tokens of one run. ``itl`` holds every gap between two tokens of one stream."""

    wall_s: float = 0.0
    output_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """What is printed and written as JSON: rates in tokens per second, latencies in milliseconds."""
        return {
            "output_tok_s": round(self.output_tokens / self.wall_s, 2) if self.wall_s else 0.0,
            "wall_s": round(self.wall_s, 3),
            "output_tokens": self.output_tokens,
            "prompt_tokens": self.prompt_tokens,
            "prefix_hit_rate": round(self.cached_tokens / self.prompt_tokens, 4) if self.prompt_tokens else 0.0,
            "ttft_ms": _quantiles(self.ttft),
            "itl_ms": _quantiles(self.itl),
            "failures": len(self.failures),
        }


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    values = {"p50": statistics.median(ordered), "p99": p99, "max": ordered[-1]}
    return {name: round(1000 * value, 2) for name, value in values.items()}


async def closed_loop(url: str, load: Load, *, model: str = "", api_key: str | None = None) -> Measured:
    """Run ``load`` against ``url``'s ``/v1/completions`` as streams."""
    import httpx

    measured = Measured()
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=load.clients, max_keepalive_connections=load.clients)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=httpx.Timeout(600), limits=limits) as client:

        async def worker(number: int) -> None:
            for request in range(load.requests):
                await _one_stream(client, load, number, request, model, measured)

        begun = time.monotonic()
        await asyncio.gather(*(worker(number) for number in range(load.clients)))
        measured.wall_s = time.monotonic() - begun
    return measured


async def _one_stream(client: Any, load: Load, number: int, request: int, model: str, measured: Measured) -> None:
    body = {
        "model": load.adapter(number) or model,
        "prompt": load.prompt(number, request),
        "max_tokens": load.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = last = time.monotonic()
    first = True
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            measured.failures.append((await response.aread()).decode(errors="replace")[:300])
            return
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now = time.monotonic()
            chunk = json.loads(line[6:])
            if "error" in chunk:
                measured.failures.append(str(chunk["error"])[:300])
                return
            if chunk.get("usage"):
                _count(measured, chunk["usage"])
            elif chunk["choices"] and first:
                measured.ttft.append(now - sent)
                first, last = False, now
            elif chunk["choices"]:
                measured.itl.append(now - last)
                last = now


def _count(measured: Measured, usage: dict[str, Any]) -> None:
    measured.output_tokens += usage["completion_tokens"]
    measured.prompt_tokens += usage["prompt_tokens"]
    measured.cached_tokens += (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
