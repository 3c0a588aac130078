"""How loading adapters delays running streams: the largest against the median time between two tokens.

python benchmarks/join.py smollm2 [--running 4] [--joins 6] [--rank 64]
python benchmarks/join.py --smoke              # a tiny random model
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from truffula.bench.load import Load
from truffula.bench.server import TruffulaServer, end_children_on_sigterm, plan_of, random_adapters
from truffula.cli.output import out, table
from truffula.config import EngineConfig
from truffula.errors import ConfigError
from truffula.testing.tiny import write_tiny_checkpoint

PROMPT_TOKENS = 16
JOIN_TOKENS = 4


@dataclass
class Gaps:
    """Inter-token seconds of the running streams: before any join, and while adapters join."""

    quiet: list[float] = field(default_factory=list)
    joining: list[float] = field(default_factory=list)
    join_ttft: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--running", type=int, default=4, help="base streams that run while adapters join")
    parser.add_argument("--joins", type=int, default=6, help="new adapters that join, one after the other")
    parser.add_argument("--rank", type=int, default=64, help="rank of the random all-linear adapters")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="two joins on a tiny model")
    asked = parser.parse_args()
    end_children_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="truffula-bench-") as folder:
        model = asked.model
        if asked.smoke:
            model, asked.running, asked.joins, asked.rank = str(write_tiny_checkpoint(Path(folder, "tiny"))), 2, 2, 2
        gaps = run(EngineConfig(model=model), Path(folder, "adapters"), asked.running, asked.joins, asked.rank)
    report = _report(gaps, asked.running, asked.joins, asked.rank)
    if asked.json:
        out().print_json(json.dumps(report))
        return
    title = f"{asked.running} base streams, {asked.joins} adapters of rank {asked.rank} join"
    shown = table("", ">median ms", ">p99 ms", ">largest ms", ">largest / median", title=title)
    for name in ("quiet", "joining"):
        row = report[name]
        milliseconds = [f"{row[key]:.1f}" for key in ("median_ms", "p99_ms", "max_ms")]
        shown.add_row(name, *milliseconds, f"{row['max_over_median']:.2f}")
    out().print(shown)
    out().print(f"first token of a joining adapter: {report['join_ttft_ms']:.0f} ms (median)")


def run(config: EngineConfig, folder: Path, running: int, joins: int, rank: int) -> Gaps:
    names = [f"join-{i:03d}" for i in range(joins)]
    plan = plan_of(config)
    random_adapters(plan, folder, names, rank)
    load = Load(running + 1, 1, PROMPT_TOKENS, 0, (), plan.program.vocab_size, 7)
    length = min(4096, plan.max_model_len) - 2 * PROMPT_TOKENS
    with TruffulaServer(config, ["--adapter-dir", str(folder), "--log-level", "warning"]) as server:
        url = server.wait()
        try:
            return asyncio.run(_measure(url, running, names, load, length))
        except ExceptionGroup as failed:  # of the streams; the first one is enough
            raise failed.exceptions[0] from None


async def _measure(url: str, running: int, names: list[str], load: Load, length: int) -> Gaps:
    """Streams of ``length`` tokens run, one after another on each of ``running`` places, until all ``names`` joined."""
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


if __name__ == "__main__":
    main()
