"""``truffula bench join``: what running streams feel while new adapters are fetched, judged, mapped and used."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truffula.bench.load import Load
from truffula.bench.processes import end_children_on_sigterm
from truffula.bench.server import OwnServer, planned, random_adapters
from truffula.cli.output import out, table
from truffula.config import EngineConfig
from truffula.errors import ConfigError

PROMPT_TOKENS = 16
JOIN_TOKENS = 4


@dataclass
class Gaps:
    """Inter-token seconds of the running streams: before any join, and while adapters join."""

    quiet: list[float] = field(default_factory=list)
    joining: list[float] = field(default_factory=list)
    join_ttft: list[float] = field(default_factory=list)


def run_bench_join(config: EngineConfig, running: int, joins: int, rank: int, *, as_json: bool) -> None:
    end_children_on_sigterm()
    names = [f"join-{i:03d}" for i in range(joins)]
    with tempfile.TemporaryDirectory(prefix="truffula-bench-") as folder:
        plan = planned(config)
        random_adapters(plan, Path(folder), names, rank)
        load = Load(running + 1, 1, PROMPT_TOKENS, 0, (), plan.program.vocab_size, 7)
        length = min(4096, config.max_model_len or plan.max_model_len) - 2 * PROMPT_TOKENS
        with OwnServer(config, ["--adapter-dir", folder, "--log-level", "warning"]) as server:
            url = server.wait()
            try:
                gaps = asyncio.run(_measure(url, running, names, load, length))
            except ExceptionGroup as failed:  # of the streams; the first says it all
                raise failed.exceptions[0] from None
    report = _report(gaps, running, joins, rank)
    if as_json:
        out().print_json(json.dumps(report))
        return
    title = f"{running} base streams, {joins} adapters of rank {rank} join"
    shown = table("", ">median ms", ">p99 ms", ">largest ms", ">largest / median", title=title)
    for name in ("quiet", "joining"):
        row = report[name]
        shown.add_row(
            name,
            f"{row['median_ms']:.1f}",
            f"{row['p99_ms']:.1f}",
            f"{row['max_ms']:.1f}",
            f"{row['max_over_median']:.2f}",
        )
    out().print(shown)
    out().print(f"first token of a joining adapter: {report['join_ttft_ms']:.0f} ms (median)")


async def _measure(url: str, running: int, names: list[str], load: Load, length: int) -> Gaps:
    """Streams of ``length`` tokens run, one after another on each of ``running`` places, until all ``names`` joined."""
    import httpx

    gaps, joined = Gaps(), asyncio.Event()
    quiet_done = asyncio.Event()
    async with httpx.AsyncClient(base_url=url, timeout=600) as client, asyncio.TaskGroup() as group:

        async def stream(number: int) -> None:
            for turn in itertools.count():
                async for gap in _gaps(client, load.prompt(number, turn), "", length):
                    (gaps.joining if quiet_done.is_set() else gaps.quiet).append(gap)
                    if len(gaps.quiet) >= 40 * running:
                        quiet_done.set()
                    if joined.is_set() and gaps.joining:
                        return

        for number in range(running):
            group.create_task(stream(number))
        await quiet_done.wait()
        for name in names:
            begun = time.monotonic()
            async for _ in _gaps(client, load.prompt(running, 0), name, JOIN_TOKENS, gaps.join_ttft, begun):
                pass
        joined.set()
    return gaps


async def _gaps(
    client: Any, prompt: list[int], model: str, count: int, ttft: list[float] | None = None, begun: float = 0.0
) -> Any:
    """Seconds between the tokens of one stream; the time to the first goes to ``ttft``."""
    body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "stream": True}
    last = None
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise ConfigError(f"A request failed: {(await response.aread()).decode(errors='replace')[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now = time.monotonic()
            if last is not None:
                yield now - last
            elif ttft is not None:
                ttft.append(now - begun)
            last = now


def _report(gaps: Gaps, running: int, joins: int, rank: int) -> dict[str, Any]:
    report: dict[str, Any] = {"running": running, "joins": joins, "rank": rank}
    for name, values in (("quiet", gaps.quiet), ("joining", gaps.joining)):
        median = statistics.median(values)
        p99 = sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]
        report[name] = {
            "tokens": len(values),
            "median_ms": round(1000 * median, 2),
            "p99_ms": round(1000 * p99, 2),
            "max_ms": round(1000 * max(values), 2),
            "max_over_median": round(max(values) / median, 2),
        }
    report["join_ttft_ms"] = round(1000 * statistics.median(gaps.join_ttft), 1)
    return report
