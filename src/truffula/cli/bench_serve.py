"""``truffula bench serve``."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from truffula.cli.bench_load import Load, closed_loop
from truffula.cli.bench_server import OwnServer, config_fields, planned, random_adapters
from truffula.cli.output import err, out, table
from truffula.config import EngineConfig
from truffula.errors import ConfigError

# Ids below this exist in the vocabulary of any server whose model we don't know.
UNKNOWN_VOCABULARY = 1000
MIXES = ("none", "shared", "distinct")


@dataclass(frozen=True)
class ServeBench:
    clients: int
    requests: int
    adapters: str
    rank: int
    prompt_tokens: int
    max_tokens: int
    repeats: int
    against_llm: bool
    url: str | None

    def names(self) -> list[str]:
        """Names of the adapters the mix needs."""
        if self.adapters not in MIXES:
            raise ConfigError(
                f"--adapters is {self.adapters!r}; it must be one of {', '.join(MIXES)}.", param="adapters"
            )
        return [f"bench-{i:03d}" for i in range({"none": 0, "shared": 1, "distinct": self.clients}[self.adapters])]


def run_bench_serve(config: EngineConfig, bench: ServeBench, *, as_json: bool) -> None:
    names = bench.names()
    if bench.url:
        results = {"http": _http_runs(bench.url, bench, names, UNKNOWN_VOCABULARY)}
    else:
        results = _own_server(config, bench, names)
    report = {"bench": asdict(bench), "model": config.model, "machine": _machine(), **_medians(results)}
    if as_json:
        out().print_json(json.dumps(report))
        return
    _print(report, bench)


def _own_server(config: EngineConfig, bench: ServeBench, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory(prefix="truffula-bench-") as folder:
        plan = planned(config)
        made = random_adapters(plan, Path(folder), names, bench.rank)
        vocabulary = plan.program.vocab_size
        results: dict[str, list[dict[str, Any]]] = {"http": []}
        with OwnServer(config, ["--adapter-dir", folder, "--log-level", "warning"]) as server:
            url = server.wait()
            results["http"] = _http_runs(url, bench, names, vocabulary)
        if bench.against_llm:
            results["llm"] = _llm_runs(config, bench, {name: str(path) for name, path in made.items()}, vocabulary)
        return results


def _load(bench: ServeBench, names: list[str], vocab_size: int, seed: int) -> Load:
    return Load(bench.clients, bench.requests, bench.prompt_tokens, bench.max_tokens, tuple(names), vocab_size, seed)


def _http_runs(url: str, bench: ServeBench, names: list[str], vocab_size: int) -> list[dict[str, Any]]:
    runs = []
    for repeat in range(bench.repeats + 1):  # the first warms up: adapters are loaded, pages touched
        err().print(f"[dim]http run {repeat or 'warm-up'} ...[/]")
        measured = asyncio.run(closed_loop(url, _load(bench, names, vocab_size, repeat)))
        if measured.failures:
            raise ConfigError(f"{len(measured.failures)} requests failed; the first said: {measured.failures[0]}")
        runs.append(measured.summary())
    return runs[1:]


def _llm_runs(
    config: EngineConfig, bench: ServeBench, adapters: dict[str, str], vocab_size: int
) -> list[dict[str, Any]]:
    """The same load through ``LLM.generate``, in a process of its own so that both have the machine alone."""
    err().print("[dim]the same through LLM.generate ...[/]")
    job = {
        "config": config_fields(config),
        "adapters": adapters,
        "loads": [asdict(_load(bench, sorted(adapters), vocab_size, repeat)) for repeat in range(bench.repeats + 1)],
    }
    child = subprocess.run(
        [sys.executable, "-m", "truffula.cli.bench_offline"], input=json.dumps(job), capture_output=True, text=True
    )
    if child.returncode:
        raise ConfigError(f"LLM.generate failed in the benchmark:\n{child.stderr[-2000:]}")
    runs: list[dict[str, Any]] = json.loads(child.stdout.splitlines()[-1])
    return runs[1:]


def _medians(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    report: dict[str, Any] = {"runs": results}
    for way, runs in results.items():
        report[way] = min(runs, key=lambda run: abs(run["output_tok_s"] - _median(runs)))
        report[way]["output_tok_s_spread"] = [
            min(r["output_tok_s"] for r in runs),
            max(r["output_tok_s"] for r in runs),
        ]
    if "llm" in report:
        report["http_over_llm"] = round(report["http"]["output_tok_s"] / report["llm"]["output_tok_s"], 3)
    return report


def _median(runs: list[dict[str, Any]]) -> float:
    return float(statistics.median(run["output_tok_s"] for run in runs))


def _machine() -> str:
    from truffula.cli.doctor import cpu_name
    from truffula.engine.memory import usable_cpus

    name, sets = cpu_name()
    return f"{name}, {usable_cpus()} cores, {sets[0] if sets else 'unknown instruction set'}"


def _print(report: dict[str, Any], bench: ServeBench) -> None:
    title = (
        f"{bench.clients} clients, adapters {bench.adapters} (rank {bench.rank}), {bench.prompt_tokens} prompt tokens, "
        f"{bench.max_tokens} new: median of {bench.repeats}"
    )
    shown = table(
        "", ">output tok/s", ">spread", ">TTFT p50 ms", ">p99", ">ITL p50 ms", ">p99", ">prefix hits", title=title
    )
    for way in ("http", "llm"):
        if way in report:
            row = report[way]
            low, high = row["output_tok_s_spread"]
            ttft, itl = row["ttft_ms"], row["itl_ms"]
            shown.add_row(
                {"http": "HTTP", "llm": "LLM.generate"}[way], f"{row['output_tok_s']:.1f}", f"{low:.1f}-{high:.1f}",
                *(f"{d[q]:.1f}" if d else "-" for d in (ttft, itl) for q in ("p50", "p99")),
                f"{row['prefix_hit_rate']:.1%}",
            )  # fmt: skip
    out().print(shown)
    if "http_over_llm" in report:
        out().print(f"HTTP / LLM.generate: [bold]{report['http_over_llm']:.3f}[/]")
    out().print(f"[dim]{report['machine']}[/]")
